"""Carrying out a plan, file by file: copies, casts and merges run beside each other on a few workers."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from vera_tools import blas
from vera_tools.checkpoints.base import BaseModel
from vera_tools.files.local import LocalFile
from vera_tools.files.safetensors import as_bytes, confirm
from vera_tools.merging.copying import PIECE, OutputFile, copy_range
from vera_tools.merging.entries import Computed, Copied, Merged
from vera_tools.merging.plan import Plan, Shard
from vera_tools.merging.staging import Journal, Staging
from vera_tools.merging.values import blocks
from vera_tools.merging.workspace import Workspace
from vera_tools.report import Progress

#: Each worker holds some 20 MB; more of them than this would only wait for the disk.
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


@dataclass
class _Work:
    """One file under way."""

    shard: Shard
    part: Path
    file: OutputFile
    futures: list[Future[None]] = field(default_factory=list)
    xxh3: dict[str, str] = field(default_factory=dict)
    base_sha256: dict[str, str] = field(default_factory=dict)


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
    """
    under_way: list[_Work] = []
    workspace = Workspace()
    pool = ThreadPoolExecutor(jobs)
    try:
        for shard in shards:
            work = _open(shard, staging)
            under_way.append(work)
            for task in _tasks(plan, work, workspace, allow_nonfinite=allow_nonfinite, meter=meter):
                work.futures.append(pool.submit(task))
            if len(under_way) > 1:
                _close(under_way.pop(0), plan, staging)
        while under_way:
            _close(under_way.pop(0), plan, staging)
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        for work in under_way:
            work.file.close()
            work.part.unlink(missing_ok=True)
        raise
    pool.shutdown()


def _open(shard: Shard, staging: Staging) -> _Work:
    part = staging.part(shard)
    file = OutputFile(part)
    try:
        file.reserve(shard.size)
        file.write_at(memoryview(struct.pack("<Q", len(shard.header)) + shard.header), 0)
    except BaseException:
        file.close()
        part.unlink(missing_ok=True)
        raise
    return _Work(shard, part, file)


def _close(work: _Work, plan: Plan, staging: Staging) -> None:
    try:
        for future in work.futures:
            future.result()
        origins = {plan.base.files[entry.origin.file].source for entry in work.shard.entries if entry.origin}
        for origin in origins:
            if isinstance(origin, LocalFile):
                origin.check_unchanged()
        if not all(isinstance(origin, LocalFile) for origin in origins):
            plan.base.check_unchanged()
        for adapter in plan.adapters:
            adapter.checkpoint.check_unchanged()
        work.file.close()
        confirm(work.part)
        staging.finish(work.shard, work.part, Journal(plan.digest, work.xxh3, work.base_sha256))
    except BaseException:
        for future in work.futures:
            future.cancel()
        for future in work.futures:
            if not future.cancelled():
                future.exception()
        work.file.close()
        work.part.unlink(missing_ok=True)
        raise


def _tasks(
    plan: Plan, work: _Work, workspace: Workspace, *, allow_nonfinite: bool, meter: Meter
) -> Iterator[Callable[[], None]]:
    """What is to be done for one file, in the order of its bytes, so that copying and computing alternate."""

    def copy(piece: _Range) -> None:
        copy_range(plan.base.files[piece.name].source, piece.start, piece.length, work.file, piece.offset)
        meter.add(piece.length, work.shard.name)

    def compute(entry: Computed) -> None:
        checksum = xxhash.xxh3_64()
        digest = hashlib.sha256() if isinstance(entry, Merged) else None
        offset = work.shard.data_start + entry.info.start
        for block in blocks(plan.base, entry, workspace=workspace, digest=digest, allow_nonfinite=allow_nonfinite):
            data = as_bytes(block)
            work.file.write_at(data, offset)
            checksum.update(data)
            offset += len(data)
            meter.add(len(data), work.shard.name)
        work.xxh3[entry.info.name] = checksum.hexdigest()
        if digest is not None and entry.origin is not None:
            sha256 = work.base_sha256[entry.origin.info.name] = digest.hexdigest()
            plan.refuse_another_base(entry.origin.info.name, sha256)

    tasks = [(piece.offset, functools.partial(copy, piece)) for piece in _pieces(plan.base, work.shard)]
    tasks += [
        (work.shard.data_start + entry.info.start, functools.partial(compute, entry))
        for entry in work.shard.entries
        if not isinstance(entry, Copied)
    ]
    for _, task in sorted(tasks, key=lambda item: item[0]):
        yield task


@dataclass(frozen=True)
class _Range:
    """`length` bytes from `start` of the base's file `name`, to be copied to `offset` of the output."""

    name: str
    start: int
    length: int
    offset: int


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
