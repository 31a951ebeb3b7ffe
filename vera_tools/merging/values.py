"""The values of one tensor of the result, block by block: merged, replaced or cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vera_tools.base import BaseModel
from vera_tools.dtypes import HALVES
from vera_tools.merging import arithmetic
from vera_tools.merging.arithmetic import Delta, accumulator, doubtful, rounded, row_blocks
from vera_tools.merging.changes import Part
from vera_tools.merging.plan import Entry
from vera_tools.prng import Array
from vera_tools.tensorfile import as_bytes

if TYPE_CHECKING:
    import hashlib

#: Elements that are cast or replaced at a time.
FLAT_BLOCK = 1 << 20


def blocks(
    base: BaseModel, entry: Entry, *, digest: hashlib._Hash | None = None, exact: bool = False
) -> Iterator[Array]:
    """The tensor that an entry describes, in row-major order.

    Args:
        base: The open base.
        entry: An entry that is not "copied".
        digest: Updated with the base's bytes.
        exact: Compute in float64 and leave the result in it, for verification.
    """
    if entry.kind == "merged":
        yield from _merged(base, entry, digest, exact=exact)
    elif entry.kind == "cast":
        for start, stop in _flat_blocks(entry.info.size):
            yield _finished(_read(base, entry, start, stop), entry, exact=exact)
    else:
        yield from _replaced(base, entry, exact=exact)


def delta(entry: Entry, *, dtype: np.dtype[np.float32] | np.dtype[np.float64]) -> Delta:
    """The change of a merged weight."""
    factors = [
        part.adapter.factor(part.layer, part.linear)
        for part in entry.parts
        if part.layer is not None and part.linear is not None
    ]
    return Delta(factors, transposed=entry.transposed, dtype=dtype)


def _merged(base: BaseModel, entry: Entry, digest: hashlib._Hash | None, *, exact: bool) -> Iterator[Array]:
    assert entry.origin is not None
    dtype = np.dtype(np.float64) if exact else accumulator(entry.origin[1].dtype)
    change = delta(entry, dtype=dtype)
    columns = change.shape[1]
    settle = entry.info.dtype in HALVES and dtype == np.float32
    scratch: Array | None = None
    double: Delta | None = None
    for start, stop in row_blocks(change.shape):
        weight = _read(base, entry, start * columns, stop * columns).reshape(-1, columns)
        if digest is not None:
            digest.update(as_bytes(weight))
        if scratch is None:
            scratch = np.empty(weight.shape, dtype)
        left = change.left(start, stop)
        total = change.product(left, out=scratch)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(total, weight, out=total, dtype=dtype, casting="same_kind")
        result = _finished(total, entry, exact=exact)
        if settle:
            rows, places = doubtful(total, result, spread=change.spread(left))
            if rows.size > arithmetic.CROWDED * result.size:
                double = double or delta(entry, dtype=np.dtype(np.float64))
                wide = double.rows(start, stop, out=np.empty(weight.shape))
                wide += weight.astype(np.float64)
                result = rounded(wide, entry.info.dtype)
            else:
                result[rows, places] = rounded(change.exactly(weight, rows, places, start=start), entry.info.dtype)
        yield result


def _replaced(base: BaseModel, entry: Entry, *, exact: bool) -> Iterator[Array]:
    (part,) = entry.parts
    assert part.replacement is not None
    for start, stop in _flat_blocks(entry.info.size):
        values = part.adapter.checkpoint.weights.read_elements(part.replacement, start, stop)
        if part.adapter.weight != 1:
            values = _weighted(_read(base, entry, start, stop), values, part)
        yield _finished(values, entry, exact=exact)


def _weighted(old: Array, new: Array, part: Part) -> Array:
    """Between the base's values and the adapter's: base + weight * (saved - base), in float64."""
    before = old.astype(np.float64)
    result: Array = before + part.adapter.weight * (new.astype(np.float64) - before)
    return result


def _finished(values: Array, entry: Entry, *, exact: bool) -> Array:
    return values.astype(np.float64, copy=False) if exact else rounded(values, entry.info.dtype)


def _read(base: BaseModel, entry: Entry, start: int, stop: int) -> Array:
    assert entry.origin is not None
    name, info = entry.origin
    return base.files[name].read_elements(info, start, stop)


def _flat_blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, FLAT_BLOCK):
        yield start, min(start + FLAT_BLOCK, size)
