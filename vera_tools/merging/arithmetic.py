"""The merged weight: W + sum of weight_i * (lambda_b_i * B_i) @ (lambda_d_i * A_i), in float32, rounded once.

The adapters' factors are laid side by side, so that several adapters are one matrix product with a longer inner
dimension, and the sum is rounded to the weight's dtype once however many there are. float64 weights are merged in
float64. Work is done in blocks of rows, whose scratch memory does not grow with the weight.

BLAS runs on one thread here, and the workers of `execution` run beside each other: that way products, casts, reading
and writing overlap, and no thread waits for another inside a product.
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

    def left(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the left matrix, (stop - start, sum of ranks)."""
        return self._in_side(start, stop).T if self._transposed else self._out_side(start, stop)

    @property
    def right(self) -> Array:
        """The right matrix, (sum of ranks, columns of the weight)."""
        return self._right

    def rows(self, start: int, stop: int, *, out: Array) -> Array:
        """Rows `start` to `stop` of the change, written into `out`."""
        return np.matmul(self.left(start, stop), self._right, out=out[: stop - start])

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


def check_finite(values: Array, *, where: str, what: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        CheckFailedError: naming the tensor, what it holds, and how often.
    """
    if np.isfinite(values).all():
        return
    count = int(np.count_nonzero(~np.isfinite(values)))
    raise CheckFailedError(
        f"{what} NaN or infinity",
        where=where,
        expected="finite values",
        found=f"{count} that are not, among {values.size}",
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
