"""Norms of weight updates and of their differences, without ever making a weight-sized matrix.

A layer's update is ``diag(lambda_b) @ B @ diag(lambda_d) @ A`` with B (out, r) and A (r, in). The difference of two
updates, 1 and 2, is again of low rank: with ``L = diag(lambda_b) @ B`` and ``D = diag(lambda_d)``,

    L1 D1 A1 - L2 D2 A2  =  [ (L1 - L2) D1 + L2 (D1 - D2),  L2 D2 ] @ [ A1 ; A1 - A2 ]  =:  M @ X

and the squared Frobenius norm of ``M @ X`` is the sum over the elementwise product of the Gram matrices M'M and XX'.
The small differences are taken before anything is multiplied, so that nothing cancels, and in float64, which holds the
product of two float32 numbers exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from vera_tools.dtypes import Array

#: lambda_b (out,) and lambda_d (r,) of one layer.
Vectors = tuple[Array, Array]
#: vera_A (r, in_max) and vera_B (out_max, r).
Pair = tuple[Array, Array]

_BLOCK = 1024  # rows or columns that are widened to float64 at a time


@dataclass(frozen=True)
class Norms:
    """Frobenius norms of one layer's two updates and of their difference; 0 for an update that is not there."""

    a: float
    b: float
    difference: float


class UpdateComparison:
    """The updates that two adapters make to the same weights, layer by layer; what layers share is computed once.

    Attributes:
        same_pair: Both have the same vera_A and vera_B.
    """

    def __init__(self, a: Pair, b: Pair) -> None:
        self._pairs = a, b
        self._r = max(len(a[0]), len(b[0]))
        width = min(a[0].shape[1], b[0].shape[1])
        self._same_A = len(a[0]) == len(b[0]) and np.array_equal(a[0][:, :width], b[0][:, :width])
        self.same_pair = a is b or all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        self._grams: dict[tuple[str, int], Array] = {}

    def same(self, a: Vectors | None, b: Vectors | None) -> bool:
        """Whether two updates have the same factors, so that nothing needs to be computed to know their distance."""
        return (
            a is not None
            and b is not None
            and self.same_pair
            and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
        )

    def layer(self, width: int, a: Vectors | None, b: Vectors | None) -> Norms:
        """The norms for a layer with in_features `width`; None for an adapter that does not adapt it.

        Raises:
            ValueError: the vectors do not fit the pair, or each other; or a norm is not finite in float64.
        """
        if a and self.same(a, b):
            norm = self._norm(0, width, a)
            return Norms(norm, norm, 0.0)
        norm_a, norm_b = (0.0 if x is None else self._norm(side, width, x) for side, x in enumerate((a, b)))
        if a is None or b is None:
            return Norms(norm_a, norm_b, max(norm_a, norm_b))
        if len(a[0]) != len(b[0]):
            raise ValueError(f"the layer has {len(a[0])} rows in one adapter and {len(b[0])} in the other")
        return Norms(norm_a, norm_b, self._distance(width, a, b))

    def _norm(self, side: int, width: int, vectors: Vectors) -> float:
        (lambda_b, lambda_d), (vera_A, vera_B) = vectors, self._pairs[side]
        if width > vera_A.shape[1] or len(lambda_b) > len(vera_B) or len(lambda_d) != len(vera_A):
            raise ValueError(
                f"a layer of shape [{len(lambda_b)}, {width}] and rank {len(lambda_d)} does not fit "
                f"vera_A {list(vera_A.shape)} and vera_B {list(vera_B.shape)}"
            )
        right = self._gram(f"norm {side}", width, lambda: _columns(vera_A, width))
        return _root(_gram(rows * lambda_d for rows in _rows(lambda_b, vera_B)), right)

    def _distance(self, width: int, a: Vectors, b: Vectors) -> float:
        r = self._r
        d_a, d_b = (np.pad(d.astype(np.float64), (0, r - len(d))) for _, d in (a, b))

        def left() -> Iterator[Array]:
            (_, B_a), (_, B_b) = self._pairs
            for x, y in zip(_rows(a[0], B_a), _rows(b[0], B_b), strict=True):
                one, two = _wide(x, r), _wide(y, r)
                moved = (one - two) * d_a + two * (d_a - d_b)
                yield moved if self._same_A else np.concatenate([moved, two * d_b], axis=1)

        def right() -> Iterator[Array]:
            (A_a, _), (A_b, _) = self._pairs
            for x, y in zip(_columns(A_a, width), _columns(A_b, width), strict=True):
                one, two = _wide(x, r), _wide(y, r)
                yield one if self._same_A else np.concatenate([one, one - two], axis=1)

        return _root(_gram(left()), self._gram("difference", width, right))

    def _gram(self, what: str, width: int, blocks: Callable[[], Iterable[Array]]) -> Array:
        if (what, width) not in self._grams:
            self._grams[what, width] = _gram(blocks())
        return self._grams[what, width]


def _columns(matrix: Array, width: int) -> Iterator[Array]:
    """The first `width` columns, as rows of float64, some at a time."""
    for start in range(0, width, _BLOCK):
        yield matrix[:, start : min(start + _BLOCK, width)].T.astype(np.float64)


def _rows(scale: Array, matrix: Array) -> Iterator[Array]:
    """``diag(scale) @ matrix[:len(scale)]`` in float64, some rows at a time."""
    for start in range(0, len(scale), _BLOCK):
        part = slice(start, min(start + _BLOCK, len(scale)))
        yield scale[part, None].astype(np.float64) * matrix[part].astype(np.float64)


def _wide(matrix: Array, r: int) -> Array:
    """Filled up with columns of zeros: a higher rank that adds nothing."""
    return matrix if matrix.shape[1] == r else np.pad(matrix, ((0, 0), (0, r - matrix.shape[1])))


def _gram(blocks: Iterable[Array]) -> Array:
    """``x.T @ x`` of a tall matrix that comes in blocks of rows."""
    total: Array | None = None
    for block in blocks:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused at the end
            product = block.T @ block
        total = product if total is None else total + product
    return np.zeros((0, 0)) if total is None else total


def _root(left: Array, right: Array) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.sum(left * right))
    if not math.isfinite(square):
        raise ValueError("the norm of an update is not finite in float64")
    # Both are positive semidefinite, so the sum is not negative but for its rounding.
    return math.sqrt(max(0.0, square))
