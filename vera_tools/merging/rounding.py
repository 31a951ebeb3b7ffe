"""Rounding sums to a weight's dtype once, finding the sums too inexact for that, and refusing what is not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vera_tools.dtypes import HALVES, Array, np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.merging.workspace import Workspace, row_by_row
from vera_tools.projections.floats import to_odd

#: Elements that go through all steps of `sum_to_half` together: few enough for a CPU's cache, and worth a call each.
STRIP = 1 << 18

# Adding a weight to a product rounds once, by at most 2**-24 of the sum, and so does adding an error to the sum.
_LAST_BITS = np.float32(2.0**-23 * 1.02)

# The same for float64, where the margin itself is added with one more rounding.
_LAST_BITS_OF_DOUBLE = 2.0**-51

_NOTHING, _SMALLEST = np.float32(0), np.float32(2.0**-149)  # of all that float32 holds

#: Elements of one block, or of one tensor that is verified, that are computed in integers at most: two minutes or so.
MAX_EXACT = 1 << 17

# What bfloat16 cuts off a float32: so many bits, and half and one of its last place in them.
_BITS, _HALF, _ONE = np.uint32(16), np.uint32(1 << 15), np.uint32(1 << 16)


def rounded(values: Array, dtype: str) -> Array:
    """`values` in another dtype, rounded to nearest even once. Overflow gives infinity, as a cast does."""
    target = np_dtype(dtype)
    if values.dtype == np.float64 and dtype in HALVES:
        values = to_odd(values)  # through float32, without rounding twice
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(target, copy=False)


def sum_to_half(
    total: Array,
    weight: Array | None,
    *,
    error: Array,
    bound: Array | np.float32,
    out: Array,
    workspace: Workspace,
    own: np.float32 = _NOTHING,
    shares: Array | None = None,
) -> tuple[Array, Array]:
    """Add a weight to a product, round to a half type, and find what its own error may have rounded the wrong way.

    Where a sum less its error rounds to the same number as the sum plus its error, so does the exact sum. The others
    are doubtful, and what `out` holds there is one of the two.

    Args:
        total: (rows, columns or more) float32, the product; holds the sum afterwards.
        weight: (rows, columns), of any dtype that float32 holds; None where `total` is the sum already, rounded once.
        error: (rows,) float32: how far the products of a row may be off.
        bound: No sum is larger, of all or of each row. Finite.
        out: (rows, columns), bfloat16 or float16: the result.
        workspace: Scratch memory.
        own: By what share of itself each product may be off besides.
        shares: (columns,) float32: how much of a row's error is possible in each column. Default: all.

    Returns:
        Rows and columns of the doubtful elements.
    """
    columns = out.shape[1]
    step = max(1, STRIP // max(1, columns))
    # Never zero, also where so little is lost below the smallest number: a tie is rounded wrongly at first.
    slack = np.maximum(error + bound * _LAST_BITS, _SMALLEST)[:, None]
    round_both = _bfloat16_by_integers if out.dtype == np_dtype("bfloat16") else _by_casts
    places = []
    with np.errstate(over="ignore"), row_by_row():
        for start in range(0, len(out), step):
            strip = slice(start, start + step)
            sums = total[strip, :columns]
            either = workspace.array("either", (2, *sums.shape), np.float32)
            if own:
                slack[strip, 0] += own * largest(sums, axis=1)
            if weight is not None:
                _add(weight[strip], sums, scratch=either[0])
            np.add(sums, slack[strip], out=either[0])
            np.subtract(sums, slack[strip], out=either[1])
            differs = workspace.array("differs", sums.shape, np.bool_)
            round_both(either, out=out[strip], differs=differs)
            places.append(np.flatnonzero(differs) + start * columns)
    found = np.concatenate([np.zeros(0, np.intp), *places])
    rows = found // max(columns, 1)
    inside = found - rows * columns
    # A second look at the few whose result is open: now each by its own error, and not by its row's largest.
    sums = at(total, rows, inside)
    errors = error[rows] if shares is None else error[rows] * shares[inside]
    if own:
        errors += own * np.abs(sums if weight is None else sums - wide(at(weight, rows, inside)))
    values, doubtful = either_way(sums, errors, out.dtype.name)
    put(out, rows, inside, values)
    open_ = np.flatnonzero(doubtful)
    return rows[open_], inside[open_]


def at(matrix: Array, rows: Array, columns: Array) -> Array:
    """Single elements of a matrix whose rows follow each other. Two indices would take twice as long as one."""
    elements: Array = matrix.reshape(-1)[rows * matrix.shape[1] + columns]
    return elements


def put(matrix: Array, rows: Array, columns: Array, values: Array) -> None:
    """Write elements of a half type. By integers: bfloat16 is no dtype of numpy's own, which takes it byte by byte."""
    matrix.view(np.uint16).reshape(-1)[rows * matrix.shape[1] + columns] = values.view(np.uint16)


