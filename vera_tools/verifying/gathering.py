"""The outcomes of many checkpoints, kept small."""

from __future__ import annotations

from collections.abc import Sequence

from vera_tools.errors import UsageError
from vera_tools.verifying.findings import VERDICTS, Verdict
from vera_tools.verifying.gates import LoadSpec
from vera_tools.verifying.report import CheckpointReport, Failed, Outcome, Skipped, VerifyReport
from vera_tools.verifying.sharing import Shared


class Gathered:
    """Outcomes as they come in, and the report that they make.

    Raises:
        UsageError: an unknown `require`, `require_loads` or `against_loads`.
    """

    def __init__(
        self,
        require: Verdict,
        require_loads: str | Sequence[str],
        against_loads: str | None,
        *,
        require_recorded: bool = False,
    ) -> None:
        if require not in VERDICTS:
            raise UsageError("unknown verdict to require", expected=" or ".join(VERDICTS), found=str(require))
        self._require = require
        self._require_recorded = require_recorded
        self._specs = tuple(map(LoadSpec.parse, [require_loads] if isinstance(require_loads, str) else require_loads))
        self._against = LoadSpec.parse(against_loads) if against_loads is not None else None
        if self._against and len(self._specs) != 1:
            what = "`against_loads` goes with one `require_loads`, to move from"
            raise UsageError(what, found=f"{len(self._specs)}")
        self._outcomes: dict[int, list[Outcome]] = {}
        #: What its outcomes share; whoever else holds some of them may share it too.
        self.shared = Shared()

    def add(self, place: int, outcome: Outcome) -> int:
        """Keep an outcome, and say of how many places there is one."""
        if self._require_recorded and isinstance(outcome, CheckpointReport):
            outcome = outcome.with_required()
        small = self.shared.small(outcome) if isinstance(outcome, CheckpointReport) else outcome
        self._outcomes.setdefault(place, []).append(small)
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
