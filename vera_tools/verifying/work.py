"""The unit of work: verify one checkpoint on disk, in this process or in any other that sees the same files."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vera_tools.checkpoints.base import BaseModel
from vera_tools.verifying.log import State, state_of
from vera_tools.verifying.report import Outcome, named
from vera_tools.verifying.verifier import Verifier


@dataclass(frozen=True)
class Job:
    """What a process has to know to verify as the others do.

    Attributes:
        run: Names the run, so that no process takes a base for the one that it opened in an earlier run.
        base: The base to verify against.
        base_digests: Whether its weights are hashed.
        allow_pickle: Whether legacy .bin files are read.
        skip_others: Whether adapters of other kinds are skipped.
        states: Whether the state of the files is asked for.
        folder: What relative paths start from.
        file_digests: Whether the checkpoints' files are hashed.
    """

    run: str
    base: str | None
    base_digests: bool
    allow_pickle: bool
    skip_others: bool
    states: bool
    folder: str
    file_digests: bool = False


class Done(NamedTuple):
    """What became of one, and the state of its files; None where that was not asked for, or changed meanwhile."""

    outcome: Outcome
    state: State | None


def verify_one(verifier: Verifier, job: Job, path: str) -> Done:
    """Verify one checkpoint on disk."""
    before = state_of(path) if job.states else None
    outcome = verifier.verify(path)
    return Done(outcome, before if before is not None and before == state_of(path) else None)


def verify_some(job: Job, paths: Sequence[str]) -> tuple[float, list[Done]]:
    """Verify some checkpoints on disk, wherever this runs; and how many seconds that took."""
    started = time.monotonic()
    verifier = _verifier(job)
    found = []
    for path in paths:
        done = verify_one(verifier, job, _here(job, path))
        found.append(Done(named(done.outcome, path), done.state))
    return time.monotonic() - started, found


@functools.lru_cache(maxsize=1)
def _verifier(job: Job) -> Verifier:
    base = None if job.base is None else BaseModel.open(_here(job, job.base))
    return Verifier(
        base=base,
        base_digests=job.base_digests,
        allow_pickle=job.allow_pickle,
        skip_others=job.skip_others,
        file_digests=job.file_digests,
    )


def _here(job: Job, path: str) -> str:
    """The path as this process has to call it: it may have been started elsewhere."""
    if os.path.isabs(path) or "://" in path or not job.folder or job.folder == os.getcwd():
        return path
    return os.path.join(job.folder, path)
