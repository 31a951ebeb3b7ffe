"""The outcomes of many checkpoints, kept small."""

from __future__ import annotations

from collections.abc import Sequence

from vera_tools.errors import UsageError
from vera_tools.verifying.findings import VERDICTS, Verdict
from vera_tools.verifying.gates import LoadSpec
from vera_tools.verifying.outcomes import Outcomes
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
        self._outcomes = Outcomes()
        self._last, self._places = -1, 0
        #: What its outcomes share; whoever else holds some of them may share it too.
        self.shared = Shared()

    def add(self, place: int, outcome: Outcome) -> int:
        """Keep an outcome, and say of how many places there is one. Those of one place follow each other."""
        if self._require_recorded and isinstance(outcome, CheckpointReport):
            outcome = outcome.with_required()
        self._outcomes.add(place, self.shared.small(outcome) if isinstance(outcome, CheckpointReport) else outcome)
        self._places += place != self._last
        self._last = place
        return self._places

    def report(self, *, partial: bool = False, from_log: int = 0) -> VerifyReport:
        """The report on all of them, in the order of their places."""
        return VerifyReport(
            self._outcomes.of(CheckpointReport),
            self._outcomes.of(Skipped),
            self._require,
            self._outcomes.of(Failed),
            self._specs,
            self._against,
            partial,
            from_log,
        )
