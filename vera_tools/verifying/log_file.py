"""The file of a log: appended to by several runs, of which each waits for the others, and ending with a whole line."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from vera_tools.errors import UsageError
from vera_tools.files import locking

#: Of each line, in every version; what has another is not mended.
_BEGINNING = b'{"schema": "vera-tools/verify-'


class LogFile:
    """It is opened, locked and closed again whenever lines are written.

    Attributes:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._note = (0, b"")

    def append(self, data: bytes, note: bytes) -> None:
        """Write lines and a note at the end, in the place of our last note where that is still the last line.

        Raises:
            OSError: the file system refused.
            UsageError: it has become something else than a log.
        """
        data += note
        with self.alone() as stream:
            start, before = self._note
            size = stream.seek(0, os.SEEK_END)
            if before and size == start + len(before):
                stream.seek(start)
                size = start if stream.read(len(before)) == before else size
            stream.seek(size)
            rest = memoryview(data)
            while rest:
                rest = rest[stream.write(rest) :]
            stream.truncate()
            self._note = (stream.tell() - len(note), note) if note else (0, b"")

    @contextlib.contextmanager
    def alone(self) -> Iterator[io.FileIO]:
        """The file, from its beginning and with whole lines only, for as long as no other run may touch it.

        Raises:
            OSError: the file system refused.
            UsageError: it is no log.
        """
        with io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+") as stream:
            locking.wait(stream.fileno())
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":  # nobody is writing it, so nobody will end this line
                    stream.seek(0)
                    content = stream.readall()
                    if not content.startswith(_BEGINNING[: len(content)]):
                        raise UsageError(
                            "is there, and no log of `verify`, so nothing is written to it",
                            where=self.path,
                            hint="choose another file, or delete it yourself",
                        )
                    stream.truncate(content.rfind(b"\n") + 1)
            stream.seek(0)
            yield stream
