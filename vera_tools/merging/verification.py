"""Reading a merged file back and proving it: copied tensors by digest, computed ones by computing them again.

Tensors are computed again in float64. A stored value passes where it is what some number within the error bound of a
float32 sum rounds to; the bound is Higham's, (n + 4) * 2**-24 * ||row|| * ||column|| for a product of inner dimension
n, plus the sum's own rounding. So a file that another machine merged passes too, whatever the order in which its BLAS
adds, and one wrong bit above the last does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from vera_tools.checkpoints.base import BaseModel
from vera_tools.dtypes import Array
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files.safetensors import TensorFile, as_bytes
from vera_tools.merging.entries import Copied, Entry, Merged
from vera_tools.merging.execution import Meter
from vera_tools.merging.plan import Plan, Shard
from vera_tools.merging.rounding import rounded
from vera_tools.merging.staging import Journal, Staging
from vera_tools.merging.values import blocks, delta
from vera_tools.merging.workspace import Workspace


@dataclass(frozen=True)
class Verification:
    """What reading the result back has proven.

    Attributes:
        copied: Tensors whose digest is the base's.
        computed: Tensors that were computed again.
        elements: Elements of those.
        off: Elements among them that are not the correctly rounded result of float64 arithmetic, yet within the bound.
        sha256: Digest of every tensor of the result, by name.
    """

    copied: int
    computed: int
    elements: int
    off: int
    sha256: dict[str, str]


def verify(plan: Plan, folder: Path, *, jobs: int, meter: Meter) -> Verification:
    """Read the files of `folder` back and compare them with the plan.

    Raises:
        CheckFailedError: a tensor is not what it should be.
        FormatError: a file is missing, or malformed.
    """
    workspace = Workspace()
    with ThreadPoolExecutor(jobs) as pool:
        files = [_open(folder, shard) for shard in plan.shards]
        try:
            results = list(
                pool.map(
                    lambda task: _check(plan.base, *task, workspace=workspace, meter=meter),
                    [(file, entry) for shard, file in zip(plan.shards, files, strict=True) for entry in shard.entries],
                )
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            for file in files:
                file.close()
    computed = [result for result in results if not isinstance(result.entry, Copied)]
    return Verification(
        copied=len(results) - len(computed),
        computed=len(computed),
        elements=sum(result.entry.info.size for result in computed),
        off=sum(result.off for result in computed),
        sha256={result.entry.info.name: result.sha256 for result in results},
    )


def finished(plan: Plan, shards: Sequence[Shard], staging: Staging, *, jobs: int) -> list[Shard]:
    """Those of `shards` that an earlier process left whole: header, copied bytes, checksums of what was computed."""
    with ThreadPoolExecutor(jobs) as pool:
        whole = list(pool.map(lambda shard: _is_finished(plan, shard, staging), shards))
    return [shard for shard, is_whole in zip(shards, whole, strict=True) if is_whole]


def _is_finished(plan: Plan, shard: Shard, staging: Staging) -> bool:
    journal = staging.journal(shard)
    computed = {entry.info.name for entry in shard.entries if not isinstance(entry, Copied)}
    if journal is None or journal.plan != plan.digest or set(journal.xxh3) != computed:
        return False
    try:
        file = TensorFile.open(staging.done(shard))
    except FormatError:
        return False
    with file:
        return file.header == shard.header and all(
            _is_whole(plan.base, file, entry, journal) for entry in shard.entries
        )


def _is_whole(base: BaseModel, file: TensorFile, entry: Entry, journal: Journal) -> bool:
    if isinstance(entry, Copied):
        name, info = entry.origin
        ours, theirs = file.chunks(entry.info), base.files[name].chunks(info)
        return all(a == b for a, b in zip(ours, theirs, strict=True))
    checksum = xxhash.xxh3_64()
    for chunk in file.chunks(entry.info):
        checksum.update(chunk)
    return checksum.hexdigest() == journal.xxh3[entry.info.name]


@dataclass(frozen=True)
class _Result:
    entry: Entry
    sha256: str
    off: int = 0


def _open(folder: Path, shard: Shard) -> TensorFile:
    file = TensorFile.open(folder / shard.name)
    if file.header != shard.header:
        file.close()
        raise CheckFailedError("the header is not the planned one", where=folder / shard.name)
    return file


def _check(base: BaseModel, file: TensorFile, entry: Entry, *, workspace: Workspace, meter: Meter) -> _Result:
    where = f"{file.label}: {entry.info.name}"
    if isinstance(entry, Copied):
        name, info = entry.origin
        found, expected = file.sha256(entry.info.name), base.files[name].sha256(info.name)
        if found != expected:
            raise CheckFailedError("is not the base's tensor", where=where, expected=f"sha256 {expected}", found=found)
        meter.add(entry.info.nbytes, "verifying")
        return _Result(entry, found)
    digest = hashlib.sha256()
    bound = _Bound(entry)
    position = off = 0
    for exact in blocks(base, entry, exact=True, workspace=workspace):
        stored = file.read_elements(entry.info, position, position + exact.size)
        digest.update(as_bytes(stored))
        off += _compare(stored, exact.reshape(-1), bound.of(position, exact), entry.info.dtype, where=where)
        position += exact.size
        meter.add(stored.nbytes, "verifying")
    return _Result(entry, digest.hexdigest(), off)


def _compare(stored: Array, exact: Array, bound: Array | float, dtype: str, *, where: str) -> int:
    """Number of elements that are not the correctly rounded `exact`.

    Raises:
        CheckFailedError: one is further off than the bound allows.
    """
    bits = np.dtype(f"u{stored.dtype.itemsize}")
    # The sum of a zero and a product may be -0.0 or 0.0; the two are one number.
    differing = (stored.view(bits) != rounded(exact, dtype).view(bits)) & (stored != rounded(exact, dtype))
    with np.errstate(invalid="ignore"):
        differing &= ~(np.isnan(stored) & np.isnan(exact))
    places = np.flatnonzero(differing)
    if places.size == 0:
        return 0
    slack = np.broadcast_to(np.asarray(bound), exact.shape)[places]
    values = stored[places].astype(np.float64)
    low = rounded(exact[places] - slack, dtype).astype(np.float64)
    high = rounded(exact[places] + slack, dtype).astype(np.float64)
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise CheckFailedError(
            f"{int(wrong.sum())} elements are not what they should be",
            where=where,
            expected=f"{exact[places][first]:.9g} at element {int(places[first])} of the block",
            found=f"{values[first]:.9g}",
        )
    return int(places.size)


class _Bound:
    """How far a sum in the accumulation's precision may lie from the exact one, element by element."""

    def __init__(self, entry: Entry) -> None:
        self._rows: Array | None = None
        if not isinstance(entry, Merged):
            return
        change = delta(entry, dtype=np.dtype(np.float64), workspace=Workspace())
        # A float64 weight is compared with another float64 sum, which is off by as much.
        self._unit = 2.0**-52 if entry.origin.info.dtype == "float64" else 2.0**-24
        norms = [np.linalg.norm(change.left(start, stop), axis=1) for start, stop in _steps(change.shape[0])]
        self._rows = np.concatenate(norms) * ((change.right.shape[0] + 4) * self._unit)
        self._columns = np.linalg.norm(change.right, axis=0)

    def of(self, position: int, exact: Array) -> Array | float:
        """The bound for a block that starts at element `position`, flattened."""
        if self._rows is None:
            return 0.0
        start = position // exact.shape[1]
        rows = self._rows[start : start + exact.shape[0]]
        result: Array = (np.outer(rows, self._columns) + self._unit * np.abs(exact)).reshape(-1)
        return result


def _steps(size: int, step: int = 4096) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]
