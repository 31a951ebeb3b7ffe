"""Rounding sums to a weight's dtype once, finding the sums too inexact for that, and refusing what is not finite."""

from __future__ import annotations

import numpy as np

from vera_tools.dtypes import HALVES, np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.merging.workspace import Workspace
from vera_tools.prng import Array

#: Elements that go through all steps of `to_half` together, so that they stay in a CPU's cache.
STRIP = 1 << 18

# Adding a weight to a product rounds once, by at most 2**-24 of the sum, and so does adding an error to the sum.
_LAST_BITS = np.float32(2.0**-23 * 1.02)


def rounded(values: Array, dtype: str) -> Array:
    """`values` in another dtype, rounded to nearest even once. Overflow gives infinity, as a cast does."""
    target = np_dtype(dtype)
    if values.dtype == np.float64 and dtype in HALVES:
        values = _to_odd(values)  # through float32, without rounding twice
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(target, copy=False)


def to_half(total: Array, *, error: Array, bound: Array, out: Array, workspace: Workspace) -> tuple[Array, Array]:
    """Round float32 sums to a half type, and find those that their own error may have rounded the wrong way.

    Where a sum less its error rounds to the same number as the sum plus its error, so does the exact sum. The others
    are doubtful, and what `out` holds there is one of the two.

    Args:
        total: (rows, columns) float32, each the sum of a weight and a product.
        error: (rows,) float32: how far the products of a row may be off.
        bound: (rows,) float32: no sum of the row is larger.
        out: (rows, columns), bfloat16 or float16: the result.
        workspace: Scratch memory.

    Returns:
        Rows and columns of the doubtful elements.
    """
    columns = total.shape[1]
    step = max(1, STRIP // max(1, columns))
    # Where a weight or a factor is NaN, nothing is known of its row, and each element is looked at by itself.
    error, bound = (np.nan_to_num(rows, nan=np.inf, posinf=np.inf) for rows in (error, bound))
    slack = error + bound * _LAST_BITS
    by_integers = out.dtype == np_dtype("bfloat16") and bool(np.isfinite(slack).all())
    round_both = _bfloat16_by_integers if by_integers else _by_casts
    found = [np.empty(0, np.intp)]
    for start in range(0, total.shape[0], step):
        strip = slice(start, start + step)
        above, below = (workspace.array(use, total[strip].shape, np.float32) for use in ("above", "below"))
        differs = workspace.array("differs", above.shape, np.bool_)
        with np.errstate(over="ignore", invalid="ignore"):
            np.add(total[strip], slack[strip, None], out=above)
            np.subtract(total[strip], slack[strip, None], out=below)
        round_both(above, below, out=out[strip], differs=differs)
        found.append(np.flatnonzero(differs) + start * columns)
    rows, places = np.divmod(np.concatenate(found), columns)
    # A second look at the few whose result is open: now by the sum itself and not by the largest of the row.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = total[rows, places]
        margin = error[rows] + np.abs(sums) * _LAST_BITS
        low, high = (rounded(value, out.dtype.name) for value in (sums - margin, sums + margin))
    out[rows, places] = high
    doubtful = low.view(np.uint16) != high.view(np.uint16)
    return rows[doubtful], places[doubtful]


def _by_casts(above: Array, below: Array, *, out: Array, differs: Array) -> None:
    out[...] = rounded(above, out.dtype.name)
    np.not_equal(out.view(np.uint16), rounded(below, out.dtype.name).view(np.uint16), out=differs)


def _bfloat16_by_integers(above: Array, below: Array, *, out: Array, differs: Array) -> None:
    """bfloat16 is the upper half of float32, so integers round, at three times the speed of a cast.

    A tie goes away from zero here and not to even; it is doubtful in any case. A NaN may turn into a number.
    """
    high, low = above.view(np.uint32), below.view(np.uint32)
    np.add(high, np.uint32(1 << 15), out=high)
    np.add(low, np.uint32(1 << 15), out=low)
    np.right_shift(high, np.uint32(16), out=out.view(np.uint16), casting="unsafe")
    np.bitwise_xor(low, high, out=low)
    np.greater_equal(low, np.uint32(1 << 16), out=differs)


def largest(values: Array, *, axis: int | None = None) -> Array:
    """The largest magnitude, in the values' own dtype. NaN is larger than infinity.

    By integers: without their signs, floats are ordered as their bits are. As signed integers the largest is the
    largest positive float, as unsigned ones it is the largest negative one.
    """
    size = values.dtype.itemsize
    signed, unsigned = np.dtype(f"i{size}"), np.dtype(f"u{size}")
    positive = values.view(signed).max(axis)
    negative = values.view(unsigned).max(axis) & unsigned.type(np.iinfo(signed).max)
    top: Array = np.maximum(positive, np.asarray(negative).view(signed)).view(values.dtype)
    return top


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


def _to_odd(values: Array) -> Array:
    """float64 to float32 with rounding to odd, after which a second rounding to a half type is as good as one."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    back = near.astype(np.float64)
    even = (near.view(np.uint32) & 1) == 0
    adjust = even & (back != values) & np.isfinite(near)
    towards = np.where(back < values, np.float32(np.inf), np.float32(-np.inf))
    return np.where(adjust, np.nextafter(near, towards), near)
