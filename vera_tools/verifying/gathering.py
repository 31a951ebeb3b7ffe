"""The outcomes of many checkpoints, kept small: in a registry most checks, recipes and digests are the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TypeVar

from vera_tools.errors import UsageError
from vera_tools.verifying.findings import VERDICTS, Verdict
from vera_tools.verifying.gates import LoadSpec
from vera_tools.verifying.report import CheckpointReport, Failed, Outcome, Skipped, VerifyReport

Value = TypeVar("Value")


class Gathered:
    """Outcomes as they come in, and the report that they make.

    Raises:
        UsageError: an unknown `require`, `require_loads` or `against_loads`.
    """

    def __init__(self, require: Verdict, require_loads: str | tuple[str, ...], against_loads: str | None) -> None:
        if require not in VERDICTS:
            raise UsageError("unknown verdict to require", expected=" or ".join(VERDICTS), found=str(require))
        self._require = require
        self._specs = tuple(map(LoadSpec.parse, [require_loads] if isinstance(require_loads, str) else require_loads))
        self._against = LoadSpec.parse(against_loads) if against_loads is not None else None
        if self._against and len(self._specs) != 1:
            what = "`against_loads` goes with one `require_loads`, to move from"
            raise UsageError(what, found=f"{len(self._specs)}")
        self._outcomes: dict[int, list[Outcome]] = {}
        self._shared: dict[Hashable, object] = {}

    def add(self, place: int, outcome: Outcome) -> int:
        """Keep an outcome, and say of how many places there is one."""
        self._outcomes.setdefault(place, []).append(
            self._small(outcome) if isinstance(outcome, CheckpointReport) else outcome
        )
        return len(self._outcomes)

    def report(self, *, partial: bool = False, from_log: int = 0) -> VerifyReport:
        """The report on all of them, in the order of their places."""
        outcomes = [outcome for place in sorted(self._outcomes) for outcome in self._outcomes[place]]
        return VerifyReport(
            tuple(outcome for outcome in outcomes if isinstance(outcome, CheckpointReport)),
            tuple(outcome for outcome in outcomes if isinstance(outcome, Skipped)),
            self._require,
            tuple(outcome for outcome in outcomes if isinstance(outcome, Failed)),
            self._specs,
            self._against,
            partial,
            from_log,
        )

    def _small(self, report: CheckpointReport) -> CheckpointReport:
        one, two = report.projections
        trained = report.trained
        return replace(
            report,
            checks=tuple(self._one(check, check) for check in report.checks),
            recipe=self._one(report.recipe, report.recipe),
            also_matches=self._one(report.also_matches, report.also_matches),
            projections=self._one((one, two), (one, two)),
            trained=self._one(trained, trained),
            scope=self._one(report.scope, report.scope),
            base=self._one(report.base, report.base),
        )

    def _one(self, key: Hashable, value: Value) -> Value:
        """The first of all that are equal to this."""
        return self._shared.setdefault((type(value), key), value)  # type: ignore[return-value]
