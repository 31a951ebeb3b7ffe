"""The tool that changes code: each change is one, runs, and comes again with its seed; and tests that see it."""

from __future__ import annotations

import ast
import random

import pytest

from tests import ROOT, mutants

SUBJECT = mutants.Subject(("merging/exact.py",), ("tests/merging/test_rounding.py",))


def test_every_change_is_one_and_can_be_run():
    sample = mutants.drawn(SUBJECT, 1000, random.Random(0))
    plain = ast.unparse(ast.parse((ROOT / "vera_tools/merging/exact.py").read_text("utf-8")))
    assert len({change.source for change in sample}) == len(sample) > 20
    for change in sample:
        compile(change.source, "exact.py", "exec")
        assert change.source != plain
        assert change.before != change.after
        assert change.line > 0


def test_a_sample_comes_again_with_its_seed():
    one, two, other = (mutants.drawn(SUBJECT, 5, random.Random(seed)) for seed in (1, 1, 2))
    assert one == two != other


@pytest.mark.parametrize("subject", mutants.SUBJECTS)
def test_each_subject_has_code_and_tests(subject):
    found = mutants.files_of_tests(mutants.SUBJECTS[subject])
    assert found
    assert all((ROOT / test).is_file() for test in found)
    assert all(list((ROOT / "vera_tools").glob(pattern)) for pattern in mutants.SUBJECTS[subject].code)


@pytest.mark.parametrize(
    ("lines", "asked"),
    [
        (range(1, 2), ["b::one", "a::slow", "c::apart"]),  # by what sets up a file too, which stands for all of it
        (range(2, 4), ["a::slow", "c::apart"]),
        (range(9, 10), ["a::quick", "b::one", "a::slow", "c::apart"]),  # on import: those that ran anything of the file
    ],
)
def test_those_that_ran_the_lines_are_asked_and_those_that_start_processes(lines, asked):
    mutants_asked = pytest.importorskip("tests.mutants_asked", exc_type=ImportError)
    known = mutants_asked.Known(
        {"a::slow": 3.0, "a::quick": 1.0, "b::one": 2.0, "c::apart": 0.1, "d::other": 0.2},
        {"c::apart", "a::slow"},
        {"x.py": {1: ["", "b::", "a::slow"], 3: ["a::slow"], 5: ["a::quick"], 9: [""]}, "y.py": {1: ["d::other"]}},
    )
    assert known.concerned("x.py", lines) == asked
    assert known.concerned("x.py", lines, here=True) == [name for name in asked if name != "c::apart"]
