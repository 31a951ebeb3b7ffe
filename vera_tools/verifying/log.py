"""The log of `verify`: a JSON line for each checkpoint (verify-line/v1), from which later runs and `summarize` take.

A line holds for as long as what it tells of stays what it was: a commit on the Hub for ever, and a folder on disk until
the size, the times or the name of one of its files changes. Each says how far its run was (see `runs`); where there is
no checkpoint to say it of, before the first and where the last was known, a line of its own does (verify-run/v1).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import marshal
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from vera_tools import schema
from vera_tools._version import TOOL
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.errors import FormatError, UsageError, VeraToolsError, escaped
from vera_tools.files import local
from vera_tools.files.store import StoreFolder
from vera_tools.files.strict_json import parse_json
from vera_tools.verifying.log_file import LogFile
from vera_tools.verifying.report import CheckpointReport, Failed, Outcome, Skipped
from vera_tools.verifying.runs import Run, Runs
from vera_tools.verifying.sharing import Shared

#: The member of a line that says more of each status.
_MEMBERS = {"verified": "checkpoint", "skipped": "kind", "failed": "error"}
#: Bytes. A checkpoint's own line has some six thousand.
_LONGEST_LINE = 16 << 20
#: Paths in one line that says what is gone.
_MOST_GONE = 1000
#: So many different reports are known again; in a log of more, hardly any is like another.
_MOST_REPORTS = 4096
#: What `verify` reads of a checkpoint.
_READ = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, MANIFEST_NAME)

#: Name, size, nanoseconds when it was last written to, and when anything of it changed, which nobody can set.
State = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Conditions:
    """What else than the checkpoint an outcome depends on.

    Attributes:
        base: What the user called the base; None without one.
        base_state: Its commit on the Hub, or a digest over the names, sizes, and times or versions of its files.
        base_digests: Whether the base's weights are hashed.
        allow_pickle: Whether legacy .bin files are read.
    """

    base: str | None = None
    base_state: str | None = None
    base_digests: bool = False
    allow_pickle: bool = False

    @classmethod
    def of(
        cls, label: str | os.PathLike[str] | None, model: BaseModel | None, *, base_digests: bool, allow_pickle: bool
    ) -> Conditions:
        """Those of a run against this base."""
        if model is None or label is None:
            return cls(allow_pickle=allow_pickle)
        commit = getattr(model.folder, "commit", None)
        if isinstance(model.folder, StoreFolder):
            commit = model.folder.state
        elif commit is None and isinstance(model.folder, local.LocalFolder):
            state = _state(os.fspath(model.folder.path), model.folder.names())
            commit = None if state is None else hashlib.sha256(json.dumps(state).encode()).hexdigest()
        return cls(model.label, commit, base_digests, allow_pickle)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one checkpoint.

    Attributes:
        path: What it is called.
        commit: The commit that was verified, or the state of a folder in a store; None for local ones, and where it
            changed meanwhile.
        outcome: Its report; that it was skipped; or why it could not be reached.
        state: The files on disk that were verified; None on the Hub, or where they changed meanwhile.
    """

    path: str
    commit: str | None
    outcome: Outcome
    state: State | None = field(default=None, compare=False)

    def to_dict(self, conditions: Conditions | None = None, run: Run | None = None) -> dict[str, Any]:
        """The verify-line/v1 document."""
        outcome, under = self.outcome, conditions or Conditions()
        status = {Skipped: "skipped", Failed: "failed"}.get(type(outcome), "verified")
        return {
            "schema": "vera-tools/verify-line/v1",
            "tool": dict(TOOL),
            "path": self.path,
            "commit": self.commit,
            "status": status,
            "kind": outcome.kind if isinstance(outcome, Skipped) else None,
            "checkpoint": outcome.to_dict(table=False) if isinstance(outcome, CheckpointReport) else None,
            "error": outcome.error.to_dict() if isinstance(outcome, Failed) else None,
            "base": under.base,
            "base_state": under.base_state,
            "base_digests": under.base_digests,
            "allow_pickle": under.allow_pickle,
            "files": None if self.state is None else [dict(zip(_FILE, file, strict=True)) for file in self.state],
            **({"run": run.to_dict()} if run else {}),
        }


#: This program, as a line names it.
_THIS = (TOOL["name"], TOOL["version"])
_FILE = ("name", "size", "modified_ns", "changed_ns")


