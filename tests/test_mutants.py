"""The tool that changes code: each change is one, runs, and comes again with its seed; and tests that see it."""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys

import pytest

from tests import ROOT, mutants

SUBJECT = mutants.Subject(("merging/exact.py",), ("tests/merging/test_rounding.py",))
CODE = """\
LIMIT = 2

@property
def size(self, most=3):
    if (
        self.a <
        most
    ):
        return 1

    def inner():
        return (
            0
        )
    return inner
"""


@pytest.mark.slow
def test_every_change_is_one_and_can_be_run():
    pytest.importorskip("cosmic_ray")
    sample = mutants.drawn(SUBJECT, 1000, random.Random(0))
    plain = (ROOT / "vera_tools/merging/exact.py").read_text("utf-8")
    assert len({change.source for change in sample}) == len(sample) > 20
    for change in sample:
        compile(change.source, "exact.py", "exec")
        assert ast.dump(ast.parse(change.source)) != ast.dump(ast.parse(plain))
        where, *shown = str(change).splitlines()
        assert where == f"vera_tools/merging/exact.py:{change.line}"
        assert f"    -{plain.splitlines()[change.line - 1]}" in shown


@pytest.mark.slow
def test_a_sample_comes_again_with_its_seed():
    pytest.importorskip("cosmic_ray")
    one, two, other = (mutants.drawn(SUBJECT, 5, random.Random(seed)) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.slow
def test_what_changes_annotations_alone_or_is_no_python_is_not_drawn(tmp_path, monkeypatch):
    pytest.importorskip("cosmic_ray")
    (tmp_path / "vera_tools").mkdir()
    text = "def f(a: int | None, *, b: 2 = 3) -> A | B:\n    c: X | Y\n    return a\n"
    (tmp_path / "vera_tools" / "code.py").write_text(text, "utf-8")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    sample = mutants.drawn(mutants.Subject(("code.py",), ()), 1000, random.Random(0))
    assert [change.source for change in sample] in ([text.replace("= 3", new)] for new in ("= 2", "= 4"))


@pytest.mark.parametrize(
    ("line", "lines"),
    [(1, []), (3, []), (4, []), (6, [5, 6, 7, 8]), (9, [9, 10]), (13, [12, 13, 14]), (15, [15])],
)
def test_the_lines_of_a_statement_are_known_unless_it_runs_on_import(line, lines):
    assert list(mutants.lines_run(ast.parse(CODE), line)) == lines


@pytest.mark.parametrize("subject", mutants.SUBJECTS)
def test_each_subject_has_code_and_tests(subject):
    found = mutants.files_of_tests(mutants.SUBJECTS[subject])
    assert found
    assert all((ROOT / test).is_file() for test in found)
    assert all(list((ROOT / "vera_tools").glob(pattern)) for pattern in mutants.SUBJECTS[subject].code)


@pytest.mark.parametrize(
    ("lines", "asked", "others"),
    [
        (range(1, 2), ["b::one", "a::slow"], ["c::apart", "d::other", "a::quick"]),  # by what sets up a file too
        (range(2, 4), ["a::slow"], ["c::apart", "d::other", "a::quick", "b::one"]),
        (range(9, 10), [], ["c::apart", "d::other", "a::quick", "b::one", "a::slow"]),
        (range(0), ["a::quick", "b::one", "a::slow"], ["c::apart", "d::other"]),  # on import
    ],
)
def test_those_that_ran_the_lines_are_asked_first(lines, asked, others):
    mutants_asked = pytest.importorskip("tests.mutants_asked", exc_type=ImportError)
    known = mutants_asked.Known(
        {"a::slow": 3.0, "a::quick": 1.0, "b::one": 2.0, "c::apart": 0.1, "d::other": 0.2},
        {"x.py": {1: ["", "b::", "a::slow"], 3: ["a::slow"], 5: ["a::quick"], 9: [""]}, "y.py": {1: ["d::other"]}},
    )
    assert known.concerned("x.py", lines) == [*asked, *others]
    assert known.concerned("x.py", lines, here=True) == asked


SMALL = {
    "vera_tools/__init__.py": "",
    "vera_tools/projections/__init__.py": "",
    "vera_tools/projections/code.py": """\
UNUSED = 7
LIMIT = 3

def clipped(number):
    if number > LIMIT:
        return LIMIT
    return number

def apart(number):
    return number * 5

def never(number):
    return not number
""",
    "tests/__init__.py": "from pathlib import Path\nROOT = Path(__file__).parents[1]\n",
    "tests/projections/test_code.py": """\
import subprocess, sys
from vera_tools.projections import code

def test_here():
    assert [code.clipped(n) for n in range(5)] == [0, 1, 2, 3, 3]

def test_apart():
    asserted = "from vera_tools.projections.code import apart; assert apart(3) == 15"
    subprocess.run([sys.executable, "-c", asserted], check=True)
""",
}


@pytest.mark.slow
def test_what_no_test_notices_is_shown_and_the_rest_counted(tmp_path):
    pytest.importorskip("cosmic_ray")
    pytest.importorskip("coverage")
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    for name in ("mutants.py", "mutants_asked.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    command = [sys.executable, "-m", "tests.mutants", "projections", "--here"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # one of them is ours, which this tree does not have
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, *shown, last = ended.stdout.splitlines()
    assert first.startswith("projections: 2 tests, ")
    assert last.startswith("projections: 5 of 7 changes are noticed (seed 0, "), ended.stdout
    assert [line.split("#")[0] for line in shown if line.startswith("    -")] == [
        "    -UNUSED = 7",
        "    -    return not number",
    ]
    for name, text in SMALL.items():
        assert (tmp_path / name).read_text("utf-8") == text
