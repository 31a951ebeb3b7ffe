"""Sums of products without any rounding, for the few elements that float64 cannot decide.

A float is an integer times a power of two, and so are sums and products of floats. Python's integers hold them whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from vera_tools.dtypes import Array

#: Bits of a float64, and the exponent of its smallest number.
_BITS, _SMALLEST = 53, -1074


class Scaled:
    """Floats as integers times powers of two, element by element.

    Args:
        values: Finite, of any floating-point dtype that float64 holds.
    """

    def __init__(self, values: Array) -> None:
        fractions, exponents = np.frexp(values.astype(np.float64))
        self.integers: list[int] = (fractions * 2.0**_BITS).astype(np.int64).tolist()
        self.exponents: list[int] = (exponents.astype(np.int64) - _BITS).tolist()


def product_sum(factors: Sequence[Scaled]) -> tuple[int, int]:
    """The sum over i of the product of the factors' i-th elements, as an integer and the exponent of a power of two."""
    terms = [(1, 0)] * len(factors[0].integers)
    for factor in factors:
        terms = [
            (integer * other, exponent + shift)
            for (integer, exponent), other, shift in zip(terms, factor.integers, factor.exponents, strict=True)
        ]
    return total(terms)


def total(terms: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The sum of numbers that are integers times powers of two, given and returned as (integer, exponent)."""
    filled = [(integer, exponent) for integer, exponent in terms if integer]
    lowest = min((exponent for _, exponent in filled), default=0)
    return sum(integer << (exponent - lowest) for integer, exponent in filled), lowest


def to_odd(integer: int, exponent: int) -> float:
    """A number in float64, rounded to odd, after which a rounding to a narrower dtype is as good as the only one."""
    magnitude = abs(integer)
    cut = max(magnitude.bit_length() - _BITS, _SMALLEST - exponent, 0)
    kept, rest = magnitude >> cut, magnitude & ((1 << cut) - 1)
    try:
        result = math.ldexp(float(kept | (rest != 0)), exponent + cut)
    except OverflowError:
        result = math.inf
    return -result if integer < 0 else result  # copysign would make a float of an integer that may be too large for one
