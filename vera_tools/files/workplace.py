"""Where an output grows: a hidden folder beside it, which says whose it is, so that none is left for ever.

::

    .NAME.XXXXXXXX.tmp/
      lock       held by the process that works here, and empty until it holds it
      NAME       what is written; it is renamed out of here when it is finished

A process that is killed leaves the folder behind, and the system drops its lock. The next one that writes to the same
output removes it, if it can prove that it is such a folder and that nobody works in it; what it cannot prove, it names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from vera_tools.errors import LeftoverWarning
from vera_tools.files import locking

_LOCK = "lock"
_MARK = b"vera-tools works here, or was killed here\n"
#: Seconds after which a folder without a proof is spoken of: until then, somebody may just have made it.
_QUIET = 60


class Workplace:
    """One such folder, held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = (folder / _LOCK).open("xb", buffering=0)
        locking.take(self._lock.fileno())
        self._lock.write(_MARK)  # not before it is held: whoever reads this and gets the lock knows that we are gone

    def keep(self) -> None:
        """Leave what is in it for the user, and to no later process."""
        self._lock.close()
        with contextlib.suppress(OSError):
            (self.folder / _LOCK).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything, the lock last: until then nobody else takes it for abandoned."""
        _remove(self.folder)
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Workplace]:
    """A workplace in the folder of `path`, empty but for its lock, and removed at the end unless it was `keep`-ed.

    Raises:
        OSError: the file system refused.
    """
    _sweep(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        place = Workplace(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        yield place
    finally:
        if (folder / _LOCK).exists():
            place.remove()


def _sweep(path: Path) -> None:
    """Remove, or name, what killed processes left beside an output."""
    try:
        with os.scandir(path.parent) as entries:
            found = [
                Path(entry.path)
                for entry in entries
                if entry.name.startswith(f".{path.name}.")
                and entry.name.endswith(".tmp")
                and len(entry.name) == len(path.name) + len("..12345678.tmp")
            ]
    except OSError:  # whoever writes there says so
        return
    for folder in sorted(found):
        proof = _abandoned(folder)
        if proof:
            what = "removed what a run that was killed had left here"
        elif proof is None and _is_old(folder):
            what = "left here by a run that was killed, or one is at work in it: delete it where none is"
        else:
            continue
        warnings.warn(f"{folder}: {what}", LeftoverWarning, stacklevel=2)


def _abandoned(folder: Path) -> bool | None:
    """Remove the folder where it is ours and nobody works in it. False: somebody does. None: nothing proves either."""
    lock = folder / _LOCK
    if folder.is_symlink() or lock.is_symlink() or not lock.is_file():
        return None
    try:
        with lock.open("rb") as stream:
            if stream.read(len(_MARK) + 1) != _MARK:
                return None
            taken = locking.take(stream.fileno())
            if taken:
                _remove(folder)
    except OSError:
        return None
    if not taken:
        return taken
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _remove(folder: Path) -> None:
    """Everything but the lock."""
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            if entry.name == _LOCK:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.lstat().st_mtime > _QUIET
    except OSError:  # gone meanwhile
        return False
