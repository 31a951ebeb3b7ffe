"""The merged weight: W + sum of weight_i * (lambda_b_i * B_i) @ (lambda_d_i * A_i), in float32, rounded once.

The adapters' factors are laid side by side, so that several adapters are one matrix product with a longer inner
dimension, and the sum is rounded to the weight's dtype once however many there are. float64 weights are merged in
float64. Work is done in blocks of rows, whose scratch memory does not grow with the weight.

A half-precision weight comes out correctly rounded, whatever the adapter. Where the float32 sum lies so near the middle
between two of its neighbours that its own error (`Delta.error_share`) could decide, that element alone, a few in a
thousand, is computed again in float64 (`Delta.closely`), and where that cannot decide either, in integers
(`Delta.exactly`). So the result does not depend on the order in which a BLAS adds, on the number of its threads, or on
the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vera_tools.dtypes import Array
from vera_tools.merging import exact
from vera_tools.merging.workspace import Workspace

#: Elements of a weight that are merged at a time: 4 MB of float32, which stays in a CPU's outer cache.
BLOCK = 1 << 20
#: Ranks that are multiplied together. A sum's error grows with their number, and so does the number of doubtful
#: elements; more panels are more additions of whole blocks.
PANEL = 128
#: Places that are computed in float64 at a time.
PLACES = 1 << 8
#: Share of doubtful elements above which a whole block in float64 costs less than its single places.
CROWDED = 1 / 64

#: By how much a rounding changes a number at most, as a share of it.
UNITS = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}

# Added to a norm. It stands for what is lost below the smallest numbers when elements are squared or multiplied, also
# where a processor was told to take subnormal numbers for zero: 2**-126 is far less than 2**-100 of a rounding.
_FLOOR = 2.0**-50


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
        columns: (in_features, r): vera_A again, so that single columns of it lie together too.
        rows: Where the weight is a part of the stored tensor: for each row of that, the row of vera_B; lambda_b is then
            as long as that, and zero in the rows of other weights.
    """

    lambda_b: Array
    vera_B: Array
    lambda_d: Array
    vera_A: Array
    columns: Array
    rows: Array | None = None

    def vera_B_at(self, rows: slice | Array, *, out: Array | None = None) -> Array:
        """Rows of vera_B by the rows of the stored tensor."""
        if self.rows is not None:
            rows = self.rows[rows]
        if isinstance(rows, slice):
            return self.vera_B[rows]
        return np.take(self.vera_B, rows, axis=0, out=out, mode="clip")


