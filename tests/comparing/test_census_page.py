"""The page of a census: all that is there is on it, it filters, and nothing that is named in it can break out."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import replace

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY
from tests.command import run_cli
from tests.markup import BROWSER, HOSTILE, Page, assert_inert, in_a_browser
from vera_tools.comparing import census_page
from vera_tools.errors import FormatError
from vera_tools.pages import Made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two copies, what one of them was stripped to, one of which nothing is recorded, and two that are none."""
    root = tmp_path_factory.mktemp("registry")
    for name in ("one", "two", "cut"):
        shutil.copytree(CHECKPOINTS / KEPT, root / name)
    (root / "cut" / "adapter_model.safetensors").write_bytes(b"")
    vera_tools.strip_projections(root / "one", root / "stripped")
    shutil.copytree(CHECKPOINTS / SEED_ONLY, root / "seeds")
    (root / "other").mkdir()
    (root / "other" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return root


@pytest.fixture(scope="module")
def report(root):
    return vera_tools.census(root, recursive=True)


def rows_of(text):
    """Each row's attributes, by the last part of its path."""
    rows = re.findall(r'<li class="s-[a-z]+" (data-[^>]*)>.*?<span class="path">(.*?)</span>', text)
    return {path.rsplit("/")[-1]: dict(re.findall(r'data-([a-z]+)="([^"]*)"', said)) for said, path in rows}


def test_every_checkpoint_is_a_row(report, root):
    text = census_page.render(report)
    rows, words = rows_of(text), Page(text).text
    assert list(rows) == ["cut", "one", "seeds", "stripped", "two", "other"]
    pair, alone = "key 101, r 16, 64 x 64, float32", "a pair that no other has"
    facts = {name: tuple(map(row.get, ("state", "pair", "manifest", "copy", "good"))) for name, row in rows.items()}
    assert facts == {
        "cut": ("failed", None, None, None, "0"),
        "one": ("stored", pair, "no", "yes", "1"),
        "two": ("stored", pair, "no", "yes", "1"),
        "stripped": ("recorded", pair, "yes", "no", "1"),
        "seeds": ("unrecorded", alone, "no", "no", "1"),
        "other": ("skipped", None, None, None, "1"),
    }
    assert f"the same file as {root / 'two'}" in words
    assert words.count("the same file as") == 2
    total = report.summary
    assert f"{total['stripping_saves'] / 1000:.1f} kB saved by stripping, at most" in words
    assert f"strip saves up to {vera_tools.inspect(root / 'one').projection_bytes / 1000:.1f} kB" in words
    for number, what in ((4, "VeRA adapters"), (2, "distinct pairs"), (1, "copies of another's file")):
        assert f"{number} {what}" in words
    assert "✗ 1 cannot be read" in words
    assert str(report.failed[0][1]) in words
    assert "cannot be read" not in Page(census_page.render(replace(report, failed=()))).text


def test_many_copies_are_not_all_named(report):
    entry = report.checkpoints[0]
    paths = [f"r/{n}" for n in range(9)]
    many = replace(
        report, checkpoints=tuple(replace(entry, path=path) for path in paths), duplicates=(tuple(paths),), failed=()
    )
    assert "the same file as r/1, r/2, r/3 and 5 more" in Page(census_page.render(many)).text


def test_nothing_named_in_it_breaks_out(report):
    hostile = replace(
        report,
        checkpoints=tuple(replace(one, path=f"{HOSTILE}{n}", base=HOSTILE, dtype=HOSTILE)
                          for n, one in enumerate(report.checkpoints)),
        duplicates=((f"{HOSTILE}0", f"{HOSTILE}1"),),
        skipped=((HOSTILE, HOSTILE),),
        failed=((HOSTILE, FormatError(HOSTILE)),),
    )  # fmt: skip
    text = census_page.render(hostile, made=Made("today", HOSTILE, HOSTILE))
    assert_inert(text)


def test_ten_thousand_rows(report):
    entries = tuple(replace(report.checkpoints[n % 4], path=f"registry/{n:05}", prng_key=n % 10) for n in range(10_000))
    many = replace(report, checkpoints=entries, duplicates=())
    started = time.process_time()
    text = census_page.render(many)
    assert time.process_time() - started < 10  # a second where nothing else runs
    assert text.count("<li class=") == 10_000 + 2 + text[: text.index('class="rows"')].count("<li class=")
    assert len(text) < 10_000 * 1000


def test_the_command(root, tmp_path):
    page = tmp_path / "census.html"
    result = run_cli("inspect", "-R", root, "--report", page)
    assert result.returncode == 4
    assert len(rows_of(page.read_text("utf-8"))) == 6
    assert re.search(r"<footer>vera-tools [\d.]+: \d{4}-\d\d-\d\d \d\d:\d\d UTC, on ", page.read_text("utf-8"))
    assert run_cli("inspect", root / "one", root / "two", "-q", "--report", page).returncode == 0
    assert len(rows_of(page.read_text("utf-8"))) == 2
    alone = run_cli("inspect", root / "one", "--report", tmp_path / "none.html")
    assert (alone.returncode, "add -R" in alone.stderr) == (2, True)
    unwritable = run_cli("inspect", "-R", root, "--report", tmp_path / "none" / "x.html")
    assert (unwritable.returncode, unwritable.stdout) == (2, "")
    assert [path.name for path in tmp_path.iterdir()] == ["census.html"]
    weights = root / "one" / "adapter_model.safetensors"  # named in the place of the page
    content = weights.read_bytes()
    assert run_cli("inspect", "-R", root, "--report", weights).returncode == 2
    assert weights.read_bytes() == content


STEPS = [
    ("state", "problems"),
    ("state", "stored"),
    ("state", ""),
    ("manifest", "yes"),
    ("manifest", ""),
    ("pair", "key 101, r 16, 64 x 64, float32"),
    ("copy", "no"),
    ("copy", ""),
    ("pair", ""),
    ("path", "TWO"),
]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])  # a window of chromium's is not narrower than that
def test_in_a_browser(report, tmp_path, size):
    """The filters do what they say, and no column is cut off."""
    assert in_a_browser(census_page.render(report), STEPS, size=size, folder=tmp_path) == [
        1,
        2,
        6,
        1,
        6,
        3,
        1,
        3,
        6,
        1,
        True,
    ]
