from __future__ import annotations

import pytest

from tests import ROOT

pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")

from tests.peer.comparison import Difference, compare, known

GAP = Difference("gap", "to be done")
PASSED, FAILED, SKIPPED = ({"outcome": outcome, "why": "E why"} for outcome in ("passed", "failed", "skipped"))


def problems(peft, ours, listed=(), *, whole=True):
    differences = dict.fromkeys(listed, GAP)
    return [
        line.partition(":")[0] for line in compare({"t": peft}, {"t": ours} if ours else {}, differences, whole=whole)
    ]


@pytest.mark.parametrize(
    ("peft", "ours", "listed", "expected"),
    [
        (PASSED, PASSED, (), []),
        (PASSED, FAILED, (), ["failed"]),
        (PASSED, SKIPPED, (), ["skipped"]),
        (PASSED, None, (), ["not run"]),
        (PASSED, FAILED, ("t",), []),
        (PASSED, PASSED, ("t",), ["stale"]),
        (FAILED, FAILED, (), []),
        (SKIPPED, PASSED, (), []),
        (FAILED, FAILED, ("t",), ["stale"]),
        (PASSED, PASSED, ("renamed",), ["stale"]),
    ],
)
def test_only_what_is_listed_may_differ_and_only_while_it_does(peft, ours, listed, expected):
    assert problems(peft, ours, listed) == expected


def test_an_entry_for_a_test_that_was_not_selected_is_no_matter():
    assert problems(PASSED, PASSED, ("elsewhere",), whole=False) == []


def test_the_list_says_why(tmp_path):
    path = tmp_path / "differences.toml"
    path.write_text('[[difference]]\nkind = "deliberate"\nreason = "so"\ntests = ["a", "b"]\n')
    assert known(path) == dict.fromkeys(("a", "b"), Difference("deliberate", "so"))
    for other in ('kind = "whim"\nreason = "so"\ntests = []', 'kind = "gap"\nreason = " "\ntests = []'):
        path.write_text(f"[[difference]]\n{other}\n")
        with pytest.raises(ValueError, match="differences"):
            known(path)
    path.write_text('[[difference]]\nkind = "gap"\nreason = "so"\ntests = ["a", "a"]\n')
    with pytest.raises(ValueError, match="twice"):
        known(path)


def test_the_list_can_be_read():
    assert known(ROOT / "tests" / "peer" / "differences.toml")
