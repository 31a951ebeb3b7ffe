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
    found = mutants.tests_of(mutants.SUBJECTS[subject], None)
    assert found
    assert all((ROOT / test).is_file() for test in found)
    assert all(list((ROOT / "vera_tools").glob(pattern)) for pattern in mutants.SUBJECTS[subject].code)


def test_tests_that_are_named_like_the_file_come_first():
    found = mutants.tests_of(mutants.SUBJECTS["files"], ROOT / "vera_tools/files/safetensors.py")
    assert [path.split("/")[-1] for path in found[:2]] == ["test_safetensors.py", "test_safetensors_library.py"]
