"""What `verify` finds of one checkpoint: checks, each with its outcome, and a verdict on the projections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from vera_tools.report import Document

Status = Literal["pass", "fail", "warn", "skip"]
Verdict = Literal["reproducible", "assumed", "unproven", "drift", "invalid"]

#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("reproducible", "assumed", "unproven", "drift", "invalid")
#: The verdict's own check: it says in words what the verdict says in one.
MATCH = "projections.match"
#: The check of `required`.
REQUIRED = "manifest.required"
#: The checks that fail where its tensors are none that anything computes with: `verify` calls it invalid.
BROKEN = frozenset({"tensors.shapes", "tensors.dtypes"})
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


def is_covered(checks: Iterable[Check]) -> bool:
    """Whether a manifest has the digest of every tensor, and they hold: nothing else tells of changed vectors."""
    return any(check.id == "manifest.tensors" and check.status == "pass" for check in checks)


def required(checks: Iterable[Check]) -> Check:
    """The check that every tensor is covered by a manifest, for a gate that demands it."""
    found = tuple(checks)
    if is_covered(found):
        return Check(REQUIRED, "pass", "a manifest has the digest of every tensor")
    refused = [check.id for check in found if check.status == "fail" and check.id != MATCH]
    if refused and not any(check.id == "manifest.schema" and check.status == "skip" for check in found):
        return Check(REQUIRED, "skip", f"a manifest that does not hold, or was not looked at (see {refused[0]})")
    message = "no manifest covers its tensors: a changed vector or config would not be found"
    return Check(REQUIRED, "fail", message)