@dataclass(frozen=True, slots=True)
class Line:
    """A line that was read: a result, and under what it was found.

    Attributes:
        tool: Name and version of the program that wrote it.
        old: Why nothing may rest on it; None where something may.
        run: The run that wrote it; None where an older version did.
    """

    result: Result
    conditions: Conditions
    tool: tuple[str, str]
    old: str | None
    run: Run | None

    @property
    def key(self) -> tuple[str, str | None]:
        """The checkpoint that it is on."""
        return self.result.path, self.result.commit


class Reader:
    """Parses lines. In a registry most tell the same of their checkpoints, which is looked at once."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        #: The reports that good lines held, by all that they said but the path.
        self._reports: dict[bytes, CheckpointReport] = {}

    def read(self, line: bytes, *, where: str) -> Line | Run:
        """Parse a line: one on a checkpoint, or on a run alone.

        Raises:
            FormatError: it is none.
        """
        data = parse_json(line.decode("utf-8", "replace"), where=where, paths=True)
        if isinstance(data, dict) and data.get("schema") == "vera-tools/verify-run/v1":
            schema.validate(data, "verify-run.v1", where=where)
            return replace(Run.from_dict(data["run"]), gone=tuple(data.get("gone", ())))
        entry = data.get("checkpoint") if isinstance(data, dict) else None
        content = _content(entry) if isinstance(entry, dict) else None
        known = self._reports.get(content) if content else None
        if known is None or schema.problems({**data, "checkpoint": None}, "verify-line.v1"):
            schema.validate(data, "verify-line.v1", where=where)
        member = _MEMBERS[data["status"]]
        if data[member] is None:
            raise FormatError(f"{data['status']}, and {member} is null", where=where)
        try:
            found = self._line(data, known, where=where)
        except VeraToolsError:
            raise
        except Exception as error:  # members that contradict each other in a way that no schema tells
            raise escaped(error, where=where) from error
        outcome = found.result.outcome
        if content and isinstance(outcome, CheckpointReport) and len(self._reports) < _MOST_REPORTS:
            self._reports[content] = outcome
        return found

    def read_all(self, stream: io.RawIOBase, *, where: str | os.PathLike[str]) -> Iterator[Line | Run]:
        """Parse the lines of a log, one after the other.

        Raises:
            FormatError: one of them is none, or longer than any.
        """
        lines = io.BufferedReader(stream)
        try:
            for number in itertools.count(1):
                line, place = lines.readline(_LONGEST_LINE + 1), f"{os.fspath(where)}: line {number}"
                if not line:
                    return
                if len(line) > _LONGEST_LINE:
                    most = f"at most {_LONGEST_LINE} bytes"
                    raise FormatError("too long for a line of a log", where=place, expected=most)
                yield self.read(line.rstrip(b"\r\n"), where=place)
        finally:
            lines.detach()

    def _line(self, data: dict[str, Any], known: CheckpointReport | None, *, where: str) -> Line:
        one, path, files = self._shared.one, data["path"], data.get("files")
        conditions = Conditions(
            data["base"], data.get("base_state"), data.get("base_digests", False), data.get("allow_pickle", False)
        )
        state = None
        if files is not None:
            state = tuple((one(f["name"]), f["size"], f["modified_ns"], f["changed_ns"]) for f in files)
        outcome: Outcome
        old = None
        if data["status"] == "skipped":
            outcome = Skipped(path, data["kind"] or "")
        elif data["status"] == "failed":
            outcome = Failed(path, VeraToolsError.from_dict(data["error"]))
        elif "trained" not in data["checkpoint"]:
            old = "it does not say what the table of loaders follows from"
            outcome = Failed(path, FormatError(old, where=where))
        else:
            its_path = data["checkpoint"]["path"]
            report = known or self._shared.small(CheckpointReport.from_dict(data["checkpoint"]))
            outcome = replace(report, path=path if path == its_path else its_path)  # one text for both
            old = "it may call reproducible what is only assumed" if _may_be_assumed(outcome) else None
        run = Run.from_dict(data["run"]) if "run" in data else None
        tool = (data["tool"]["name"], data["tool"]["version"])
        return Line(Result(path, data["commit"], outcome, state), one(conditions), one(tool), old, run)


def _content(entry: dict[str, Any]) -> bytes | None:
    """What tells this from every other report but that of another path; None where nothing does."""
    if not isinstance(entry.get("path"), str):
        return None
    try:
        text = marshal.dumps({name: value for name, value in entry.items() if name != "path"}, 2)
    except ValueError:  # nested too deeply
        return None
    return hashlib.sha256(text).digest()


def refuse_no_file(path: Path) -> None:
    """Refuse what is there and is no file: a pipe or a device has no end.

    Raises:
        UsageError: names what it is.
    """
    if kind := local.not_a_file(path):
        raise UsageError(f"this is {kind}, not a file", where=path, hint="`--log -` writes to stdout")


def state_of(path: str) -> State | None:
    """The files on disk that `verify` reads of a checkpoint; None where there is nothing to be known by."""
    if os.path.isdir(path):
        return _state(path, _READ)
    folder, name = os.path.split(path)
    return _state(folder, dict.fromkeys((name, *_READ)))


def _state(folder: str, names: Iterable[str]) -> State | None:
    found = []
    for name in names:
        try:
            status = os.stat(os.path.join(folder, name))
        except OSError:
            continue
        found.append((name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    return tuple(found) or None


def _may_be_assumed(report: CheckpointReport) -> bool:
    """Whether a line of version 0.1.0, which knew no such verdict, may call `reproducible` what is only assumed.

    It named no origin where the record is in the file's own metadata alone.
    """
    found = {check.id: check.status for check in report.checks}
    alone = "metadata.projections" in found and found.get("manifest.schema") == "skip"
    return report.verdict == "reproducible" and ("manifest.assumed" in found or alone)


class _Known(NamedTuple):
    """What is kept of a line from which a later run may take: `holds` is whether a run answers for it."""

    result: Result
    conditions: Conditions
    tool: tuple[str, str]
    holds: bool


class Log:
    """The log file or stream of a run. A line that was cut off by a crash is dropped.

    Several runs may share a file: it is opened, locked and closed again whenever lines are written, which is at once.
    """

    def __init__(self, target: str | os.PathLike[str] | TextIO | None, run: Run, shared: Shared | None = None) -> None:
        """Read what is there, and note that the run began.

        Args:
            target: A file, which may be there; a stream to write to; or None for no log.
            run: The run.
            shared: What results share with others that are held.

        Raises:
            FormatError: it holds something else.
            UsageError: it cannot be written.
        """
        self._run, self._conditions = run, Conditions()
        self._lines: list[_Known] = []
        self._runs = Runs()
        self._known: dict[tuple[str, str | None], _Known] = {}
        self._taken: set[tuple[str, str | None]] = set()
        self._done = self._written = 0
        self._held: list[Result] = []
        #: Paths of which runs wrote that looked at the same, and that this one has not come upon.
        self._unseen: set[str] = set()
        #: Paths that a run did not come upon any more, and how many of `_lines` were before it said so.
        self._gone: dict[str, int] = {}
        self._stream: TextIO | None = None
        self._file: LogFile | None = None
        #: How many results were taken from it.
        self.taken = 0
        if target is None:
            return
        if not isinstance(target, str | os.PathLike):
            self._stream = target
            return
        path = Path(target)
        try:
            refuse_no_file(path)
            self._file = LogFile(path)
            with self._file.alone() as stream:
                for line in Reader(shared or Shared()).read_all(stream, where=path):
                    self._read(line, where=str(path))
            self._file.append(b"", run.to_line())
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror}", where=path) from error

    def _read(self, line: Line | Run, *, where: str) -> None:
        """Take note of a line that is there."""
        if isinstance(line, Run):
            self._runs.add(line, where=where)
            self._gone.update(dict.fromkeys(line.gone, len(self._lines)))
            if self._run.looks_again(line):
                self._unseen.difference_update(line.gone)
            return
        if line.run:
            self._runs.add(line.run, where=where, key=line.key)
            if self._run.looks_again(line.run):
                self._unseen.add(line.result.path)
        if not (isinstance(line.result.outcome, Failed) or line.old):
            self._lines.append(_Known(line.result, line.conditions, line.tool, line.run is not None))

    @property
    def is_file(self) -> bool:
        """Whether a later run may take from it, so that states are worth writing down."""
        return self._file is not None

    def begin(self, conditions: Conditions, *, total: int, whole: str) -> None:
        """Note what there is to do, and take up what is known under these conditions."""
        self._conditions = conditions
        self._run = replace(self._run, total=total, whole=whole)
        for number, line in enumerate(self._lines):
            there = number >= self._gone.get(line.result.path, 0)
            self._remember(line if there else line._replace(holds=False))
        self._lines = []
        if self._file:
            self._append([], self._now().to_line())

    def end(self) -> None:
        """Note that the run did all that it had to do, and that nothing else is wrong."""
        held, self._held = self._held, []
        if self._unseen and not self._runs.others_took(self._run):
            self._append(held, gone=sorted(self._unseen))
            return
        if held:
            self._append(held, ended=True)
            return
        # Where all was taken from a run that was asked the same, that one's line says it already.
        proven = self._written == 0 and self._runs.prove(self._run)
        self._append([], b"" if proven else self._now(ended=True).to_line())

    def give_up(self) -> None:
        """Note what was done of a run that does not end as it should."""
        held, self._held = self._held, []
        self._append(held)

    def local(self, path: str, *, skip_others: bool) -> Result | None:
        """What is known of a checkpoint on disk, where its files are still the ones that were verified."""
        found = self.get(path, None, skip_others=skip_others)
        return found if found is not None and found.state == state_of(path) else None

    def get(self, path: str, commit: str | None, *, skip_others: bool) -> Result | None:
        """What is known of a checkpoint at this commit."""
        line = self._known.get((path, commit))
        if line is None:
            return None
        outcome = line.result.outcome  # one of another kind is skipped by a search, and invalid where it was named
        if skip_others:
            other = isinstance(outcome, CheckpointReport) and any(c.id == "config.kind" for c in outcome.failed)
        else:
            other = isinstance(outcome, Skipped)
        return None if other else line.result

    def write(self, results: Iterable[Result]) -> None:
        """Append what is new of the results of one thing that was to be done, and count it as done."""
        results = list(results)
        self._unseen.difference_update(result.path for result in results)
        fresh = [result for result in results if not self._take(result)]
        self._done += 1
        if self._done == self._run.total:  # with which the run ends, where nothing else is wrong
            self._held += fresh
        else:
            self._append(fresh)

    def _take(self, result: Result) -> bool:
        """Count a result that comes from here; False where it is to be written, for this run to answer for it."""
        line = self._known.get((result.path, result.commit))
        if line is None or line.result is not result:
            return False
        self.taken += 1
        if not line.holds:
            return False
        self._taken.add((result.path, result.commit))
        return True

    def _now(self, *, ended: bool = False) -> Run:
        """The run as far as it is."""
        return replace(self._run, done=self._done, written=self._written, taken=len(self._taken), ended=ended)

    def _append(
        self, results: list[Result], note: bytes | None = None, *, ended: bool = False, gone: Sequence[str] = ()
    ) -> None:
        """Append lines, the last of which may say that the run ended; or a note on the run, until the next line.

        What is gone is said after the lines, by which the run ends.
        """
        if self._file is None and self._stream is None:
            return
        lines = []
        for number, result in enumerate(results, start=1):
            self._written += 1
            now = self._now(ended=ended and number == len(results))
            lines.append(json.dumps(result.to_dict(self._conditions, now), allow_nan=False) + "\n")
        for start in range(0, len(gone), _MOST_GONE):
            some = tuple(gone[start : start + _MOST_GONE])
            now = self._now(ended=start + _MOST_GONE >= len(gone))
            lines.append(replace(now, gone=some).to_line().decode())
        data = "".join(lines).encode()
        if self._file and (data or note is not None):
            try:
                self._file.append(data, note or b"")
            except OSError as error:
                what = f"could not be written: {error.strerror or error}"
                hint = "a later run goes on from what it holds"
                raise VeraToolsError(what, where=self._file.path, hint=hint) from error
        elif self._stream and data:
            self._stream.write(data.decode())
            self._stream.flush()

    def _remember(self, line: _Known) -> None:
        result, mine = line.result, self._conditions
        if line.conditions.base != mine.base:
            return
        if result.commit is not None and line.conditions != mine:  # of the base, say, which may be in another state
            return
        key = result.path, result.commit
        if result.commit is None:  # the newest line of a path holds, so that an older state that comes back is unknown
            self._known.pop(key, None)
            if result.state is None or line.tool != _THIS or line.conditions != mine:
                return
        self._known[key] = line
