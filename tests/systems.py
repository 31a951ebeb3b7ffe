"""Takes away from Python, on Linux, what other systems lack, and then imports vera-tools.

    python tests/systems.py REPORT [LACK...]

runs the commands of `tests.systems_commands` in the working folder on such a Python, and writes to the file REPORT, as
JSON, what each printed and wrote. A LACK is one of `LACKS`, or a whole system's, of `SYSTEMS`. What these systems have
in the place of what they lack is stood in for: by Linux's own call, held to the other system's documentation.

The standard library has to do without these calls too. Other libraries have not: they know that this is Linux.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import importlib
import io
import os
import pathlib
import shutil
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

try:
    import fcntl
except ImportError:  # only to be imported there, not to be run
    fcntl = None

#: Calls that were made, by name.
USED: dict[str, int] = {}

_real_open, _real_os_open, _real_fsync, _real_close = io.open, os.open, os.fsync, os.close
_CDLL = ctypes.CDLL


def _ours() -> bool:
    """Whether vera-tools itself makes the call: other libraries take themselves to be on Linux still."""
    return str(sys._getframe(2).f_globals["__name__"]).startswith("vera_tools")


def _without(module: types.ModuleType, *names: str) -> Callable[[], None]:
    def take_away() -> None:
        for name in names:
            if hasattr(module, name):
                delattr(module, name)

    return take_away


def _refused(name: str, code: int) -> Callable[[], None]:
    """A call that is there, and that this file system or user may not use."""

    def take_away() -> None:
        def refuse(*args: Any, **options: Any) -> None:
            _count(name)
            raise OSError(code, os.strerror(code))

        setattr(os, name, refuse)

    return take_away


def _no_symbolic_links() -> None:
    """Windows lets few users make them; the Hub's client then does without."""
    _refused("symlink", errno.EPERM)()
    _whole_os.symlink = os.symlink


_symbols_lacking: set[str] = set()
_symbols_instead: dict[str, Callable[..., int]] = {}


class _Library(_CDLL):
    """The C library without some of its functions, and with others."""

    def __getattr__(self, name: str) -> Any:
        if name in _symbols_instead:
            return _symbols_instead[name]
        if name in _symbols_lacking:
            raise AttributeError(name)
        _count(name)
        return super().__getattr__(name)


def _no_symbol(*names: str) -> Callable[[], None]:
    return lambda: _symbols_lacking.update(names)


def _no_c_library() -> None:
    def load(name: str | None, *args: Any, **options: Any) -> Any:
        if name is None and _ours():
            raise TypeError("argument of type 'NoneType' is not iterable")  # as ctypes on Windows
        return _Library(name, *args, **options)

    ctypes.CDLL = load


def _no_module(name: str) -> Callable[[], None]:
    return lambda: sys.modules.update({name: None})


def _no_open_folders() -> None:
    """Windows opens no folder, and shutil does without."""
    shutil._use_fd_functions = False

    def refuse_folders(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if os.path.isdir(path):
            _count("open of a folder")
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return _real_os_open(path, flags, *args, **options)

    os.open = refuse_folders


def _no_flushing_of_what_is_read() -> None:
    """Windows flushes a file only through a descriptor that may write to it."""

    def refuse_read_only(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            _count("fsync of what is read")
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        _real_fsync(descriptor)

    os.fsync = refuse_read_only


def _text_mode() -> None:
    """Windows writes line ends as it likes, to files that were opened as text and to descriptors without O_BINARY."""

    def translating(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        if newline is None and "b" not in mode and set(mode) & set("wax+"):
            newline = "\r\n"
        return _real_open(file, mode, buffering, encoding, errors, newline, *more, **options)

    io.open = builtins.open = translating
    os.O_BINARY = binary = 1 << 30
    as_text: set[int] = set()
    opening, real_pwrite = os.open, getattr(os, "pwrite", None)
    real = {name: getattr(os, name) for name in ("read", "write")}

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        descriptor = opening(path, flags & ~binary, *args, **options)
        if not flags & binary and _ours():
            as_text.add(descriptor)
        return descriptor

    def closed(descriptor: int) -> None:
        as_text.discard(descriptor)
        _real_close(descriptor)

    def checked(name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            assert descriptor not in as_text, f"os.{name} of a descriptor that Windows opened as text"
            return real[name](descriptor, *args)

        return call

    os.open, os.close = opened, closed
    if real_pwrite is not None:
        real["pwrite"] = real_pwrite
    for name in real:
        setattr(os, name, checked(name))


def _open_files_stay() -> None:
    """Windows renames and removes nothing that is open, and no folder that holds such a thing; nor does it swap any."""
    shutil._use_fd_functions = False
    _symbols_lacking.add("renameat2")

    def refuse(path: Any) -> None:
        name = os.fspath(path)
        name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        for number in os.listdir("/proc/self/fd"):
            try:
                held = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if os.path.isdir(held):
                continue  # Windows opens no folder
            if held == name or held.startswith(name + "/"):
                _count("open file")
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    def guard(name: str, paths: int) -> None:
        real = getattr(os, name)

        def call(*args: Any, **options: Any) -> Any:
            for path in args[:paths]:
                refuse(path)
            return real(*args, **options)

        setattr(os, name, call)

    for name in ("unlink", "remove", "rmdir"):
        guard(name, 1)
    for name in ("rename", "replace"):
        guard(name, 2)


def _no_renaming_over() -> None:
    """Windows' rename never replaces anything, and its replace replaces no folder."""
    rename, replace = os.rename, os.replace

    def strict_rename(a: Any, b: Any, **options: Any) -> None:
        if os.path.lexists(b):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), a, None, b)
        rename(a, b, **options)

    def strict_replace(a: Any, b: Any, **options: Any) -> None:
        if os.path.isdir(b):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), a, None, b)
        replace(a, b, **options)

    os.rename, os.replace = strict_rename, strict_replace


