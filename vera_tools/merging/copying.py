"""Bytes from one file to another, by the system itself where it can: a reflink or a copy inside the kernel."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from vera_tools.files.local import ByteSource, LocalFile

#: Bytes a single request copies, so that progress is seen and an interrupt is heard.
PIECE = 64 << 20
# The kernel copies 3.0 GB/s to offsets that are multiples of 64 KB, and 2.1 GB/s to others (Linux 6, ext4).
_ALIGNMENT = 1 << 16
_BUFFER = 4 << 20
# At most so many bytes at a time are written: two threads that write 4 MB each at once into files on ext4 take three
# times as much of the kernel's time, and smaller pieces are more calls (Linux 6).
_WRITE = 1 << 20

# What copy_file_range says where it cannot copy between these two files, though reading and writing can.
_NOT_POSSIBLE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
# What fstatfs(2) calls a file system in memory.
_TMPFS = 0x01021994


def _linux_calls() -> tuple[Callable[[int, int, int, int], int], Callable[[int, Any], int]] | None:
    """fallocate(2) and fstatfs(2), which Python lacks. Elsewhere None: other systems' fstatfs answers otherwise.

    `os.posix_fallocate` would write to every block where a file system has no such call.
    """
    try:
        library = ctypes.CDLL(None)
        fallocate, fstatfs = library.fallocate, library.fstatfs  # the first is Linux's alone
    except (AttributeError, OSError, TypeError):  # TypeError: Windows, which has no one C library for every program
        return None
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return fallocate, fstatfs


_calls = _linux_calls()


class OutputFile:
    """A file of known size that is written at any place, by several threads and processes."""

    def __init__(self, path: Path, *, new: bool = True) -> None:
        """Make a file, or, without `new`, open one that is there."""
        self.path = path
        self._file = io.FileIO(path, "w+" if new else "r+")
        self._position = threading.Lock()

    def fileno(self) -> int:
        """The open descriptor."""
        return self._file.fileno()

    def reserve(self, size: int) -> None:
        """Reserve the blocks of a file of `size` bytes, where the system can: copying then takes a sixth less time."""
        if _calls is not None:
            fallocate, _ = _calls
            fallocate(self.fileno(), 0, 0, size)  # where that fails, writing tells why

    def is_in_memory(self) -> bool:
        """Whether it lies on tmpfs, which fills blocks with zeros to reserve them: that takes as long as a copy."""
        if _calls is None:
            return False
        _, fstatfs = _calls
        answer = (ctypes.c_long * 64)()  # a struct statfs, and more than that: its first field is the kind
        return fstatfs(self.fileno(), answer) == 0 and answer[0] == _TMPFS

    def write_at(self, data: memoryview, offset: int) -> None:
        """Write all of `data`.

        Raises:
            OSError: the disk is full, or fails.
        """
        while data:
            count = self._write_at(data[:_WRITE], offset)
            data, offset = data[count:], offset + count

    def _write_at(self, data: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.fileno(), data, offset)
        with self._position:  # which is one for all threads
            self._file.seek(offset)
            return self._file.write(data)

    def close(self) -> None:
        """Close the descriptor."""
        self._file.close()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def copy_range(source: ByteSource, start: int, length: int, target: OutputFile, offset: int) -> None:
    """Copy `length` bytes from `start` of `source` to `offset` of `target`.

    Raises:
        FormatError: the source ends too early, or cannot be read.
        OSError: the target cannot be written.
    """
    done = 0
    if isinstance(source, LocalFile) and hasattr(os, "copy_file_range"):
        done = _copy_inside_the_kernel(source, start, length, target, offset)
    buffer = memoryview(bytearray(min(_BUFFER, length - done)))
    while done < length:
        piece = buffer[: length - done]
        source.read_into(piece, start + done)
        target.write_at(piece, offset + done)
        done += len(piece)


def _copy_inside_the_kernel(source: LocalFile, start: int, length: int, target: OutputFile, offset: int) -> int:
    """Bytes copied: all of them, or as many as were copied before the system said that it cannot."""
    done = 0
    while done < length:
        to_boundary = -(offset + done) % _ALIGNMENT
        count = min(to_boundary or PIECE, length - done)
        try:
            count = os.copy_file_range(source.fileno(), target.fileno(), count, start + done, offset + done)
        except OSError as error:
            if error.errno in _NOT_POSSIBLE:
                return done
            raise
        if count == 0:
            return done  # the end of a file that was cut off, or a file system that has no such call: reading will tell
        done += count
    return done
