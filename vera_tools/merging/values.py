"""The values of one tensor of the result, block by block: merged, replaced or cast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.dtypes import HALVES, Array, np_dtype
from vera_tools.files.safetensors import as_bytes
from vera_tools.merging import arithmetic
from vera_tools.merging.arithmetic import Delta, accumulator, row_blocks
from vera_tools.merging.entries import Cast, Computed, Merged, Origin, Patched, Replaced
from vera_tools.merging.rounding import check_finite, decide, either_way, largest, put, rounded, sum_to_half
from vera_tools.merging.workspace import Workspace

if TYPE_CHECKING:
    import hashlib

#: Elements that are cast or replaced at a time.
FLAT_BLOCK = 1 << 20
# Elements that are multiplied in float64 and rounded together.
_STRIP = 1 << 18


def blocks(
    base: BaseModel,
    entry: Computed,
    *,
    workspace: Workspace,
    digest: hashlib._Hash | None = None,
    exact: bool = False,
    allow_nonfinite: bool = True,
) -> Iterator[Array]:
    """The tensor that an entry describes, in row-major order. A block is good until the next one is asked for.

    Args:
        base: The open base.
        entry: An entry whose values are computed.
        workspace: Scratch memory.
        digest: Updated with the base's bytes.
        exact: Compute in float64 and leave the result in it, for verification.
        allow_nonfinite: Take NaN and infinity as they come.

    Raises:
        CheckFailedError: NaN or infinity.
        FormatError: the base cannot be read.
    """
    if isinstance(entry, Merged):
        results = _merged(base, entry, digest, exact=exact, workspace=workspace)
    elif isinstance(entry, Cast):
        results = (
            (_finished(_read(base, entry.origin, start, stop, workspace), entry, exact=exact), False)
            for start, stop in _flat_blocks(entry.info.size)
        )
    elif isinstance(entry, Patched):
        results = ((values, False) for values in _patched(base, entry, exact=exact, workspace=workspace))
    else:
        results = ((values, False) for values in _replaced(base, entry, exact=exact, workspace=workspace))
    for values, is_finite in results:
        if not (is_finite or allow_nonfinite):
            check_finite(values, where=f"{base.label}: {entry.info.name}", what="the base's weight or the result holds")
        yield values


def delta(entry: Merged, *, dtype: np.dtype[np.float32] | np.dtype[np.float64], workspace: Workspace) -> Delta:
    """The change of a merged weight."""
    factors = [product.factor() for product in entry.products]
    return Delta(factors, transposed=entry.transposed, dtype=dtype, workspace=workspace)


def _merged(
    base: BaseModel, entry: Merged, digest: hashlib._Hash | None, *, exact: bool, workspace: Workspace
) -> Iterator[tuple[Array, bool]]:
    """Blocks of rows, each with whether it is known to be finite."""
    dtype = np.dtype(np.float64) if exact else accumulator(entry.origin.info.dtype)
    change = delta(entry, dtype=dtype, workspace=workspace)
    columns = change.shape[1]
    in_float32 = dtype == np.float32
    if entry.info.dtype in HALVES:
        change.widen()
    for start, stop in row_blocks(change.shape):
        weight = _read(base, entry.origin, start * columns, stop * columns, workspace).reshape(-1, columns)
        if digest is not None:
            digest.update(as_bytes(weight))
        if entry.info.dtype in HALVES and not exact:
            settled = _in_float32(change, weight, entry, start=start, workspace=workspace) if in_float32 else None
            if settled is None:
                if change.dtype == np.float32:
                    in_float32, change = False, delta(entry, dtype=np.dtype(np.float64), workspace=workspace)
                settled = _in_float64(change, weight, entry, start=start, workspace=workspace)
            yield settled
        else:
            total = change.rows(start, stop, out=workspace.matrix("total", weight.shape, dtype))
            with np.errstate(over="ignore", invalid="ignore"):
                result = workspace.array("result", weight.shape, dtype)
                total = np.add(total, weight, out=result, dtype=dtype, casting="same_kind")
            yield _finished(total, entry, exact=exact), False


def _in_float32(
    change: Delta, weight: Array, entry: Merged, *, start: int, workspace: Workspace
) -> tuple[Array, bool] | None:
    """The correctly rounded sum in a half type, of rows from `start` on, and whether it is known to be finite.

    None where float32 is no use: numbers are too large for it, or it leaves too many elements open.
    """
    left = change.left(start, start + len(weight))
    spread, bounds = _largest_sums(change, left, weight, start)
    bound, (share, own) = bounds.max(), change.error_shares()
    if not np.isfinite(bound + np.float32(share)):
        return None
    total = workspace.padded("total", weight.shape, np.float32)
    change.product(left, out=total[:, : weight.shape[1]])
    result = workspace.array("result", weight.shape, np_dtype(entry.info.dtype))
    error = spread * np.float32(share)
    rows, columns = sum_to_half(
        total,
        weight,
        error=error,
        bound=bounds,
        out=result,
        workspace=workspace,
        own=np.float32(own),
        shares=change.shares,
    )
    if rows.size > arithmetic.CROWDED * result.size:
        return None
    if rows.size > arithmetic.MANY * result.size:
        change.narrow()
    put(result, rows, columns, _settled(change, weight, entry, spread, (rows, columns), start))
    return result, _fits(bound, entry.info.dtype)


def _settled(
    change: Delta, weight: Array, entry: Merged, spread: Array, places: tuple[Array, Array], start: int
) -> Array:
    """The correctly rounded sums at the doubtful places of a block."""
    rows, columns = places
    sums, errors = change.closely(weight, rows, columns, start=start, spread=spread, products=np.dtype(np.float32))
    with np.errstate(over="ignore"):
        result, doubtful = either_way(sums.astype(np.float32), errors.astype(np.float32), entry.info.dtype)
    doubtful = np.flatnonzero(doubtful)
    rows, columns = rows[doubtful], columns[doubtful]
    sums, errors = change.closely(weight, rows, columns, start=start, spread=spread, products=np.dtype(np.float64))
    result[doubtful] = _decided(change, weight, entry, sums, errors, (rows, columns), start)
    return result


def _in_float64(change: Delta, weight: Array, entry: Merged, *, start: int, workspace: Workspace) -> tuple[Array, bool]:
    """The same by way of float64, whatever the numbers are; NaN and infinity come out where they go in."""
    left = change.left(start, start + len(weight))
    spread, bounds = _largest_sums(change, left, weight, start)
    bound = bounds.max()
    result = workspace.array("result", weight.shape, np_dtype(entry.info.dtype))
    step = max(1, _STRIP // weight.shape[1])
    for done in range(0, len(weight), step):
        strip = slice(done, done + step)
        stored, out = weight[strip], result[strip]
        with np.errstate(over="ignore", invalid="ignore"):
            sums = change.product(left[strip], out=workspace.array("sums", stored.shape, np.float64))
            sums += stored
            errors = spread[strip] * change.error_share(np.dtype(np.float64))
        if np.isfinite(bound):  # rounded to float32 they tell which are near a middle, at a fraction of the cost
            total = workspace.array("total", stored.shape, np.float32)
            np.copyto(total, sums, casting="same_kind")
            error = errors.astype(np.float32) + np.float32(2.0**-148)
            rows, places = sum_to_half(total, None, error=error, bound=bound, out=out, workspace=workspace)
        else:
            rows, places = np.divmod(np.arange(stored.size), stored.shape[1])
        chosen = sums[rows, places]
        out[rows, places] = _decided(change, stored, entry, chosen, errors[rows], (rows, places), start + done)
    return result, _fits(bound, entry.info.dtype)


def _largest_sums(change: Delta, left: Array, weight: Array, start: int) -> tuple[Array, Array]:
    """What no element of each row of a change exceeds, and what no sum of it does; infinite or NaN past float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        spread = change.spread(left, start)
        return spread, ((spread + largest(weight).astype(np.float64)) * 1.001).astype(np.float32)


