"""The loader table: which loader, on which machine and base, computes with exactly the trained projections.

Three facts about PEFT decide every row (each was seen by running it):

- before 0.21 stored projections are ignored on loading, in silence, and drawn again from the key;
- a redrawn pair is cast to the base weights' dtype, which rounds it where that is a half type; integer (quantised)
  weights are not cast to, but for bitsandbytes' 4 bit ones, which from 0.19 on count with the dtype they compute in;
- from 0.21 on stored projections are restored, unless save_projection is false, but rounded through a half-precision
  base under ``low_cpu_mem_usage=True`` or ``autocast_adapter_dtype=False``.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from vera_tools.dtypes import HALVES
from vera_tools.platforms import rows
from vera_tools.projections.key import same_key
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Document

OLD_PEFT, PEFT, VERA_TOOLS = "peft>=0.11,<0.21", "peft>=0.21", "vera-tools"
ROUNDINGS = rows.ROUNDINGS
BASE_DTYPES = ("float32", "bfloat16", "float16", "integer")
#: The same in words. Of the layers whose weights are integers, bitsandbytes' of 8 bit were tried.
BASE_KINDS = dict(zip(BASE_DTYPES, ("float32", "bfloat16", "float16", "bnb 8-bit"), strict=True))
OPTIONS: tuple[dict[str, bool], ...] = ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False})


@dataclass(frozen=True)
class Load(Document):
    """One row: what a loader would compute with.

    Attributes:
        loader: OLD_PEFT, PEFT or VERA_TOOLS.
        options: The loader's options that differ from its defaults.
        rounding: How the loading machine rounds: `platforms.rows` says which platforms do.
        base_dtype: Dtype of the adapted base weights; "integer" for quantised ones.
        exact: Whether the projections are exactly the trained ones; None where nobody can know.
        why: The reason, one clause.
        cites: The platforms and torch releases that draw with this rounding, where the loader draws the pair again.
    """

    loader: str
    options: dict[str, bool]
    rounding: str
    base_dtype: str
    exact: bool | None
    why: str
    cites: str | None = None


@dataclass(frozen=True)
class Trained:
    """What is known of the projections that a checkpoint was trained with.

    Attributes:
        stored: They are in the file.
        save_projection: The config says that they are.
        prng_key: The config's key.
        recipes: Every recipe that gives exactly their bits, the canonical one first; empty where none does; None where
            nothing is known (seed-only, nothing recorded).
        dtype: The dtype they are stored or recorded in.
        fits: The pair has the size that the adapter's own layers give, which is the size PEFT makes room for.
        assumed: That they were trained with was assumed or stated, so that no loader is known to be right or wrong.
        whole: Nothing else of the adapter is damaged or missing: else no loader computes what was trained.
        held_by: The dtypes to which the stored values can be cast without a change to any of them.
        obstacles: By loader, why it does not compute with this adapter, whatever its projections are: one clause, of
            which the loader is the subject.
        doubts: By loader, why it cannot be known whether it computes with this adapter, where nothing else speaks
            against it: one clause, of which the loader is the subject.
        unknown_before_14: Keys of the config for which PEFT before 0.14 refuses it.
    """

    stored: bool
    save_projection: bool
    prng_key: int
    recipes: tuple[Recipe, ...] | None
    dtype: str
    held_by: frozenset[str] = frozenset()
    fits: bool = True
    assumed: bool = False
    whole: bool = True
    obstacles: Mapping[str, str] = field(default_factory=dict)
    doubts: Mapping[str, str] = field(default_factory=dict)
    unknown_before_14: tuple[str, ...] = ()

    def __hash__(self) -> int:
        said = (*self.obstacles.items(), *self.doubts.items())
        return hash((self.stored, tuple(self.recipes or ()), self.dtype, self.prng_key, said))

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports, which hold the recipes already."""
        return {
            "stored": self.stored,
            "save_projection": self.save_projection,
            "prng_key": self.prng_key,
            "made": None if self.recipes is None else bool(self.recipes),
            "dtype": self.dtype,
            "held_by": sorted(self.held_by),
            "fits": self.fits,
            "assumed": self.assumed,
            "whole": self.whole,
            "obstacles": dict(self.obstacles),
            **({"doubts": dict(self.doubts)} if self.doubts else {}),
            "unknown_before_14": list(self.unknown_before_14),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], recipes: tuple[Recipe, ...]) -> Trained:
        """The inverse of `to_dict`, for data that a schema has passed, and the recipes that stand beside it."""
        others = {key: value for key, value in data.items() if key != "made"}
        made = {True: recipes, False: (), None: None}[data["made"]]
        others |= {"held_by": frozenset(data["held_by"]), "unknown_before_14": tuple(data["unknown_before_14"])}
        return cls(**others, recipes=made)


def redrawn(prng_key: int, rounding: str, base_dtype: str) -> Recipe:
    """What PEFT gets when it draws the pair again on such a machine, onto such a base."""
    through = base_dtype if base_dtype in HALVES else None
    return Recipe(prng_key=prng_key, rounding=rounding, rounded_through=through)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)  # in a registry few differ in what their table follows from
