"""What a run of `verify` says of itself in its log, and whether the runs in logs are all that they had to be.

Each line says how far its run was with it, and the one that says that it ended is written when nothing can go wrong any
more. So a log that lacks lines, wherever it lacks them, does not look like that of a run that ended.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vera_tools._version import TOOL
from vera_tools.parts import Part


@dataclass(frozen=True)
class Run:
    """A run, and how far it is.

    Attributes:
        asked: A digest over what it was asked, but for the part.
        part: (I, N), or None for the whole.
        id: Names it.
        whole: A digest over the names of what all parts together hold; None before they are found.
        total: How many checkpoints and repositories are of this part; None before they are found.
        done: How many of them are done.
        written: How many lines on checkpoints it wrote.
        taken: How many results it took from lines of earlier runs.
        ended: Whether it did all that it had to do, and nothing else was wrong.
        at: A digest over what it was asked to look at, with absolute paths; None in lines of older versions.
        gone: Paths that earlier runs wrote of that looked at the same, and that it did not come upon any more.
    """

    asked: str
    part: Part | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    whole: str | None = None
    total: int | None = None
    done: int = 0
    written: int = 0
    taken: int = 0
    ended: bool = False
    at: str | None = None
    gone: tuple[str, ...] = ()

    @property
    def question(self) -> tuple[str, str | None]:
        """What it was asked, and where: the same words name something else in another folder."""
        return self.asked, self.at

    def repeats(self, other: Run) -> bool:
        """Whether it was asked all that the other one was asked."""
        return self.asked == other.asked and self.part in (None, other.part)

    def looks_again(self, other: Run) -> bool:
        """Whether it looks wherever the other one looked, so that what it does not come upon is gone."""
        return self.repeats(other) and self.at is not None and self.at == other.at

    def to_dict(self) -> dict[str, Any]:
        """The member `run` of a line."""
        return {
            "id": self.id,
            "asked": self.asked,
            "part": None if self.part is None else list(self.part),
            "whole": self.whole,
            "total": self.total,
            "done": self.done,
            "written": self.written,
            "taken": self.taken,
            "ended": self.ended,
            **({"at": self.at} if self.at else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        """The inverse of `to_dict`, for data that a schema has passed."""
        return cls(**{**data, "part": None if data["part"] is None else (data["part"][0], data["part"][1])})

    def to_line(self) -> bytes:
        """The verify-run/v1 line."""
        document: dict[str, Any] = {"schema": "vera-tools/verify-run/v1", "tool": dict(TOOL), "run": self.to_dict()}
        if self.gone:
            document["gone"] = list(self.gone)
        return (json.dumps(document) + "\n").encode()


def digest(names: Iterable[str | bool | None]) -> str:
    """A digest over names, in the order given."""
    found = hashlib.sha256(b"[")  # the text of a JSON list, without having it
    for number, name in enumerate(names):
        found.update(f"{', ' * bool(number)}{json.dumps(name)}".encode("ascii"))
    found.update(b"]")
    return found.hexdigest()


@dataclass
class _Seen:
    """What the lines tell of one run."""

    run: Run
    where: str
    lines: set[int] = field(default_factory=set)
    keys: set[Hashable] = field(default_factory=set)

    @property
    def lost(self) -> int:
        """Lines that it wrote, and that are not here."""
        return self.run.written - len(self.lines)

    @property
    def name(self) -> str:
        return "the run" if self.run.part is None else "part {}/{}".format(*self.run.part)


class Runs:
    """The runs that some logs tell of, in the order of their last lines."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def add(self, run: Run, *, where: str, key: Hashable = None) -> None:
        """Take note of a line. `key` is the checkpoint that it is on; None where it is on none."""
        seen = self._seen.pop(run.id, None) or _Seen(run, where)
        if key is not None:
            seen.lines.add(run.written)
            seen.keys.add(key)
        if (run.ended, run.done, run.written) >= (seen.run.ended, seen.run.done, seen.run.written):
            seen.run, seen.where = run, where
        self._seen[run.id] = seen

    def prove(self, run: Run) -> bool:
        """Whether what the run says is what the last one said that was asked the same, and that one ended."""
        earlier = [seen for seen in self._seen.values() if seen.run.repeats(run)]
        if not earlier or earlier[-1].lost:
            return False
        last = earlier[-1].run
        return last.ended and (last.whole, last.total) == (run.whole, run.total)

    def others_took(self, run: Run) -> bool:
        """Whether runs that looked elsewhere may rest on the lines of those that looked where this one does."""
        return any(seen.run.taken and seen.run.question != run.question for seen in self._seen.values())

    def missing(self) -> list[str]:
        """What is missing for the lines to be all that the runs had to write, in words."""
        seen = list(self._seen.values())
        runs_of = Counter(key for one in seen for key in one.keys)
        valid = []
        said: list[str] = []
        for place, one in enumerate(seen):
            if one.run.ended and not one.lost:
                others = len(runs_of) - sum(runs_of[key] == 1 for key in one.keys)
                if others < one.run.taken:
                    said.append(f"{one.name} took {one.run.taken} results from lines that are not here ({one.where})")
            elif any(later.run.ended and not later.lost and later.run.repeats(one.run) for later in seen[place:]):
                continue  # that one did what this one did not
            else:
                said.append(_short(one))
            valid.append(one)
        parts = [one for one in valid if not any(two.run.part is None and two.run.repeats(one.run) for two in valid)]
        return [*said, *(words for group in _groups(parts) for words in _absent(group))]


def _short(seen: _Seen) -> str:
    """What one run did not do."""
    run = seen.run
    if run.total is None:
        return f"{seen.name} did not begin to verify ({seen.where})"
    if not run.ended:
        left = max(0, run.total - run.done)
        missing = f"{left} missing" if left else "then it failed"
        return f"{seen.name} did not end: {run.done} of {run.total} done, {missing} ({seen.where})"
    return f"{seen.lost} of the {run.written} lines that {seen.name} wrote are not here ({seen.where})"


def _groups(seen: list[_Seen]) -> Iterator[list[_Seen]]:
    """The runs that are parts of one whole: that were asked the same or, where machines name it otherwise, found it."""
    left = [one for one in seen if one.run.part is not None]
    while left:
        group, rest = [left[0]], left[1:]
        while near := [one for one in rest if any(_together(one.run, other.run) for other in group)]:
            group += near
            rest = [one for one in rest if one not in near]
        yield group
        left = rest


def _together(one: Run, other: Run) -> bool:
    assert one.part is not None
    assert other.part is not None
    same = one.asked == other.asked or (one.whole is not None and one.whole == other.whole)
    return same and one.part[1] == other.part[1]


def _absent(group: list[_Seen]) -> Iterator[str]:
    parts = {one.run.part for one in group if one.run.part is not None}
    of = max(number for _, number in parts)
    absent = [number for number in range(1, of + 1) if (number, of) not in parts]
    if absent:
        names = ", ".join(f"{number}/{of}" for number in absent[:10]) + (", ..." if len(absent) > 10 else "")
        yield f"part{'s' * (len(absent) > 1)} {names} {'were' if len(absent) > 1 else 'was'} never begun, or not named"