def _fits(bound: np.float32, dtype: str) -> bool:
    return bool(np.isfinite(rounded(np.array(bound), dtype)))


def _decided(
    change: Delta, weight: Array, entry: Merged, sums: Array, errors: Array, places: tuple[Array, Array], start: int
) -> Array:
    """The float64 sums at some places of a block, rounded as the exact ones are."""

    def exactly(chosen: Array) -> Array:
        rows, columns = (indices[chosen] for indices in places)
        return change.exactly(weight[rows, columns], rows + start, columns)

    return decide(sums, errors, entry.info.dtype, exactly)


def exact_at(base: BaseModel, entry: Merged, places: Array) -> Array:
    """Single elements of a merged tensor, by their places in row-major order: exact, in float64 rounded to odd."""
    name, info = entry.origin
    weights = np.concatenate([base.files[name].read_elements(info, place, place + 1) for place in places.tolist()])
    change = delta(entry, dtype=np.dtype(np.float64), workspace=Workspace())
    return change.exactly(weights, *np.divmod(places, change.shape[1]))


def _replaced(base: BaseModel, entry: Replaced, *, exact: bool, workspace: Workspace) -> Iterator[Array]:
    adapter, tensor = entry.saved.adapter, entry.saved.tensor
    weights, spans = adapter.checkpoint.weights, _flat_blocks(entry.info.size)
    if entry.transposed:
        whole = np.swapaxes(weights.read(tensor.name), -1, -2).reshape(-1)
        saved = ((start, stop, whole[start:stop]) for start, stop in spans)
    else:
        saved = ((*span, values) for span, values in zip(spans, weights.in_order(tensor, FLAT_BLOCK), strict=True))
    for start, stop, values in saved:
        if adapter.weight != 1 and entry.origin is not None:  # what the base lacks has weight 1
            values = _weighted(_read(base, entry.origin, start, stop, workspace), values, adapter.weight)
        yield _finished(values, entry, exact=exact)


