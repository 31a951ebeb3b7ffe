"""vera_A and vera_B in plain Python, from the text of the algorithm alone: no numpy, nothing of vera_tools.

Slow and exact: Matsumoto and Nishimura's MT19937 in integers, the arithmetic in fractions that are rounded where, and
only where, the kernel rounds.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from fractions import Fraction

PRECISION = {"float64": 53, "float32": 24, "float16": 11, "bfloat16": 8}
SMALLEST = {"float64": -1074, "float32": -149, "float16": -24, "bfloat16": -133}  # exponent of the least subnormal


def mt19937(key: int) -> Iterator[int]:
    """The generator's 32-bit words, seeded by init_genrand with the low 32 bits of `key`."""
    state = [key % 2**32]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) % 2**32)
    while True:
        for i in range(624):
            y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7FFFFFFF)
            state[i] = state[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y % 2 else 0)
        for y in state:
            y ^= y >> 11
            y ^= (y << 7) & 0x9D2C5680
            y ^= (y << 15) & 0xEFC60000
            yield y ^ (y >> 18)


def nearest(value: Fraction, dtype: str) -> Fraction:
    """The number of this dtype nearest to `value`, ties to even."""
    if value == 0:
        return value
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - PRECISION[dtype] + 1, SMALLEST[dtype])
    return round(value / unit) * unit


def encode(value: Fraction, dtype: str) -> bytes:
    """The little-endian bytes of a number that this dtype holds exactly."""
    if dtype == "bfloat16":
        return struct.pack("<f", float(value))[2:]
    return struct.pack({"float64": "<d", "float32": "<f", "float16": "<e"}[dtype], float(value))


def pair(
    key: int,
    shape: tuple[int, int, int],
    *,
    drawn_dtype: str = "float32",
    half_sampling: str | None = None,
    rounding: str = "fused",
    through: str | None = None,
    stored: str = "float32",
    key_B: int | None = None,
    b_first: bool = False,
) -> dict[str, bytes]:
    """The bytes of vera_A (r, in_max) and vera_B (out_max, r), `shape` being (r, in_max, out_max)."""
    r, in_max, out_max = shape
    sizes = {"vera_A": (r * in_max, in_max), "vera_B": (out_max * r, r)}
    words = mt19937(key)
    result = {}
    for name in ("vera_B", "vera_A") if b_first else ("vera_A", "vera_B"):
        own = mt19937(key_B) if name == "vera_B" and key_B is not None else words
        size, fan_in = sizes[name]
        values = (_draw(own, fan_in, drawn_dtype, half_sampling, rounding) for _ in range(size))
        result[name] = b"".join(encode(_cast(value, drawn_dtype, through, stored), stored) for value in values)
    return result


def _draw(words: Iterator[int], fan_in: int, dtype: str, half_sampling: str | None, rounding: str) -> Fraction:
    exact_bound = Fraction(math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan_in)))
    if dtype == "float64":
        work, bits, raw = "float64", 53, (next(words) << 32) | next(words)
    elif half_sampling == "scalar":
        work, bits, raw = "float32", PRECISION[dtype], next(words)
    else:
        work, bits, raw = "float32", 24, next(words)
    bound = nearest(nearest(exact_bound, work), dtype if half_sampling == "scalar" else work)
    product = Fraction(raw % 2**bits, 2**bits) * (bound + bound)
    if rounding == "separate":
        product = nearest(product, work)
    value = nearest(nearest(product - bound, work), dtype)
    if half_sampling == "opmath" and value == nearest(bound, dtype):
        value = nearest(-bound, dtype)
    return value


def _cast(value: Fraction, drawn_dtype: str, through: str | None, stored: str) -> Fraction:
    now = drawn_dtype
    for dtype in (through, stored):
        if dtype is None:
            continue
        if now == "float64" and dtype in ("bfloat16", "float16"):
            value = nearest(value, "float32")  # torch makes half types from a float, never from a double
        value, now = nearest(value, dtype), dtype
    return value
