"""`vera-tools env`: versions, CPU capability, which platform of the loader table this is, and what it is known to draw.

Nothing is drawn and torch is not imported, so it works without torch; `drift` draws.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, ClassVar

from vera_tools import installed
from vera_tools.platforms import machine, rows
from vera_tools.platforms.machine import Capability
from vera_tools.platforms.rows import Row, Span
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Report

#: What decides or reads what is drawn, and is worth knowing in a bug report.
PACKAGES = ("numpy", "torch", "peft", "transformers", "safetensors", "huggingface_hub")


@dataclass(frozen=True, repr=False)
class EnvReport(Report):
    """This machine.

    Attributes:
        python: Python's version.
        packages: Distribution: its version, or None where it is not installed.
        system: "Linux", "Darwin", "Windows".
        machine: "x86_64", "AMD64", "arm64", ...
        cpu_model: The CPU's name, or None.
        capability: The CPU kernels that torch picks.
        platform: Which platform of the loader table this is, or None.
        known: What the atlas has for that platform, every release.
        draws: What the installed torch is known to do here; None where there is no torch, or none that is known.
        evidence: How that is known: "drawn" or "machine code".
    """

    name: ClassVar[str] = "env"

    python: str
    packages: dict[str, str | None]
    system: str
    machine: str
    cpu_model: str | None
    capability: Capability
    platform: str | None
    known: tuple[Span, ...]
    draws: Span | None
    evidence: str | None

    @property
    def recipe(self) -> str | None:
        """The recipe that a pair made here in float32 follows."""
        return Recipe(prng_key=0, rounding=self.draws.rounding).name if self.draws else None  # type: ignore[arg-type]

    def body(self) -> dict[str, Any]:
        """The env/v1 document's own part."""
        return {
            "python": self.python,
            "packages": self.packages,
            "system": self.system,
            "machine": self.machine,
            "cpu_model": self.cpu_model,
            "cpu_capability": self.capability.name,
            "cpu_capability_source": self.capability.source,
            "platform": self.platform,
            "known": [
                {"rounding": span.rounding, **Row(span.platform, span.torch, span.evidence).to_dict()}
                for span in self.known
            ],
            "draws": {"rounding": self.draws.rounding, "recipe": self.recipe, "evidence": self.evidence}
            if self.draws
            else None,
        }


def describe() -> EnvReport:
    """Look at this machine and what is installed on it."""
    capability, here = machine.cpu_capability(), machine.this_platform()
    packages = {name: installed.version(name) for name in PACKAGES}
    draws = rows.drawn_by(here, packages["torch"])
    evidence = draws.evidence if draws else None
    if here is not None and draws is not None and rows.read_only(here, capability.name):
        evidence = rows.READ
    return EnvReport(
        python=platform.python_version(),
        packages=packages,
        system=platform.system(),
        machine=platform.machine(),
        cpu_model=machine.cpu_model(),
        capability=capability,
        platform=here,
        known=tuple(span for span in rows.spans() if span.platform == here),
        draws=draws,
        evidence=evidence,
    )
