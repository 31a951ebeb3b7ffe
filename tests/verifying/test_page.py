"""The page of a registry: all that is there is on it, it filters, and nothing that is named in it can break out."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest

import vera_tools
from tests.adapters import KEPT, SEED_ONLY
from tests.command import run_cli
from tests.markup import BROWSER, HOSTILE, Page, assert_inert, in_a_browser
from tests.verifying.registries import mixed
from vera_tools.errors import FormatError
from vera_tools.pages import Made
from vera_tools.verifying import page as pages
from vera_tools.verifying.report import Failed


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    adapters = [("good", KEPT), ("drift", KEPT), ("seeds", SEED_ONLY), ("cut", KEPT)]
    return mixed(tmp_path_factory.mktemp("registry"), adapters, drift="drift", cut="cut", other="other")


@pytest.fixture(scope="module")
def report(root):
    return vera_tools.verify(root, recursive=True, jobs=1)


def rows_of(text):
    return re.findall(r'<li class="s-[a-z]+" data-state="([a-z]+)".*?<span class="path">(.*?)</span>', text)


def test_every_checkpoint_is_a_row_and_the_worst_come_first(report, root):
    text = pages.render(report)
    assert [(state, path.rsplit("/")[-1]) for state, path in rows_of(text)] == [
        ("invalid", "cut"),
        ("drift", "drift"),
        ("unproven", "seeds"),
        ("reproducible", "good"),
        ("skipped", "other"),
    ]
    words = Page(text).text
    for checkpoint in report.checkpoints:
        assert (checkpoint.safety in words) == (checkpoint.exit_code() != 0)
        assert checkpoint.next_step is None or checkpoint.next_step.command in words
    assert "✗ 3 of 4 checkpoints are not good" in words
    assert "in 1 place: [1, 3]" in words
    assert re.search(r"skipped\s+1\s+✗ failed a check", words)
    good = next(one for one in report.checkpoints if one.verdict == "reproducible")
    pair = sum(4 * rows * columns for rows, columns in (match.shape for match in good.projections))
    assert f"strip saves {pair / 1000:.1f} kB" in words


def test_what_strip_saves_is_what_strip_saves(root, report, tmp_path):
    done = vera_tools.strip_projections(root / "good", tmp_path / "out")
    (good,) = (one for one in report.checkpoints if one.verdict == "reproducible")
    assert abs(pages._saves(good) - done.saved_bytes) < 1500  # the header grows by the record
    assert [pages._saves(one) for one in report.checkpoints if one != good] == [0, 0, 0]


def test_a_demand_is_part_of_the_page(root):
    gated = vera_tools.verify(root / "good", require_loads="peft>=0.21:float32:windows-x86_64", require="unproven")
    words = Page(pages.render(gated)).text
    assert ("✓ all 1 checkpoints are good" in words) == (gated.exit_code == 0)
    assert "Good is what is unproven or better" in words
    lost = replace(gated, failed=(Failed("hf://ann/gone", FormatError("it is gone")),), partial=True)
    words = Page(pages.render(lost)).text
    assert "it is gone" in words
    assert "interrupted: there are more" in words
    lost = replace(vera_tools.verify(root / "good"), failed=lost.failed)
    shown = re.findall(r'data-state="([a-z ]+)" data-good="(.)"', pages.render(lost))
    assert shown == [("not verified", "0"), ("reproducible", "1")]


def test_it_is_self_contained_and_nothing_named_in_it_breaks_out(report):
    hostile = replace(
        report,
        checkpoints=tuple(replace(one, path=HOSTILE, base=HOSTILE) for one in report.checkpoints),
        failed=(Failed(HOSTILE, FormatError(HOSTILE)),),
    )
    text = pages.render(hostile, made=Made("today", HOSTILE, HOSTILE))
    assert_inert(text)
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_the_command_writes_it_and_says_so_before_it_works_where_it_cannot(root, tmp_path):
    page = tmp_path / "registry.html"
    result = run_cli("verify", "-R", root, "--report", page, "--log", tmp_path / "log")
    assert result.returncode == 4
    assert len(rows_of(page.read_text("utf-8"))) == 5
    assert re.search(r"<footer>vera-tools [\d.]+: \d{4}-\d\d-\d\d \d\d:\d\d UTC, on ", page.read_text("utf-8"))
    again = tmp_path / "again.html"
    assert run_cli("summarize", tmp_path / "log", "--report", again).returncode == 4
    assert rows_of(again.read_text("utf-8")) == rows_of(page.read_text("utf-8"))
    result = run_cli("verify", "-R", root, "--report", tmp_path / "none" / "x.html", "--log", tmp_path / "new")
    assert result.returncode == 2
    assert not (tmp_path / "new").exists()


STEPS = [
    ("state", "problems"),
    ("state", "drift"),
    ("state", ""),
    ("path", "GOOD"),
    ("path", ""),
    ("peft", "none"),
    ("peft", ""),
    ("kind", "LORA"),
    ("kind", ""),
]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser here")
@pytest.mark.parametrize("size", ["1280,900", "500,900"])  # a window of chromium's is not narrower than that
def test_in_a_browser(report, tmp_path, size):
    """The filters do what they say, and no column is cut off."""
    assert in_a_browser(pages.render(report), STEPS, size=size, folder=tmp_path) == [3, 1, 5, 1, 5, 2, 5, 1, 5, True]
