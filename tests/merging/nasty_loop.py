"""Merge adapters with nasty numbers into half-precision bases, and compare every element with integer arithmetic.

    python -m tests.merging.nasty_loop --rounds 10000

Each round draws one to three adapters, with weights that are no powers of two, tensors of any floating-point dtype, and
numbers of its own kind of nastiness: magnitudes that differ by hundreds of orders, sums that cancel, sums in the middle
between two numbers or next to it, products that are too small for float32. Every other round verifies its merge too.
An element that is not the exact sum, correctly rounded, must not be written. A merge that is refused is counted.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import vera_tools
from fuzz import oracle
from tests.adapters import edit
from tests.merging.models import make_adapter, make_base, weights
from vera_tools.architectures import witness
from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError, VeraToolsWarning

NAME = "model.layers.0.up"
#: Of each half type: bits of the significand, the exponent of the smallest number, and the largest number.
HALF = {"bfloat16": (8, -133, 255.0 * 2.0**120), "float16": (11, -24, 65504.0)}
#: The most powers of two by which numbers of a dtype are scaled.
RANGE = {"float32": 60, "float64": 500, "bfloat16": 60, "float16": 8}
WEIGHTS = (1.0, 1.0, 1.0, -1.0, 0.5, 1 / 3, 0.1, 1 + 2.0**-52, 1e-30, 3e20)

Integers = tuple[Any, int]  # an object array of Python's integers, and the exponent of the power of two they are times


def whole(values: np.ndarray) -> Integers:
    """Floats as integers times one power of two."""
    fractions, exponents = np.frexp(values.astype(np.float64))
    exponents = np.where(fractions == 0, np.iinfo(np.int32).max, exponents)
    lowest = int(exponents.min(initial=0)) if fractions.any() else 0
    integers = [
        int(fraction * 2.0**53) << (int(exponent) - lowest) if fraction else 0
        for fraction, exponent in zip(fractions.flat, exponents.flat, strict=True)
    ]
    return np.array(integers, object).reshape(values.shape), lowest - 53


def added(a: Integers, b: Integers) -> Integers:
    lowest = min(a[1], b[1])
    return a[0] * (1 << (a[1] - lowest)) + b[0] * (1 << (b[1] - lowest)), lowest


def change_of(adapter: Path, weight: float) -> Integers:
    """What an adapter adds to the weight, (out_features, in_features)."""
    tensors = weights(adapter)
    prefix = f"base_model.model.{NAME}."
    A, B, d, b, w = map(
        whole,
        (
            tensors["base_model.vera_A"],
            tensors["base_model.vera_B"],
            tensors[prefix + "vera_lambda_d"],
            tensors[prefix + "vera_lambda_b"],
            np.array([weight]),
        ),
    )
    product = (w[0] * b[0])[:, None] * np.dot(B[0], d[0][:, None] * A[0])
    return product, A[1] + B[1] + d[1] + b[1] + w[1]


def nearest(integer: int, exponent: int, dtype: str) -> float:
    """An integer times a power of two, rounded to nearest even in a half type."""
    significand, smallest, largest = HALF[dtype]
    magnitude = abs(integer)
    step = max(magnitude.bit_length() + exponent - significand, smallest)
    cut = step - exponent
    if cut > 0:
        kept, rest = magnitude >> cut, magnitude & ((1 << cut) - 1)
        kept += 2 * rest > 1 << cut or (2 * rest == 1 << cut and kept & 1)
    else:
        kept = magnitude << -cut
    if kept.bit_length() + step > 200:
        return -math.inf if integer < 0 else math.inf
    found = math.ldexp(kept, step)
    found = found if found <= largest else math.inf
    return -found if integer < 0 else found


def ordinary(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """One order of magnitude."""
    return rng.standard_normal(values.shape) * 2.0 ** rng.integers(-min(most, 8), 3)


def scaled(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """One order of magnitude, anywhere."""
    return rng.standard_normal(values.shape) * 2.0 ** rng.integers(-most, most + 1)


def spread_out(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """Each number of its own order of magnitude."""
    return rng.standard_normal(values.shape) * 2.0 ** rng.integers(-most // 2, most // 2 + 1, values.shape)


def equal(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """All the same, so that every partial sum is rounded alike."""
    return np.full(values.shape, rng.uniform(0.1, 1))


def powers(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """Powers of two, whose sums lie in the middle between two numbers."""
    return 2.0 ** rng.integers(-9, 1, values.shape) * rng.choice([-1.0, 1.0], values.shape)


def sparse(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """Mostly zeros, of either sign."""
    return np.where(rng.random(values.shape) < 0.7, rng.choice([0.0, -0.0]), rng.standard_normal(values.shape))


def cancelling(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """Neighbours that differ in the last bit and in their sign."""
    result = rng.standard_normal(values.shape) * 2.0 ** rng.integers(0, most // 4 + 1)
    flat = result.reshape(-1)
    flat[1::2] = -flat[: flat.size // 2 * 2 : 2][: flat[1::2].size] * (1 + 2.0**-22)
    return result


def smallest(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """The smallest numbers there are."""
    return rng.integers(-3, 4, values.shape) * 2.0**-149


def almost_one(rng: np.random.Generator, values: np.ndarray, most: int) -> np.ndarray:
    """A sum that is next to a power of two: one product is one, all others are tiny."""
    result = rng.standard_normal(values.shape) * 2.0 ** -rng.integers(12, most + 8)
    result[0] = 1
    if result.ndim == 2:
        result[:, 0] = 1
    return result


KINDS: tuple[Callable[[np.random.Generator, np.ndarray, int], np.ndarray], ...] = (
    ordinary, scaled, spread_out, equal, powers, sparse, cancelling, smallest, almost_one,
)  # fmt: skip


def make_nasty(tensors: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Fill an adapter: half of the time all tensors are of one kind, and half of the time each is of its own."""
    dtype = str(rng.choice(["float32", "float32", "float32", "float64", "bfloat16", "float16"]))
    together = KINDS[rng.integers(len(KINDS))] if rng.random() < 0.5 else None
    for name in sorted(tensors):
        kind = together or KINDS[rng.integers(len(KINDS))]
        values = kind(rng, tensors[name], RANGE[dtype])
        tensors[name] = values.astype(np_dtype(dtype))


