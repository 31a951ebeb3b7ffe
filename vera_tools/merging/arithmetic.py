"""The merged weight: W + sum of weight_i * (lambda_b_i * B_i) @ (lambda_d_i * A_i), in float32, rounded once.

The adapters' factors are laid side by side, so that several adapters are one matrix product with a longer inner
dimension, and the sum is rounded to the weight's dtype once however many there are. float64 weights are merged in
float64. Work is done in blocks of rows, whose scratch memory does not grow with the weight.

A half-precision weight comes out correctly rounded. Where the float32 sum lies so near the middle between two of its
neighbours that its own error could decide (`doubtful`: about one element in ten thousand), that element alone is
computed again in float64 (`Delta.exactly`). So the result does not depend on the order in which a BLAS adds, on the
number of its threads, or on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vera_tools.dtypes import HALVES, np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.prng import Array

#: Elements of a weight that are merged at a time: 4 MB of float32, which stays in a CPU's outer cache.
BLOCK = 1 << 20
#: Elements that are looked at together while they lie in a CPU's inner cache.
_STRIP = 1 << 17
#: Places that are computed in float64 at a time.
PLACES = 1 << 10
#: Share of doubtful elements above which a whole block in float64 costs less than its single places.
CROWDED = 1 / 128

# Significant bits, and the smallest normal number, of the half types.
_PRECISION = {"bfloat16": (8, 2.0**-126), "float16": (11, 2.0**-14)}


def accumulator(dtype: str) -> np.dtype[np.float32] | np.dtype[np.float64]:
    """The dtype in which a weight of this dtype is merged."""
    return np.dtype(np.float64) if dtype == "float64" else np.dtype(np.float32)


@dataclass(frozen=True)
class Factor:
    """One adapter's part in one weight.

    Attributes:
        lambda_b: (out_features,), with the adapter's weight multiplied in.
        vera_B: (out_features, r).
        lambda_d: (r,).
        vera_A: (r, in_features).
    """

    lambda_b: Array
    vera_B: Array
    lambda_d: Array
    vera_A: Array


class Delta:
    """The change of one stored weight as a product of two thin matrices, handed out by rows of the weight.

    Args:
        factors: Each adapter's part.
        transposed: The weight is stored as (in_features, out_features).
        dtype: float32, or float64 for a float64 weight and for verification.
    """

    def __init__(self, factors: Sequence[Factor], *, transposed: bool, dtype: np.dtype[np.floating]) -> None:
        self._factors, self._transposed, self._dtype = factors, transposed, dtype
        outs, ins = factors[0].lambda_b.size, factors[0].vera_A.shape[1]
        self.shape = (ins, outs) if transposed else (outs, ins)
        self._right = self._out_side(0, outs).T if transposed else self._in_side(0, ins)
        self._largest_column = float(np.sqrt(np.einsum("ij,ij->j", self._right, self._right).max()))

    def left(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the left matrix, (stop - start, sum of ranks)."""
        return self._in_side(start, stop).T if self._transposed else self._out_side(start, stop)

    @property
    def right(self) -> Array:
        """The right matrix, (sum of ranks, columns of the weight)."""
        return self._right

    def spread(self, left: Array) -> Array:
        """For rows of the left matrix, the norm of each times the largest norm of a column of the right matrix.

        A float32 sum of r products errs by about 2**-26 times this: r roundings of partial sums, each at random.
        """
        rows: Array = np.sqrt(np.einsum("ij,ij->i", left, left)) * self._largest_column
        return rows

    def exactly(self, weight: Array, rows: Array, columns: Array, *, start: int) -> Array:
        """W + change at single places, in float64.

        Args:
            weight: Rows of the stored weight, from row `start` on.
            rows: Row of each place, counted from `start`.
            columns: Column of each place.
            start: Where `weight` begins.
        """
        total = weight[rows, columns].astype(np.float64)
        outs, ins = (columns, rows + start) if self._transposed else (rows + start, columns)
        for factor in self._factors:
            for done in range(0, total.size, PLACES):
                part = slice(done, done + PLACES)
                left = factor.vera_B[outs[part]] * factor.lambda_b[outs[part], None]
                right = factor.vera_A.T[ins[part]] * factor.lambda_d
                total[part] += np.einsum("ij,ij->i", left, right)
        return total

    def rows(self, start: int, stop: int, *, out: Array) -> Array:
        """Rows `start` to `stop` of the change, written into `out`."""
        return self.product(self.left(start, stop), out=out)

    def product(self, left: Array, *, out: Array) -> Array:
        """Rows of the change whose rows of the left matrix are `left`, written into `out`."""
        return np.matmul(left, self._right, out=out[: left.shape[0]])

    def _out_side(self, start: int, stop: int) -> Array:
        parts = [
            np.multiply(f.vera_B[start:stop], f.lambda_b[start:stop, None], dtype=self._dtype) for f in self._factors
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _in_side(self, start: int, stop: int) -> Array:
        parts = [np.multiply(f.vera_A[:, start:stop], f.lambda_d[:, None], dtype=self._dtype) for f in self._factors]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `BLOCK` elements (one row at least) that cover a matrix."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def rounded(values: Array, dtype: str) -> Array:
    """`values` in another dtype, rounded to nearest even once. Overflow gives infinity, as a cast does."""
    target = np_dtype(dtype)
    if values.dtype == np.float64 and dtype in HALVES:
        values = _to_odd(values)  # through float32, without rounding twice
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(target, copy=False)


def doubtful(total: Array, result: Array, *, spread: Array) -> tuple[Array, Array]:
    """Rows and columns of the elements that the error of a float32 sum may have rounded the wrong way.

    A value is doubtful where it lies within 2**-22 * spread of the middle between two neighbours, or within its own
    last bit of it. Sums of random signs err by 2**-26 * spread on average, and in 10**7 of them none erred by more
    than 2**-22 * spread. No element of 10**8 was left wrong.

    Args:
        total: (rows, columns) float32 sums.
        result: The same, rounded to a half type.
        spread: (rows,), from `Delta.spread`.
    """
    bits, smallest = _PRECISION[result.dtype.name]
    columns = total.shape[1]
    slack = (spread[:, None] * 2.0**-22).astype(np.float32)
    scale = np.float32(1 / (2.0**-bits - 2.0**-22))
    step = max(1, _STRIP // max(1, columns))
    scratch = np.empty((2, min(step, total.shape[0]), columns), np.float32)
    near = np.empty(scratch.shape[1:], bool)
    found = [np.empty(0, np.intp)]
    for start in range(0, total.shape[0], step):
        strip = total[start : start + step]
        moved, exponent = scratch[:, : len(strip)]
        # From a value to its neighbour's middle it is 2**exponent * 2**-bits, less what rounding has moved it by.
        np.bitwise_and(strip.view(np.uint32), np.uint32(0x7F800000), out=exponent.view(np.uint32))
        if smallest > 2.0**-126:
            np.maximum(exponent, np.float32(smallest), out=exponent)
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(strip, result[start : start + step], out=moved, dtype=np.float32, casting="same_kind")
            np.abs(moved, out=moved)
            np.add(moved, slack[start : start + step], out=moved)
            np.multiply(moved, scale, out=moved)
            np.greater(moved, exponent, out=near[: len(strip)])
        found.append(np.flatnonzero(near[: len(strip)]) + start * columns)
    rows, places = np.divmod(np.concatenate(found), columns)
    return rows, places


def check_finite(values: Array, *, where: str, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckFailedError: naming the tensor, what it holds, and how often.
    """
    bits = values.reshape(-1).view(np.dtype(f"u{values.dtype.itemsize}"))
    infinity = np.array(np.inf).astype(values.dtype).view(bits.dtype)
    # Without their signs, floats are ordered as their bits are; infinity and NaN come last.
    magnitudes = bits & (np.iinfo(bits.dtype).max >> 1)
    if not magnitudes.size or magnitudes.max() < infinity:
        return
    raise CheckFailedError(
        f"{what} NaN or infinity",
        where=where,
        expected="finite values",
        found=f"{int(np.count_nonzero(magnitudes >= infinity))} that are not, among {values.size}",
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
