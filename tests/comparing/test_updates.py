"""Norms through Gram matrices against the weight-sized matrices themselves, in extended precision."""

from __future__ import annotations

import numpy as np
import pytest

from vera_tools.comparing.updates import UpdateComparison


def adapter(seed, *, r=6, width=20, height=15, dtype=np.float32):
    """One pair and one layer's vectors."""
    rng = np.random.default_rng(seed)
    pair = rng.normal(size=(r, width)).astype(dtype), rng.normal(size=(height, r)).astype(dtype)
    return pair, (rng.normal(size=height).astype(dtype), rng.normal(size=r).astype(dtype))


def update(pair, vectors, width):
    """The definition, in the widest float there is."""
    (A, B), (b, d) = ([x.astype(np.longdouble) for x in y] for y in (pair, vectors))
    return (b[:, None] * B[: len(b)]) @ (d[:, None] * A[:, :width])


def norm(matrix):
    return float(np.sqrt(np.sum(matrix**2)))


@pytest.mark.parametrize("width", [20, 7])
@pytest.mark.parametrize("ranks", [(6, 6), (6, 4), (3, 6)])
def test_against_the_definition(width, ranks):
    (one, u), (two, v) = adapter(1, r=ranks[0]), adapter(2, r=ranks[1])
    norms = UpdateComparison(one, two).layer(width, u, v)
    first, second = update(one, u, width), update(two, v, width)
    assert norms.a == pytest.approx(norm(first), rel=1e-13)
    assert norms.b == pytest.approx(norm(second), rel=1e-13)
    assert norms.difference == pytest.approx(norm(first - second), rel=1e-12)


@pytest.mark.parametrize("changed", ["lambda_b", "lambda_d", "vera_A", "vera_B"])
def test_one_changed_bit_is_measured_and_does_not_drown(changed):
    """A change of 6e-8 in one factor; Gram matrices of the whole updates would lose it in their rounding."""
    (A, B), (b, d) = adapter(3)
    moved = {"lambda_b": b.copy(), "lambda_d": d.copy(), "vera_A": A.copy(), "vera_B": B.copy()}
    flat = moved[changed].reshape(-1)
    flat[2] = np.nextafter(flat[2], np.float32(np.inf))
    pair, vectors = (moved["vera_A"], moved["vera_B"]), (moved["lambda_b"], moved["lambda_d"])
    norms = UpdateComparison((A, B), pair).layer(20, (b, d), vectors)
    expected = norm(update((A, B), (b, d), 20) - update(pair, vectors, 20))
    assert 0 < norms.difference < 1e-5
    assert norms.difference == pytest.approx(expected, rel=1e-6)


def test_equal_is_exactly_zero():
    pair, vectors = adapter(4)
    same = tuple(x.copy() for x in pair)
    assert UpdateComparison(pair, same).layer(20, vectors, vectors).difference == 0.0


def test_large_layers_in_blocks():
    (one, u), (two, v) = (adapter(seed, r=3, width=2500, height=2100) for seed in (5, 6))
    norms = UpdateComparison(one, two).layer(2500, u, v)
    expected = norm(update(one, u, 2500).astype(float) - update(two, v, 2500).astype(float))
    assert norms.difference == pytest.approx(expected, rel=1e-10)


def test_a_layer_that_only_one_has():
    (one, u), (two, _) = adapter(7), adapter(8)
    norms = UpdateComparison(one, two).layer(20, u, None)
    assert (norms.b, norms.difference) == (0.0, norms.a)


def test_what_does_not_fit_is_refused():
    pair, (b, d) = adapter(9)
    comparison = UpdateComparison(pair, pair)
    with pytest.raises(ValueError, match=r"rank 5 does not fit vera_A \[6, 20\]"):
        comparison.layer(20, (b, d[:5]), (b, d))
    with pytest.raises(ValueError, match="15 rows in one adapter and 14 in the other"):
        comparison.layer(20, (b, d), (b[:14], d))
