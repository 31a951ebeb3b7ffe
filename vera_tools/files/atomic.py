"""The one way in which vera-tools writes: a file or a folder appears whole, or not at all.

Everything is written under a temporary name in the same parent folder, flushed to disk, and renamed. A process that is
killed leaves the old state or the new one, and at most a hidden ``.NAME.XXXX.tmp`` beside it. A folder that is there
already is exchanged with the new one in a single step (`exchange`), where the system has it: Linux's renameat2, macOS's
renameatx_np.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vera_tools.errors import UsageError, VeraToolsError


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write one file.

    Args:
        path: The file.
        data: What it is to hold.
        sync: Flush it to disk before it appears. Without it, a power failure soon afterwards may leave it empty.

    Raises:
        VeraToolsError: the file system refused (full, read-only, ...).
    """
    with file(path, sync=sync) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Hand out a temporary path; on leaving without an error it becomes `path`, with `path`'s old permissions.

    Args:
        path: The file.
        sync: As for `write_bytes`.

    Raises:
        VeraToolsError: the file system refused.
    """
    with errors(path.parent, "could not be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            os.close(descriptor)
            temporary.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
            yield temporary
            if sync:
                _sync(temporary)
            temporary.replace(path)
            if sync:
                _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty temporary folder; on leaving without an error it becomes `path`.

    Raises:
        UsageError: `path` exists, or does in the end, and `overwrite` is false.
        VeraToolsError: the file system refused.
    """
    refuse_existing(path, overwrite=overwrite)
    with errors(path.parent, "could not be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with errors(path):
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            refuse_existing(path, overwrite=overwrite)  # what has appeared meanwhile is somebody else's
            publish(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def replacement(path: Path, *, drop: Collection[str] = ()) -> Iterator[Path]:
    """Hand out an empty temporary folder; on leaving without an error it is exchanged with the folder `path`.

    What `path` holds and the new folder does not is carried over, subfolders included, as hard links where the file
    system has them. Permissions and owners stay as they were.

    Args:
        path: A folder. Where it is a symbolic link, the folder behind it is replaced and the link stays.
        drop: Names of files that are not carried over.

    Raises:
        UsageError: the system cannot exchange two folders in one step.
        VeraToolsError: the file system refused.
    """
    with errors(path):
        path = path.resolve(strict=True)
        if _swap() is None:
            raise _no_exchange(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            yield temporary
            for entry in os.scandir(path):
                new = temporary / entry.name
                if new.exists():
                    _keep_owner(Path(entry.path), new)
                elif entry.name not in drop:
                    _carry_over(Path(entry.path), new)
            _sync_tree(temporary)
            _keep_owner(path, temporary)
            exchange(temporary, path)
            _sync(path.parent)
        finally:  # after the exchange, the temporary name is the old folder's
            _remove(temporary)


def exchange(a: Path, b: Path) -> None:
    """Swap what two names of one file system stand for, in a single step.

    Raises:
        UsageError: this system or this file system has no such operation.
        OSError: it has, and refused.
    """
    swap = _swap()
    if swap is not None:
        if swap.call(swap.here, os.fsencode(a), swap.here, os.fsencode(b), swap.flag) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise OSError(code, os.strerror(code), str(b))
    raise _no_exchange(b)


def _no_exchange(path: Path) -> UsageError:
    return UsageError(
        "this system cannot replace a folder in one step", where=path, hint="write to another folder with -o instead"
    )


@dataclass(frozen=True)
class _Swap:
    """A function of the C library, what it takes for the working folder, and the flag that has it swap."""

    call: ctypes._NamedFuncPointer
    here: int
    flag: int


@functools.cache
def _swap() -> _Swap | None:
    """How two names are swapped here; None where it cannot be done (Windows)."""
    known = (
        ("renameat2", -100, 2),  # Linux: AT_FDCWD in fcntl.h, RENAME_EXCHANGE in linux/fs.h
        ("renameatx_np", -2, 2),  # macOS: AT_FDCWD in sys/fcntl.h, RENAME_SWAP in sys/stdio.h
    )
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (TypeError, OSError):  # there is no one C library that every program has
        return None
    for name, here, flag in known:
        call: ctypes._NamedFuncPointer | None = getattr(library, name, None)
        if call is not None:
            call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
            return _Swap(call, here, flag)
    return None


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError where `path` exists and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise UsageError("already exists", where=path, hint="choose another output, or pass --overwrite to replace it")


def publish(temporary: Path, path: Path, *, sync: bool = True) -> None:
    """Make a finished folder appear as `path`, in the place of what was there.

    Args:
        temporary: The folder, on the same file system.
        path: Its name from now on.
        sync: Flush every file to disk first. Without it, a power failure soon afterwards may leave files incomplete.

    Raises:
        OSError: the file system refused.
    """
    if sync:
        _sync_tree(temporary)
    _put_in_place(temporary, path)
    if sync:
        _sync(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):
        temporary.rename(path)
        return
    try:
        exchange(temporary, path)
        _remove(temporary)
    except UsageError:
        # A folder cannot be renamed over a filled one. The old one steps aside for the moment between two renames.
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
        path.rename(aside / path.name)
        try:
            temporary.rename(path)
        except BaseException:
            (aside / path.name).rename(path)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def errors(path: Path, what: str = "could not be written") -> Iterator[None]:
    """Turn an OSError into a VeraToolsError that names `path` and says that nothing was left half-written."""
    try:
        yield
    except OSError as error:
        raise VeraToolsError(
            f"{what}: {error.strerror or error}",
            where=path,
            hint="nothing was left half-written",
        ) from error


def _carry_over(old: Path, new: Path) -> None:
    """The same file, link or folder under another name."""
    if old.is_dir() and not old.is_symlink():
        new.mkdir()
        for entry in os.scandir(old):
            _carry_over(Path(entry.path), new / entry.name)
        _keep_owner(old, new)
        shutil.copystat(old, new)
        return
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, AttributeError, NotImplementedError):  # no hard links here, or too many of them
        shutil.copy2(old, new, follow_symlinks=False)
        _keep_owner(old, new, follow_symlinks=False)


def _keep_owner(old: Path, new: Path, *, follow_symlinks: bool = True) -> None:
    status = old.stat(follow_symlinks=follow_symlinks)
    # Only root may give a file away, and Windows has no owners of this kind.
    with contextlib.suppress(PermissionError, AttributeError):
        os.chown(new, status.st_uid, status.st_gid, follow_symlinks=follow_symlinks)
    if follow_symlinks:
        new.chmod(status.st_mode & 0o7777)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for entry in folder.rglob("*"):
        if (entry.is_file() and not entry.is_symlink()) or entry.is_dir():
            _sync(entry)
    _sync(folder)


def _sync(path: Path) -> None:
    if path.is_dir():
        with contextlib.suppress(OSError):  # Windows opens no folder, and some file systems cannot flush one
            _flush(path, os.O_RDONLY)
        return
    try:
        _flush(path, os.O_RDONLY)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        _flush(path, os.O_RDWR)  # Windows flushes nothing that was opened for reading


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
