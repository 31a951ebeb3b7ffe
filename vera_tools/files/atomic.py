"""The one way in which vera-tools writes: a file or a folder appears whole, or not at all.

Everything is written in a hidden folder beside it (`workplace`), flushed to disk, and renamed. A process that is killed
leaves the old state or the new one, and at most that folder. What is there already is exchanged with the new in a
single step, and what must not be there is not replaced, where the system has such calls (`renaming`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from vera_tools.errors import UsageError, VeraToolsError
from vera_tools.files import attributes, local, locking, renaming, workplace

#: (device, inode, bytes, nanoseconds of the last writing) of a file.
_Known = dict[str, tuple[int, int, int, int]]


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
def file(path: Path, *, overwrite: bool = True, sync: bool = True) -> Iterator[Path]:
    """Hand out a path to write to; on leaving without an error it becomes `path`, with `path`'s old attributes.

    Args:
        path: The file.
        overwrite: Replace what is there.
        sync: As for `write_bytes`.

    Raises:
        UsageError: `path` has appeared meanwhile, and `overwrite` is false; or it is a device, a pipe or a socket.
        VeraToolsError: the file system refused.
    """
    refuse_special(path)
    with errors(path.parent, "could not be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with errors(path), workplace.beside(path) as place:
        temporary = place.folder / path.name
        temporary.touch()
        yield temporary
        if path.exists():
            attributes.keep(path, temporary)
        if sync:
            _sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)
        if sync:
            _sync(path.parent)


@contextlib.contextmanager
def folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty folder to write into; on leaving without an error it becomes `path`.

    Raises:
        UsageError: `path` exists, or does in the end, and `overwrite` is false.
        VeraToolsError: the file system refused.
    """
    refuse_existing(path, overwrite=overwrite)
    with errors(path.parent, "could not be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
    with errors(path), workplace.beside(path) as place:
        temporary = place.folder / path.name
        temporary.mkdir()
        if path.is_dir() and not path.is_symlink():
            attributes.keep_group(path, temporary)
        yield temporary
        if path.is_dir() and not path.is_symlink():
            attributes.keep(path, temporary)
        publish(temporary, path, overwrite=overwrite)


@contextlib.contextmanager
def replacement(
    path: Path, *, drop: Collection[str] = (), check: Callable[[Path], None] = lambda _: None
) -> Iterator[Path]:
    """Hand out an empty folder to write into; on leaving without an error it is exchanged with the folder `path`.

    What `path` holds and the new folder does not is carried over, subfolders included, as hard links where the file
    system has them. Permissions, owners and extended attributes stay as they were. What comes to lie in `path` while
    the new folder is written is carried over too: it is looked through again after the exchange.

    Args:
        path: A folder. Where it is a symbolic link, the folder behind it is replaced and the link stays.
        drop: Names of files that are not carried over.
        check: Called with the place of the old folder, before the exchange and again after it, when nobody finds the
            old folder under its name any more. Where it raises, the old folder comes back.

    Raises:
        UsageError: the system cannot exchange two folders in one step.
        VeraToolsError: the file system refused.
    """
    with errors(path):
        path = path.resolve(strict=True)
        if not renaming.can_exchange():
            raise no_exchange(path)
        with alone(path), workplace.beside(path) as place:
            temporary = place.folder / path.name
            temporary.mkdir()
            attributes.keep_group(path, temporary)
            yield temporary
            written, known = {entry.name for entry in os.scandir(temporary)}, _Known()
            for entry in os.scandir(path):
                if entry.name in written:
                    attributes.keep(Path(entry.path), temporary / entry.name)
                elif entry.name not in drop:
                    _carry_over(Path(entry.path), temporary / entry.name, known, entry.name)
            _sync_tree(temporary)
            attributes.keep(path, temporary)
            check(path)
            exchange(temporary, path)
            try:
                check(temporary)
            except BaseException:
                exchange(temporary, path)
                raise
            try:
                _catch_up(temporary, path, known, written | set(drop))
            except OSError as error:
                place.keep()
                what = f"files that came while it was replaced could not be carried over: {error.strerror or error}"
                raise VeraToolsError(what, where=path, hint=f"they lie in {temporary}") from error
            _sync(path.parent)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep out every other process that changes what lies in a folder and asks for this too, and wait for one.

    Where the system cannot lock a folder, nobody is kept out.

    Raises:
        OSError: there is no such folder.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # Windows opens no folder
            descriptor = None
        if descriptor is None:
            yield
            return
        try:
            locking.wait(descriptor)
            here, there = os.fstat(descriptor), os.stat(path)
            if (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino):
                yield
                return
        finally:  # it was exchanged meanwhile: the lock on the new one is wanted
            os.close(descriptor)


def exchange(a: Path, b: Path) -> None:
    """Swap what two names of one file system stand for, in a single step.

    Raises:
        UsageError: this system or this file system has no such operation.
        OSError: it has, and refused.
    """
    if not renaming.exchange(a, b):
        raise no_exchange(b)


@dataclass(frozen=True)
class Sort:
    """A sort of output file.

    Attributes:
        words: What it is called.
        mark: What stands, in lower case, among its first 4,096 bytes.
    """

    words: str
    mark: bytes


PAGE, JUNIT = Sort("page", b"<!doctype html"), Sort("JUnit XML", b"<testsuite")


def no_exchange(path: Path) -> UsageError:
    """What is said where the system cannot replace a folder in one step."""
    return UsageError(
        "this system cannot replace a folder in one step", where=path, hint="write to another folder with -o instead"
    )


def refuse_unwritable(path: Path, sort: Sort | None = None) -> None:
    """Find out before any work that an output file could not be written after it.

    Args:
        path: The file.
        sort: What is written, where a file that is there is replaced only if it is of that sort.

    Raises:
        UsageError: there is no folder for it, nothing can be written there, or what is there is something else.
    """
    refuse_special(path)
    parent = path.parent
    if not parent.is_dir():
        raise UsageError("there is no folder to write it to", where=path, hint=f"make {parent} first")
    try:  # asking for the rights says nothing of a file system that is read-only, full, or no disk at all
        descriptor, name = tempfile.mkstemp(dir=parent)
        os.close(descriptor)  # before it goes: Windows removes no open file
        os.unlink(name)
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=path) from error
    if sort is not None and path.is_file():
        refuse_other(path, sort)


