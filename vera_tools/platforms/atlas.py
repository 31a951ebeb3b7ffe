"""What real torch builds draw: one drift report a build, shipped with the package.

The entries tell whether the torch at hand is a known one, and let `verify` name platforms where it says that a loader
is exact (`rows`). fixtures/make_atlas.py makes those of Linux builds, fixtures/platforms/make.py the others.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vera_tools import schema
from vera_tools.platforms.names import machine_name
from vera_tools.platforms.streams import Draw, Environment, agreeing, shortened


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
        draws = tuple(Draw(**draw) for draw in document["pairs"])
        rows = [
            Environment.from_dict(row, pairs=len(draws), where=f"{name}: environments.{n}")
            for n, row in _numbered(document)
        ]
        return cls(name, draws, tuple(rows))


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every Linux build in the atlas, oldest release first."""
    return _sorted(Entry.from_document(document, name=name) for name, document in _documents("fixtures/atlas").items())


@functools.cache
def platform_documents() -> dict[str, dict[str, Any]]:
    """The platform/v1 documents of the atlas, by name: what Windows and macOS builds do, and how that is known."""
    return _documents("fixtures/atlas/platforms")


@functools.cache
def platform_entries() -> tuple[Entry, ...]:
    """Every build of another system than Linux that has drawn, oldest release first."""
    documents = platform_documents().items()
    return _sorted(Entry.from_document(one["report"], name=name) for name, one in documents if "report" in one)


@functools.cache
def device_entries() -> tuple[Entry, ...]:
    """What accelerators' own generators have drawn, oldest release first. PEFT does not draw there."""
    documents = _documents("fixtures/atlas/devices").items()
    return _sorted(Entry.from_document(document, name=name) for name, document in documents)


def _documents(folder: str) -> dict[str, dict[str, Any]]:
    files = [file for file in schema.packaged(folder).iterdir() if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): json.loads(file.read_text("utf-8")) for file in files}


def _sorted(found: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(found, key=lambda entry: (_number(release(entry.environments[0].torch)), entry.name)))


def look_up(environment: Environment, draws: Sequence[Draw]) -> dict[str, Any] | None:
    """Whether this release is known with these kernels, or this device, and whether it draws the same here.

    Args:
        environment: A row of a report.
        draws: The pairs that it drew.

    Returns:
        {"entry": name, "agrees": bool}, or None where the atlas has no such build.
    """
    if environment.torch is None:
        return None
    for entry in _candidates(environment):
        common = [draw for draw in entry.draws if draw in draws]
        for row in entry.environments:
            if common and _build(row) == _build(environment):
                ours = shortened(environment, [draws.index(draw) for draw in common])
                theirs = shortened(row, [entry.draws.index(draw) for draw in common])
                return {"entry": entry.name, "agrees": agreeing(ours, theirs)}
    return None


def _candidates(environment: Environment) -> tuple[Entry, ...]:
    if environment.device != "cpu":
        return device_entries()
    return entries() if environment.system == "Linux" else platform_entries()


def _build(environment: Environment) -> tuple[str | None, ...]:
    """What tells builds and their kernels apart: Windows' and Linux' are others on one and the same machine."""
    kind = environment.device.split(":")[0]
    kernels = environment.cpu_capability if kind == "cpu" else environment.device_name
    return environment.system, release(environment.torch), machine_name(environment.machine), kind, kernels


def release(torch: str | None) -> str:
    """The release that a build is of: "2.12.1" for "2.12.1+cu130", "1.13.0" for Debian's "1.13.0a0"."""
    match = re.match(r"\d+(\.\d+)*", torch or "")
    return match[0] if match else ""


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part)


def _numbered(document: dict[str, Any]) -> Iterable[tuple[int, dict[str, Any]]]:
    return enumerate(document["environments"])