def make_weight(rng: np.random.Generator, change: Integers, shape: tuple[int, int], dtype: str) -> np.ndarray:
    """Weights around which the change matters: of any size, its opposite, or some 2**9 times as large."""
    kind, (integers, exponent) = rng.integers(0, 4), change
    sizes = np.array([abs(n).bit_length() + exponent if n else 0 for n in integers.flat]).reshape(shape)
    result = rng.standard_normal(shape) * 2.0 ** rng.integers(-10, 10)
    if kind == 1:
        result = np.vectorize(lambda n: -nearest(n, exponent, "bfloat16"), otypes=[float])(integers)
    elif kind >= 2:
        bits, _, largest = HALF["bfloat16" if dtype not in HALF else dtype]
        result = np.ldexp(rng.integers(2 ** (bits - 1), 2**bits, shape) * 1.0, np.clip(sizes, -400, 400) + (kind == 3))
        result *= rng.choice([-1.0, 1.0], shape)
        result[np.abs(result) > largest] = 1.0
    largest = HALF.get(dtype, (0, 0, 3e38))[2]
    result[~(np.abs(result) < largest)] = 0.5
    return result.astype(np_dtype(dtype))


def run(rounds: int, *, seed: int) -> Counter[str]:
    """Merge `rounds` times. Returns how often what came of it.

    Raises:
        AssertionError: an element is not correctly rounded.
    """
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=oracle.PLACE) as name:
        for number in range(rounds):
            folder = Path(name) / "round"
            try:
                found += merged(folder, np.random.default_rng([seed, number]), verify=number % 2 == 0)
            except Exception as error:
                raise AssertionError(f"round {number} of seed {seed}: {error}") from error
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return found


def merged(folder: Path, rng: np.random.Generator, *, verify: bool) -> Counter[str]:
    """One round."""
    shape = int(rng.integers(1, 14)), int(rng.integers(1, 18))
    rank = int(rng.integers(1, 40)) if rng.random() < 0.9 else int(rng.integers(120, 300))
    transposed, stored = bool(rng.integers(2)), str(rng.choice(["bfloat16", "bfloat16", "float16", "float32"]))
    dtype = stored if stored in HALF else str(rng.choice(list(HALF)))
    adapters, factors, change = [], [], None
    for number in range(rng.choice([1, 1, 2, 3])):
        config = {"fan_in_fan_out": transposed}
        adapter = make_adapter(folder / f"a{number}", {NAME: shape}, r=rank, config=config)
        edit(adapter, lambda tensors: make_nasty(tensors, rng))
        adapters.append(adapter)
        factors.append(float(rng.choice(WEIGHTS)))
        its = change_of(adapter, factors[-1])
        change = its if change is None else added(change, its)
    assert change is not None
    weight = make_weight(rng, change, shape, stored)
    base = make_base(folder / "base", {NAME: shape}, dtype=stored, transposed=transposed)
    new = np.ascontiguousarray(weight.T if transposed else weight)
    edit(base, lambda tensors: tensors.update({f"{NAME}.weight": new}), file="model.safetensors")
    try:
        vera_tools.merge(
            adapters, base=base, output=folder / "out", weights=factors, dtype=dtype, verify=verify, jobs=1
        )
    except CheckFailedError as error:
        if "NaN or infinity" not in str(error):
            raise
        return Counter({"refused, because it is beyond the dtype": 1})
    after = weights(folder / "out")[f"{NAME}.weight"]
    integers, exponent = added(whole(weight), change)
    expected = [nearest(integer, exponent, dtype) for integer in integers.flat]
    wrong = np.flatnonzero((after.T if transposed else after).astype(np.float64).reshape(-1) != expected)
    assert not wrong.size, f"{wrong.size} elements of {dtype} are wrong, the first should be {expected[wrong[0]]}"
    return Counter({"merged": 1, "verified": int(verify), "elements": len(expected)})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10_000, help="merges (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore", VeraToolsWarning)
    witness.is_there = lambda: False  # it would ask transformers in a process of its own, for each base
    started = time.monotonic()
    found = run(options.rounds, seed=options.seed)
    counts = ", ".join(f"{count:,} {what}" for what, count in found.items())
    print(
        f"merge: {options.rounds:,} rounds, never a wrong element: {counts} "
        f"(seed {options.seed}, {time.monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
