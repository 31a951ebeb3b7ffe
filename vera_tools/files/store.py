"""A folder in an object store, read by ranges, as it was when it was listed.

What is read is held against the listing at the end, so that all of it was there at one time, or it is an error.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vera_tools.errors import FormatError, StoreError
from vera_tools.files import store_client
from vera_tools.files.local import Folder
from vera_tools.files.ranges import RangedFile
from vera_tools.files.store_client import AbsentError, Address, Entry

if TYPE_CHECKING:
    from collections.abc import Callable

    from fsspec import AbstractFileSystem

#: Stands in a folder for as long as it is not whole.
UNFINISHED = ".vera-tools-unfinished"


def locate(address: Address) -> tuple[StoreFolder, str | None]:
    """The folder that an address stands for, and the file in it that was named, if one was.

    Raises:
        UsageError: the store's client is not installed.
        StoreError: nothing is there, it cannot be reached, or it lists what is in no folder.
    """
    system = store_client.client(address)
    files = store_client.listing(system, address)
    if list(files) != [""]:
        return StoreFolder(system, address, files), None
    above, _, name = address.path.rpartition("/")
    parent = Address(address.scheme, above)
    return StoreFolder(system, parent, store_client.listing(system, parent)), name


def folders(address: Address) -> dict[Address, list[str]]:
    """Every folder at or below an address, hidden ones left out, with its files' names; none for what is a file.

    Raises:
        UsageError: the store's client is not installed.
        StoreError: nothing is there, it cannot be reached, or it lists what is in no folder.
    """
    files = store_client.listing(store_client.client(address), address, recursive=True)
    if list(files) == [""]:
        return {address: []}
    found: dict[str, list[str]] = {}
    for path in files:
        folder, _, name = path.rpartition("/")
        if not any(part.startswith(".") for part in folder.split("/")):
            found.setdefault(folder, []).append(name)
    return {address / folder if folder else address: names for folder, names in found.items()}


def state_of(folder: Folder) -> str | None:
    """The state of a folder in a store; None of one that is elsewhere."""
    return folder.state if isinstance(folder, StoreFolder) else None


class StoreFolder:
    """A folder in a store.

    Attributes:
        label: As it was asked for.
        address: Where it is.
    """

    def __init__(self, system: AbstractFileSystem, address: Address, files: dict[str, Entry]) -> None:
        self.label, self.address = str(address), address
        self._system, self._files = system, files
        #: What was read, here and in folders below, with what its folder's listing said of it.
        self._read: dict[Address, dict[str, Entry]] = {}
        if UNFINISHED in files:
            raise FormatError(
                "this is being written, or was left unfinished by a run that was killed",
                where=self.label,
                hint="wait for it, or delete it where nothing writes to it",
            )

    @property
    def state(self) -> str:
        """40 digits that are others where one of its files is another one."""
        files = sorted((name, entry.version) for name, entry in self._files.items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]

    def names(self) -> list[str]:
        """Sorted names of the files."""
        return sorted(self._files)

    def path_of(self, name: str) -> str:
        """The file's address."""
        return str(self.address / name)

    def open(self, name: str) -> StoreFile:
        """Open one file.

        Raises:
            StoreError: no such file, or it cannot be reached.
            FormatError: it was changed since the folder was listed.
        """
        if name not in self._files:
            raise StoreError("no such file in the store", where=self.path_of(name), hint="check the name")
        entry, where = self._files[name], self.path_of(name)
        self._read.setdefault(self.address, {})[name] = entry
        return StoreFile(self._system, entry, label=where)

    def folder(self, name: str) -> StoreFolder | None:
        """A folder in it, or None where there is none.

        Raises:
            StoreError: it cannot be reached.
        """
        address = self.address / name
        with store_client.errors(str(address), self._system):
            there = self._system.isdir(str(address))
        if not there:
            return None
        inside = StoreFolder(self._system, address, store_client.listing(self._system, address))
        inside._read = self._read
        return inside

    def refuse_leaving(self, name: str) -> None:
        """There are no links."""

    def check_unchanged(self, at: Path | None = None) -> None:
        """Refuse to go on where a file that was read is not the same any more, or is gone.

        Raises:
            FormatError: it is not.
            StoreError: the store cannot be asked.
        """
        for address, files in list(self._read.items()):
            try:
                now = store_client.listing(self._system, address)
            except AbsentError:
                now = {}
            for name, before in list(files.items()):
                found = now.get(name)
                if found is None or found.version != before.version:
                    raise store_client.changed(str(address / name))

    def forget(self, name: str | None = None) -> None:
        """Take what was read for settled, or one file of it: it is not checked again."""
        if name is None:
            self._read.clear()
        else:
            self._read.get(self.address, {}).pop(name, None)


class StoreFile(RangedFile):
    """A file in a store, of the version that its folder's listing names."""

    def __init__(self, system: AbstractFileSystem, entry: Entry, *, label: str) -> None:
        super().__init__(label=label, size=entry.size)
        self._system, self._entry = system, entry

    @property
    def version(self) -> str:
        """What the store's listing tells it from others by."""
        return self._entry.version

    @functools.cached_property
    def _reader(self) -> Callable[[int, int], bytes]:
        return store_client.reader(self._system, self._entry, where=self.label)

    def _get_whole(self, *, before: tuple[int, bytes]) -> bytes:
        content, (first, held) = self._ask(0, self.size + 1), before  # a byte more, to see that there is none
        if len(content) != self.size or content[first : first + len(held)] != held:
            raise store_client.changed(self.label)
        return content

    def _get_range(self, start: int, stop: int) -> bytes:
        content = self._ask(start, stop) if stop > start else b""
        if len(content) != stop - start:
            raise store_client.changed(self.label)
        return content

    def _ask(self, start: int, stop: int) -> bytes:
        try:
            with store_client.errors(self.label, self._system):
                return self._reader(start, stop)
        except AbsentError as error:  # it was there when its folder was listed
            raise store_client.changed(self.label) from error

    def _too_short(self, expected: int) -> FormatError:
        return store_client.changed(self.label)
