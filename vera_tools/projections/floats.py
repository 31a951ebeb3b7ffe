"""What numpy lacks of floating-point arithmetic: fused multiply-add, rounding to odd, floats as ordered integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from vera_tools.dtypes import Array


def fma(a: Array, b: float, c: float) -> Array:
    """``a * b + c`` in float64 with one rounding.

    Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd"
    (IEEE Transactions on Computers 57, 2008). Valid away from overflow and underflow, as here.
    """
    product, product_error = _two_product(a, b)
    low, low_error = _two_sum(product_error, c)
    high, high_error = _two_sum(product, low)
    # The two errors are added with rounding to odd, so that the last addition cannot round twice.
    tail, tail_error = _two_sum(high_error, low_error)
    even = (tail.view(np.int64) & 1) == 0
    towards = np.where(tail_error > 0, np.inf, -np.inf)
    tail = np.where(even & (tail_error != 0), np.nextafter(tail, towards), tail)
    return high + tail


def _two_sum(a: Array, b: Array | float) -> tuple[Array, Array]:
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: float) -> tuple[Array, Array]:
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(np.float64(b))
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Any) -> tuple[Any, Any]:
    scaled = a * 134217729.0  # 2**27 + 1: Veltkamp's splitting into two halves of 26 bits
    high = scaled - (scaled - a)
    return high, a - high


def to_odd(values: Array) -> Array:
    """float64 to float32 with rounding to odd, after which a second rounding to a half type is as good as one."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    back = near.astype(np.float64)
    even = (near.view(np.uint32) & 1) == 0
    adjust = even & (back != values) & np.isfinite(near)
    towards = np.where(back < values, np.float32(np.inf), np.float32(-np.inf))
    return np.where(adjust, np.nextafter(near, towards), near)


def max_ulp(a: Array, b: Array) -> int:
    """Largest distance between two arrays of one floating-point dtype, counted in representable numbers."""
    first, second = _ordered(a), _ordered(b)
    largest, smallest = np.maximum(first, second), np.minimum(first, second)
    return int((largest - smallest).max()) if largest.size else 0


def _ordered(values: Array) -> Array:
    """Floats as uint64 in the floats' own order, so that neighbours differ by 1 (and -0.0 equals 0.0)."""
    bits = as_bits(values)
    width = 8 * bits.dtype.itemsize
    sign = np.uint64(1 << (width - 1))
    wide = bits.astype(np.uint64)
    magnitude = wide & (sign - np.uint64(1))
    ordered: Array = np.where(wide & sign, sign - magnitude, sign + magnitude)
    return ordered


def as_bits(values: Array) -> Array:
    """Floats as the unsigned integers of their bits, so that equal means identical: NaN equals itself, -0.0 not 0.0."""
    return values.view(np.dtype(f"u{values.dtype.itemsize}"))
