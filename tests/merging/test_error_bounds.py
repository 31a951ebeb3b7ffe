"""By how much a sum errs at most, in whatever order it is added, against sums in integers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from vera_tools.dtypes import np_dtype
from vera_tools.merging import arithmetic
from vera_tools.merging.workspace import Workspace


@pytest.mark.parametrize("rank", [16, 256, 4096])
def test_no_float32_sum_errs_by_more_than_its_bound(rank):
    """The same product in several orders, for sums that are rounded the same way again and again."""
    rng = np.random.default_rng(rank)
    A = np.full((rank, 8), np.float32(0.1))
    A[:, 1] = rng.uniform(0, 1, rank)
    A[:, 2] = rng.standard_normal(rank)
    A[:, 3] = np.float32(1) + np.float32(2.0**-23)
    A[rank // 2 :, 6:] *= -1  # partial sums grow, and the sum is small
    A[:, 7] *= 3
    B = np.full((5, rank), np.float32(0.3))
    B[1:] = rng.uniform(0.5, 1, (4, rank))
    d, b = rng.uniform(0.5, 1, rank).astype(np.float32), rng.uniform(0.5, 1, 5).astype(np.float32)
    factor = arithmetic.Factor(b.astype(np.float64), B, d.astype(np.float64), A, np.ascontiguousarray(A.T))
    delta = arithmetic.Delta([factor], transposed=False, dtype=np.dtype(np.float32), workspace=Workspace())
    left = delta.left(0, 5)
    spread = delta.spread(left, 0).astype(np.float64)[:, None]
    bound = spread * delta.error_share(np.dtype(np.float32))
    places = np.indices((5, 8)).reshape(2, -1)
    true = delta.exactly(np.zeros(40), *places).reshape(5, 8)
    products = left[:, :, None] * delta.right[None]
    one_after_the_other = np.zeros((5, 8), np.float32)
    for k in range(rank):
        one_after_the_other += products[:, k]
    sums = [delta.product(left, out=np.empty((5, 8), np.float32)), one_after_the_other, products.sum(axis=1)]
    errors = [np.abs(total - true) for total in sums]
    assert all((error <= bound).all() for error in errors)
    if rank == 4096:  # and a bound that did not grow with the rank would be too small
        assert max((error / bound).max() for error in errors) * (rank + 9) > 16
    delta.widen()
    share, own = delta.error_shares()
    if rank == 4096:
        assert (share, own) == (delta.error_share(np.dtype(np.float32)), 0)
        return
    sums[0] = delta.product(left, out=np.empty((5, 8), np.float32))
    for total in sums:
        assert (np.abs(total - true) <= spread * share + own * np.abs(total)).all()
    # Of a sum that is small itself, that is little more than half.
    assert share < (0.6 if rank == 256 else 0.8) * delta.error_share(np.dtype(np.float32))


def test_a_float32_product_takes_no_more_ranks_at_once_than_its_bound_is_of(monkeypatch):
    rank, matmul, taken = arithmetic.WHOLE + 44, np.matmul, []
    rng = np.random.default_rng(0)
    A, B = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, 8), (5, rank)))
    factor = arithmetic.Factor(np.ones(5), B, np.ones(rank), A, np.ascontiguousarray(A.T))
    delta = arithmetic.Delta([factor], transposed=False, dtype=np.dtype(np.float32), workspace=Workspace())
    left = delta.left(0, 5)

    def noted(left, right, out):
        taken.append(left.shape[1])
        return matmul(left, right, out=out)

    monkeypatch.setattr(np, "matmul", noted)
    for change, most in [(delta.widen, arithmetic.PANEL), (delta.narrow, arithmetic.NARROW_PANEL)]:
        change()
        taken.clear()
        assert np.allclose(delta.product(left, out=np.empty((5, 8), np.float32)), B @ A, atol=1e-4)
        assert max(taken) == most
        assert sum(taken) == rank


@pytest.mark.parametrize("last", [0.0, -1.0])
def test_a_float32_sum_can_err_by_nearly_as_much_as_its_bound_says(last):
    """One large product, and many that are a little more than half of its last bit: each is rounded up."""
    rank = 256
    A, B = np.full((rank, 1), 2.0**-12 * (1 + 2.0**-10), np.float32), np.full((1, rank), 2.0**-12, np.float32)
    A[[0, -1], 0], B[0, [0, -1]] = (1, last / 4), (1, 4)
    one = np.ones(rank, np.float32)
    factor = arithmetic.Factor(np.ones(1), B, one, A, np.ascontiguousarray(A.T))
    delta = arithmetic.Delta([factor], transposed=False, dtype=np.dtype(np.float32), workspace=Workspace())
    delta.widen()
    share, own = delta.error_shares()
    total = np.float32(0)
    for term in B[0] * A[:, 0]:
        total += term
    error = abs(float(total) - float(delta.exactly(np.zeros(1), np.zeros(1, int), np.zeros(1, int))[0]))
    magnitudes = float(np.abs(B[0] * A[:, 0]).sum(dtype=np.float64))
    assert 0.9 < error / (share * magnitudes + own * abs(total)) <= 1


@pytest.mark.parametrize("rank", [2, 5, 8])
def test_partial_sums_are_no_larger_than_half_of_all_magnitudes_and_the_sum(rank):
    """What `Delta.error_shares` rests on: a sum errs by a rounding of each partial sum, in any order."""
    rng = np.random.default_rng(rank)
    for _ in range(10):
        terms = [Fraction(float(x)) for x in rng.standard_normal(rank)]
        largest = (sum(map(abs, terms)) + abs(sum(terms))) / 2
        for chosen in range(2**rank):
            assert abs(sum(term for place, term in enumerate(terms) if chosen >> place & 1)) <= largest


# What vera_A, lambda_d, vera_B and lambda_b are multiplied by, as powers of two. Their product stays what it is.
SCALES = {
    "ordinary": (0, 0, 0, 0),
    "vera_B * vera_A underflows": (-80, 80, -60, 60),
    "nearly all of it underflows": (-80, 40, -66, 106),
    "vera_B * vera_A overflows": (70, -70, 70, -70),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_no_sum_at_a_single_place_errs_by_more_than_it_says(scales, dtype):
    rng = np.random.default_rng(7)
    rank, outs, ins = 256, 12, 9
    a, d, b, c = (2.0**exponent for exponent in scales)
    A, B = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in ((rank, ins), (outs, rank)))
    A, B = A * np.float32(a), B * np.float32(b)
    factor = arithmetic.Factor(rng.uniform(0.5, 1, outs) * c, B, rng.uniform(0.5, 1, rank) * d, A, A.T.copy())
    delta = arithmetic.Delta([factor], transposed=False, dtype=np.dtype(np.float32), workspace=Workspace())
    spread = delta.spread(delta.left(0, outs), 0)
    weight = rng.standard_normal((outs, ins)).astype(np_dtype("bfloat16"))
    places = np.indices((outs, ins)).reshape(2, -1)
    sums, errors = delta.closely(weight, *places, start=0, spread=spread, products=np.dtype(dtype))
    true = delta.exactly(weight.reshape(-1), *places)
    assert (np.abs(sums - true) <= errors).all()
    if not any(scales):  # and it is a tenth of what a float32 sum may err by, or there would be no point in it
        assert errors.max() < 0.1 * spread.max() * delta.error_share(np.dtype(np.float32))
    elif dtype == np.float32:
        assert (np.abs(sums - true) > spread.max() * 2.0**-20).any(), "nothing was lost, so this proves nothing"
