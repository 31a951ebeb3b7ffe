"""Where bytes come from: a folder on disk, or (through `vera_tools.files.hub`) a repository on the Hub.

Everything above this module reads through `Folder` and `ByteSource`, by ranges, and so never needs to know which.
Files are read by ranges, not mapped: a file that is truncated while it is read becomes an error, not a SIGBUS.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from vera_tools.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Self

_PIECE = 1 << 20


class ByteSource(Protocol):
    """Random access to one file's bytes."""

    label: str
    size: int

    @property
    def version(self) -> int | str:
        """What is another where other content stands under the same name: time of modification, the Hub's digest."""

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on, or raise `FormatError`."""

    def close(self) -> None:
        """Release the file."""


class Folder(Protocol):
    """One folder: the files directly in it, and the folders. It remembers what was read from it."""

    label: str

    def names(self) -> list[str]:
        """Sorted names of the files."""

    def path_of(self, name: str) -> str:
        """How error messages call this file."""

    def open(self, name: str) -> ByteSource:
        """Open one file, or raise `FormatError`."""

    def folder(self, name: str) -> Folder | None:
        """A folder in it, or None where there is none."""

    def refuse_leaving(self, name: str) -> None:
        """Raise `FormatError` where the file is a link that leads out of the folder."""

    def check_unchanged(self, at: Path | None = None) -> None:
        """Raise `FormatError` where a file that was opened is not the same any more; `at` is where it lies by now."""

    def forget(self, name: str | None = None) -> None:
        """Take what was read for settled, or one file of it: it is not checked again."""


class Closing:
    """What is closed at the end of a `with` block."""

    def close(self) -> None:
        """Release what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()


class ReadFromFolder(Closing):
    """What is read from the files of one folder, and may not be of two states of it.

    Attributes:
        folder: The folder.
    """

    folder: Folder

    def check_unchanged(self) -> None:
        """Refuse what was changed since it was opened; at the end of a `with` block this is done by itself.

        Raises:
            FormatError: a file that was read is not the same any more.
        """
        self.folder.check_unchanged()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.check_unchanged()
        finally:
            self.close()


@dataclass(frozen=True)
class Stamp:
    """What tells a file from another one under its name, and from itself after it was written to.

    Attributes:
        device: Where it lies.
        inode: Its number there.
        size: Bytes.
        modified: Nanoseconds, when it was last written to, or was said to be.
        changed: Nanoseconds, when anything of it changed, which nobody can set; on Windows, when it was made.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """From what the system says."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def of_open(cls, descriptor: int) -> Stamp:
        """Of an open file, such that whatever is written to it from now on changes the stamp.

        Older systems stamp by a clock that ticks every few milliseconds: what was written in this very tick could be
        written to again unseen, so the tick is waited out.
        """
        stamp = cls.of(os.fstat(descriptor))
        for _ in range(_TICKS):
            newest = max(stamp.modified, stamp.changed)
            # A file system of whole seconds, or of two as FAT's.
            step = 2 * 10**9 if stamp.modified % 10**9 == stamp.changed % 10**9 == 0 else 0
            if not -_AHEAD < _now() - newest <= step:
                break
            time.sleep(0.001 if step == 0 else 0.1)
            stamp = cls.of(os.fstat(descriptor))
        return stamp


#: Newer systems stamp by a finer clock where it matters, which may be ahead of the one that ticks.
_AHEAD = 10**7
#: How often a file's stamp is looked at again while it is too young to be told from its next state.
_TICKS = 30
# CLOCK_REALTIME_COARSE of Linux's time.h, by which its file systems stamp.
_COARSE = 5


def _now() -> int:
    """Nanoseconds, by the clock that file systems go by."""
    return time.clock_gettime_ns(_COARSE) if sys.platform == "linux" else time.time_ns()


