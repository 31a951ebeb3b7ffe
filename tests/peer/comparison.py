"""What came of PEFT's tests on its model and on ours, held against the list of the differences that are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomllib

from tests.peer.suite import Outcomes

#: `deliberate`: we do something else, and docs/training.md says so. `plugin`: the test looks at something of PEFT's
#: that the swap cannot put in its place. `gap`: still to be done.
KINDS = ("deliberate", "plugin", "gap")


@dataclass(frozen=True)
class Difference:
    """Why a test of PEFT's does not pass on ours."""

    kind: str
    reason: str


def known(path: Path) -> dict[str, Difference]:
    """The listed differences, by the test's name.

    Raises:
        ValueError: an unknown kind, no reason, or a test that is listed twice.
    """
    found: dict[str, Difference] = {}
    for entry in tomllib.loads(path.read_text("utf-8"))["difference"]:
        difference = Difference(entry["kind"], entry["reason"])
        if difference.kind not in KINDS or not difference.reason.strip():
            raise ValueError(f"{path.name}: {entry}")
        for test in entry["tests"]:
            if test in found:
                raise ValueError(f"{path.name}: {test} is listed twice")
            found[test] = difference
    return found


def compare(peft: Outcomes, ours: Outcomes, differences: dict[str, Difference], *, whole: bool) -> list[str]:
    """What is wrong, one line each; nothing where we pass all that PEFT passes, but for the listed differences.

    Args:
        peft: The outcomes on PEFT's own model.
        ours: Those on ours.
        differences: The list.
        whole: Whether all tests were run, so that an entry for one that was not is stale.
    """
    problems = []
    passed = [name for name, outcome in peft.items() if outcome["outcome"] == "passed"]
    for name in passed:
        outcome = ours.get(name, {"outcome": "not run", "why": ""})
        if outcome["outcome"] != "passed" and name not in differences:
            problems.append(f"{outcome['outcome']}: {name}\n{outcome['why']}")
        elif outcome["outcome"] == "passed" and name in differences:
            problems.append(f"stale: it passes, so take it off the list: {name}")
    if whole:
        gone = sorted(differences.keys() - set(passed))
        problems += [f"stale: PEFT has no such test, or does not pass it: {name}" for name in gone]
    return problems
