"""The reference for vera_A and vera_B: numpy alone, bit-identical to torch's CPU kernel, and frozen.

The engine is MT19937 with ``init_genrand(key mod 2**32)``. numpy has the same one in `numpy.random.RandomState`, whose
streams NumPy guarantees never to change (NEP 19), so this reference cannot move with any later numpy or torch.

The arithmetic follows ``uniform_real`` in ATen/core/TransformationHelper.h and the kernels in
ATen/native/cpu/DistributionTemplates.h, read in the releases from 1.13.1 to 2.15.0:

- float32 takes the low 24 bits of one 32-bit word, float64 the low 53 bits of two (the first word is the high half);
- ``from`` and ``to`` are -bound and +bound in the drawn dtype, with ``bound = sqrt(3) * sqrt(2) / sqrt(fan_in)``
  computed in double (PEFT's ``_kaiming_init``), ``fan_in`` being the tensor's second dimension;
- half types: "scalar" draws as many bits as the type's own precision, with ``from`` and ``to`` rounded to that type;
  "opmath" draws in float32, rounds, and turns a value that has rounded to ``to`` into ``from``.

Work is done in blocks of `BLOCK` elements, so that scratch memory stays in the CPU's cache whatever the tensor's size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_tools.dtypes import HALVES, Array, np_dtype
from vera_tools.projections.affine import AFFINE, Scratch
from vera_tools.projections.key import seed
from vera_tools.projections.pair import PairShape
from vera_tools.projections.recipe import Recipe

#: Elements drawn at a time: the scratch arrays of one block (about 20 bytes an element) fit in a CPU's L2 cache.
BLOCK = 1 << 15


def bound(fan_in: int) -> float:
    """The uniform distribution's bound, in double precision, in PEFT's own order of operations."""
    return math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan_in))


def generate(recipe: Recipe, shape: PairShape, *, stored_dtype: str = "float32") -> tuple[Array, Array]:
    """Draw the pair.

    Args:
        recipe: Which stream.
        shape: r, in_max and out_max.
        stored_dtype: The dtype of the result ("float32", "float64", "bfloat16", "float16"); the values are cast to it
            after they were rounded through the recipe's own dtypes.

    Returns:
        vera_A of shape (r, in_max) and vera_B of shape (out_max, r), C-contiguous.
    """
    dtype = np_dtype(stored_dtype)
    out = {name: np.empty(math.prod(shape.of(name)), dtype) for name in ("vera_A", "vera_B")}
    for block in blocks([recipe], shape, stored_dtype=stored_dtype):
        out[block.tensor][block.start : block.stop] = block.values[recipe]
    return out["vera_A"].reshape(shape.vera_A), out["vera_B"].reshape(shape.vera_B)


def digests(recipe: Recipe, shape: PairShape, *, stored_dtype: str = "float32") -> dict[str, str]:
    """sha256 of vera_A and vera_B (little-endian, row-major), without holding either of them."""
    hashes = {"vera_A": hashlib.sha256(), "vera_B": hashlib.sha256()}
    for block in blocks([recipe], shape, stored_dtype=stored_dtype):
        hashes[block.tensor].update(block.values[recipe].view(np.uint8).data)
    return {name: digest.hexdigest() for name, digest in hashes.items()}


@dataclass(frozen=True)
class Block:
    """Elements `start` to `stop` of the flattened tensor, as each wanted recipe draws them.

    ``values`` are views of scratch memory: they hold until the next block is asked for.
    """

    tensor: str
    start: int
    stop: int
    values: dict[Recipe, Array]


def blocks(
    recipes: Sequence[Recipe],
    shape: PairShape,
    *,
    stored_dtype: str = "float32",
    wanted: set[Recipe] | None = None,
    first: int = BLOCK,
) -> Iterator[Block]:
    """Draw the pair block by block, under several recipes side by side.

    Recipes that read the same words of the same generator share them. A recipe that the caller removes from `wanted`
    is not computed any more.

    Args:
        recipes: All with the same draw order (`Recipe.b_first`).
        shape: r, in_max and out_max.
        stored_dtype: The dtype of the values handed out.
        wanted: The recipes that are still of interest; may shrink between blocks. Default: all.
        first: Elements of each tensor's first block; few of them tell most recipes apart at little cost.
    """
    wanted = set(recipes) if wanted is None else wanted
    names = ("vera_B", "vera_A") if recipes[0].b_first else ("vera_A", "vera_B")
    engines: dict[tuple[int, bool, bool], np.random.MT19937] = {}
    for name in names:
        size = math.prod(shape.of(name))
        fan_in = shape.of(name)[1]
        drawers = {}
        for recipe in recipes:
            own = name == "vera_B" and recipe.prng_key_B is not None
            key = recipe.prng_key_B if own and recipe.prng_key_B is not None else recipe.prng_key
            stream = (seed(key), own, recipe.drawn_dtype == "float64")
            if stream not in engines:
                engines[stream] = _engine(key)
            drawers[recipe] = (stream, _Drawer(recipe, fan_in, stored_dtype))
        stop = 0
        while stop < size:
            start, stop = stop, min(stop + (first if stop == 0 else BLOCK), size)
            words: dict[tuple[int, bool, bool], Array] = {}
            values: dict[Recipe, Array] = {}
            for recipe, (stream, drawer) in drawers.items():
                if recipe not in wanted:
                    continue
                if stream not in words:
                    words[stream] = engines[stream].random_raw((stop - start) * (2 if stream[2] else 1))
                values[recipe] = drawer(words[stream])
            yield Block(name, start, stop, values)


def _engine(key: int) -> np.random.MT19937:
    engine = np.random.MT19937()
    # RandomState's seeding is init_genrand, as torch's; MT19937(seed) would go through SeedSequence instead.
    state: Any = np.random.RandomState(seed(key)).get_state(legacy=False)
    engine.state = state
    return engine


class _Drawer:
    """Raw words to values of one tensor under one recipe, through scratch arrays that are used again and again."""

    def __init__(self, recipe: Recipe, fan_in: int, stored_dtype: str) -> None:
        limit = bound(fan_in)
        self._affine = AFFINE[recipe.drawn_dtype == "float64", recipe.rounding]
        bits = 53 if recipe.drawn_dtype == "float64" else 24
        limits: np.dtype[Any] = np.dtype(np.float32)
        self._wrap: tuple[Array, Array] | None = None
        if recipe.drawn_dtype == "float64":
            limits = np.dtype(np.float64)
        elif recipe.drawn_dtype in HALVES:
            half = np_dtype(recipe.drawn_dtype)
            if recipe.half_sampling == "scalar":
                bits, limits = (8 if recipe.drawn_dtype == "bfloat16" else 11), half
            else:
                edge = np.array([limit, -limit], np.float32).astype(half)
                self._wrap = edge[:1], edge[1:]
        # float64 holds every one of these exactly, so nothing is lost by carrying them as Python floats.
        self._low = float(np.array(-limit).astype(limits))
        self._scale = 2 * float(np.array(limit).astype(limits)) * 2.0**-bits
        self._mask = np.uint64(2**bits - 1)
        self._casts = _casts(recipe, stored_dtype)
        self._scratch = Scratch()

    def __call__(self, words: Array) -> Array:
        values = self._affine(words, self._mask, self._scale, self._low, self._scratch)
        for step, dtype in enumerate(self._casts):
            values = values.astype(dtype, copy=False)
            if step == 0 and self._wrap is not None:
                values[values == self._wrap[0]] = self._wrap[1]
        return values


def _casts(recipe: Recipe, stored_dtype: str) -> list[np.dtype[Any]]:
    """The dtypes that drawn values pass through, the stored one last."""
    chain = [recipe.drawn_dtype, recipe.rounded_through or recipe.drawn_dtype, stored_dtype]
    path = ["float64" if recipe.drawn_dtype == "float64" else "float32"]
    for dtype in chain:
        if dtype != path[-1]:
            if path[-1] == "float64" and dtype in HALVES:
                path.append("float32")  # c10::BFloat16 and c10::Half are made from a float, never from a double
            path.append(dtype)
    return [np_dtype(dtype) for dtype in path[1:]]
