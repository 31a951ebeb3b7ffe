"""Locks on open files: flock where the system has it, LockFileEx on Windows. They end with the process that holds them.

A lock keeps out who asks for it, and nobody else: flock is advisory, and what is locked on Windows, where locks are
not, is one byte far behind the end of any file.
"""

from __future__ import annotations

import ctypes
import errno
import time

# What flock says where a file system has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

# LockFileEx's flags (minwinbase.h), and what it says (winerror.h) of a lock that another handle holds and of a file
# system without locks: ERROR_LOCK_VIOLATION, ERROR_IO_PENDING; ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED.
_FAIL_IMMEDIATELY, _EXCLUSIVE = 1, 2
_WINDOWS_HELD, _WINDOWS_NO_LOCKS = {33, 997}, {1, 50}
_PLACE = 1 << 62


class _Overlapped(ctypes.Structure):
    """OVERLAPPED (minwinbase.h), which says where the locked bytes begin."""

    _fields_ = (
        ("Internal", ctypes.c_size_t),
        ("InternalHigh", ctypes.c_size_t),
        ("Offset", ctypes.c_uint32),
        ("OffsetHigh", ctypes.c_uint32),
        ("hEvent", ctypes.c_void_p),
    )


def take(descriptor: int, *, shared: bool = False) -> bool | None:
    """Take a lock on an open file, without waiting for it. Closing the descriptor gives it back.

    Args:
        descriptor: The open file.
        shared: Others may hold it too, if they take it as shared.

    Returns:
        True: it is taken. False: another one holds it. None: this system or file system has no locks.

    Raises:
        OSError: the disk fails.
    """
    try:
        import fcntl
    except ImportError:
        return _take_on_windows(descriptor, shared=shared)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def wait(descriptor: int) -> bool:
    """Take a lock on an open file, and wait as long as another one holds it. False where there are no locks.

    Raises:
        OSError: the disk fails.
    """
    while (taken := take(descriptor)) is False:
        time.sleep(0.01)
    return bool(taken)


def _take_on_windows(descriptor: int, *, shared: bool) -> bool | None:
    try:
        import msvcrt

        lock_file = ctypes.WinDLL("kernel32", use_last_error=True).LockFileEx  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return None
    lock_file.argtypes = [ctypes.c_void_p, *[ctypes.c_uint32] * 4, ctypes.POINTER(_Overlapped)]
    where = _Overlapped(Offset=_PLACE & 0xFFFFFFFF, OffsetHigh=_PLACE >> 32)
    flags = _FAIL_IMMEDIATELY | (0 if shared else _EXCLUSIVE)
    handle = msvcrt.get_osfhandle(descriptor)  # type: ignore[attr-defined]
    if lock_file(handle, flags, 0, 1, 0, ctypes.byref(where)):
        return True
    code = ctypes.get_last_error()  # type: ignore[attr-defined]
    if code in _WINDOWS_HELD:
        return False
    if code in _WINDOWS_NO_LOCKS:
        return None
    raise ctypes.WinError(code)  # type: ignore[attr-defined]
