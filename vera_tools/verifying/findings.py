"""What `verify` finds of one checkpoint: checks, each with its outcome, and a verdict on the projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vera_tools.report import Document

Status = Literal["pass", "fail", "warn", "skip"]
Verdict = Literal["reproducible", "assumed", "unproven", "drift", "invalid"]

#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("reproducible", "assumed", "unproven", "drift", "invalid")
#: The verdict's own check: it says in words what the verdict says in one.
MATCH = "projections.match"
#: The checks that fail where something of the adapter is damaged or missing, so that nothing computes what was trained.
DAMAGE = frozenset(
    {
        "config.save_projection",
        "tensors.official",
        "tensors.layers",
        "tensors.saved",
        "tensors.finite",
        "metadata.projections",
        "manifest.projections",
        "manifest.tensors",
        "base.modules",
        "base.parameters",
    }
)


@dataclass(frozen=True)
class Check(Document):
    """One thing that was looked at. `id` is "<what>.<which>", stable from release to release."""

    id: str
    status: Status
    message: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {"id": self.id, "status": self.status, "message": self.message}  # twenty for each checkpoint
