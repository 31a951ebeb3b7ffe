"""One row of a drift report: what an environment drew, which recipes that is, and what it means for a checkpoint.

A probe answers with digests. A stream is identified by finding the recipe whose own digests are the same for every pair
that was drawn; nothing is ever guessed from how the values look.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vera_tools.errors import FormatError
from vera_tools.platforms.names import platform_of
from vera_tools.projections import philox
from vera_tools.projections.identification import Match
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe, candidates
from vera_tools.report import Document

Digests = Mapping[str, str]


@dataclass(frozen=True)
class Draw(Document):
    """A pair to draw: what the probe is asked for, and what a recipe's digests are compared with."""

    prng_key: int
    r: int
    in_max: int
    out_max: int

    @property
    def shape(self) -> PairShape:
        """Its dimensions."""
        return PairShape(self.r, self.in_max, self.out_max)

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """As the probe takes it."""
        return self.prng_key, self.r, self.in_max, self.out_max


@dataclass(frozen=True)
class Stream:
    """What one environment drew under one default dtype.

    Attributes:
        digests: {tensor: sha256} for each pair, in the report's order; empty where nothing was drawn.
        recipe: The canonical recipe that makes exactly these bits, or None. Its key is the first pair's.
        also_matches: Names of further recipes that make the same bits.
        generator: On an accelerator: a generator whose algorithm is known and gives exactly these bits, or the
            device's own.
        error: Why nothing was drawn.
    """

    digests: tuple[Digests, ...] = ()
    recipe: Recipe | None = None
    also_matches: tuple[str, ...] = ()
    generator: str | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """What to call it in a table."""
        if self.error:
            return "not drawn"
        return self.recipe.name if self.recipe else self.generator or "unknown"


