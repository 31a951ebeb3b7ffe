"""Every ```console block of README and docs/ is run, in order, in a copy of the project's fixtures, and must be true.

A line that starts with "$ " is a command; the lines up to the next one are what it prints, on stdout and stderr. A line
"..." stands for any lines. What a document takes for granted is prepared by its comment "<!-- before: COMMAND -->".
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from vera_tools._version import __version__

DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "```console" in path.read_text("utf-8")
)


def steps(text: str) -> list[tuple[str, str]]:
    """(command, output) pairs of all console blocks."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            while command.endswith("\\"):
                more, _, output = output.partition("\n")
                command += "\n" + more
            found.append((command, output))
    return found


def pattern(output: str) -> str:
    """A regular expression for an expected output."""
    lines = [r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line) + r"\n" for line in output.splitlines()]
    return "".join(lines)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_console_blocks_are_true(document, tmp_path):
    place = tmp_path / "vera-tools"
    place.mkdir()
    shutil.copytree(ROOT / "fixtures", place / "fixtures")
    for name in ("examples", "benchmarks"):
        if (ROOT / name).exists():
            (place / name).symlink_to(ROOT / name)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "80"}
    text = (ROOT / document).read_text("utf-8")
    for command in re.findall(r"^<!-- before: (.*?) -->$", text, re.MULTILINE):
        subprocess.run(["bash", "-euc", command], cwd=place, env=environment, check=True)
    for command, expected in steps(text):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=place,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        assert re.fullmatch(pattern(expected), result.stdout), f"$ {command}\n{result.stdout}"


def test_commands_for_a_fresh_machine():
    """README's two commands make and use a virtual environment; .ci/run finds the second one."""
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert all("python3 -m venv .venv" in block for block in blocks[:2])
    assert "<!-- the test command -->\n```bash\n" in text
    assert ".venv/bin/pytest" in blocks[1]


def test_links_lead_somewhere():
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_limits_in_security_md_are_those_of_the_code():
    rows = re.findall(
        r"^\| .* \| ([\d,]+) \w+ \| `(.+)\.(\w+)` \|$", (ROOT / "SECURITY.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) == 12
    for number, module, name in rows:
        assert getattr(importlib.import_module(module), name) == int(number.replace(",", "")), name


def test_every_decision_is_in_the_list():
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"^(\d+)\. \[(.+)\]\((.+)\)$", (folder / "README.md").read_text("utf-8"), re.MULTILINE)
    assert [name for *_, name in listed] == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for number, title, name in listed:
        assert name.startswith(f"{int(number):04d}-")
        assert (folder / name).read_text("utf-8").startswith(f"# {number}. {title}\n")


def test_the_version_stands_in_one_place():
    """As RELEASE.md says: what cites, builds or installs vera-tools reads it there or does without."""
    names = ("pyproject.toml", "CITATION.cff", "README.md", "CONTRIBUTING.md", "RELEASE.md", "noxfile.py")
    for name in (*names, "Dockerfile", "action.yml", ".github/workflows/release.yml"):
        text = (ROOT / name).read_text("utf-8")
        assert not re.search(rf"(?<![\d.]){re.escape(__version__)}(?![\d.])", text), name
