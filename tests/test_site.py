"""The site: its pages are listed, what they claim has a test, and what is made from the code is all of it.

Building it, with warnings as errors, needs the extra `docs` and is `slow`.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys

import pytest

import vera_tools
from tests import ROOT
from vera_tools.errors import UsageError
from vera_tools.verifying.check_ids import CHECK_IDS
from vera_tools.verifying.findings import VERDICTS

DOCS = ROOT / "docs"
GENERATED = runpy.run_path(str(DOCS / "site/generated.py"))


def made(name):
    return GENERATED[name]()


def test_every_page_is_in_the_list():
    """docs/README.md is the way in on GitHub, and its lists are the site's contents."""
    lists = [DOCS / "README.md", DOCS / "decisions/README.md"]
    listed = [
        (path.parent / target).resolve()
        for path in lists
        for target in re.findall(r"^(?:-|\d+\.) \[.*?\]\(([^)#]+\.md)\)", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(listed) == len(set(listed))
    pages = {*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "fuzz/README.md"}
    pages |= {ROOT / "fixtures/README.md", ROOT / "fixtures/platforms/README.md"}
    assert set(listed) == pages - {lists[0]}
    contents = GENERATED["with_contents"](lists[0].read_text("utf-8"))
    assert contents.count("{toctree}") == len(re.findall("^## ", lists[0].read_text("utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", ["comparison.md", "guarantees.md"])
def test_the_tests_that_a_page_names_are_there(page):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (DOCS / page).read_text("utf-8"))
    assert len(named) > 15
    for path, name in named:
        assert not name or f"def {name}(" in (ROOT / path).read_text("utf-8"), f"{path}::{name}"


def test_each_row_of_the_comparison_is_backed():
    """By a test or a command in the list below its table, unless all that is said of vera-tools is that it does not."""
    text = (DOCS / "comparison.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| (?!vera-tools|---)([^|]+?) \|", text, re.MULTILINE)
    assert len(rows) > 20
    claimed = [name for name, said in rows if not re.match("no\\b", said)]
    shown = re.findall(r"^- (.+?): `(?:tests/\w|python benchmarks/)", text, re.MULTILINE)
    assert shown == claimed
    for script in re.findall(r"`python (benchmarks/\w+\.py)`", text):
        assert (ROOT / script).is_file()


def test_whatever_a_page_has_made_is_made():
    wanted = {
        name
        for path in DOCS.rglob("*.md")
        for name in re.findall(r"^<!-- site: (\w+) -->$", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(wanted) == 10
    assert all(made(name) for name in wanted)


def test_every_public_name_is_in_the_reference():
    assert set(re.findall(r":: vera_tools\.(\w+)$", made("python"), re.MULTILINE)) == (
        set(vera_tools.__all__) - {"__version__"}
    )


def test_every_check_leads_to_its_section():
    rows = re.findall(r"^\| \[`(\S+)`\]\(\.\./checks\.md#(\w+)\) \|", made("checks"), re.MULTILINE)
    assert [check for check, _ in rows] == list(CHECK_IDS)
    anchors = {re.sub(r"[^\w-]", "", line[3:].lower()) for line in (DOCS / "checks.md").read_text("utf-8").splitlines()}
    assert {anchor for _, anchor in rows} <= anchors


def test_exit_codes_are_those_of_errors_and_verdicts():
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", made("exit_codes"), re.MULTILINE))
    assert list(rows) == ["0", "1", "2", "3", "4", "5", "130", "141"]
    assert f"`{UsageError.__name__}`" in rows[str(UsageError.exit_code)]
    assert sum(row.count(f"`{verdict}`") for row in rows.values() for verdict in VERDICTS) == len(VERDICTS)
    assert "in this order: 4, 1, 5, 2, 3, 0" in made("exit_codes")


def test_every_schema_is_shown_with_its_members():
    text = made("schemas")
    for path in (ROOT / "schemas").glob("*.json"):
        document = json.loads(path.read_text("utf-8"))
        _, _, section = text.partition(f"\n## {path.name.removesuffix('.schema.json')}\n")
        section = section.partition("\n## ")[0] if section else text.partition("\n## ")[0]
        assert document["title"] in section
        assert all(f"| `{name}` |" in section for name in document.get("properties", {}))


def test_the_atlases_hold_what_is_known():
    releases, classes = made("torch_releases"), made("architectures")
    assert releases.count("### ") == 4
    first = releases.partition("### float64")[0]
    assert first.count("<tr><th>2.12</th>") == 1
    assert re.search(r"<tr><th>2\.1</th>.*separate \(read\)", first)  # Apple silicon, before its compiler fused
    assert not re.search(r"<tr><th>2\.2</th>.*macos", first)
    outcomes = json.loads((ROOT / "fixtures/sweep/outcomes.json").read_text("utf-8"))["classes"]
    assert classes.count("<tr><th>") == len(outcomes)
    letters = "".join(outcomes.values())
    for letter, word in ((".", "right"), ("r", "refused"), ("p", "off")):
        assert classes.count(f'<td class="{word}">') == letters.count(letter)
    assert '<td class="bad">' not in classes
    assert made("platforms").count("<details>") > 30


@pytest.mark.slow
def test_it_is_built_without_a_warning(tmp_path):
    """By the command that CONTRIBUTING.md names."""
    pytest.importorskip("sphinx", reason="needs the extra docs")
    (command,) = re.findall(
        r"^ +\.venv/bin/sphinx-build (.+) build/site", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M
    )
    arguments = [sys.executable, "-m", "sphinx", *command.split(), str(tmp_path / "site")]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    commands = (tmp_path / "site/docs/reference/commands.html").read_text("utf-8")
    assert "--require-loads" in commands
    assert "docs/README.html" in (tmp_path / "site/index.html").read_text("utf-8")
