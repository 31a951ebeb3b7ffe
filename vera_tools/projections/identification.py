"""Stored projections -> the recipes that make exactly these bits, or how far off the nearest one is, and in what way.

Every candidate is drawn beside the stored pair, block by block, and dropped at its first wrong bit, so that the usual
case costs one full draw. Only where nothing fits exactly are other keys and orders tried, and then distances measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vera_tools.dtypes import FLOATS, HALVES, Array
from vera_tools.projections.floats import as_bits, max_ulp
from vera_tools.projections.key import KEY_MAX, KEY_MIN, same_key
from vera_tools.projections.pair import PROJECTIONS, Pair, PairShape
from vera_tools.projections.prng import BLOCK, blocks
from vera_tools.projections.recipe import Recipe, candidates
from vera_tools.report import Document

MatchKind = Literal["identical", "ulp", "rounded", "edited", "unrelated", "absent"]

#: Up to so many differing elements are listed one by one.
MAX_PLACES = 16
#: In words, so many of them.
MAX_SHOWN = 3
#: float8_e5m2, the coarsest floating-point type in use, keeps values within 1/8; what is farther off is unrelated.
MAX_ROUNDING = 2.0**-3
#: Keys that training scripts are known to leave in place of the configured one.
USUAL_KEYS = (0, 1, 42)


@dataclass(frozen=True)
class Match(Document):
    """One projection against the nearest recipe. Figures are 0 where the two are identical, None where not finite.

    Attributes:
        shape: Shape of the tensor, or None where it is unknown.
        dtype: Its stored dtype.
        sha256: Digest of the stored bytes, or of the regenerated ones where nothing is stored.
        match: identical; ulp (the other affine rounding); rounded (through another dtype); edited (a few places);
            unrelated; absent (not stored).
        differing: Share of elements that differ, 0 to 1.
        places: [row, column] of each, where they are few.
        max_abs: Largest absolute difference.
        max_ulp: Largest difference in units in the last place of the stored dtype.
        relative_norm: Frobenius norm of the difference over the recipe's own.
    """

    shape: tuple[int, ...] | None
    dtype: str | None
    sha256: str | None
    match: MatchKind
    differing: float = 0.0
    places: tuple[tuple[int, int], ...] = ()
    max_abs: float | None = 0.0
    max_ulp: int | None = 0
    relative_norm: float | None = 0.0

    @property
    def extent(self) -> str:
        """How much of it differs, in words that go on "differs in ...": a place, a share, and by how much.

        Distances stand only where they mean something: ulps where nothing but a rounding differs.
        """
        if self.places:
            listed = ", ".join(str(list(place)) for place in self.places[:MAX_SHOWN])
            more = f" and {len(self.places) - MAX_SHOWN} more" if len(self.places) > MAX_SHOWN else ""
            return f"{len(self.places)} place{'s' if len(self.places) > 1 else ''}: {listed}{more}"
        text = share(self.differing)
        if self.match == "ulp" and self.max_ulp is not None:
            text += f", by at most {self.max_ulp} ulp"
        elif self.match == "rounded" and self.max_abs is not None:
            text += f", by at most {self.max_abs:.2g}"
        return text


def share(part: float) -> str:
    """A share of elements in words: "all elements", "51.2% of the elements"."""
    if part >= 1:
        return "all elements"
    percent = "over 99.9%" if part > 0.999 else "under 0.1%" if part < 0.001 else f"{part:.1%}"
    return f"{percent} of the elements"


@dataclass(frozen=True)
class Identification:
    """What made a stored pair.

    Attributes:
        recipe: The canonical recipe that gives exactly these bits, else the nearest one, else None.
        also_matches: Further recipes that give the same bits.
        matches: Each tensor against `recipe`.
    """

    recipe: Recipe | None
    also_matches: tuple[Recipe, ...]
    matches: dict[str, Match]

    @property
    def exact(self) -> bool:
        """Whether a known recipe gives exactly the stored bits."""
        return all(match.match == "identical" for match in self.matches.values())

    @property
    def all_recipes(self) -> tuple[Recipe, ...]:
        """Every recipe that gives exactly the stored bits, the canonical one first."""
        return (self.recipe, *self.also_matches) if self.exact and self.recipe else ()

    def made_by(self, prng_key: int) -> bool:
        """Whether the bits are exactly what PEFT's draw order gives for this key (modulo 2**32)."""
        return any(r.is_peft_order and same_key(r.prng_key, prng_key) for r in self.all_recipes)


