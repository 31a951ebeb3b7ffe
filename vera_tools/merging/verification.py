"""Reading a merged file back and proving it: copied tensors by digest, computed ones by computing them again.

Tensors are computed again in float64. A half-precision value passes where it is the exact sum, correctly rounded; where
float64 cannot tell, integers do. A float32 value passes where it is what some number within the error bound of a
float32 sum rounds to (`Delta.error_share`), plus the sum's own rounding. So a file that another machine merged passes
too, whatever the order in which its BLAS adds, and one wrong bit above the last does not.
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
from vera_tools.dtypes import HALVES, Array
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files.safetensors import TensorFile, as_bytes
from vera_tools.merging.arithmetic import UNITS
from vera_tools.merging.crew import Tell, crew
from vera_tools.merging.entries import Copied, Entry, Merged
from vera_tools.merging.execution import Meter
from vera_tools.merging.plan import Plan, Shard
from vera_tools.merging.rounding import MAX_EXACT, rounded
from vera_tools.merging.staging import Journal, Staging
from vera_tools.merging.values import blocks, delta, exact_at
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


def verify(plan: Plan, staging: Staging, *, jobs: int, meter: Meter) -> Verification:
    """Read the files that were written back and compare them with the plan.

    Raises:
        CheckFailedError: a tensor is not what it should be.
        FormatError: a file is missing, or malformed.
    """
    workspace, files = Workspace(), list[TensorFile]()

    def perform(task: tuple[int, int], tell: Tell) -> _Result:
        place, number = task
        return _check(plan.base, files[place], plan.shards[place].entries[number], workspace=workspace, tell=tell)

    tasks = [(place, number) for place, shard in enumerate(plan.shards) for number in range(len(shard.entries))]
    try:
        files += [_open(staging.output, shard) for shard in plan.shards]
        with crew(perform, plan, plan.shards, jobs=jobs, tell=meter.add, begin=staging.leave) as give:
            results = [future.result() for future in [give(task) for task in tasks]]
    finally:
        for file in files:
            file.close()
    entries = [plan.shards[place].entries[number] for place, number in tasks]
    computed = [entry for entry in entries if not isinstance(entry, Copied)]
    return Verification(
        copied=len(entries) - len(computed),
        computed=len(computed),
        elements=sum(entry.info.size for entry in computed),
        off=sum(result.off for result in results),
        sha256={entry.info.name: result.sha256 for entry, result in zip(entries, results, strict=True)},
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
    sha256: str
    off: int = 0


def _open(folder: Path, shard: Shard) -> TensorFile:
    file = TensorFile.open(folder / shard.name)
    if file.header != shard.header:
        file.close()
        raise CheckFailedError("the header is not the planned one", where=folder / shard.name)
    return file


def _check(base: BaseModel, file: TensorFile, entry: Entry, *, workspace: Workspace, tell: Tell) -> _Result:
    where = f"{file.label}: {entry.info.name}"
    if isinstance(entry, Copied):
        name, info = entry.origin
        found, expected = file.sha256(entry.info.name), base.files[name].sha256(info.name)
        if found != expected:
            raise CheckFailedError("is not the base's tensor", where=where, expected=f"sha256 {expected}", found=found)
        tell(entry.info.nbytes, "verifying")
        return _Result(found)
    digest = hashlib.sha256()
    bound = _Bound(entry)
    position = off = 0
    for exact in blocks(base, entry, exact=True, workspace=workspace):
        stored = file.read_elements(entry.info, position, position + exact.size)
        digest.update(as_bytes(stored))
        slack = bound.of(position, exact)
        exact = exact.reshape(-1)
        places = _open_places(stored, exact, slack, entry.info.dtype)
        if isinstance(entry, Merged) and entry.info.dtype in HALVES:
            _settle(base, entry, stored, position, places, where=where)
        else:
            off += _compare(stored[places], exact[places], slack[places], entry.info.dtype, where=where)
        position += exact.size
        tell(stored.nbytes, "verifying")
    return _Result(digest.hexdigest(), off)


def _open_places(stored: Array, exact: Array, slack: Array, dtype: str) -> Array:
    """Where not every number within `slack` of `exact` rounds to what is stored."""
    with np.errstate(over="ignore", invalid="ignore"):
        slack = np.where(np.isfinite(exact), slack, 0)
        low, high = rounded(exact - slack, dtype), rounded(exact + slack, dtype)
        # As numbers and not as bits: the sum of a zero and a product may be -0.0 or 0.0.
        return np.flatnonzero(~((low == stored) & (high == stored)) & ~(np.isnan(stored) & np.isnan(exact)))


def _settle(base: BaseModel, entry: Merged, stored: Array, position: int, places: Array, *, where: str) -> None:
    """Compare a half-precision tensor, where float64 leaves it open, with the exact sums.

    Raises:
        CheckFailedError: an element is not the exact sum correctly rounded, or too many are open.
    """
    if places.size > MAX_EXACT:
        raise CheckFailedError(
            f"{places.size} elements are not what they should be, or nearer to the middle between two numbers than "
            "float64 can tell",
            where=where,
        )
    if not places.size:
        return
    exact = exact_at(base, entry, places + position)
    expected = rounded(exact, entry.info.dtype)
    wrong = np.flatnonzero(expected != stored[places])  # where both are NaN, nothing is open
    if wrong.size:
        raise _wrong(exact, stored[places], wrong, where=where)


def _compare(stored: Array, exact: Array, slack: Array, dtype: str, *, where: str) -> int:
    """Number of elements that are not the correctly rounded `exact`.

    Raises:
        CheckFailedError: one is further off than `slack` allows.
    """
    values = stored.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        low = rounded(exact - slack, dtype).astype(np.float64)
        high = rounded(exact + slack, dtype).astype(np.float64)
    wrong = np.flatnonzero(~((values >= low) & (values <= high)))
    if wrong.size:
        raise _wrong(exact, stored, wrong, where=where)
    return int(np.count_nonzero(stored != rounded(exact, dtype)))


def _wrong(exact: Array, stored: Array, wrong: Array, *, where: str) -> CheckFailedError:
    first = int(wrong[0])
    return CheckFailedError(
        f"{wrong.size} elements are not what they should be",
        where=where,
        expected=f"{exact[first]:.9g} at the first of them",
        found=f"{stored[first].astype(np.float64):.9g}",
    )


class _Bound:
    """How far a sum may lie from the exact one, element by element.

    Of a half-precision tensor it is the error of the float64 sum that it is compared with, of another one the error of
    what is stored: a sum in float32, or of a float64 weight another float64 sum, which is off by as much.
    """

    def __init__(self, entry: Entry) -> None:
        self._rows: Array | None = None
        if not isinstance(entry, Merged):
            return
        change = delta(entry, dtype=np.dtype(np.float64), workspace=Workspace())
        in_float32 = entry.info.dtype not in HALVES and entry.origin.info.dtype != "float64"
        dtype: np.dtype[np.floating] = np.dtype(np.float32) if in_float32 else np.dtype(np.float64)
        self._unit = 4 * UNITS[dtype]
        steps = [change.spread(change.left(start, stop), start) for start, stop in _steps(change.shape[0])]
        # A layer may have no rows at all: PEFT adapts those of a configuration that leaves nothing over for it.
        self._rows = np.concatenate([np.zeros(0), *steps]) * (
            2 * change.error_share(dtype)
        )  # what it is compared with errs too

    def of(self, position: int, exact: Array) -> Array:
        """The bound for a block that starts at element `position`, flattened."""
        if self._rows is None:
            return np.zeros(exact.size)
        start = position // exact.shape[1]
        rows = self._rows[start : start + exact.shape[0]]
        with np.errstate(over="ignore", invalid="ignore"):
            result: Array = (rows[:, None] + self._unit * np.abs(exact)).reshape(-1)
        return result


def _steps(size: int, step: int = 4096) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]