def loader_table(trained: Trained) -> tuple[Load, ...]:
    """All rows, in the order of BASE_DTYPES within ROUNDINGS within options within loaders."""
    table = []
    for loader, options in [(OLD_PEFT, {}), *((PEFT, options) for options in OPTIONS), (VERA_TOOLS, {})]:
        redraws = loader == OLD_PEFT or (loader == PEFT and not (trained.stored and trained.save_projection))
        for rounding in ROUNDINGS:
            for base_dtype in BASE_DTYPES:
                exact, why = _row(trained, loader, options, rounding, base_dtype)
                obstacle = trained.obstacles.get(loader)
                if obstacle is not None:
                    exact, why = False, obstacle
                elif trained.assumed and (trained.fits or loader == VERA_TOOLS):  # another size is wrong for any recipe
                    exact, why = None, f"{why}, if the recorded pair is the trained one, which nothing proves"
                elif exact and loader in trained.doubts:
                    exact, why = None, trained.doubts[loader]
                elif exact and loader == OLD_PEFT and trained.unknown_before_14:
                    why += f"; before 0.14 it refuses the config for its key {trained.unknown_before_14[0]!r}"
                if not trained.whole:
                    exact, why = False, f"{why}; but the adapter is damaged or incomplete, as the failed checks say"
                cites = rows.citation(rounding) if redraws and obstacle is None else None
                table.append(Load(loader, options, rounding, base_dtype, exact, why, cites))
    return tuple(table)


def _row(
    trained: Trained, loader: str, options: dict[str, bool], rounding: str, base_dtype: str
) -> tuple[bool | None, str]:
    if loader == VERA_TOOLS:
        return _vera_tools(trained)
    if loader == PEFT and trained.stored and trained.save_projection and not trained.fits:
        return False, "refuses the stored pair, which does not have the size that this adapter's own layers give"
    if loader == PEFT and trained.stored and trained.save_projection:
        return _restored(trained, options, base_dtype)
    exact, why = _redraw(trained, rounding, base_dtype)
    if trained.stored and loader == OLD_PEFT:
        why = f"ignores the stored pair and {why}"
    elif trained.stored:
        why = f"ignores the stored pair, because save_projection is false, and {why}"
    return exact, why


def _vera_tools(trained: Trained) -> tuple[bool | None, str]:
    if trained.stored:
        return True, "takes the stored pair unchanged"
    if trained.recipes is None:
        return None, "nothing is recorded: assumes PEFT's recipe for the base, and says so"
    if not trained.recipes:
        return False, "no known recipe makes the recorded pair"
    return True, "regenerates the recorded recipe on any machine and checks its digest"


def _restored(trained: Trained, options: dict[str, bool], base_dtype: str) -> tuple[bool, str]:
    if trained.dtype == "float64" and "float32" not in trained.held_by:
        return False, "restores the stored pair in float32, which does not hold its float64 values"
    if not options or base_dtype not in HALVES:
        return True, "restores the stored pair"
    if base_dtype in trained.held_by:
        return True, f"rounds the stored pair through {base_dtype}, which changes none of its values"
    return False, f"rounds the stored pair through {base_dtype}"


def _redraw(trained: Trained, rounding: str, base_dtype: str) -> tuple[bool | None, str]:
    if trained.recipes is None:
        return None, "draws it from the key, and nothing records what it was trained with"
    if not trained.fits:
        return False, "draws a pair of another size from the key: that which this adapter's own layers give"
    if not trained.recipes:
        return False, "draws it from the key, which does not give the trained pair"
    key = trained.prng_key
    own = [recipe for recipe in trained.recipes if same_key(recipe.prng_key, key)]
    wanted = redrawn(key, rounding, base_dtype)
    same = any(recipe.method == wanted.method for recipe in own)
    # The recipes tell what gives the same bits in the stored dtype. Values that a half type did not hold would differ.
    lossless = trained.dtype not in HALVES or wanted.rounded_through == trained.dtype
    if same and lossless:
        return True, "draws the same pair from the key"
    return False, f"draws another pair from the key: {_difference(_nearest(own or trained.recipes, wanted), wanted)}"


def _nearest(made: Collection[Recipe], wanted: Recipe) -> Recipe:
    """Of recipes that give the same bits, the first of those with most in common: nobody knows which it really was."""
    parts = ("drawn_dtype", "rounding", "rounded_through")
    return max(made, key=lambda recipe: sum(getattr(recipe, part) == getattr(wanted, part) for part in parts))


def _difference(made: Recipe, wanted: Recipe) -> str:
    if not same_key(made.prng_key, wanted.prng_key):
        return f"the trained one was made with key {made.prng_key}"
    if not made.is_peft_order:
        return "the trained one was drawn in another order"
    if made.drawn_dtype != wanted.drawn_dtype:
        return f"the trained one was drawn in {made.drawn_dtype}"
    reasons = []
    if made.rounding != wanted.rounding:
        reasons.append("such a machine rounds otherwise than the one that trained it")
    if made.rounded_through != wanted.rounded_through:
        here = f"rounded through {wanted.rounded_through}" if wanted.rounded_through else "not rounded"
        then = f"through {made.rounded_through}" if made.rounded_through else "unrounded"
        reasons.append(f"{here} where it was trained {then}")
    return ", ".join(reasons) or "of higher precision than the stored one"
