"""Many checkpoints, on the Hub or not: found, verified side by side, logged as they are done, and taken up again.

One that cannot be reached does not stop the others. The log holds one JSON document a line; what it says of a commit
holds for ever, so that a second run verifies only what is new, has moved, or could not be reached.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from vera_tools import schema
from vera_tools._version import TOOL
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.errors import FormatError, HubError, UsageError
from vera_tools.files import hub_client as hub
from vera_tools.files import locking, opening
from vera_tools.files.hub_client import Reference
from vera_tools.files.strict_json import parse_json
from vera_tools.verifying.report import CheckpointReport, Failed, Outcome, Skipped

#: Verifies one: its report, or, where others are to be skipped, that it is none of ours.
Verify = Callable[..., Outcome]

#: The kind of a repository that holds no adapter.
NO_ADAPTER = "no adapter"


@dataclass(frozen=True)
class Result:
    """What became of one checkpoint.

    Attributes:
        path: What it is called.
        commit: The commit that was verified; None for local ones.
        outcome: Its report; that it was skipped; or why it could not be reached.
    """

    path: str
    commit: str | None
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        """The verify-line/v1 document."""
        outcome = self.outcome
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
        }


def is_pattern(path: str) -> bool:
    """Whether this stands for many: ``hf://owner/*``."""
    return opening.is_remote(path) and any(character in path for character in "*?[")


def run(
    paths: Iterable[str],
    verify: Verify,
    *,
    jobs: int,
    log: str | os.PathLike[str] | TextIO | None,
    base: str | None,
) -> Iterator[tuple[int, Result]]:
    """Verify all, at most `jobs` at a time, and hand out each as it is done, with its place in the order asked for.

    Args:
        paths: Checkpoints, and patterns of repositories on the Hub, whose every adapter is meant.
        verify: Verifies one.
        jobs: How many at a time.
        log: A file to append a line to for each, and to take results from; or a stream to write the lines to.
        base: What they are checked against; results that were logged for another base do not count.

    Raises:
        HubError: a pattern's owner cannot be listed.
        FormatError: `log` holds something else; or a pattern stands for no adapter, which is told after the others.
    """
    with _Log(log, base) as known, ThreadPoolExecutor(max(jobs, 1)) as pool:
        tasks: dict[Future[list[Result]], tuple[int, str]] = {}
        empty: set[str] = set()
        try:
            for path in paths:
                work, items = (_repository, matching(path)) if is_pattern(path) else (_explicit, [path])
                first = len(tasks)
                tasks.update(
                    (pool.submit(work, item, verify, known), (first + n, path)) for n, item in enumerate(items)
                )
                empty.update([path] if is_pattern(path) else [])
            for task in as_completed(tasks):
                place, path = tasks[task]
                for result in task.result():
                    known.write(result)
                    if not (isinstance(result.outcome, Skipped) and result.outcome.kind == NO_ADAPTER):
                        empty.discard(path)
                    yield place, result
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        if empty:  # a mistyped owner must not pass for one whose every adapter is sound
            raise FormatError("no adapter in any repository that this stands for", where=", ".join(sorted(empty)))


def matching(pattern: str) -> list[str]:
    """The repositories that ``hf://owner/pattern`` stands for, as references, sorted.

    Raises:
        UsageError: a wildcard anywhere but in the repository's name.
        HubError: the Hub refused or cannot be reached.
    """
    owner, _, name = pattern.removeprefix(hub.SCHEME).partition("/")
    if not owner or any(character in owner for character in "*?[") or "/" in name or "@" in name:
        raise UsageError("a wildcard stands for repositories of one owner", where=pattern, expected="hf://owner/*")
    api = hub.client()
    with hub.errors(pattern):
        models = hub.call(lambda: [model.id for model in api.list_models(author=owner)], few=True)
        repos = sorted(model for model in models if fnmatch.fnmatchcase(model, f"{owner}/{name}"))
    strange = [repo for repo in repos if not hub.is_repository(repo)]
    if strange:
        raise HubError("the Hub lists what is no repository", where=pattern, found=ascii(strange[0])[:80])
    return [hub.SCHEME + repo for repo in repos]


def _explicit(path: str, verify: Verify, known: _Log) -> list[Result]:
    if not opening.is_remote(path):
        return [Result(path, None, verify(path))]
    try:
        if hub.is_offline():
            return [Result(path, None, verify(path))]
        reference = Reference.parse(path)
        commit = hub.resolve(hub.client(), reference)
        return [_pinned(path, reference, commit, verify, known)]
    except (HubError, UsageError) as error:
        return [Result(path, None, Failed(path, error))]


