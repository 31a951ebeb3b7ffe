"""Carrying out a plan, file by file: copies, casts and merges run beside each other on a few workers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from vera_tools import blas
from vera_tools.checkpoints.base import BaseModel
from vera_tools.files.local import LocalFile
from vera_tools.files.safetensors import as_bytes, confirm
from vera_tools.merging.copying import PIECE, OutputFile, copy_range
from vera_tools.merging.crew import Tell, crew
from vera_tools.merging.entries import Computed, Copied, Merged
from vera_tools.merging.plan import COMPUTED, Plan, Shard
from vera_tools.merging.staging import Journal, Staging
from vera_tools.merging.values import blocks
from vera_tools.merging.workspace import Workspace
from vera_tools.report import Progress

#: Each worker holds some 40 MB; more of them than this would only wait for the disk.
MOST_WORKERS = 8


@contextlib.contextmanager
def workers(jobs: int | None) -> Iterator[int]:
    """How many workers to run: as many as BLAS has threads, up to 8; it then computes on one thread in each of them.

    BLAS's own threads wait for each other at every product, and on a machine that others use too they wait long.
    Workers of one thread each do not, and overlap products with reading and writing. The limits that users set
    (OPENBLAS_NUM_THREADS, OMP_NUM_THREADS, CPU affinity) are thus kept.
    """
    import threadpoolctl

    threads = blas.threads()
    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield jobs or min(threads, MOST_WORKERS)


class Meter:
    """Counts bytes from several threads and tells `progress`."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int, what: str) -> None:
        """`count` more bytes are done."""
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total, what)


class _Outputs:
    """The files under way, open in this process; a copy of it opens its own. At most two are under way at a time."""

    def __init__(self) -> None:
        self._open: dict[Path, OutputFile] = {}
        self._made: list[Path] = []
        self._lock = threading.Lock()

    def make(self, path: Path) -> OutputFile:
        """A new file."""
        self._made.append(path)
        with self._lock:
            file = self._open[path] = OutputFile(path)
        return file

    def at(self, path: Path) -> OutputFile:
        """One that is there."""
        with self._lock:
            while path not in self._open and len(self._open) > 1:
                self._open.pop(next(iter(self._open))).close()
            if path not in self._open:
                self._open[path] = OutputFile(path, new=False)
            return self._open[path]

    def close(self, path: Path) -> None:
        """Close it."""
        self._open.pop(path).close()

    def discard(self) -> None:
        """Close and remove all of them but those that were moved away."""
        for path in list(self._open):
            self.close(path)
        for path in self._made:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Range:
    """`length` bytes from `start` of the base's file `name`, to be copied to `offset` of the output."""

    name: str
    start: int
    length: int
    offset: int


class _Task(NamedTuple):
    """What is written into one file: a range, or the values of an entry, by their numbers among all."""

    part: Path
    shard: int
    what: _Range | int


class _Written(NamedTuple):
    """Checksum of what was computed, and digest of the base's weight that was read for it."""

    name: str
    xxh3: str
    origin: str | None
    sha256: str | None


def write_shards(
    plan: Plan,
    shards: Sequence[Shard],
    staging: Staging,
    *,
    jobs: int,
    allow_nonfinite: bool,
    meter: Meter,
) -> None:
    """Write `shards`. At most two files are open for writing at a time, and one of them is nearly done.

    Args:
        plan: The plan.
        shards: Those of its files that are to be written.
        staging: Where to.
        jobs: Number of workers.
        allow_nonfinite: Take NaN and infinity as they come.
        meter: Told of every byte.

    Raises:
        CheckFailedError: NaN or infinity; or a weight is not that of the base which an adapter was recorded with.
        FormatError: the base cannot be read, or was changed meanwhile.
        OSError: the output cannot be written.
        VeraToolsError: a worker was ended from outside.
    """
    outputs, workspace = _Outputs(), Workspace()
    under_way: list[tuple[Shard, Path, list[Future[_Written | None]]]] = []

    def perform(task: _Task, tell: Tell) -> _Written | None:
        shard, file = shards[task.shard], outputs.at(task.part)
        if isinstance(task.what, int):
            entry = shard.entries[task.what]
            assert not isinstance(entry, Copied)
            return _compute(plan, shard, entry, file, workspace, allow_nonfinite=allow_nonfinite, tell=tell)
        piece = task.what
        copy_range(plan.base.files[piece.name].source, piece.start, piece.length, file, piece.offset)
        tell(piece.length, shard.name)
        return None

    def is_copied(task: _Task) -> bool:
        return not isinstance(task.what, int)

    try:
        with crew(perform, plan, shards, jobs=jobs, tell=meter.add, begin=staging.leave, alone=is_copied) as give:
            for number, shard in enumerate(shards):
                part = staging.part(shard)
                file = outputs.make(part)
                done = [give(_Task(part, number, what)) for what in _parts(plan.base, shard, last=shard is shards[-1])]
                under_way.append((shard, part, done))
                if number or not file.is_in_memory():  # where all workers would wait for it, with nothing else to do
                    file.reserve(shard.size)
                file.write_at(memoryview(struct.pack("<Q", len(shard.header)) + shard.header), 0)
                if len(under_way) > 1:
                    _finish(*under_way.pop(0), plan, staging, outputs)
            while under_way:
                _finish(*under_way.pop(0), plan, staging, outputs)
    except BaseException:
        outputs.discard()
        raise


