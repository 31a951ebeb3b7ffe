"""Renaming in ways that Python has no function for: two names exchanged, and a name that must not be there yet.

Linux's renameat2 and macOS's renameatx_np do both in a single step; other systems do neither.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from dataclasses import dataclass
from pathlib import Path

#: What a file system says that has no such operation.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@dataclass(frozen=True)
class _Rename:
    """A function of the C library, what it takes for the working folder, and its flags."""

    call: ctypes._NamedFuncPointer
    here: int
    exchange: int
    to_new: int


@functools.cache
def _function() -> _Rename | None:
    """How it is done here; None where it cannot be (Windows)."""
    known = (
        # Linux: AT_FDCWD in fcntl.h, RENAME_EXCHANGE and RENAME_NOREPLACE in linux/fs.h
        ("renameat2", -100, 2, 1),
        # macOS: AT_FDCWD in sys/fcntl.h, RENAME_SWAP and RENAME_EXCL in sys/stdio.h
        ("renameatx_np", -2, 2, 4),
    )
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (TypeError, OSError):  # there is no one C library that every program has
        return None
    for name, *constants in known:
        call: ctypes._NamedFuncPointer | None = getattr(library, name, None)
        if call is not None:
            call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
            return _Rename(call, *constants)
    return None


def can_exchange() -> bool:
    """Whether the system has the call at all; a file system may lack it still."""
    return _function() is not None


def exchange(a: Path, b: Path) -> bool:
    """Swap what two names stand for. False where this system or file system has no such operation.

    Raises:
        OSError: it has, and refused.
    """
    rename = _function()
    return rename is not None and _call(rename, a, b, rename.exchange)


def to_new(a: Path, b: Path) -> bool:
    """Rename `a` to `b`, which must not exist. False where this system or file system has no such operation.

    Raises:
        FileExistsError: it exists.
        OSError: the file system refused.
    """
    rename = _function()
    return rename is not None and _call(rename, a, b, rename.to_new)


def _call(rename: _Rename, a: Path, b: Path, flag: int) -> bool:
    if rename.call(rename.here, os.fsencode(a), rename.here, os.fsencode(b), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(b))