def refuse_special(path: Path) -> None:
    """Refuse to put a file in the place of what is none: root's /dev/null would be an ordinary file from then on.

    Raises:
        UsageError: a device, a pipe, a socket, a link to one of this process's streams, as /dev/stdout is, or any
            name among the system's devices.
    """
    kind = None if path.is_dir() or not path.exists() else local.not_a_file(path)
    if kind is None and path.is_symlink() and str(path.parent / os.readlink(path)).startswith("/proc/"):
        kind = "a stream of this process"
    if kind is None and os.path.realpath(path.parent) == "/dev":
        kind = "among the system's devices"
    if kind is not None:
        raise UsageError(f"is {kind}, and a file is to be written", where=path, hint="name a file")


def refuse_other(path: Path, sort: Sort) -> None:
    """Refuse to replace a file that is something else, as it is where an option's value is a checkpoint by mistake.

    Raises:
        UsageError: it is, or cannot be read. An empty file is of every sort.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(1 << 12)
    except OSError as error:
        raise UsageError(f"cannot be replaced: {error.strerror}", where=path) from error
    if start and sort.mark not in start.lower():
        raise UsageError(
            f"is there, and no {sort.words}, so it is not replaced",
            where=path,
            hint="choose another file, or delete it yourself",
        )


def refuse_forbidden(path: Path) -> None:
    """Refuse, without a touch, where nobody would let an output be made; what only writing tells is not found.

    Raises:
        VeraToolsError: the nearest folder above `path` that is there may not be written to.
    """
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not os.access(above, os.W_OK | os.X_OK):
        with errors(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError where `path` exists and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise _exists(path)


def _exists(path: Path) -> UsageError:
    return UsageError("already exists", where=path, hint="choose another output, or pass --overwrite to replace it")


def publish(temporary: Path, path: Path, *, overwrite: bool, sync: bool = True) -> None:
    """Make a finished folder appear as `path`.

    Args:
        temporary: The folder, on the same file system.
        path: Its name from now on.
        overwrite: Put it in the place of what is there.
        sync: Flush every file to disk first. Without it, a power failure soon afterwards may leave files incomplete.

    Raises:
        UsageError: `path` exists, and `overwrite` is false: what has appeared meanwhile is somebody else's.
        OSError: the file system refused.
    """
    if sync:
        _sync_tree(temporary)
    if overwrite and os.path.lexists(path):
        with alone(path) if path.is_dir() and not path.is_symlink() else contextlib.nullcontext():
            _put_in_place(temporary, path)
    else:
        _rename_to_new(temporary, path)
    if sync:
        _sync(path.parent)


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename, if nothing of that name is there: of two processes that do, one is refused."""
    try:
        if not renaming.to_new(temporary, path):  # the system has no such call
            refuse_existing(path, overwrite=False)
            temporary.rename(path)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError:
        refuse_existing(path, overwrite=False)
        raise


def _put_in_place(temporary: Path, path: Path) -> None:
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


def _carry_over(old: Path, new: Path, known: _Known, name: str) -> None:
    """The same file, link or folder under another name; what it was then is noted under its path in `known`."""
    if old.is_dir() and not old.is_symlink():
        new.mkdir()
        for entry in os.scandir(old):
            _carry_over(Path(entry.path), new / entry.name, known, f"{name}/{entry.name}")
        attributes.keep(old, new)
        shutil.copystat(old, new)
        return
    known[name] = _state(old)
    try:
        os.link(old, new, follow_symlinks=False)
    except (OSError, AttributeError, NotImplementedError):  # no hard links here, or too many of them
        shutil.copy2(old, new, follow_symlinks=False)
        attributes.keep(old, new, follow_symlinks=False)


def _catch_up(old: Path, new: Path, known: _Known, done: Collection[str], inside: str = "") -> None:
    """Move from the old folder what has come since it was carried over: new files, and those put in a file's place."""
    for entry in list(os.scandir(old)):
        name, here, there = f"{inside}{entry.name}", Path(entry.path), new / entry.name
        if name in done:
            continue
        if entry.is_dir(follow_symlinks=False) and there.is_dir() and not there.is_symlink():
            _catch_up(here, there, known, done, f"{name}/")
        elif name not in known:
            # What is there by now came after the exchange, and so is newer.
            with contextlib.suppress(UsageError):
                _rename_to_new(here, there)
        elif _state(here) != known[name] and os.path.lexists(there):
            os.replace(here, there)


def _state(path: Path) -> tuple[int, int, int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


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