def _finish(
    shard: Shard, part: Path, done: list[Future[_Written | None]], plan: Plan, staging: Staging, outputs: _Outputs
) -> None:
    results = [future.result() for future in done]
    origins = {plan.base.files[entry.origin.file].source for entry in shard.entries if entry.origin}
    for origin in origins:
        if isinstance(origin, LocalFile):
            origin.check_unchanged()
    if not all(isinstance(origin, LocalFile) for origin in origins):
        plan.base.check_unchanged()
    for adapter in plan.adapters:
        adapter.checkpoint.check_unchanged()
    outputs.close(part)
    confirm(part)
    computed = [one for one in results if one is not None]
    xxh3 = {one.name: one.xxh3 for one in computed}
    sha256 = {one.origin: one.sha256 for one in computed if one.origin is not None and one.sha256 is not None}
    staging.finish(shard, part, Journal(plan.digest, xxh3, sha256))


def _compute(
    plan: Plan,
    shard: Shard,
    entry: Computed,
    file: OutputFile,
    workspace: Workspace,
    *,
    allow_nonfinite: bool,
    tell: Tell,
) -> _Written:
    checksum = xxhash.xxh3_64()
    digest = hashlib.sha256() if isinstance(entry, Merged) else None
    offset = shard.data_start + entry.info.start
    stop = offset + entry.info.nbytes
    for block in blocks(plan.base, entry, workspace=workspace, digest=digest, allow_nonfinite=allow_nonfinite):
        data = as_bytes(block)
        assert offset + len(data) <= stop, f"{entry.info.name} would reach into its neighbour"
        file.write_at(data, offset)
        checksum.update(data)
        offset += len(data)
        tell(len(data), shard.name)
    assert offset == stop, f"{entry.info.name} is not whole"
    origin = sha256 = None
    if digest is not None and entry.origin is not None:
        origin, sha256 = entry.origin.info.name, digest.hexdigest()
        plan.refuse_another_base(origin, sha256)
    return _Written(entry.info.name, checksum.hexdigest(), origin, sha256)


def _parts(base: BaseModel, shard: Shard, *, last: bool) -> list[_Range | int]:
    """What is to be done for one file.

    In the order of its bytes, so that copying and computing alternate; of the last file what takes longest first, so
    that all workers come to an end together.
    """
    parts: list[tuple[int, int, _Range | int]] = [(piece.offset, piece.length, piece) for piece in _pieces(base, shard)]
    parts += [
        (shard.data_start + entry.info.start, COMPUTED * entry.info.nbytes, number)
        for number, entry in enumerate(shard.entries)
        if not isinstance(entry, Copied)
    ]
    return [part for *_, part in sorted(parts, key=lambda part: -part[1] if last else part[0])]


def _pieces(base: BaseModel, shard: Shard) -> Iterator[_Range]:
    """Everything to copy: neighbours joined, and cut into pieces again that several workers can share."""
    joined: list[_Range] = []
    for entry in shard.entries:
        if not isinstance(entry, Copied) or entry.info.nbytes == 0:
            continue
        name, info = entry.origin
        start, offset = base.files[name].data_start + info.start, shard.data_start + entry.info.start
        last = joined[-1] if joined else None
        if last and (name, start, offset) == (last.name, last.start + last.length, last.offset + last.length):
            joined[-1] = dataclasses.replace(last, length=last.length + info.nbytes)
        else:
            joined.append(_Range(name, start, info.nbytes, offset))
    for whole in joined:
        for done in range(0, whole.length, PIECE):
            yield _Range(whole.name, whole.start + done, min(PIECE, whole.length - done), whole.offset + done)