LACKS: dict[str, Callable[[], None]] = {
    "preadv": _without(os, "preadv", "pread"),
    "pwrite": _without(os, "pwritev", "pwrite"),
    "fchmod": _without(os, "fchmod"),
    "copy_file_range": _without(os, "copy_file_range"),
    "fallocate": _no_symbol("fallocate", "posix_fallocate"),
    "posix_fallocate": _without(os, "posix_fallocate"),
    "renameat2": _no_symbol("renameat2"),
    "chown": _without(os, "chown", "lchown", "fchown"),
    "uname": _without(os, "uname"),
    "memfd_create": _without(os, "memfd_create"),
    "link": _without(os, "link"),
    "hard links": _refused("link", errno.EPERM),
    "symbolic links": _no_symbolic_links,
    "signals": _without(signal, "SIGPIPE", "SIGKILL", "SIGHUP", "SIGSTOP"),
    "killpg": _without(os, "killpg"),
    "flushing what is read": _no_flushing_of_what_is_read,
    "fcntl": _no_module("fcntl"),
    "opening folders": _no_open_folders,
    "binary by default": _text_mode,
    "moving open files": _open_files_stay,
    "renaming over": _no_renaming_over,
    "a C library": _no_c_library,
}

SYSTEMS: dict[str, tuple[str, ...]] = {
    "windows": tuple(name for name in LACKS if name not in ("link", "hard links")),
    "macos": ("preadv", "copy_file_range", "fallocate", "posix_fallocate", "renameat2", "memfd_create"),
}


def _renameatx_np(from_folder: int, a: bytes, to_folder: int, b: bytes, flags: int) -> int:
    """macOS's renameatx_np(2), between paths from the working folder, AT_FDCWD (-2)."""
    assert (from_folder, to_folder) == (-2, -2)
    linux = {2: 2, 4: 1}[flags]  # RENAME_SWAP is RENAME_EXCHANGE there, and RENAME_EXCL is RENAME_NOREPLACE
    _count("renameatx_np")
    result: int = _CDLL(None, use_errno=True).renameat2(-100, a, -100, b, linux)
    return result


class _LockFileEx:
    """Windows' LockFileEx as its documentation has it, by flock."""

    argtypes: Any = None

    def __init__(self) -> None:
        self.error = 0

    def __call__(self, handle: int, flags: int, reserved: int, low: int, high: int, overlapped: Any) -> int:
        where = overlapped._obj
        assert (reserved, low, high, flags & ~3) == (0, 1, 0, 0)
        assert (where.OffsetHigh << 32) + where.Offset > os.fstat(handle).st_size + (1 << 60)
        _count("LockFileEx")
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if flags & 2 else fcntl.LOCK_SH) | (fcntl.LOCK_NB if flags & 1 else 0))
        except BlockingIOError:
            self.error = 33  # ERROR_LOCK_VIOLATION
            return 0
        return 1


_whole_os = types.ModuleType("os")
#: Libraries that vera-tools uses and that look at the system themselves.
OTHERS = ("click", "filelock", "huggingface_hub", "httpcore", "httpx", "numpy", "rich", "threadpoolctl", "tqdm")


def take_away(*names: str) -> None:
    """Take away what `names` stand for, and give what these systems have instead."""
    _leave_others_alone()
    ctypes.CDLL = _Library
    for name in names:
        for lack in SYSTEMS.get(name, (name,)):
            LACKS[lack]()
    if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 keeps the functions that it found
        for name in ("rename", "replace", "unlink", "rmdir", "symlink"):
            setattr(accessor, name, staticmethod(getattr(os, name)))
        accessor.open = staticmethod(io.open)
    if "macos" in names:
        _symbols_instead["renameatx_np"] = _renameatx_np
    if "windows" in names:
        stand_in_for_windows()


def stand_in_for_windows() -> None:
    """Give Python what it has on Windows for locks: the module msvcrt, and ctypes' way to kernel32."""
    sys.modules["msvcrt"] = module = types.ModuleType("msvcrt")
    module.get_osfhandle = lambda descriptor: descriptor
    lock_file = _LockFileEx()
    ctypes.WinDLL = lambda name, use_last_error: types.SimpleNamespace(LockFileEx=lock_file)
    ctypes.get_last_error = lambda: lock_file.error


def _leave_others_alone() -> None:
    for name in ("click", "huggingface_hub.file_download", "numpy", "rich.progress", "threadpoolctl"):
        importlib.import_module(name)
    vars(_whole_os).update(vars(os))
    for name, module in list(sys.modules.items()):
        other = name.split(".")[0].removesuffix("2") in OTHERS or name == "ctypes.util"
        if other and getattr(module, "os", None) is os:
            module.os = _whole_os


def count(*names: str) -> None:
    """Count the calls of these functions of `os`."""
    for name in names:
        setattr(os, name, _counted(name, getattr(os, name)))


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        _count(name)
        return function(*args, **options)

    return call


def _count(name: str) -> None:
    USED[name] = USED.get(name, 0) + 1


def main(report: str, *names: str) -> None:
    """Run the commands and write the report."""
    if not names:
        count("preadv", "pwrite", "copy_file_range", "link", "chown")
    take_away(*names)
    import json

    from tests import systems_commands
    from vera_tools.architectures import witness

    # It is asked in a process of its own, which would have what this one lacks, and takes seconds.
    witness.is_there = lambda: False
    results = systems_commands.run()
    with open(report, "w", encoding="utf-8") as file:
        json.dump({"used": USED, "results": results}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