def _patched(base: BaseModel, entry: Patched, *, exact: bool, workspace: Workspace) -> Iterator[Array]:
    """The base's rows, those that adapters saved put in their place."""
    shape = entry.info.shape
    columns = shape[-1] if len(shape) > 1 else 1
    count = entry.info.size // columns
    # For each row, which patch it is of, and which row of that.
    patch, row = np.full(count, -1), np.zeros(count, np.intp)
    saved = []
    for number, (replacement, piece) in enumerate(entry.patches):
        values = replacement.adapter.checkpoint.weights.read(replacement.tensor.name).reshape(-1, columns)
        patch[piece.rows], row[piece.rows] = number, np.arange(len(values))[piece.of]
        saved.append((values, replacement.adapter.weight))
    for start, stop in row_blocks((count, columns)):
        block = _read(base, entry.origin, start * columns, stop * columns, workspace).reshape(-1, columns)
        result = block.astype(np.float64)
        for number, (values, weight) in enumerate(saved):
            here = np.flatnonzero(patch[start:stop] == number)
            result[here] = _weighted(block[here], values[row[start + here]], weight)
        yield _finished(result, entry, exact=exact)


def _weighted(old: Array, new: Array, weight: float) -> Array:
    """Between the base's values and the adapter's: base + weight * (saved - base), in float64."""
    before = old.astype(np.float64)
    result: Array = before + weight * (new.astype(np.float64) - before)
    return result


def _finished(values: Array, entry: Computed, *, exact: bool) -> Array:
    return values.astype(np.float64, copy=False) if exact else rounded(values, entry.info.dtype)


def _read(base: BaseModel, origin: Origin, start: int, stop: int, workspace: Workspace) -> Array:
    name, info = origin
    out = workspace.array("weight", (stop - start,), np_dtype(info.dtype))
    return base.files[name].read_elements(info, start, stop, out=out)


def _flat_blocks(size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, FLAT_BLOCK):
        yield start, min(start + FLAT_BLOCK, size)