class LocalFile(Closing):
    """A file on disk."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.path = path
        if kind := not_a_file(path):
            raise FormatError(f"this is {kind}, not a file", where=path)
        try:
            self._file = io.FileIO(path)
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", where=path) from error
        self._position = threading.Lock()
        self.stamp = Stamp.of_open(self._file.fileno())
        self.size = self.stamp.size

    @property
    def version(self) -> int:
        """Nanoseconds, when it was last written to before it was opened."""
        return self.stamp.modified

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on.

        Raises:
            FormatError: the file ends before, or the disk fails.
        """
        view, done = buffer.cast("B"), 0
        while done < len(view):
            try:
                count = self._read_at(view[done:], start + done)
            except OSError as error:
                raise FormatError(f"cannot be read: {error.strerror}", where=self.label) from error
            if count == 0:
                raise FormatError(
                    "the file ends too early",
                    where=self.label,
                    expected=f"{start + len(view)} bytes",
                    found=f"{start + done}",
                    hint="it was cut off, or is being written",
                )
            done += count

    def _read_at(self, view: memoryview, start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._position:  # which is one for all threads
            self._file.seek(start)
            return self._file.readinto(view)

    def fileno(self) -> int:
        """The open descriptor."""
        return self._file.fileno()

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened.

        Raises:
            FormatError: it was.
        """
        now = Stamp.of(os.fstat(self._file.fileno()))
        if now != self.stamp:
            raise changed(self.label, self.stamp, now)

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()


def changed(where: str, before: Stamp, now: Stamp | None) -> FormatError:
    """What is raised for a file that is another one after it was read than before; `now` is None where it is gone."""
    sizes = (f"{before.size} bytes", "nothing" if now is None else f"{now.size} bytes")
    other = sizes[0] != sizes[1]
    return FormatError(
        "the file was changed while it was read",
        where=where,
        expected=sizes[0] if other else None,
        found=sizes[1] if other else None,
        hint="something else writes to it: run this again when that is done",
    )


class MemoryFile:
    """A file that exists in memory only."""

    version = 0  # nothing else can come to stand there

    def __init__(self, label: str, data: bytes) -> None:
        self.label, self.size, self._data = label, len(data), data

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        view = buffer.cast("B")
        view[:] = self._data[start : start + len(view)]

    def close(self) -> None:
        """Nothing to release."""


class LocalFolder:
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.path = path
        #: The folder that was opened first, and what was read below it, by the path from there.
        self._root, self._within, self._read = path, "", dict[str, Stamp]()

    def names(self) -> list[str]:
        """Sorted names of the files directly in the folder.

        Raises:
            FormatError: no such folder.
        """
        try:
            with os.scandir(self.path) as entries:
                return sorted(entry.name for entry in entries if _is_file(entry))
        except OSError as error:
            raise FormatError(f"cannot be read: {error.strerror}", where=self.path) from error

    def path_of(self, name: str) -> str:
        """The file's path."""
        return str(self.path / name)

    def open(self, name: str) -> LocalFile:
        """Open one file.

        Raises:
            FormatError: it cannot be read, or is not the one any more that was opened before.
        """
        path = self.path / name
        file = LocalFile(path)
        before = self._read.setdefault(os.path.join(self._within, name), file.stamp)
        if before != file.stamp:
            file.close()
            raise changed(self.path_of(name), before, file.stamp)
        return file

    def folder(self, name: str) -> LocalFolder | None:
        """A folder in it, or None where there is none."""
        if not is_folder(self.path / name):
            return None
        inside = LocalFolder(self.path / name)
        inside._root, inside._within, inside._read = self._root, os.path.join(self._within, name), self._read
        return inside

    def refuse_leaving(self, name: str) -> None:
        """Refuse a link that leads out of the folder, where what it leads to would be taken for the folder's own.

        The folder is the one that was opened first. The Hub's cache keeps every file as a link to a blob of the same
        repository; those are no links in this sense.

        Raises:
            FormatError: the file, or a folder on the way to it, is such a link.
        """
        path = self.path / name
        root, real = Path(os.path.realpath(self._root)), Path(os.path.realpath(path))
        if real.is_relative_to(root) or real.parent == _blobs(root):
            return
        raise FormatError(
            "this link leads out of the folder",
            where=self.path_of(name),
            found=str(real),
            hint="put a copy of the file in its place, or remove it",
        )

    def check_unchanged(self, at: Path | None = None) -> None:
        """Refuse to go on where a file that was read is not the same any more, or another one lies under its name.

        One check after the last read proves that all that was read belongs together: it was all there at one time.

        Args:
            at: Where the folder lies by now, if not under its own name.

        Raises:
            FormatError: it is not.
        """
        for name, before in list(self._read.items()):
            try:
                now = Stamp.of(os.stat((at or self._root) / name))
            except OSError:
                now = None
            if now != before:
                raise changed(self.path_of(name), before, now)

    def forget(self, name: str | None = None) -> None:
        """Take what was read for settled, or one file of it: it is not checked again."""
        if name is None:
            self._read.clear()
        else:
            self._read.pop(os.path.join(self._within, name), None)


def _blobs(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the files of a snapshot, ``models--OWNER--NAME/snapshots/COMMIT``, or None."""
    for inside, snapshots in zip((folder, *folder.parents), folder.parents, strict=False):
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--") and len(inside.name) == 40:
            return repository / "blobs"
    return None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself, or through a folder that may not be entered: no reason to give up the others
        return False


def not_a_file(path: Path) -> str | None:
    """What stands in the place of a file, in words; None for a file, or where there is nothing."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return f"a broken link to {os.readlink(path)}" if path.is_symlink() else None
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return None if stat.S_ISREG(mode) else kinds.get(stat.S_IFMT(mode), "a device")


def present(folder: Folder, names: Iterable[str]) -> list[str]:
    """Those of `names` that anything in the folder has, so that what is no file is not taken for missing."""
    files = folder.names()
    local = folder.path if isinstance(folder, LocalFolder) else None
    return [name for name in names if name in files or (local and os.path.lexists(local / name))]


def is_folder(path: Path) -> bool:
    """Whether a folder is there.

    Raises:
        FormatError: the system does not let us look: a folder above may not be entered, or the name is too long.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=path) from error


def read_all(source: ByteSource, *, limit: int) -> bytes:
    """The whole of a small file.

    Raises:
        FormatError: larger than `limit` bytes, or unreadable.
    """
    _refuse_size(source, limit)
    data = bytearray(source.size)
    source.read_into(memoryview(data), 0)
    return bytes(data)


def _refuse_size(source: ByteSource, limit: int) -> None:
    if source.size > limit:
        raise FormatError(
            "too large for what it is",
            where=source.label,
            expected=f"at most {limit} bytes",
            found=f"{source.size}",
        )


#: Bytes of a text that is read whole, where nothing else is said: configs, cards, indices of little.
MOST_TEXT = 16 << 20


def read_text(folder: Folder, name: str, *, limit: int = MOST_TEXT) -> str:
    """A small text file of a folder, UTF-8, line ends and a byte-order mark as they are.

    Raises:
        FormatError: not there, not UTF-8, or too large.
    """
    source = folder.open(name)
    try:
        return read_all(source, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}", where=source.label) from error
    finally:
        source.close()


def same(one: Folder, other: Folder, name: str) -> bool:
    """Whether a file of two folders has the same bytes.

    Raises:
        FormatError: it cannot be read.
    """
    with contextlib.ExitStack() as stack:
        a, b = (stack.enter_context(contextlib.closing(folder.open(name))) for folder in (one, other))
        if a.size != b.size:
            return False
        here, there = bytearray(min(_PIECE, a.size)), bytearray(min(_PIECE, a.size))
        for start in range(0, a.size, _PIECE):
            length = min(_PIECE, a.size - start)
            a.read_into(memoryview(here)[:length], start)
            b.read_into(memoryview(there)[:length], start)
            if here[:length] != there[:length]:
                return False
    return True


def copy(folder: Folder, name: str, target: Path, *, limit: int | None = None) -> None:
    """Copy a file of a folder to `target`.

    Raises:
        FormatError: it cannot be read, is larger than `limit` bytes, or is a link that leads out of the folder.
        OSError: `target` cannot be written.
    """
    source = folder.open(name)
    try:
        folder.refuse_leaving(name)
        if limit is not None:
            _refuse_size(source, limit)
        with target.open("wb") as stream:
            buffer = memoryview(bytearray(min(_PIECE, source.size)))
            for start in range(0, source.size, _PIECE):
                view = buffer[: min(_PIECE, source.size - start)]
                source.read_into(view, start)
                stream.write(view)
    finally:
        source.close()