def identify(vera_A: Array, vera_B: Array, *, prng_key: int) -> Identification:
    """Find out which recipe made a pair of projections.

    Args:
        vera_A: (r, in_max), float32, float64, float16 or ml_dtypes.bfloat16.
        vera_B: (out_max, r), of the same dtype.
        prng_key: The key that the config names.

    Returns:
        The identification; `Match.sha256` is None here.

    Raises:
        ValueError: the shapes or dtypes do not fit each other.
    """
    return identify_pair(Pair.of(vera_A, vera_B), prng_key=prng_key)


def identify_pair(pair: Pair, *, prng_key: int) -> Identification:
    """`identify` for a pair that is read by ranges, in memory that does not grow with it."""
    for family in (candidates(prng_key), *_other_families(prng_key)):
        exact = sorted(_exact(pair, family), key=lambda recipe: _canonical_order(recipe, pair.dtype))
        if exact:
            same = {name: Match(pair.shape.of(name), pair.dtype, None, "identical") for name in PROJECTIONS}
            return Identification(exact[0], tuple(exact[1:]), same)
    nearest = _nearest(pair, candidates(prng_key))
    matches = _compare(pair, nearest)
    related = any(match.match != "unrelated" for match in matches.values())
    return Identification(nearest if related else None, (), matches)


def same_bits(recipe: Recipe, others: Collection[Recipe], shape: PairShape, stored_dtype: str) -> set[Recipe]:
    """Those of `others` that give the same bits as `recipe`, in both tensors."""
    rivals = [other for other in others if other.b_first == recipe.b_first]
    wanted = {recipe, *rivals}
    for block in blocks([recipe, *rivals], shape, stored_dtype=stored_dtype, wanted=wanted):
        if len(wanted) == 1:
            break
        reference = as_bits(block.values[recipe])
        wanted -= {other for other, values in block.values.items() if not np.array_equal(as_bits(values), reference)}
    return wanted - {recipe}


def _exact(pair: Pair, recipes: tuple[Recipe, ...]) -> list[Recipe]:
    wanted = set(recipes)
    for block in blocks(recipes, pair.shape, stored_dtype=pair.dtype, wanted=wanted, first=1 << 10):
        stored = as_bits(pair.read(block.tensor, block.start, block.stop))
        wanted -= {recipe for recipe, values in block.values.items() if not np.array_equal(as_bits(values), stored)}
        if not wanted:
            break
    return [recipe for recipe in recipes if recipe in wanted]  # a set's order is another one in every process


def _other_families(key: int) -> list[tuple[Recipe, ...]]:
    """Other keys and orders that are known to happen, most plausible first."""
    families = [
        candidates(key, prng_key_B=key + 1 if key < KEY_MAX else KEY_MIN),
        candidates(key, prng_key_B=key),
    ]
    families.append(candidates(key, b_first=True))
    others = dict.fromkeys(k for k in (*USUAL_KEYS, key - 1, key + 1) if KEY_MIN <= k <= KEY_MAX)
    families += [candidates(other) for other in others if not same_key(other, key)]
    return families


def _canonical_order(recipe: Recipe, stored_dtype: str) -> tuple[int, bool, bool]:
    # A pair stored in a half type was rounded through it, whether on the way or on storing: the bits are the same.
    usual = stored_dtype if stored_dtype in HALVES else None
    return FLOATS.index(recipe.drawn_dtype), recipe.rounded_through != usual, recipe.rounding != "fused"


