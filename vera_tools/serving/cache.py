"""A bounded cache of folders on disk, shared by processes. Each is kept under a key that says what it was made of.

::

    CACHE/
      lock        held by the process that works here: one at a time looks up, makes, keeps and removes
      work/       what it makes; whatever a killed one left there is removed by the next
      KEY/        what is kept
      KEY.entry   the digests of its files; its time is that of the last use, and who serves from it holds a lock on it

What a living process was given stays: a server reads an adapter again whenever it has dropped it from memory. Of the
others, the one that was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

from vera_tools.errors import UsageError, VeraToolsError
from vera_tools.files import atomic, locking

_ENTRY = ".entry"


class Cache:
    """One such folder.

    Args:
        folder: Where it is; it is made where there is none.
        most: The bytes that what is kept may take together.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most
        self._held: dict[str, int] = {}  # descriptors: who has no cache any more serves nothing from it
        weakref.finalize(self, _close, self._held)

    @contextlib.contextmanager
    def alone(self) -> Iterator[Path]:
        """Wait until nobody else works here; an empty folder to make things in, which is removed at the end.

        Raises:
            UsageError: the folder is open to everybody, or its file system has no locks.
            VeraToolsError: the file system refused.
        """
        work = self.folder / "work"
        with atomic.errors(self.folder, "the cache cannot be used"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_strangers()
            with (self.folder / "lock").open("ab") as lock:
                if not locking.wait(lock.fileno()):
                    raise UsageError("this file system has no locks", where=self.folder, hint="name another folder")
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                try:
                    yield work
                finally:
                    shutil.rmtree(work, ignore_errors=True)

    def find(self, key: str) -> Path | None:
        """What is kept under the key, if every byte is as it was; it is held from now on. For within `alone`."""
        folder, entry = self.folder / key, self.folder / f"{key}{_ENTRY}"
        try:
            if json.loads(entry.read_text("utf-8")) != _digests(folder):
                return None
        except (OSError, ValueError):
            return None
        self._hold(key)
        return folder

    def keep(self, key: str, made: Path) -> Path:
        """Keep a folder that was made within `alone`, and hold it; what lies under the key already is replaced.

        Raises:
            VeraToolsError: there is no room for it, or the file system refused.
        """
        self.make_room(_size(made), key)
        folder = self.folder / key
        digests = _digests(made)
        atomic.publish(made, folder, overwrite=True)
        # In place, since others may hold it. Half-written it fits nothing, and what lies here is made anew.
        (self.folder / f"{key}{_ENTRY}").write_bytes(json.dumps(digests).encode())
        self._hold(key)
        return folder

    def make_room(self, needed: int, key: str = "") -> None:
        """Remove what was not used for longest until `needed` bytes fit, `key`'s own not counted. For within `alone`.

        Raises:
            VeraToolsError: they cannot, since they are more than all, or processes serve from what is kept.
        """
        kept = [path for path in self.folder.iterdir() if path.is_dir() and path.name not in ("work", key)]
        sizes = {path: _size(path) for path in sorted(kept, key=self._used)}
        excess = sum(sizes.values()) + needed - self.most
        going = []
        for path, size in sizes.items():
            if excess <= 0:
                break
            if self._is_free(path.name):
                going.append(path)
                excess -= size
        if excess > 0:
            raise VeraToolsError(
                "the cache has no room for it",
                where=self.folder,
                expected=f"at most {self.most} bytes, with what running servers were given",
                found=f"{self.most + excess} bytes",
                hint="set VERA_TOOLS_VLLM_CACHE_BYTES higher",
            )
        for path in going:
            (self.folder / f"{path.name}{_ENTRY}").unlink(missing_ok=True)  # first: without it, the folder is nothing
            shutil.rmtree(path)

    def _refuse_strangers(self) -> None:
        if os.name == "posix":
            status = self.folder.stat()
            if status.st_mode & 0o002 or status.st_uid not in (0, os.geteuid()):
                hint = "name a folder of your own, into which not everybody writes"
                raise UsageError("somebody else could put other weights here", where=self.folder, hint=hint)

    def _used(self, path: Path) -> int:
        """When it was used last; what is not whole was never."""
        try:
            return (self.folder / f"{path.name}{_ENTRY}").stat().st_mtime_ns
        except OSError:
            return 0

    def _is_free(self, key: str) -> bool:
        """Whether no living process was given it."""
        try:
            with (self.folder / f"{key}{_ENTRY}").open("rb") as entry:
                return locking.take(entry.fileno()) is True
        except FileNotFoundError:
            return True

    def _hold(self, key: str) -> None:
        path = self.folder / f"{key}{_ENTRY}"
        os.utime(path)
        descriptor = os.open(path, os.O_RDONLY)
        if not locking.take(descriptor, shared=True):
            os.close(descriptor)
            raise VeraToolsError("cannot be locked", where=path)
        if key in self._held:
            os.close(self._held[key])
        self._held[key] = descriptor


def _close(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
        found[path.name] = digest.hexdigest()
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
