"""The CUDA generator against published vectors, values that GPUs printed, and the kernel's own loops spelled out."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction

import numpy as np
import pytest

from tests import ROOT
from vera_tools.dtypes import FLOATS, np_dtype
from vera_tools.projections import philox
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import bound

# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
# torch.manual_seed(0); torch.rand(10, device="cuda") twice, and manual_seed(42); torch.rand(12): as GPUs print them.
PRINTED = {
    (0, 0): [0.3990, 0.5167, 0.0249, 0.9401, 0.9459, 0.7967, 0.4150, 0.8203, 0.2290, 0.9096],
    (0, 1): [0.9722, 0.7910, 0.4690, 0.3300, 0.3345, 0.3783, 0.7640, 0.6405, 0.1103, 0.3594],
    (42, 0): [0.6130, 0.0101, 0.3984, 0.0403, 0.1563, 0.4825, 0.7362, 0.4060, 0.5189, 0.2867, 0.2416, 0.9228],
}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert tuple(philox.philox4x32(np.array([counter], np.uint64), key)[0]) == expected


@pytest.mark.parametrize(("seed", "call"), PRINTED)
def test_gives_what_gpus_print(seed, call):
    expected = PRINTED[seed, call]
    offset = 0
    for _ in range(call + 1):
        values, offset = philox.uniform(seed, len(expected), 0.0, 1.0, offset=offset, multiprocessors=80)
    assert [round(float(value), 4) for value in values] == expected


def kernel(seed: int, size: int, *, multiprocessors: int, threads: int, offset: int) -> list[int]:
    """The word that each element is made from, by the kernel's loops: thread by thread, four elements a time."""
    grid = min(multiprocessors * (threads // 256), -(-size // 256))
    words = [-1] * size
    for thread in range(grid * 256):
        counter, index = offset // 4, thread
        while index < -(-size // (grid * 256 * 4)) * grid * 256 * 4:
            block = np.array([[counter & 0xFFFFFFFF, counter >> 32, thread, 0]], np.uint64)
            for lane, word in enumerate(philox.philox4x32(block, (seed & 0xFFFFFFFF, seed >> 32))[0]):
                element = index + grid * 256 * lane
                if element < size:
                    words[element] = int(word)
            counter, index = counter + 1, index + grid * 256 * 4
    return words


@pytest.mark.parametrize("before", [8, (1 << 34) - 4])  # the counter's first word, and from there on the second too
@pytest.mark.parametrize(("size", "multiprocessors"), [(100, 4), (1300, 1), (2500, 2)])
def test_which_thread_draws_which_element(size, multiprocessors, before):
    seed = 7 + (9 << 32)
    values, offset = philox.uniform(seed, size, 0.0, 1.0, offset=before, multiprocessors=multiprocessors, threads=256)
    words = kernel(seed, size, multiprocessors=multiprocessors, threads=256, offset=before)
    expected = [np.float32(np.float32(word) * np.float32(2**-32) + np.float32(2**-33)) for word in words]
    assert values.tolist() == [0.0 if value == 1 else float(value) for value in expected]
    assert offset == before + 4 * math.ceil(size / (min(multiprocessors, math.ceil(size / 256)) * 1024))


def test_the_number_of_multiprocessors_matters_only_where_the_device_is_full():
    small, large = PairShape(2, 100, 60), PairShape(16, 4096, 2048)
    for shape, same in ((small, True), (large, False)):
        a = philox.digests(1, shape, dtype="float32", multiprocessors=4, threads=1024)
        b = philox.digests(1, shape, dtype="float32", multiprocessors=6, threads=1024)
        assert (a == b) is same
    usual = philox.generate(1, large, dtype="float32", multiprocessors=3)
    for array, same in zip(
        usual, philox.generate(1, large, dtype="float32", multiprocessors=6, threads=1024), strict=True
    ):
        assert np.array_equal(array, same)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_values_stay_within_the_bound(dtype):
    shape = PairShape(16, 300, 500)
    for array, fan_in in zip(philox.generate(3, shape, dtype=dtype, multiprocessors=8), (300, 16), strict=True):
        assert array.dtype == np_dtype(dtype)
        limit = np.array(bound(fan_in)).astype(np_dtype(dtype)).astype(float)
        wide = array.astype(float)
        assert wide.min() >= -limit
        assert wide.max() < limit
        assert abs(wide.mean()) < 0.05 * limit
        assert wide.std() == pytest.approx(limit / math.sqrt(3), rel=0.03)


def test_the_fused_sum_rounds_once():
    # 1 + 2**-24 + 2**-60 lies just above the middle of two floats: float64 alone loses the last term, and ties to even.
    product = np.array([2.0**-24 + 2.0**-60])
    assert np.float32(product + 1.0) == 1.0
    assert philox._odd_sum(product, 1.0).astype(np.float32)[0] == np.float32(1 + 2.0**-23)
    product = np.array([3 * 2.0**-24 - 2.0**-60])  # and just below another one, whose even neighbour is the upper
    assert np.float32(product + 1.0) == np.float32(1 + 2.0**-22)
    assert philox._odd_sum(product, 1.0).astype(np.float32)[0] == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("words", [(0, 0), (1, 0), (0, 1), (2**32 - 1, 2**21 - 1), (0x9ABCDEF0, 0x12345)])
def test_a_double_is_made_of_53_bits_and_half_a_step(words):
    first, second = words
    unit = float(Fraction(2 * (first ^ (second << 21)) + 1, 2**54))
    expected = float(Fraction(unit) * Fraction(0.75) + Fraction(-0.5))
    assert philox._double(np.array([words], np.uint64), -0.5, 0.25)[0, 0] == expected


RESULTS = sorted((ROOT / "tests" / "gpu" / "results").glob("*.json"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_gives_what_a_gpu_drew(file, dtype):
    """Digests that the card itself made, of pairs that fill it and of others."""
    stream = json.loads(file.read_text("utf-8"))["sections"]["generator"]["streams"][dtype]
    multiprocessors, threads = map(int, re.findall(r" (\d+) ", stream["made by"]))
    for pair in stream["drawn"]:
        shape = PairShape(pair["r"], pair["in_max"], pair["out_max"])
        found = philox.digests(pair["prng_key"], shape, dtype=dtype, multiprocessors=multiprocessors, threads=threads)
        assert found == {name: pair[name] for name in ("vera_A", "vera_B")}
    largest = max(stream["drawn"], key=lambda pair: pair["r"] * (pair["in_max"] + pair["out_max"]))
    shape = PairShape(largest["r"], largest["in_max"], largest["out_max"])
    other = philox.digests(
        largest["prng_key"], shape, dtype=dtype, multiprocessors=multiprocessors - 1, threads=threads
    )
    assert other["vera_B"] != largest["vera_B"]
