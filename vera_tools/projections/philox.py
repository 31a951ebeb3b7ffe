"""torch's CUDA generator, in numpy: which values a GPU draws, given how many threads it can hold.

PEFT draws on the CPU; some trainers draw on the GPU itself, where the same key gives other values, and other ones again
on a GPU with another number of multiprocessors. The algorithm is public, so such a stream can be named:

- Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) under the key
  ``(seed low, seed high)`` and the counter ``(offset / 4 low, high, thread low, high)``;
- a kernel of G blocks of 256 threads, G being as many as the tensor needs and at most as many as the device can hold,
  in which thread t draws four words at a time (float64: two pairs) for the elements t, t + 256 G, t + 512 G, ...
  (ATen/native/cuda/DistributionTemplates.h);
- ``u = word * 2**-32 + 2**-33``, then ``u * (to - from) + from`` as one fused multiply-add, and the value ``to``
  becomes ``from`` (before torch 2.1 only ``u = 1`` did). Half types compute in float32 and are rounded at the end.

A stream that this does not give bit for bit is reported as the device's own.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from vera_tools.dtypes import HALVES, Array, np_dtype
from vera_tools.projections.floats import fma
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import bound

NAME = "philox4x32-10"
BLOCK_SIZE = 256

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Ten rounds of Philox4x32.

    Args:
        counter: (n, 4) words, as uint64 below 2**32.
        key: Two words.

    Returns:
        (n, 4) words, as uint64 below 2**32.
    """
    c0, c1, c2, c3 = (counter[:, column].astype(np.uint64) for column in range(4))
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1)


def uniform(
    seed: int,
    size: int,
    low: float,
    high: float,
    *,
    dtype: str = "float32",
    offset: int = 0,
    multiprocessors: int,
    threads: int = 2048,
) -> tuple[Array, int]:
    """What ``torch.empty(size, device="cuda").uniform_(low, high)`` holds.

    Args:
        seed: The generator's seed.
        size: Number of elements.
        low: Lower end.
        high: Upper end.
        dtype: The tensor's dtype.
        offset: The generator's offset, a multiple of 4: 0 after seeding.
        multiprocessors: The device's number of multiprocessors.
        threads: Threads that each of them can hold.

    Returns:
        (size,) values, and the generator's offset afterwards.
    """
    unroll = 2 if dtype == "float64" else 4
    grid = min(multiprocessors * (threads // BLOCK_SIZE), -(-size // BLOCK_SIZE))
    total = grid * BLOCK_SIZE
    rounds = -(-size // (total * unroll))
    thread = np.arange(total, dtype=np.uint64)
    seed &= 2**64 - 1
    out = np.empty(rounds * total * unroll, np_dtype(dtype))
    for n in range(rounds):
        counter = np.empty((total, 4), np.uint64)
        counter[:, 0] = (offset // 4 + n) & 0xFFFFFFFF
        counter[:, 1] = (offset // 4 + n) >> 32
        counter[:, 2], counter[:, 3] = thread & _LOW, thread >> np.uint64(32)
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        values = _affine(words, low, high, dtype)
        out[n * total * unroll : (n + 1) * total * unroll] = values.T.reshape(-1)
    return out[:size], offset + 4 * rounds


def generate(
    key: int, shape: PairShape, *, dtype: str, multiprocessors: int, threads: int = 2048
) -> tuple[Array, Array]:
    """vera_A (r, in_max) and vera_B (out_max, r) as a CUDA device draws them from one generator, vera_A first."""
    pair, offset = [], 0
    for dimensions in (shape.vera_A, shape.vera_B):
        limit = bound(dimensions[1])
        flat, offset = uniform(
            key,
            math.prod(dimensions),
            -limit,
            limit,
            dtype=dtype,
            offset=offset,
            multiprocessors=multiprocessors,
            threads=threads,
        )
        pair.append(flat.reshape(dimensions))
    return pair[0], pair[1]


def digests(key: int, shape: PairShape, *, dtype: str, multiprocessors: int, threads: int = 2048) -> dict[str, str]:
    """sha256 of the two tensors of `generate`."""
    pair = generate(key, shape, dtype=dtype, multiprocessors=multiprocessors, threads=threads)
    names = ("vera_A", "vera_B")
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in zip(names, pair, strict=True)}


def _affine(words: Array, low: float, high: float, dtype: str) -> Array:
    if dtype == "float64":
        return _double(words, low, high)
    kind: Any = np_dtype(dtype)
    start, stop = np.array([low, high]).astype(np.float32).astype(kind)
    # The difference is taken in the tensor's own dtype.
    width = np.float64(kind.type(np.float32(stop) - np.float32(start)))
    unit = (words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)).astype(np.float64)
    values = _odd_sum(unit * width, float(start)).astype(np.float32)
    if dtype in HALVES:
        values = values.astype(kind)
    return np.where(values == stop, start, values)


def _odd_sum(product: Array, start: float) -> Array:
    """float64 sums rounded to odd, so that rounding them to float32 afterwards rounds as one fused operation would."""
    total = product + start
    part = total - product
    lost = (product - (total - part)) + (start - part)
    even = (total.view(np.int64) & 1) == 0
    return np.where(even & (lost != 0), np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)), total)


def _double(words: Array, low: float, high: float) -> Array:
    # 53 bits of two words (the first is the low one); one rounding where the half step is added.
    first, second = words[:, 0::2], words[:, 1::2]
    bits = (first ^ (second << np.uint64(53 - 32))).astype(np.float64)
    unit = bits * 2.0**-53 + 2.0**-54
    values = fma(unit.reshape(-1), high - low, low).reshape(unit.shape)
    return np.where(values == high, low, values)
