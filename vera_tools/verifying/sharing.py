"""One object for all that are equal: in a registry most checks, recipes and digests of checkpoints are the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TypeVar

from vera_tools.verifying.findings import Check
from vera_tools.verifying.report import CheckpointReport

Value = TypeVar("Value", bound=Hashable)


class Shared:
    """Holds what was shared so far."""

    def __init__(self) -> None:
        self._held: dict[Hashable, object] = {}
        #: The checks of what was handed out, by which it is known again.
        self._checks: dict[int, tuple[Check, ...]] = {}

    def one(self, value: Value) -> Value:
        """The first of all that are equal to this."""
        return self._held.setdefault((type(value), value), value)  # type: ignore[return-value]

    def small(self, report: CheckpointReport) -> CheckpointReport:
        """The report, its parts shared; itself, where they are by now."""
        if self._checks.get(id(report.checks)) is report.checks:
            return report
        checks = self.one(tuple(map(self.one, report.checks)))
        self._checks[id(checks)] = checks
        return replace(
            report,
            checks=checks,
            recipe=self.one(report.recipe),
            also_matches=self.one(report.also_matches),
            projections=self.one(report.projections),
            trained=self.one(report.trained),
            scope=self.one(report.scope),
            base=self.one(report.base),
        )