def _nearest(pair: Pair, recipes: tuple[Recipe, ...]) -> Recipe:
    """The recipe that gives a tensor exactly, else the one with most elements right, else the one least far off.

    The tensors are weighed one by one, so that one that was replaced says nothing about what made the other.
    """
    differing = {recipe: dict.fromkeys(PROJECTIONS, 0) for recipe in recipes}
    distance = {recipe: dict.fromkeys(PROJECTIONS, 0.0) for recipe in recipes}
    for block in blocks(recipes, pair.shape, stored_dtype=pair.dtype):
        stored = pair.read(block.tensor, block.start, block.stop)
        for recipe, values in block.values.items():
            differing[recipe][block.tensor] += int(np.count_nonzero(as_bits(values) != as_bits(stored)))
            if block.start == 0:  # enough to tell near from far where no element is the same
                wide = values.astype(np.float64)
                difference = np.linalg.norm(_finite(wide - stored.astype(np.float64)))
                distance[recipe][block.tensor] = float(difference / np.linalg.norm(wide))

    def remoteness(recipe: Recipe) -> tuple[int, float, float, tuple[int, bool, bool]]:
        wrong = [count / math.prod(pair.shape.of(name)) for name, count in differing[recipe].items()]
        return (
            sum(share > 0 for share in wrong),
            # Coarse values coincide by chance; below a half, how near the rest is says more than how many are the same.
            sum(min(share, 0.5) for share in wrong),
            sum(min(far, MAX_ROUNDING) for far in distance[recipe].values()),
            _canonical_order(recipe, pair.dtype),
        )

    return min(recipes, key=remoteness)


def _compare(pair: Pair, recipe: Recipe) -> dict[str, Match]:
    totals = {name: _Totals() for name in PROJECTIONS}
    for block in blocks([recipe], pair.shape, stored_dtype=pair.dtype):
        stored = pair.read(block.tensor, block.start, block.stop)
        totals[block.tensor].add(block.start, stored, block.values[recipe])
    return {name: totals[name].match(pair.shape.of(name), pair.dtype) for name in PROJECTIONS}


def compare(pair: Pair, reference: Pair) -> dict[str, Match]:
    """Each tensor of `pair` against another pair of the same shape and dtype, the figures relative to that one."""
    result = {}
    for name in PROJECTIONS:
        totals, size = _Totals(), math.prod(pair.shape.of(name))
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            totals.add(start, pair.read(name, start, stop), reference.read(name, start, stop))
        result[name] = totals.match(pair.shape.of(name), pair.dtype)
    return result


class _Totals:
    """Running figures of the difference between a stored tensor and a recipe's."""

    def __init__(self) -> None:
        self.count = 0
        self.places: list[int] = []
        self.max_abs = 0.0
        self.max_ulp = 0
        self.difference = 0.0
        self.reference = 0.0
        self.finite = True

    def add(self, start: int, stored: Array, values: Array) -> None:
        wrong = np.flatnonzero(as_bits(stored) != as_bits(values))
        wide = values.astype(np.float64)
        self.reference += float(np.dot(wide, wide))
        self.count += wrong.size
        self.places += [start + int(i) for i in wrong[: MAX_PLACES + 1]]
        if wrong.size == 0:
            return
        self.max_ulp = max(self.max_ulp, max_ulp(stored[wrong], values[wrong]))
        difference = stored[wrong].astype(np.float64) - wide[wrong]
        self.finite &= bool(np.isfinite(difference).all())
        difference = _finite(difference)
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.difference += float(np.dot(difference, difference))

    def match(self, shape: tuple[int, int], dtype: str) -> Match:
        size = shape[0] * shape[1]
        norm = math.sqrt(self.difference / self.reference) if self.reference else 0.0
        few = self.count <= MAX_PLACES
        return Match(
            shape,
            dtype,
            None,
            self._kind(size, norm, math.sqrt(3.0) * math.sqrt(2.0 / shape[1])),
            differing=self.count / size,
            places=tuple((i // shape[1], i % shape[1]) for i in self.places) if few else (),
            max_abs=self.max_abs if self.finite else None,
            max_ulp=self.max_ulp if self.finite else None,
            relative_norm=norm if self.finite else None,
        )

    def _kind(self, size: int, norm: float, bound: float) -> MatchKind:
        if self.count == 0:
            return "identical"
        if self.count <= max(8, size // 100):
            return "edited"
        if self.finite and self.max_abs <= bound * 2.0**-22:
            return "ulp"
        if self.finite and norm <= MAX_ROUNDING and self.max_abs <= bound * MAX_ROUNDING:
            return "rounded"
        return "edited" if self.count <= size // 2 else "unrelated"


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, 0.0)


def with_digests(identification: Identification, sha256: dict[str, str]) -> Identification:
    """The identification with the stored tensors' digests filled in."""
    matches = {name: replace(match, sha256=sha256[name]) for name, match in identification.matches.items()}
    return replace(identification, matches=matches)