class Delta:
    """The change of one stored weight as a product of two thin matrices, handed out by rows of the weight.

    Args:
        factors: Each adapter's part.
        transposed: The weight is stored as (in_features, out_features).
        dtype: float32, or float64 for a float64 weight and for verification.
        workspace: Holds the two matrices, so that one worker has one `Delta` at a time in it.
    """

    def __init__(
        self, factors: Sequence[Factor], *, transposed: bool, dtype: np.dtype[np.floating], workspace: Workspace
    ) -> None:
        self.dtype = dtype
        self._factors, self._transposed, self._workspace = factors, transposed, workspace
        self._rank = sum(factor.lambda_d.size for factor in factors)
        outs, ins = factors[0].lambda_b.size, factors[0].vera_A.shape[1]
        self.shape = (ins, outs) if transposed else (outs, ins)
        self._right = self._out_side(0, outs, "right").T if transposed else self._in_side(0, ins, "right")
        self._largest_column = _norms(self._right, axis=0).max()

    def left(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the left matrix, (stop - start, sum of ranks), until the next are asked for."""
        return self._in_side(start, stop, "left").T if self._transposed else self._out_side(start, stop, "left")

    @property
    def right(self) -> Array:
        """The right matrix, (sum of ranks, columns of the weight)."""
        return self._right

    def spread(self, left: Array) -> Array:
        """For rows of the left matrix, the norm of each times the largest norm of a column of the right one.

        No element of the product is larger, nor is the sum of the magnitudes of the products that make it (Cauchy and
        Schwarz).
        """
        rows: Array = _norms(left, axis=1) * self._largest_column
        return rows

    def error_share(self, dtype: np.dtype[np.floating]) -> float:
        """The most by which an element of the product errs when it is computed in `dtype`, as a share of `spread`.

        Higham, "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1: a sum of n products errs by
        at most n u / (1 - n u) of the sum of their magnitudes, in whatever order it is added, and whether products are
        fused with sums or not. In float32 n is a panel's rank and one addition for each panel; single places in float64
        are added in one go. To it come an addition for each adapter and the roundings of what is multiplied. The norms
        in `spread` err too, by a share that grows with the whole rank. Infinite where that is so large that this says
        nothing.
        """
        unit = UNITS[dtype]
        longest = min(self._rank, PANEL) + self._rank // PANEL if dtype == np.float32 else self._rank
        n, norms = (longest + len(self._factors) + 8) * unit, (2 * self._rank + 8) * unit
        return n / (1 - n) * (1 + norms) * 1.001 if norms < 0.01 else np.inf

    def closely(self, weight: Array, rows: Array, columns: Array, *, start: int) -> Array:
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
                total[part] += self._sums(factor, outs[part], ins[part])
        return total

    def exactly(self, weights: Array, rows: Array, columns: Array) -> Array:
        """W + change at single places, without any rounding but one to odd, in float64.

        Args:
            weights: The weight's element at each place.
            rows: Row of each place.
            columns: Column of each place.
        """
        outs, ins = (columns, rows) if self._transposed else (rows, columns)
        terms = [[term] for term in _scalars(weights)]
        for factor in self._factors:
            lambda_d = exact.Scaled(factor.lambda_d)
            for place, lambda_b in enumerate(_scalars(factor.lambda_b[outs])):
                B, A = (
                    exact.Scaled(factor.vera_B_at(outs[place : place + 1])[0]),
                    exact.Scaled(factor.columns[ins[place]]),
                )
                integer, exponent = exact.product_sum([B, lambda_d, A])
                terms[place].append((lambda_b[0] * integer, lambda_b[1] + exponent))
        return np.array([exact.to_odd(*exact.total(parts)) for parts in terms], np.float64)

    def _sums(self, factor: Factor, outs: Array, ins: Array) -> Array:
        """One adapter's change at places (outs[i], ins[i]), in float64."""
        rank, array = factor.lambda_d.size, self._workspace.array
        left, right = (
            array("B", (outs.size, rank), factor.vera_B.dtype),
            array("A", (ins.size, rank), factor.columns.dtype),
        )
        factor.vera_B_at(outs, out=left)
        np.take(factor.columns, ins, axis=0, out=right, mode="clip")
        products = np.multiply(left, right, dtype=np.float64, out=array("BA", left.shape, np.float64))
        sums: Array = (products @ factor.lambda_d.astype(np.float64)) * factor.lambda_b[outs].astype(np.float64)
        return sums

    def rows(self, start: int, stop: int, *, out: Array) -> Array:
        """Rows `start` to `stop` of the change, written into `out`."""
        return self.product(self.left(start, stop), out=out)

    def product(self, left: Array, *, out: Array) -> Array:
        """Rows of the change whose rows of the left matrix are `left`, written into `out`."""
        panel = PANEL if self.dtype == np.float32 else self._rank
        np.matmul(left[:, :panel], self._right[:panel], out=out)
        for start in range(panel, self._rank, panel):
            ranks = slice(start, start + panel)
            part = self._workspace.array("panel", out.shape, self.dtype)
            np.add(out, np.matmul(left[:, ranks], self._right[ranks], out=part), out=out)
        return out

    def _out_side(self, start: int, stop: int, use: str) -> Array:
        matrix, done = self._workspace.array(use, (stop - start, self._rank), self.dtype), 0
        for factor in self._factors:
            part = matrix[:, done : done + factor.lambda_d.size]
            rows = factor.vera_B_at(slice(start, stop))
            np.multiply(rows, factor.lambda_b[start:stop, None], out=part, dtype=self.dtype)
            done += factor.lambda_d.size
        return matrix

    def _in_side(self, start: int, stop: int, use: str) -> Array:
        matrix, done = self._workspace.array(use, (self._rank, stop - start), self.dtype), 0
        for factor in self._factors:
            part = matrix[done : done + factor.lambda_d.size]
            np.multiply(factor.vera_A[:, start:stop], factor.lambda_d[:, None], out=part, dtype=self.dtype)
            done += factor.lambda_d.size
        return matrix


def _scalars(values: Array) -> list[tuple[int, int]]:
    scaled = exact.Scaled(values)
    return list(zip(scaled.integers, scaled.exponents, strict=True))


def _norms(matrix: Array, *, axis: int) -> Array:
    """Norms of columns (axis 0) or rows (axis 1), and a little more; zero for those that are nothing but zeros."""
    squares = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", matrix, matrix)
    norms: Array = np.where(matrix.any(axis=axis), np.sqrt(squares) + matrix.dtype.type(_FLOOR), matrix.dtype.type(0))
    return norms


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `BLOCK` elements (one row at least) that cover a matrix."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
