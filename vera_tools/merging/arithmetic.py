"""The merged weight: W + sum of weight_i * (lambda_b_i * B_i) @ (lambda_d_i * A_i), in float32, rounded once.

The adapters' factors are laid side by side, so that several adapters are one matrix product with a longer inner
dimension, and the sum is rounded to the weight's dtype once however many there are. float64 weights are merged in
float64. Work is done in blocks of rows, whose scratch memory does not grow with the weight.

A half-precision weight comes out correctly rounded, whatever the adapter. Where the float32 sum lies so near the middle
between two of its neighbours that its own error (`Delta.error_share`) could decide, that element alone, a few in a
thousand, is computed again with float64 sums (`Delta.closely`), and where that cannot decide either, in integers
(`Delta.exactly`). So the result does not depend on the order in which a BLAS adds, on the number of its threads, or on
the machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vera_tools.dtypes import Array
from vera_tools.merging import exact
from vera_tools.merging.rounding import at, wide
from vera_tools.merging.workspace import Workspace, row_by_row

#: Elements of a weight that are merged at a time: 16 MB of float32. At every block a BLAS brings the right matrix into
#: its own order, and what single places need comes back into the CPU's cache.
BLOCK = 1 << 22
#: Ranks that are multiplied together. A sum's error grows with their number, and so does the number of doubtful
#: elements; more panels are more additions of whole blocks.
PANEL = 128
#: For a half type, whose error is then known more closely (`Delta.error_shares`): as many as this, if those are all.
WHOLE = 256
#: The same, where more than this share of a block is doubtful.
NARROW_PANEL, MANY = 32, 1 / 100
#: Places that are computed one by one together.
PLACES = 1 << 8
#: Share of doubtful elements above which a whole block in float64 costs less than its single places.
CROWDED = 1 / 16

#: By how much a rounding changes a number at most, as a share of it.
UNITS = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float64): 2.0**-53}

# Added to a norm. It stands for what is lost below the smallest numbers when elements are squared or multiplied, also
# where a processor was told to take subnormal numbers for zero: 2**-126 is far less than 2**-100 of a rounding.
_FLOOR = 2.0**-50
# What is lost below the smallest numbers by a product in either dtype, and twice the same for its sum.
_LOST = {np.dtype(np.float32): 2.0**-124, np.dtype(np.float64): 2.0**-1020}
# An error that leaves everything open, and that float64 can still add to a sum.
_UNKNOWN = 2.0**1000


def accumulator(dtype: str) -> np.dtype[np.float32] | np.dtype[np.float64]:
    """The dtype in which a weight of this dtype is merged."""
    return np.dtype(np.float64) if dtype == "float64" else np.dtype(np.float32)


@dataclass(frozen=True)
class Factor:
    """One adapter's part in one weight.

    Attributes:
        lambda_b: (out_features,).
        vera_B: (out_features, r).
        lambda_d: (r,).
        vera_A: (r, in_features).
        columns: (in_features, r): vera_A again, so that single columns of it lie together too.
        rows: Where the weight is a part of the stored tensor: for each row of that, the row of vera_B; lambda_b is then
            as long as that, and zero in the rows of other weights.
        weight: The adapter's weight. It stands apart, because its product with lambda_b is rounded.
    """

    lambda_b: Array
    vera_B: Array
    lambda_d: Array
    vera_A: Array
    columns: Array
    rows: Array | None = None
    weight: float = 1.0

    @cached_property
    def weighted(self) -> Array:
        """lambda_b with the adapter's weight multiplied in, (out_features,) float64."""
        product: Array = self.lambda_b * self.weight
        return product

    def is_idle(self) -> Array:
        """(out_features,) bool: the outputs that it does not change."""
        idle: Array = (self.lambda_b == 0) | (self.weight == 0 or not self.lambda_d.any())
        return idle

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
        self._panel = PANEL
        outs, ins = factors[0].lambda_b.size, factors[0].vera_A.shape[1]
        self.shape = (ins, outs) if transposed else (outs, ins)
        self._right = self._out_side(0, outs, "right").T if transposed else self._in_side(0, ins, "right")
        #: Of the weight's outputs, those that no adapter changes.
        self._idle = np.logical_and.reduce([factor.is_idle() for factor in factors])
        norms = _norms(self._right, axis=0, idle=self._idle if transposed else self._idle.all())
        self._largest_column = norms.max()
        #: Norm of each column of the right matrix, as a share of the largest; more where that could underflow.
        with np.errstate(invalid="ignore"):
            self.shares = np.maximum(norms / (self._largest_column or 1), norms.dtype.type(2.0**-100))

    def left(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of the left matrix, (stop - start, sum of ranks), until the next are asked for."""
        return self._in_side(start, stop, "left").T if self._transposed else self._out_side(start, stop, "left")

    @property
    def right(self) -> Array:
        """The right matrix, (sum of ranks, columns of the weight)."""
        return self._right

    def spread(self, left: Array, start: int) -> Array:
        """For rows of the left matrix from `start` on, the norm of each times the largest norm of a right column.

        No element of the product is larger, nor is the sum of the magnitudes of the products that make it (Cauchy and
        Schwarz).
        """
        idle = self._idle.all() if self._transposed else self._idle[start : start + len(left)]
        rows: Array = _norms(left, axis=1, idle=idle) * self._largest_column
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
        longest = min(self._rank, self._panel) + self._rank // self._panel if dtype == np.float32 else self._rank
        return self._share(longest + len(self._factors) + 8, dtype)

    def error_shares(self) -> tuple[float, float]:
        """The same in float32 as two shares, one of `spread` and one of the element's own magnitude, to be added.

        Chapter 4 of the same book: a sum errs by a rounding of each of its partial sums, whatever its order. No partial
        sum is larger than the sum of all positive products, or of all negative ones. The larger of the two is half of
        what both magnitudes and the sum's own make together, so that a sum which is small itself errs by half of what
        `error_share` says. Terms of second order are a share of 4 n u, less than what `_share` adds for them.

        That needs the sum itself. It is known where the whole rank is one product; elsewhere the second share is zero.
        """
        dtype = np.dtype(np.float32)
        if self._panel < self._rank:
            return self.error_share(dtype), 0.0
        half = self._rank // 2 + 1
        return self._share(half + len(self._factors) + 8, dtype), self._share(half, dtype)

    def _share(self, roundings: int, dtype: np.dtype[np.floating]) -> float:
        n, norms = roundings * UNITS[dtype], (2 * self._rank + 8) * UNITS[self.dtype]
        return n / (1 - n) * (1 + norms) * 1.001 if norms < 0.01 else np.inf

    def closely(
        self,
        weight: Array,
        rows: Array,
        columns: Array,
        *,
        start: int,
        spread: Array,
        products: np.dtype[np.float32] | np.dtype[np.float64],
    ) -> tuple[Array, Array]:
        """W + change at single places, added in float64.

        The product of an element of vera_B and one of vera_A is taken in `products`. In float32 that is the only
        rounding that counts, and much faster: what it leaves open is few.

        Args:
            weight: Rows of the stored weight, from row `start` on.
            rows: Row of each place, counted from `start`.
            columns: Column of each place.
            start: Where `weight` begins.
            spread: Of each row of `weight`, as `spread` has it.
            products: float32 or float64.

        Returns:
            The sums, and how far each may be off, both in float64.
        """
        total = wide(at(weight, rows, columns)).astype(np.float64)
        outs, ins = (columns, rows + start) if self._transposed else (rows + start, columns)
        # float64's own roundings are less than one of float32.
        share = self._share(2, products) if products == np.float32 else self.error_share(products)
        errors = spread[rows].astype(np.float64) * self.shares[columns] * share
        with np.errstate(over="ignore", invalid="ignore"):
            for factor in self._factors:
                lambda_b = factor.weighted[outs]
                total += self._sums(factor, outs, ins, products) * lambda_b
                most = factor.lambda_d.size * _LOST[products] * np.abs(factor.lambda_d).max(initial=0)
                errors += most * np.abs(lambda_b)
            if not np.isfinite(np.dot(total, errors)):  # factors are far larger than their product
                lost = ~(np.isfinite(total) & np.isfinite(errors))
                total[lost], errors[lost] = 0, _UNKNOWN
        return total, errors

    def exactly(self, weights: Array, rows: Array, columns: Array) -> Array:
        """W + change at single places, without any rounding but one to odd, in float64.

        Args:
            weights: The weight's element at each place. NaN and infinity stay what they are.
            rows: Row of each place.
            columns: Column of each place.
        """
        result: Array = weights.astype(np.float64)
        finite = np.isfinite(result)
        rows, columns = rows[finite], columns[finite]
        outs, ins = (columns, rows) if self._transposed else (rows, columns)
        terms = [[term] for term in _scalars(result[finite])]
        for factor in self._factors:
            lambda_d = exact.Scaled(factor.lambda_d)
            ((weight, shift),) = _scalars(np.array([factor.weight]))
            for place, lambda_b in enumerate(_scalars(factor.lambda_b[outs])):
                B, A = (
                    exact.Scaled(factor.vera_B_at(outs[place : place + 1])[0]),
                    exact.Scaled(factor.columns[ins[place]]),
                )
                integer, exponent = exact.product_sum([B, lambda_d, A])
                terms[place].append((weight * lambda_b[0] * integer, shift + lambda_b[1] + exponent))
        result[finite] = [exact.to_odd(*exact.total(parts)) for parts in terms]
        return result

    def _sums(self, factor: Factor, outs: Array, ins: Array, dtype: np.dtype[np.floating]) -> Array:
        """One adapter's change at places (outs[i], ins[i]) but for lambda_b, in float64; products are of `dtype`."""
        rank, array = factor.lambda_d.size, self._workspace.array
        lambda_d, sums = factor.lambda_d.astype(np.float64), np.empty(outs.size)
        shape = (min(PLACES, outs.size), rank)
        B, A = array("B", shape, factor.vera_B.dtype), array("A", shape, factor.columns.dtype)
        BA = array("BA", shape, np.float64)
        for start in range(0, outs.size, PLACES):
            part = slice(start, start + PLACES)
            count = outs[part].size
            left, right, products = B[:count], A[:count], BA[:count]
            factor.vera_B_at(outs[part], out=left)
            np.take(factor.columns, ins[part], axis=0, out=right, mode="clip")
            if dtype == left.dtype == right.dtype:
                np.copyto(products, np.multiply(left, right, out=left))
            else:
                np.multiply(left, right, dtype=np.float64, out=products)
            np.matmul(products, lambda_d, out=sums[part])
        return sums

    def widen(self) -> None:
        """Take the whole rank at once in float32, where it is short enough."""
        if self._rank <= WHOLE:
            self._panel = self._rank

    def narrow(self) -> None:
        """Take fewer ranks at a time in float32 from here on: that costs time, and leaves fewer elements open."""
        self._panel = NARROW_PANEL

    def rows(self, start: int, stop: int, *, out: Array) -> Array:
        """Rows `start` to `stop` of the change, written into `out`."""
        return self.product(self.left(start, stop), out=out)

    def product(self, left: Array, *, out: Array) -> Array:
        """Rows of the change whose rows of the left matrix are `left`, written into `out`."""
        panel = self._panel if self.dtype == np.float32 else self._rank
        np.matmul(left[:, :panel], self._right[:panel], out=out)
        with row_by_row():
            for start in range(panel, self._rank, panel):
                ranks = slice(start, start + panel)
                part = self._workspace.matrix("panel", out.shape, self.dtype)
                np.add(out, np.matmul(left[:, ranks], self._right[ranks], out=part), out=out)
        return out

    def _out_side(self, start: int, stop: int, use: str) -> Array:
        matrix, done = self._workspace.array(use, (stop - start, self._rank), self.dtype), 0
        for factor in self._factors:
            part = matrix[:, done : done + factor.lambda_d.size]
            rows = factor.vera_B_at(slice(start, stop))
            with np.errstate(over="ignore", invalid="ignore"):  # then the norms are not finite, and are looked at
                lambda_b = factor.weighted[start:stop, None].astype(self.dtype)
                np.multiply(rows, lambda_b, out=part, dtype=self.dtype)
            done += factor.lambda_d.size
        return matrix

    def _in_side(self, start: int, stop: int, use: str) -> Array:
        matrix, done = self._workspace.array(use, (self._rank, stop - start), self.dtype), 0
        for factor in self._factors:
            part = matrix[done : done + factor.lambda_d.size]
            with np.errstate(over="ignore", invalid="ignore"):
                lambda_d = factor.lambda_d[:, None].astype(self.dtype)
                np.multiply(factor.vera_A[:, start:stop], lambda_d, out=part, dtype=self.dtype)
            done += factor.lambda_d.size
        return matrix


def _scalars(values: Array) -> list[tuple[int, int]]:
    scaled = exact.Scaled(values)
    return list(zip(scaled.integers, scaled.exponents, strict=True))


def _norms(matrix: Array, *, axis: int, idle: Array | np.bool_) -> Array:
    """Norms of columns (axis 0) or rows (axis 1), and a little more; zero for those that are `idle` and zero.

    What holds nothing but zeros need not be idle: its products may have been too small for the dtype. And what is idle
    need not be zero: zero times what is too large for the dtype is NaN.
    """
    squares = np.einsum("ij,ij->j" if axis == 0 else "ij,ij->i", matrix, matrix)
    norms: Array = np.where(idle & (squares == 0), matrix.dtype.type(0), np.sqrt(squares) + matrix.dtype.type(_FLOOR))
    return norms


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `BLOCK` elements (one row at least) that cover a matrix."""
    step = max(1, BLOCK // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
