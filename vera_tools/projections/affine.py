"""The last step of a draw, ``x * (to - from) + from``: rounded once (fused) or twice (separate), in numpy.

A compiler makes one fused multiply-add of it or a multiply and an add, and in some half of the elements the results
differ. ``x`` is a word's low bits over a power of two; ``scale`` holds that power and ``to - from``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vera_tools.dtypes import Array
from vera_tools.projections.floats import fma


class Scratch:
    """Arrays of one block's size, made once."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}

    def __call__(self, dtype: str, size: int) -> Array:
        """An array with arbitrary content, good until the next one of this dtype is asked for."""
        array = self._arrays.get(dtype)
        if array is None or array.size < size:
            array = self._arrays[dtype] = np.empty(size, dtype)
        return array[:size]


def _low_bits(words: Array, mask: np.uint64, scratch: Scratch) -> Array:
    bits = scratch("uint32", words.size)
    np.copyto(bits, words, casting="unsafe")
    np.bitwise_and(bits, np.uint32(mask), out=bits)
    return bits.view(np.int32)  # numpy converts signed integers to floats much faster than unsigned ones


def _single_fused(words: Array, mask: np.uint64, scale: float, low: float, scratch: Scratch) -> Array:
    # 24 bits times 24 bits plus a number of the same scale fits in float64's 53, so only the last cast rounds.
    wide, out = scratch("float64", words.size), scratch("float32", words.size)
    np.multiply(_low_bits(words, mask, scratch), scale, out=wide)
    np.add(wide, low, out=wide)
    np.copyto(out, wide, casting="same_kind")
    return out


def _single_separate(words: Array, mask: np.uint64, scale: float, low: float, scratch: Scratch) -> Array:
    out = scratch("float32", words.size)
    np.copyto(out, _low_bits(words, mask, scratch), casting="same_kind")
    # The kernel multiplies by 2**-24 first; scaling by a power of two commutes with rounding.
    np.multiply(out, np.float32(scale), out=out)
    np.add(out, np.float32(low), out=out)
    return out


def _unit_bits(words: Array, mask: np.uint64) -> Array:
    high, low = words[0::2], words[1::2]
    bits: Array = ((high << np.uint64(32)) | low) & mask
    return bits.astype(np.float64)


def _double_separate(words: Array, mask: np.uint64, scale: float, low: float, scratch: Scratch) -> Array:
    return _unit_bits(words, mask) * scale + low


def _double_fused(words: Array, mask: np.uint64, scale: float, low: float, scratch: Scratch) -> Array:
    return fma(_unit_bits(words, mask), scale, low)


#: (words, mask, scale, low, scratch) -> values: ``(word & mask) * scale + low``, in scratch memory.
Affine = Callable[[Array, np.uint64, float, float, Scratch], Array]
#: By whether the draw is in float64, and by how its affine map rounds.
AFFINE: dict[tuple[bool, str], Affine] = {
    (False, "fused"): _single_fused,
    (False, "separate"): _single_separate,
    (True, "fused"): _double_fused,
    (True, "separate"): _double_separate,
}
