"""Writing a folder into an object store, such that whoever reads it finds all of it, or is told that it is not whole.

No store makes several objects appear in one step. So only a name is taken below which there is nothing, and::

    .vera-tools-unfinished     is made first, which one writer alone can, and removed last
    everything else            made, never replaced
    the config                 made when all else is there: without it nobody takes the folder for an adapter or a model

vera-tools reads no folder that has the first. Other readers begin with the config, and find all that it speaks of.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vera_tools.errors import StoreError, UsageError
from vera_tools.files import atomic, store_client
from vera_tools.files.store import UNFINISHED
from vera_tools.files.store_client import AbsentError, Address

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: The clients that make an object in one step, and refuse to where one of that name is there.
SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
#: What a folder is taken for an adapter or a model by.
_CONFIGS = ("adapter_config.json", "config.json")


def refuse(address: Address, *, overwrite: bool) -> None:
    """Find out before any work that a folder cannot be written.

    Raises:
        UsageError: its store's client is not installed, or is not known to write in one step; something is there; or
            it is to be replaced, which takes more than one step.
        StoreError: the store refuses, or cannot be reached.
    """
    where = str(address)
    if address.scheme not in SCHEMES:
        hint = "write to a folder, and copy it there"
        raise UsageError("such a store may show half an object while it is written", where=where, hint=hint)
    if overwrite:
        hint = "write to a new name, and delete the old one"
        raise UsageError("a store cannot replace a folder in one step", where=where, hint=hint)
    if not _parts(address):
        raise UsageError("this is no folder in a store", where=where, expected="a name below a bucket or container")
    try:
        found = store_client.listing(store_client.client(address), address)
    except AbsentError:
        return
    if UNFINISHED in found:
        hint = "wait for it; where nothing writes to it any more, delete what is there"
        raise UsageError("a run is writing here, or was killed while it did", where=where, hint=hint)
    raise UsageError("already exists", where=where, hint="choose another output")


def _parts(address: Address) -> str:
    """What follows the bucket or the container."""
    return address.path if address.scheme == "memory" else address.path.partition("/")[2]


@contextlib.contextmanager
def folder(address: Address) -> Iterator[Path]:
    """Hand out a path for a folder on disk; if it is made, and no error comes up, it comes to lie at `address`.

    Raises:
        UsageError: something has appeared there meanwhile.
        StoreError: the store refuses, or cannot be reached. What was written is removed again, or named.
        VeraToolsError: the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with atomic.errors(Path(tempfile.gettempdir())):
            parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="vera-tools-"))
        path = Path(parent) / address.path.rpartition("/")[2]
        yield path
        if path.is_dir():  # of a dry run nothing is there
            _upload(path, address)


def _upload(folder: Path, address: Address) -> None:
    system = store_client.client(address)
    refuse(address, overwrite=False)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    names.sort(key=lambda name: (name in _CONFIGS, name))
    marker, made = address / UNFINISHED, list[Address]()
    with store_client.errors(str(address), system):
        system.pipe_file(str(marker), b"", mode="create")
    try:
        _refuse_careless(system, marker)
        # Who had the mark before has finished meanwhile, or never. From now on nobody begins.
        taken = store_client.listing(system, address, recursive=True).keys() > {UNFINISHED}
        for name in names if not taken else ():
            to = address / name
            with store_client.errors(str(to), system):
                system.put_file(str(folder / name), str(to), mode="create")
            made.append(to)
        if not taken:
            _check(system, folder, address, names)
    except BaseException:
        _take_back(system, made, marker)
        raise
    try:
        _remove(system, marker)
    except StoreError as error:
        what = "all is written, but the mark that it is not cannot be removed"
        raise StoreError(f"{what}: {error.what}", where=str(marker), hint="delete it") from error
    if taken:
        raise UsageError("has appeared meanwhile", where=str(address), hint="choose another output")


def _refuse_careless(system: AbstractFileSystem, there: Address) -> None:
    """Find out whether a store really refuses to write over what is there: some that speak as S3 does just do it.

    Raises:
        StoreError: it does not.
    """
    with store_client.errors(str(there), system):
        try:
            system.pipe_file(str(there), b"", mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or error.errno == errno.EINVAL:  # a precondition that failed
                return
            raise
    what = "this store writes over what is there although it is told not to"
    raise StoreError(what, where=str(there), hint="write to a folder, and copy it there")


def _check(system: AbstractFileSystem, folder: Path, address: Address, names: list[str]) -> None:
    """Compare what the store lists with what was written."""
    there = store_client.listing(system, address, recursive=True)
    there.pop(UNFINISHED, None)
    sizes = {name: entry.size for name, entry in there.items()}
    if sizes != {name: (folder / name).stat().st_size for name in names}:
        what = "the store does not hold what was written, or somebody else writes there"
        raise StoreError(what, where=str(address), hint="choose another output")


def _take_back(system: AbstractFileSystem, made: list[Address], marker: Address) -> None:
    """Remove what was written, the config first and the marker last.

    Where something stays, be it that the store refuses or that it is not known to be ours, the marker stays too.
    """
    with contextlib.suppress(StoreError):
        for address in reversed(made):
            _remove(system, address)
        folder = Address(marker.scheme, marker.path.rpartition("/")[0])
        if store_client.listing(system, folder, recursive=True).keys() <= {UNFINISHED}:
            _remove(system, marker)


def _remove(system: AbstractFileSystem, address: Address) -> None:
    with store_client.errors(str(address), system):
        system.rm_file(str(address))
