"""What tests look at in the report of `verify` on one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import vera_tools

if TYPE_CHECKING:
    from vera_tools.verifying.report import CheckpointReport


def one(path: Path, **options: Any) -> CheckpointReport:
    """The report on a single checkpoint."""
    (report,) = vera_tools.verify(path, **options).checkpoints
    return report


def statuses(report: CheckpointReport) -> dict[str, str]:
    """Every check's outcome: "pass", "warn", "fail" or "skip"."""
    return {check.id: check.status for check in report.checks}


def failed(report: CheckpointReport) -> set[str]:
    """The checks that failed."""
    return {name for name, status in statuses(report).items() if status == "fail"}


def message_of(report: CheckpointReport, name: str) -> str:
    """What one check says."""
    (text,) = (check.message for check in report.checks if check.id == name)
    return text
