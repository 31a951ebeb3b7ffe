"""A file that is far away, read by ranges: the header of a large one alone, a small one whole, the rest piece by piece.

Who keeps it is asked by the classes that derive from `RangedFile`; how much of it is asked for is decided here.
"""

from __future__ import annotations

import threading

#: Bytes of the first range: enough for the header of most files.
WINDOW = 16 << 10
#: Most bytes in one request. Sequential reads grow up to it, so that streaming a file takes few requests.
MOST = 16 << 20


class RangedFile:
    """A file of which what fits into one request is fetched whole; of a larger one, and for a header alone, ranges.

    Attributes:
        label: What messages call it.
        size: Bytes.
    """

    def __init__(self, *, label: str, size: int) -> None:
        self.label, self.size = label, size
        #: What is held: where it starts, and the bytes. Replaced as one, so that threads may share the file.
        self._window = (0, b"")
        self._whole = threading.Lock()

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on.

        Raises:
            RemoteError: it cannot be had, or the bytes are not what was asked for.
            FormatError: it was changed meanwhile.
        """
        view, done = buffer.cast("B"), 0
        while done < len(view):
            position, (first, held) = start + done, self._window
            if not first <= position < first + len(held):
                first, held = self._window = self._fetch(position, len(view) - done, after=(first, held))
            piece = memoryview(held)[position - first : position - first + len(view) - done]
            view[done : done + len(piece)] = piece
            done += len(piece)

    def close(self) -> None:
        """Forget what is held."""
        self._window = (0, b"")

    def _fetch(self, start: int, wanted: int, *, after: tuple[int, bytes]) -> tuple[int, bytes]:
        """The bytes from `start` on: as many as wanted, and more where the file is read in sequence."""
        first, held = after
        if self._comes_whole(start + wanted):
            with self._whole:  # once, whatever the number of threads that wait for it
                held = self._window[1]
                window = (0, held if len(held) == self.size else self._get_whole(before=self._window))
                self._window = window
        else:
            sequential = bool(held) and start == first + len(held)
            ahead = 2 * len(held) if sequential else WINDOW
            stop = min(start + min(max(wanted, ahead), MOST), self.size)
            window = (start, self._get_range(start, stop))
        if start >= window[0] + len(window[1]):
            raise self._too_short(start + wanted)
        return window

    def _comes_whole(self, stop: int) -> bool:
        """Whether all of it is fetched where the bytes before `stop` are wanted."""
        return self.size <= MOST and not stop <= WINDOW < self.size

    def _get_whole(self, *, before: tuple[int, bytes]) -> bytes:
        """All of it; `before` is what is held of it by now, and where that starts."""
        return self._get_range(0, self.size)

    def _get_range(self, start: int, stop: int) -> bytes:
        """Exactly these bytes."""
        raise NotImplementedError

    def _too_short(self, expected: int) -> Exception:
        """What is raised where it ends before `expected` bytes."""
        raise NotImplementedError
