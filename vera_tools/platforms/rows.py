"""How the float32 draws of each platform's torch builds round, and how that is known.

Two kinds of evidence: "drawn" (the build's own library drew, and the digests are kept) and "machine code" (the kernel
was found in the library and read, and nothing was run), which is weaker. Both come from fixtures/atlas.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vera_tools.platforms import atlas
from vera_tools.platforms.names import PLATFORMS
from vera_tools.report import Document

ROUNDINGS = ("fused", "separate")
DRAWN, READ = "drawn", "machine code"

Minor = tuple[int, int]


@dataclass(frozen=True)
class Row(Document):
    """Releases of torch that round in the same way on a platform.

    Attributes:
        platform: Of `PLATFORMS`.
        torch: The minor releases, "1.13 to 2.15" or "2.2".
        evidence: "drawn" or "machine code".
    """

    platform: str
    torch: str
    evidence: str


@dataclass(frozen=True)
class Span:
    """The same, with what is computed from.

    Attributes:
        platform: Of `PLATFORMS`.
        rounding: "fused" or "separate".
        minors: The minor releases, oldest first.
        evidence: "drawn" or "machine code".
    """

    platform: str
    rounding: str
    minors: tuple[Minor, ...]
    evidence: str

    @property
    def torch(self) -> str:
        """The releases, in words."""
        first, last = self.minors[0], self.minors[-1]
        return _text(first) if first == last else f"{_text(first)} to {_text(last)}"


@functools.cache
def spans() -> tuple[Span, ...]:
    """Every run of minor releases that round alike on a platform and are known alike, in the order of tables."""
    seen = _seen()
    found = []
    for platform in PLATFORMS:
        kinds = {minor: kind for (where, minor), kind in seen.items() if where == platform}
        run: list[Minor] = []
        for minor in sorted(kinds):
            if run and kinds[minor] != kinds[run[-1]]:
                found.append(Span(platform, kinds[run[-1]][0], tuple(run), kinds[run[-1]][1]))
                run = []
            run.append(minor)
        if run:
            found.append(Span(platform, kinds[run[-1]][0], tuple(run), kinds[run[-1]][1]))
    return tuple(found)


def rows() -> dict[str, tuple[Row, ...]]:
    """The platforms and releases of each rounding: {"fused": ..., "separate": ...}."""
    return {
        rounding: tuple(Row(s.platform, s.torch, s.evidence) for s in spans() if s.rounding == rounding)
        for rounding in ROUNDINGS
    }


def to_document() -> dict[str, list[dict[str, Any]]]:
    """The same, as it stands in reports."""
    return {rounding: [row.to_dict() for row in found] for rounding, found in rows().items()}


def drawn_by(platform: str | None, torch: str | None) -> Span | None:
    """What a release of torch is known to do on a platform; None where no build of that minor release was looked at.

    Args:
        platform: Of `PLATFORMS`, or None.
        torch: A version, such as "2.13.0+cpu", or None.
    """
    minor = minor_of(torch)
    return next((span for span in spans() if span.platform == platform and minor in span.minors), None)


def minor_of(torch: str | None) -> Minor | None:
    """(2, 13) of "2.13.0+cpu"; None where it is no version."""
    parts = atlas.release(torch).split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 else None


def places(rounding: str) -> tuple[str, ...]:
    """Where draws round so, in the names that people know, with torch's releases where they matter.

    For example ("Linux", "Apple silicon (torch >=2.2)").
    """
    return tuple(dict.fromkeys(_place(span) for span in spans() if span.rounding == rounding))


def place_of(platform: str, torch: str | None = None) -> str:
    """A platform in the name that people know, with torch's releases where they matter and `torch` is one of them."""
    span = drawn_by(platform, torch)
    return _place(span) if span else PLATFORMS[platform]


def caveat() -> str:
    """Which of the platforms nobody has drawn on."""
    read = dict.fromkeys(PLATFORMS[span.platform] for span in spans() if span.evidence == READ)
    return f"{' and '.join(read)}: read from the builds' machine code, not run" if read else ""


@functools.cache
def citation(rounding: str) -> str:
    """The builds that are known to round so ("fused" or "separate"), by platform and release.

    For example "linux-x86_64 torch 1.13 to 2.15 (drawn), macos-arm64 torch 2.2 to 2.15 (machine code)".
    """
    return ", ".join(f"{row.platform} torch {row.torch} ({row.evidence})" for row in rows()[rounding])


def read_only(platform: str, capability: str | None) -> bool:
    """Whether these kernels, of all that a platform's builds have, were read and never run: SVE, on Linux aarch64."""
    evidence = {kind for where, _, name, _, kind in _observed() if (where, name) == (platform, capability)}
    return evidence == {READ}


def _place(span: Span) -> str:
    name = PLATFORMS[span.platform]
    others = [other for other in spans() if other.platform == span.platform and other.rounding != span.rounding]
    if not others:
        return name
    later = span.minors[0] > others[0].minors[0]
    return f"{name} (torch {f'>={_text(span.minors[0])}' if later else f'<{_text(others[0].minors[0])}'})"


def _seen() -> dict[tuple[str, Minor], tuple[str, str]]:
    """(platform, minor release) to (rounding, evidence). What was drawn goes before what was read.

    Raises:
        ValueError: two builds of one minor release contradict each other; then there is no row to write.
    """
    found: dict[tuple[str, Minor], tuple[str, str]] = {}
    for platform, minor, _, rounding, evidence in sorted(_observed(), key=lambda one: one[-1] != DRAWN):
        known = found.setdefault((platform, minor), (rounding, evidence))
        if known[0] != rounding:
            raise ValueError(f"the atlas contradicts itself about torch {_text(minor)} on {platform}")
    return found


@functools.cache
def _observed() -> tuple[tuple[str, Minor, str | None, str, str], ...]:
    """(platform, minor release, CPU capability, rounding, evidence) of each build that was looked at."""
    return (*_reports(), *_platforms())


def _reports() -> Iterable[tuple[str, Minor, str | None, str, str]]:
    for entry in atlas.entries():
        for row in entry.environments:
            stream, platform, minor = row.streams.get("float32"), row.platform, minor_of(row.torch)
            if stream and stream.recipe and stream.recipe.rounding and platform and minor:
                yield platform, minor, row.cpu_capability, stream.recipe.rounding, DRAWN


def _platforms() -> Iterable[tuple[str, Minor, str | None, str, str]]:
    for document in atlas.platform_documents().values():
        minor = minor_of(document["torch"])
        assert minor is not None  # the schema says so
        for entry in document["entries"]:
            yield entry["platform"], minor, entry["capability"], entry["rounding"], entry["evidence"]


def _text(minor: Minor) -> str:
    return f"{minor[0]}.{minor[1]}"