def _repository(path: str, verify: Verify, known: _Log) -> list[Result]:
    """Every adapter in one repository, wherever in it."""
    reference = Reference.parse(path)
    try:
        api = hub.client()
        commit = hub.resolve(api, reference)
        files = hub.listing(api, reference, commit, recursive=True)
    except HubError as error:
        return [Result(path, None, Failed(path, error))]
    paths = [PurePosixPath(file) for file in files]
    folders = sorted(str(path.parent) for path in paths if path.name == CONFIG_NAME)
    if not folders:
        return [known.get(path, commit) or Result(path, commit, Skipped(path, NO_ADAPTER))]
    found = [replace(reference, subfolder="" if folder == "." else folder) for folder in folders]
    results = []
    for inside in found:
        try:
            results.append(_pinned(str(inside), inside, commit, verify, known, skip_others=True))
        except HubError as error:
            results.append(Result(str(inside), commit, Failed(str(inside), error)))
    return results


def _pinned(
    path: str, reference: Reference, commit: str, verify: Verify, known: _Log, *, skip_others: bool = False
) -> Result:
    if earlier := known.get(path, commit):
        return earlier
    outcome = verify(str(replace(reference, revision=commit)), skip_others=skip_others)
    named = replace(outcome, path=path) if isinstance(outcome, CheckpointReport) else outcome._replace(path=path)
    return Result(path, commit, named)


def _may_be_assumed(report: CheckpointReport) -> bool:
    """Whether a line of version 0.1.0, which knew no such verdict, may call `reproducible` what is only assumed.

    It named no origin where the record is in the file's own metadata alone.
    """
    found = {check.id: check.status for check in report.checks}
    alone = "metadata.projections" in found and found.get("manifest.schema") == "skip"
    return report.verdict == "reproducible" and ("manifest.assumed" in found or alone)


class _Log:
    """The log file or stream. A line that was cut off by a crash is dropped.

    Several runs may share a file: it is opened, locked and closed again for each line, which is written at once.
    """

    def __init__(self, target: str | os.PathLike[str] | TextIO | None, base: str | None) -> None:
        self._base = base
        self._known: dict[tuple[str, str], Result] = {}
        self._stream: TextIO | None = None
        self._path: Path | None = None
        if target is None:
            return
        if not isinstance(target, str | os.PathLike):
            self._stream = target
            return
        self._path = Path(target)
        try:
            with self._alone(self._path) as stream:
                whole = stream.read()
            for number, line in enumerate(whole.splitlines(), start=1):
                self._remember(line, where=f"{self._path}: line {number}")
        except OSError as error:
            raise UsageError(f"cannot be written: {error.strerror}", where=self._path) from error

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        """The file is closed after each line."""

    def get(self, path: str, commit: str) -> Result | None:
        """What is known of a checkpoint at this commit."""
        return self._known.get((path, commit))

    def write(self, result: Result) -> None:
        """Append a result, unless it comes from here."""
        if result.commit is not None and self.get(result.path, result.commit) is result:
            return
        line = json.dumps({**result.to_dict(), "base": self._base}, allow_nan=False) + "\n"
        if self._path:
            with self._alone(self._path) as stream:
                stream.seek(0, os.SEEK_END)
                stream.write(line.encode())
        elif self._stream:
            self._stream.write(line)
            self._stream.flush()

    @staticmethod
    @contextlib.contextmanager
    def _alone(path: Path) -> Iterator[io.FileIO]:
        """The file, from its beginning and with whole lines only, for as long as no other run may touch it."""
        with io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+") as stream:
            locking.wait(stream.fileno())
            size = stream.seek(0, os.SEEK_END)
            if size:
                stream.seek(size - 1)
                if stream.read(1) != b"\n":  # nobody is writing it, so nobody will end this line
                    stream.seek(0)
                    stream.truncate(stream.readall().rfind(b"\n") + 1)
            stream.seek(0)
            yield stream

    def _remember(self, line: bytes, *, where: str) -> None:
        data = parse_json(line.decode("utf-8", "replace"), where=where)
        schema.validate(data, "verify-line.v1", where=where)
        if data["commit"] and data["status"] != "failed" and data["base"] == self._base:
            if data["status"] == "verified" and "trained" not in data["checkpoint"]:
                return  # of an older version, which did not say what its loader table follows from
            outcome: Outcome = (
                Skipped(data["path"], data["kind"])
                if data["status"] == "skipped"
                else CheckpointReport.from_dict(data["checkpoint"])
            )
            if isinstance(outcome, CheckpointReport) and _may_be_assumed(outcome):
                return
            self._known[data["path"], data["commit"]] = Result(data["path"], data["commit"], outcome)
