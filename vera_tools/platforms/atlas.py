"""What real torch builds draw: one drift report a build, made by `vera-tools drift` and shipped with the package.

The entries tell whether the torch at hand is a known one, and let `verify` name real builds where it says that a loader
is exact. fixtures/make_atlas.py makes them.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vera_tools import schema
from vera_tools.platforms.streams import Draw, Environment, agreeing, shortened

_MACHINES = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}
_CAPABILITIES = {"default": "without AVX2", "avx2": "with AVX2", "avx512": "with AVX-512"}


@dataclass(frozen=True)
class Entry:
    """One build.

    Attributes:
        name: The file's name, e.g. "torch-2.12.1-x86_64".
        draws: The pairs that were drawn.
        environments: One row for each CPU capability.
    """

    name: str
    draws: tuple[Draw, ...]
    environments: tuple[Environment, ...]

    @classmethod
    def from_document(cls, document: dict[str, Any], *, name: str) -> Entry:
        """The entry that a drift/v1 document holds.

        Raises:
            FormatError: a row contradicts itself.
        """
        rows = [Environment.from_dict(row, where=f"{name}: environments.{n}") for n, row in _numbered(document)]
        return cls(name, tuple(Draw(**draw) for draw in document["pairs"]), tuple(rows))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every build in the atlas, oldest release first."""
    found = []
    for file in schema.packaged("fixtures/atlas").iterdir():
        if file.name.endswith(".json"):
            name = file.name.removesuffix(".json")
            found.append(Entry.from_document(json.loads(file.read_text("utf-8")), name=name))
    return tuple(sorted(found, key=lambda entry: (_number(release(entry.environments[0])), entry.name)))


def look_up(environment: Environment, draws: Sequence[Draw]) -> dict[str, Any] | None:
    """Whether this release is known with these kernels on this kind of machine, and whether it draws the same here.

    Args:
        environment: A row of a report.
        draws: The pairs that it drew.

    Returns:
        {"entry": name, "agrees": bool}, or None where the atlas has no such build.
    """
    if environment.torch is None or environment.device != "cpu":
        return None
    for entry in entries():
        common = [draw for draw in entry.draws if draw in draws]
        for row in entry.environments:
            if common and _build(row) == _build(environment):
                ours = shortened(environment, [draws.index(draw) for draw in common])
                theirs = shortened(row, [entry.draws.index(draw) for draw in common])
                return {"entry": entry.name, "agrees": agreeing(ours, theirs)}
    return None


@functools.cache
def citation(rounding: str) -> str:
    """The builds in the atlas whose float32 draws round in this way ("fused" or "separate"), in words.

    For example "torch 1.13 to 2.15 (18 releases) on x86-64 with AVX2 and on aarch64".
    """
    groups: dict[str, list[str]] = {}
    for entry in entries():
        for row in entry.environments:
            stream = row.streams.get("float32")
            if stream and stream.recipe and stream.recipe.rounding == rounding:
                groups.setdefault(_kernels(row), []).append(release(row))
    spans: dict[str, list[str]] = {}
    for kernels, releases in sorted(groups.items(), reverse=True):
        spans.setdefault(_span(releases), []).append(kernels)
    return ", ".join(f"{span} on {' and on '.join(kernels)}" for span, kernels in spans.items())


def _span(releases: Iterable[str]) -> str:
    ordered = sorted(set(releases), key=_number)
    minors = [release.rsplit(".", 1)[0] for release in ordered]
    if len(ordered) == 1:
        return f"torch {ordered[0]}"
    return f"torch {minors[0]} to {minors[-1]} ({len(ordered)} releases)"


def _kernels(environment: Environment) -> str:
    machine = (environment.machine or "").lower()
    name = _MACHINES.get(machine, machine)
    return f"{name} {_CAPABILITIES[environment.cpu_capability or '']}" if name == "x86-64" else name


def _build(environment: Environment) -> tuple[str, str, str | None]:
    machine = (environment.machine or "").lower()
    return release(environment), _MACHINES.get(machine, machine), environment.cpu_capability


def release(environment: Environment) -> str:
    """The release that a build is of: "2.12.1" for "2.12.1+cu130", "1.13.0" for Debian's "1.13.0a0"."""
    match = re.match(r"\d+(\.\d+)*", environment.torch or "")
    return match[0] if match else ""


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part)


def _numbered(document: dict[str, Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    return enumerate(document["environments"])
