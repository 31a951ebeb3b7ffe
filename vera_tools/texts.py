"""Many short texts in little room: as the bytes that they are, where a list has an object for each."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

#: So many are sorted at a time.
_RUN = 4096


class Texts(Sequence[str]):
    """A list of texts that grows at its end. Names of files that are not UTF-8 are kept as Python has them."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("Q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one at the end."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        n = range(len(self))[place]
        return self._bytes[self._ends[n] : self._ends[n + 1]].decode("utf-8", "surrogatepass")

    def sorted(self, key: Callable[[str], Any] | None = None) -> Iterator[str]:
        """All in order, without an object for each at once."""
        starts = range(0, len(self), _RUN)
        return heapq.merge(*[Texts(sorted(self[n : n + _RUN], key=key)) for n in starts], key=key)