@dataclass(frozen=True)
class Environment:
    """One row: an interpreter, a device and a CPU capability.

    Attributes:
        interpreter: What the user called it; None for the one that ran vera-tools.
        python: Its version.
        torch: Its torch's version; None where the probe failed.
        system: "Linux", "Darwin", "Windows".
        machine: "x86_64", "aarch64", ...
        cpu_model: The CPU's name.
        device: Where the projections were drawn.
        device_name: The accelerator's name.
        cpu_capability: torch's CPU kernels: "default", "avx2", "avx512", ...
        native: The environment as it runs by itself, on the CPU unless the device was asked for. Only such rows decide.
        status: "ok", "failed" or "timeout".
        error: Why the probe failed.
        streams: What was drawn, by default dtype.
        exact: The projections come out bit for bit as they should; None where nothing was drawn.
        gets: What a seed-only checkpoint would get there, in words.
        projections: The pair that came out against the one that should have, where it is not exact.
        effect: What the difference does to the adapter (see `drifting.effect`), where a checkpoint was given.
        known: {"entry", "agrees"}: the atlas's build of the same release and kernels; None where there is none.
    """

    interpreter: str | None
    python: str | None = None
    torch: str | None = None
    system: str | None = None
    machine: str | None = None
    cpu_model: str | None = None
    device: str = "cpu"
    device_name: str | None = None
    cpu_capability: str | None = None
    native: bool = True
    status: str = "ok"
    error: str | None = None
    streams: Mapping[str, Stream] = field(default_factory=dict)
    exact: bool | None = None
    gets: str = ""
    projections: Mapping[str, Match] | None = None
    effect: Mapping[str, Any] | None = None
    known: Mapping[str, Any] | None = None

    @property
    def title(self) -> str:
        """One line that tells it from its neighbours."""
        name = "this interpreter" if self.interpreter is None else self.interpreter
        if self.torch is None:
            return name
        return f"{name}: torch {self.torch}, {self.machine}, {self.kernels}"

    @property
    def platform(self) -> str | None:
        """Which platform of the loader table it is; None on an accelerator, and where none is known."""
        return platform_of(self.system, self.machine, self.cpu_capability) if self.device == "cpu" else None

    @property
    def kernels(self) -> str:
        """The device, and on the CPU its kernels."""
        if self.device != "cpu":
            return self.device_name or self.device
        return f"{self.cpu_capability}{'' if self.native else ' (forced)'}"

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in reports."""
        plain = ("interpreter", "python", "torch", "system", "machine", "cpu_model", "device", "device_name")
        streams = self.streams.items()
        return {
            **{name: getattr(self, name) for name in plain},
            "cpu_capability": self.cpu_capability,
            "platform": self.platform,
            "native": self.native,
            "status": self.status,
            "error": self.error,
            "streams": {dtype: s.recipe.to_dict() if s.recipe else None for dtype, s in streams},
            "also_matches": {dtype: list(s.also_matches) for dtype, s in streams if s.also_matches},
            "generators": {dtype: s.generator for dtype, s in streams if s.generator},
            "digests": {dtype: [dict(pair) for pair in s.digests] for dtype, s in streams if not s.error},
            "errors": {dtype: s.error for dtype, s in streams if s.error},
            "exact": self.exact,
            "gets": self.gets,
            "projections": {n: m.to_dict() for n, m in self.projections.items()} if self.projections else None,
            "effect": self.effect,
            "known": dict(self.known) if self.known else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, pairs: int, where: str) -> Environment:
        """The row of a saved report that its schema has passed. Figures against a checkpoint stay behind.

        Args:
            data: The row.
            pairs: How many pairs the report drew.
            where: The row's place in the report.

        Raises:
            FormatError: a recipe's name contradicts its fields, or there is not one digest for each pair.
        """
        for dtype, drawn in data["digests"].items():
            if len(drawn) not in (0, pairs):
                raise FormatError(
                    "not one entry for each of pairs",
                    where=f"{where}: digests.{dtype}",
                    expected=f"{pairs}",
                    found=f"{len(drawn)}",
                )
        streams = {
            dtype: Stream(
                tuple(data["digests"].get(dtype, ())),
                Recipe.from_dict(recipe, where=f"{where}: streams.{dtype}") if recipe else None,
                tuple(data["also_matches"].get(dtype, ())),
                data["generators"].get(dtype),
                data["errors"].get(dtype),
            )
            for dtype, recipe in data["streams"].items()
        }
        left = ("platform", "streams", "also_matches", "generators", "digests", "errors", "projections", "effect")
        return cls(**{key: value for key, value in data.items() if key not in left}, streams=streams)


def identify_stream(
    dtype: str,
    drawn: list[dict[str, str]] | str,
    draws: Sequence[Draw],
    *,
    device: str | None = None,
    threads: Sequence[int] | None = None,
) -> Stream:
    """Find the recipe of what a probe drew.

    Args:
        dtype: torch's default dtype, which the tensors have.
        drawn: {tensor: sha256} for each of `draws`, or the reason why nothing was drawn.
        draws: The pairs that were asked for.
        device: The accelerator's name; what no known generator makes is recorded as its own. None for the CPU.
        threads: A CUDA device's [multiprocessors, threads on each].
    """
    if isinstance(drawn, str):
        return Stream(error=drawn)
    every = candidates(draws[0].prng_key)
    own = [recipe for recipe in every if recipe.drawn_dtype == dtype and recipe.rounded_through is None]
    for family in (own, [recipe for recipe in every if recipe not in own]):
        found = [recipe for recipe in family if _makes(recipe, dtype, drawn, draws)]
        if found:
            return Stream(tuple(drawn), found[0], tuple(recipe.name for recipe in found[1:]))
    generator = f"own generator of {device}" if device else None
    if threads is not None and _philox(dtype, drawn, draws, threads):
        generator = f"{philox.NAME}, {threads[0]} multiprocessors of {threads[1]} threads"
    return Stream(tuple(drawn), generator=generator)


def agreeing(environment: Environment, other: Environment) -> bool:
    """Whether two rows drew the same bits wherever both drew the same pairs under the same dtype."""
    return all(
        stream.digests == other.streams[dtype].digests
        for dtype, stream in environment.streams.items()
        if dtype in other.streams
    )


def shortened(environment: Environment, keep: Sequence[int]) -> Environment:
    """The row with the digests of some pairs only, so that two reports can be compared on what both drew."""
    streams = {
        dtype: replace(stream, digests=tuple(stream.digests[n] for n in keep) if stream.digests else ())
        for dtype, stream in environment.streams.items()
    }
    return replace(environment, streams=streams)


def _makes(recipe: Recipe, dtype: str, drawn: Sequence[Digests], draws: Sequence[Draw]) -> bool:
    # Small pairs first: they refuse almost every candidate at no cost.
    order = sorted(range(len(draws)), key=lambda n: draws[n].shape.elements)
    return all(_digests(recipe.name, draws[n], dtype) == drawn[n] for n in order)


@functools.lru_cache(maxsize=256)
def _digests(name: str, draw: Draw, dtype: str) -> dict[str, str]:
    return digests(Recipe.parse(name, prng_key=draw.prng_key), draw.shape, stored_dtype=dtype)


def _philox(dtype: str, drawn: Sequence[Digests], draws: Sequence[Draw], threads: Sequence[int]) -> bool:
    return all(
        philox.digests(draw.prng_key, draw.shape, dtype=dtype, multiprocessors=threads[0], threads=threads[1]) == found
        for draw, found in zip(draws, drawn, strict=True)
    )
