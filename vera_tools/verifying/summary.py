"""`summarize`: the lines of several runs of `verify` as one report, as if one run had verified all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vera_tools.checkpoints.presence import in_order
from vera_tools.errors import FormatError, UsageError
from vera_tools.files import local, opening
from vera_tools.verifying.findings import Verdict
from vera_tools.verifying.gathering import Gathered
from vera_tools.verifying.log import Line, Reader
from vera_tools.verifying.report import VerifyReport
from vera_tools.verifying.runs import Run, Runs

#: A path, and the question of the run that wrote of it.
_Seen = tuple[str, tuple[str, str | None] | None]

_AGAIN = "run verify again with the same --log: it goes on from there"


def summarize(
    *logs: str | os.PathLike[str],
    require: Verdict = "reproducible",
    require_loads: str | Sequence[str] = (),
    against_loads: str | None = None,
    require_recorded: bool = False,
) -> VerifyReport:
    """Make one report of the lines that runs of `verify` wrote with ``log``.

    Of two lines on one path the later one holds: the one further down, in the log named last. Checkpoints come in the
    order of their paths. Of what a run found, and one with the same arguments, folder and log did not find any more,
    there is nothing. Nothing is verified, and nothing but the logs is read.

    Every run has to have ended, or one that was asked the same after it; of a run with ``part``, the runs of all other
    parts have to be there. What each run says of itself in its lines tells it.

    Args:
        logs: Files of lines (verify-line/v1).
        require: As in `verify`.
        require_loads: As in `verify`.
        against_loads: As in `verify`.
        require_recorded: As in `verify`.

    Raises:
        FormatError: a log cannot be read, is empty, holds something else or ends in the middle of a line; a run did
            not end; a part, or lines that a run wrote or took, are not there; or there is no line on a checkpoint.
        UsageError: no log given, or one that is not there; an unknown `require`, `require_loads` or `against_loads`.
    """
    gathered = Gathered(require, require_loads, against_loads, require_recorded=require_recorded)
    if not logs:
        raise UsageError("no log given")
    for log in logs:
        opening.require(log)
    found: dict[str, Line] = {}
    ran = Runs()
    reader = Reader(gathered.shared)
    for log in logs:
        empty = True
        here: dict[_Seen, Line] = {}
        for line in _lines(Path(log), reader):
            empty = False
            if isinstance(line, Run):
                ran.add(line, where=os.fspath(log))
                _drop(here, line)
                continue
            if line.run:
                ran.add(line.run, where=os.fspath(log), key=line.key)
            key = line.result.path, line.run.question if line.run else None
            here.pop(key, None)  # the later one comes last
            here[key] = line
        if empty:
            what = "nothing in it: the run that was to write it did not end"
            raise FormatError(what, where=log, hint=_AGAIN)
        found.update((path, line) for (path, _), line in here.items())
    where = ", ".join(os.fspath(log) for log in logs)
    if missing := ran.missing():
        raise FormatError(f"incomplete: {'; '.join(missing)}", where=where, hint=_AGAIN)
    if not found:
        raise FormatError("no checkpoint was verified", where=where, expected="a line or more")
    for place, path in enumerate(sorted(found, key=_as_found)):
        line = found[path]
        if line.old or not line.run:
            why = line.old or "it does not say whether the run that wrote it ended, so there may be more"
            hint = f"vera-tools {line.tool[1]} wrote it: verify it again, with --log"
            raise FormatError(f"its line in the log cannot be relied on: {why}", where=path, hint=hint)
        gathered.add(place, line.result.outcome)
    return gathered.report()


def _drop(lines: dict[_Seen, Line], run: Run) -> None:
    """Take out what a run that was asked the same did not come upon any more; what others saw stays."""
    for path in run.gone:
        lines.pop((path, run.question), None)


def _as_found(path: str) -> tuple[object, ...]:
    """What to sort paths by, such that they come as a search finds them: numbers in names count as numbers."""
    return [in_order(part) for part in re.split(r"[/\\]", path)], path


def _lines(log: Path, reader: Reader) -> Iterator[Line | Run]:
    if kind := local.not_a_file(log):  # a pipe or a device has no end
        raise FormatError(f"this is {kind}, not a file", where=log)
    try:
        with log.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{log}: line {number}"
                if not line.endswith(b"\n"):
                    raise FormatError(
                        "the line is cut off: the run that wrote it did not end", where=where, hint=_AGAIN
                    )
                yield reader.read(line, where=where)
    except OSError as error:
        raise FormatError(f"cannot be read: {error.strerror}", where=log) from error
