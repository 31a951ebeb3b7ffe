"""The one way in which vera-tools writes: a file or a folder appears whole, or not at all.

Everything is written under a temporary name in the same parent folder, flushed to disk, and renamed. A process that is
killed leaves the old state, and at most a hidden ``.NAME.XXXX.tmp`` beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vera_tools.errors import UsageError, VeraToolsError


def write_bytes(path: Path, data: bytes) -> None:
    """Write one file.

    Raises:
        VeraToolsError: the file system refused (full, read-only, ...).
    """
    with file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Hand out a temporary path; on leaving without an error it becomes `path`, with `path`'s old permissions."""
    with _errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            os.fchmod(descriptor, path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
            os.close(descriptor)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty temporary folder; on leaving without an error it becomes `path`.

    Raises:
        UsageError: `path` exists and `overwrite` is false.
        VeraToolsError: the file system refused.
    """
    refuse_existing(path, overwrite=overwrite)
    with _errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            for entry in temporary.rglob("*"):
                if entry.is_file():
                    _sync(entry)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise UsageError where `path` exists and may not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise UsageError("already exists", where=path, hint="choose another output, or pass --overwrite to replace it")


def _put_in_place(temporary: Path, path: Path) -> None:
    if not os.path.lexists(path):
        temporary.rename(path)
    else:
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
    _sync(path.parent)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VeraToolsError(
            f"could not be written: {error.strerror or error}",
            where=path,
            hint="nothing was left half-written",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems cannot sync a folder
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
