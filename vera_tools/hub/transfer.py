"""What `push` and `pull` share: which files belong to a checkpoint, their digests, and when verification refuses."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vera_tools.checkpoints.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.errors import CheckFailedError, FormatError, HubError, UnprovenError, VeraToolsError
from vera_tools.files.hub_answers import RemoteFile
from vera_tools.verifying.findings import Check
from vera_tools.verifying.report import CheckpointReport

CARD_NAME = "README.md"
PROVENANCE_NAME = "vera_provenance.json"

#: What belongs to a checkpoint: its own files, its licence, and a tokenizer saved beside it.
ALLOWED = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    MANIFEST_NAME,
    CARD_NAME,
    "LICENSE*",
    "NOTICE*",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.model",
)
#: What trainers save beside an adapter to go on from: transformers, TRL, accelerate, DeepSpeed, Lightning.
TRAINING_STATE = (
    "trainer_state.json",
    "training_args.*",
    "optimizer*.*",
    "scheduler*.*",
    "scaler*.*",
    "rng_state*",
    "random_states_*",
    "sampler*.*",
    "custom_checkpoint_*",
    "zero_to_fp32.py",
    "latest",
    "hparams.*",
    "events.out.tfevents*",
)
#: Formats that may run code when they are read.
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.npy", "*.npz", "*.h5")


@dataclass(frozen=True)
class Digests:
    """A local file: bytes, sha256 of its content, and git's name for it."""

    size: int
    sha256: str
    git_sha1: str

    @classmethod
    def of(cls, path: Path) -> Digests:
        """Read a file once for all of them."""
        size = path.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                sha256.update(chunk)
                git.update(chunk)
        return cls(size, sha256.hexdigest(), git.hexdigest())

    def is_of(self, remote: RemoteFile) -> bool:
        """Whether these are the bytes that the Hub's listing names."""
        if remote.sha256 is not None:
            return self.sha256 == remote.sha256
        return self.git_sha1 == remote.git_sha1


@dataclass(frozen=True)
class Transferred:
    """One file that went to or came from the Hub.

    Attributes:
        path: Path in the repository.
        size: Bytes.
        sha256: Of its content, computed here.
        checked: The digest that the Hub lists for it, and that it was compared with: "sha256" or "git-sha1".
        status: "added", "changed" or "unchanged" on the Hub; None for files that were pulled.
    """

    path: str
    size: int
    sha256: str
    checked: str
    status: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        document: dict[str, Any] = {
            "path": self.path,
            "size": self.size,
            "sha256": self.sha256,
            "checked": self.checked,
        }
        return document if self.status is None else {**document, "status": self.status}


def select(
    names: Iterable[str],
    *,
    include: Iterable[str] = (),
    leave_out: Iterable[str] = (),
    allow_pickle: bool = False,
) -> list[str]:
    """The files of a folder that belong to a checkpoint, sorted.

    Args:
        names: Names of the files in the folder.
        include: Further patterns.
        leave_out: Patterns of what does not belong to it, unless `include` says so.
        allow_pickle: Take adapter_model.bin too, and whatever `include` says.
    """
    include, leave_out = list(include), list(leave_out)
    patterns = [*ALLOWED, *([PICKLE_NAME] if allow_pickle else [])]
    return sorted(
        name
        for name in names
        if name != PROVENANCE_NAME
        and (_matches(name, include) or (_matches(name, patterns) and not _matches(name, leave_out)))
        and (allow_pickle or not _matches(name, PICKLES))
    )


def check_arrived(path: Path, remote: RemoteFile, *, where: str) -> Digests:
    """Compare a file that was downloaded to `path` with what the Hub lists.

    Raises:
        HubError: other bytes than the Hub's.
    """
    found = Digests.of(path)
    if not found.is_of(remote) or found.size != remote.size:
        known = remote.sha256 is not None
        raise HubError(
            "the bytes that arrived are not the ones on the Hub",
            where=where,
            expected=f"sha256 {remote.sha256}" if known else f"git's {remote.git_sha1}",
            found=found.sha256 if known else found.git_sha1,
            hint="the bad copy was removed; try again, and suspect disk, memory or proxy if it happens again",
        )
    return found


def refuse_unfit(report: CheckpointReport, *, force: bool, strict: bool, verb: str) -> None:
    """Stop where verification says that this is not what it claims to be.

    Raises:
        CheckFailedError: drift, or a check failed, and no `force`.
        FormatError: invalid, and no `force`.
        UnprovenError: nothing to compare with, or only what was assumed or stated, and `strict`.
    """
    if strict and report.verdict in ("assumed", "unproven"):
        assumed = report.verdict == "assumed"
        raise UnprovenError(
            f"the projections are {report.verdict}: {report.scope}"
            if assumed
            else "nothing records which recipe made its projections",
            where=report.path,
            hint="run `vera-tools record` where it was trained, or do without --strict",
        )
    if force or (report.ok and report.verdict in ("reproducible", "assumed", "unproven")):
        return
    reasons = [check for check in report.checks if check.status == "fail"]
    reasons = reasons or [check for check in report.checks if check.id == "projections.match"]
    words = "; ".join(f"{check.id}: {check.message}" for check in reasons)
    kind = FormatError if report.verdict == "invalid" else CheckFailedError
    what = report.verdict if report.verdict in ("drift", "invalid") else "a check failed"
    raise kind(f"{what}, so it is not {verb}: {words}", where=report.path, hint=f"--force: it is {verb} all the same")


def relabel(report: CheckpointReport, old: Path, new: str) -> CheckpointReport:
    """The report of a checkpoint that was verified at `old`, which the user knows as `new`."""
    checks = tuple(Check(c.id, c.status, c.message.replace(str(old), new)) for c in report.checks)
    return replace(report, path=new, checks=checks)


@contextlib.contextmanager
def speaking_of(new: str, old: Path) -> Iterator[None]:
    """Let warnings and errors from inside name `new`, which the user knows, and not the temporary folder `old`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except VeraToolsError as error:
            error.what = error.what.replace(str(old), new)
            error.where = error.where.replace(str(old), new) if error.where else None
            raise
    for warning in caught:
        warnings.warn(str(warning.message).replace(str(old), new), warning.category, stacklevel=3)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
