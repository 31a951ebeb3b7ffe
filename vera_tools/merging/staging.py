"""The folder in which a merge grows: hidden beside the output, resumable, and shared by the processes of one merge.

::

    .OUT.merge/
      lock             held while a process works here: shared by `--part` processes, alone otherwise
      plan             digest of the plan; a process with another plan is refused
      shared           present where `--part` processes fill it
      parts/NAME       a file that is being written
      journal/NAME     JSON: what a finished file's tensors are known by
      output/NAME      finished files; becomes OUT as a whole

A file counts as finished once it is in ``output``, and it is renamed there after its journal was written. A process
that is killed leaves the folder behind; the system drops its lock.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.files import atomic, locking
from vera_tools.merging.plan import Plan, Shard


@dataclass(frozen=True)
class Journal:
    """What is known of a finished file.

    Attributes:
        plan: Digest of the plan that it was written by.
        xxh3: Checksum (xxh3_64) of every tensor that was computed, by name.
        base_sha256: Digest of the base's weight that a tensor was merged into, by the base's name.
    """

    plan: str
    xxh3: dict[str, str]
    base_sha256: dict[str, str]


class Staging:
    """One merge's folder, locked."""

    def __init__(self, folder: Path, output: Path, lock: io.FileIO) -> None:
        self.folder, self.path, self._lock = folder, output, lock

    @property
    def output(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "output"

    def part(self, shard: Shard) -> Path:
        """Where a file is written; each process has its own, so that none disturbs another's."""
        return self.folder / "parts" / f"{shard.name}.{platform.node()}.{os.getpid()}"

    def done(self, shard: Shard) -> Path:
        """Where it lies when it is finished."""
        return self.output / shard.name

    def finish(self, shard: Shard, part: Path, journal: Journal) -> None:
        """Declare a written file finished. What a power failure leaves of it is found out by the checksums."""
        atomic.write_bytes(self.folder / "journal" / shard.name, json.dumps(asdict(journal)).encode(), sync=False)
        part.replace(self.done(shard))

    def journal(self, shard: Shard) -> Journal | None:
        """What is known of a finished file, or None where it is not finished, or the journal is damaged."""
        if not self.done(shard).is_file():
            return None
        try:
            return Journal(**json.loads((self.folder / "journal" / shard.name).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def leave(self) -> None:
        """In a copy of the process that entered: let go of the lock, which then ends with that process."""
        self._lock.close()

    def publish(self, *, overwrite: bool, sync: bool) -> None:
        """Make the output appear, and remove the rest.

        Raises:
            UsageError: something of that name has appeared meanwhile.
        """
        atomic.publish(self.output, self.path, overwrite=overwrite, sync=sync)
        self.discard()

    def discard(self) -> None:
        """Remove everything, the lock last: until it is gone no other process begins here."""
        with contextlib.suppress(OSError):
            _clear(self.folder)
            try:
                _remove_lock(self.folder)
            except PermissionError:  # Windows removes no open file: ours, nor one that another process has just opened
                self._lock.close()
                _remove_lock(self.folder)


def place(output: Path) -> Path:
    """The staging folder that belongs to an output."""
    return output.parent / f".{output.name}.merge"


@contextlib.contextmanager
def enter(output: Path, plan: Plan, *, resume: bool, shared: bool, finish: bool = False) -> Iterator[Staging]:
    """Create or take up the staging folder of `output` and hold its lock.

    Args:
        output: The output folder, which does not exist yet.
        plan: What is to be written.
        resume: Take up what an earlier process left; otherwise that is removed.
        shared: Other processes work on the same merge.
        finish: This process finishes what others have filled.

    Raises:
        UsageError: another process is at work on this output, what is there belongs to another merge, or there is
            nothing to finish.
        VeraToolsError: the file system refused.
    """
    output = output.absolute()
    folder = place(output)
    with atomic.errors(output):
        if finish and not folder.is_dir():
            raise UsageError(
                "there is nothing to finish", where=output, hint="run the merge with --part 1/N to N/N first"
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, output, shared=shared) as lock:
            staging = Staging(folder, output, lock)
            _take_up(folder, output, plan, resume=resume or finish, shared=shared)
            if not shared:  # what is in parts then belongs to processes that are no more
                shutil.rmtree(folder / "parts", ignore_errors=True)
                for unfinished in (folder / "journal").glob(".*.tmp"):
                    shutil.rmtree(unfinished, ignore_errors=True)
            for name in ("parts", "journal", "output"):
                (folder / name).mkdir(exist_ok=True)
            try:
                yield staging
            except Exception:
                if not (resume or shared or finish):
                    staging.discard()
                raise


def refuse(output: Path, plan: Plan, *, shared: bool) -> None:
    """Refuse what `enter` would refuse, and touch nothing. For a merge that resumes nothing.

    Raises:
        UsageError: another process is at work on this output, or what is there belongs to another merge.
        VeraToolsError: the output could not be made there.
    """
    output = output.absolute()
    folder = place(output)
    atomic.refuse_forbidden(output)
    if not folder.is_dir():
        return
    with atomic.errors(output), contextlib.suppress(FileNotFoundError), io.FileIO(folder / "lock") as lock:
        if locking.take(lock.fileno(), shared=shared) is False:
            raise _busy(output)
    _refuse_another(folder, output, plan, resume=False, shared=shared)


def _remove_lock(folder: Path) -> None:
    (folder / "lock").unlink(missing_ok=True)
    folder.rmdir()  # fails where another process has begun at once


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _take_up(folder: Path, output: Path, plan: Plan, *, resume: bool, shared: bool) -> None:
    _refuse_another(folder, output, plan, resume=resume, shared=shared)
    plan_file = folder / "plan"
    if not (resume or shared):
        _clear(folder)
    if not (plan_file.exists() and plan_file.read_text("utf-8")):
        atomic.write_bytes(plan_file, plan.digest.encode(), sync=False)
    if shared:
        (folder / "shared").touch()


def _refuse_another(folder: Path, output: Path, plan: Plan, *, resume: bool, shared: bool) -> None:
    if not (resume or shared):
        if (folder / "shared").exists():
            raise UsageError(
                "processes with --part have begun to fill this output",
                where=output,
                hint=f"end them with --finish, or delete {folder}",
            )
        return
    plan_file = folder / "plan"
    # A power failure may have emptied it.
    known = (plan_file.read_text("utf-8") or None) if plan_file.exists() else None
    if known is not None and known != plan.digest:
        raise UsageError(
            "what was begun here belongs to another merge: base, adapters, weights or options are not the same",
            where=output,
            hint=f"repeat it as it was begun, or delete {folder}",
        )


@contextlib.contextmanager
def _locked(folder: Path, output: Path, *, shared: bool) -> Iterator[io.FileIO]:
    while True:
        folder.mkdir(exist_ok=True)
        try:
            lock = io.FileIO(folder / "lock", "a")
        except FileNotFoundError:  # another process has just finished and removed the folder
            continue
        with lock:
            taken = locking.take(lock.fileno(), shared=shared)
            if taken is None:
                message = f"{output}: there are no file locks here, so a second merge into it would not be refused"
                warnings.warn(message, VeraToolsWarning, stacklevel=5)
            if taken is False:
                raise _busy(output)
            if not _is_current(lock.fileno(), folder / "lock"):
                continue  # locked a file that was removed meanwhile
            yield lock
            return


def _busy(output: Path) -> UsageError:
    hint = "wait for it, or choose another output"
    return UsageError("another merge is at work on this output", where=output, hint=hint)


def _is_current(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False