def wide(values: Array) -> Array:
    """bfloat16 in float32, by integers as in `put`; any other dtype as it is."""
    if values.dtype != np_dtype("bfloat16"):
        return values
    bits = values.view(np.uint16).astype(np.uint32)
    widened: Array = np.left_shift(bits, _BITS, out=bits).view(np.float32)
    return widened


def either_way(sums: Array, error: Array, dtype: str) -> tuple[Array, Array]:
    """Sums that were rounded to float32 once, in a half type, and where their errors may make another number of them.

    Args:
        sums: float32.
        error: float32, how far each was off before it was rounded.
        dtype: The half type.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        margin = error + np.abs(sums) * _LAST_BITS
        low, high = rounded(np.stack((sums - margin, sums + margin)), dtype)
    return high, low.view(np.uint16) != high.view(np.uint16)


def decide(sums: Array, error: Array, dtype: str, exactly: Callable[[Array], Array]) -> Array:
    """float64 sums rounded to a half type as the exact sums are.

    Args:
        sums: float64. NaN and infinity have no error, and stay.
        error: float64, how far each may be off; infinite where nothing is known.
        dtype: The half type.
        exactly: For places in `sums`, the exact sums in float64, rounded to odd.

    Raises:
        CheckFailedError: so many are open that computing them exactly would take hours.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        margin = error + np.abs(sums) * _LAST_BITS_OF_DOUBLE
        low, high = rounded(sums - margin, dtype), rounded(sums + margin, dtype)
    certain = low.view(np.uint16) == high.view(np.uint16)
    places = np.flatnonzero(~certain & np.isfinite(sums))
    if places.size > MAX_EXACT:
        raise CheckFailedError(
            f"{places.size} sums lie in the middle between two {dtype} numbers, or nearer to it than float64 can tell",
            expected=f"{MAX_EXACT} at most",
            hint="merge into a float32 base, or with --dtype float32",
        )
    result = rounded(sums, dtype)
    if places.size:
        result[places] = rounded(exactly(places), dtype)
    return result


def _add(weight: Array, total: Array, *, scratch: Array) -> None:
    """Add to `total` in place. Casts from bfloat16 are ml_dtypes', which would not let other threads run meanwhile."""
    if weight.dtype == np_dtype("bfloat16"):
        bits = scratch.view(np.uint32)
        np.copyto(bits, weight.view(np.uint16))
        np.left_shift(bits, _BITS, out=bits)
        weight = scratch
    np.add(total, weight, out=total, dtype=np.float32, casting="same_kind")


def _by_casts(either: Array, *, out: Array, differs: Array) -> None:
    out[...] = rounded(either[0], out.dtype.name)
    np.not_equal(out.view(np.uint16), rounded(either[1], out.dtype.name).view(np.uint16), out=differs)


def _bfloat16_by_integers(either: Array, *, out: Array, differs: Array) -> None:
    """bfloat16 is the upper half of float32, so integers round, at three times the speed of a cast.

    A tie goes away from zero here and not to even; it is doubtful in any case. A NaN might turn into a number.
    """
    bits = either.view(np.uint32)
    np.add(bits, _HALF, out=bits)
    high, low = bits
    np.bitwise_xor(low, high, out=low)
    np.greater_equal(low, _ONE, out=differs)
    np.right_shift(high, _BITS, out=high)
    np.copyto(out.view(np.uint16), high, casting="unsafe")


def largest(values: Array, axis: int | None = None) -> Any:
    """The largest magnitude, of all or along an axis, in the values' own dtype. NaN is larger than infinity.

    By integers: without their signs, floats are ordered as their bits are. As signed integers the largest is the
    largest positive float, as unsigned ones it is the largest negative one.
    """
    size = values.dtype.itemsize
    signed, unsigned = np.dtype(f"i{size}"), np.dtype(f"u{size}")
    positive = values.view(signed).max(axis=axis)
    negative = values.view(unsigned).max(axis=axis) & unsigned.type(np.iinfo(signed).max)
    return np.maximum(positive, negative.view(signed)).view(values.dtype)


def check_finite(values: Array, *, where: str, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckFailedError: naming the tensor, what it holds, and how often.
    """
    if not values.size or np.isfinite(largest(values)):
        return
    raise CheckFailedError(
        f"{what} NaN or infinity",
        where=where,
        expected="finite values",
        found=f"{int(np.count_nonzero(~np.isfinite(values)))} that are not, among {values.size}",
        hint="--allow-nonfinite merges all the same",
    )
