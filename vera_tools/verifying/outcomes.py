"""The outcomes of many checkpoints in little room: what several share, which is all but the path, is kept once."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np

from vera_tools.texts import Texts
from vera_tools.verifying.report import CheckpointReport, Failed, Outcome, Skipped, named

Kind = TypeVar("Kind", CheckpointReport, Skipped, Failed)


class Outcomes:
    """Outcomes in the order in which they come, each with its place in the order asked for."""

    def __init__(self) -> None:
        self._paths, self._places, self._which = Texts(), array("i"), array("i")
        self._distinct: list[Outcome] = []
        self._known: dict[Outcome, int] = {}

    def add(self, place: int, outcome: Outcome) -> None:
        """Keep one."""
        bare = named(outcome, "")
        which = self._known.setdefault(bare, len(self._distinct))
        if which == len(self._distinct):
            self._distinct.append(bare)
        self._paths.append(outcome.path)
        self._places.append(place)
        self._which.append(which)

    def of(self, kind: type[Kind]) -> View[Kind]:
        """Those of one kind, in the order of their places."""
        which = np.array(self._which, np.int32)
        is_one = np.array([isinstance(one, kind) for one in self._distinct], bool)
        order = np.argsort(np.array(self._places, np.int32), kind="stable")
        chosen = order[is_one[which[order]]].astype(np.int32)
        return View(self._paths, self._distinct, which, chosen)


class View(Sequence[Kind], Generic[Kind]):
    """Outcomes of one kind, each made when it is asked for; equal to a tuple of the same."""

    def __init__(self, paths: Texts, distinct: list[Outcome], which: Any, chosen: Any) -> None:
        self._paths, self._distinct, self._which, self._chosen = paths, distinct, which, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, place: int) -> Kind: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Kind, ...]: ...
    def __getitem__(self, place: int | slice) -> Kind | tuple[Kind, ...]:
        if isinstance(place, slice):
            return tuple(self[n] for n in range(*place.indices(len(self))))
        n = int(self._chosen[place])
        return named(self._distinct[self._which[n]], self._paths[n])  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Kind]:
        return (self[n] for n in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, View | tuple):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))
