"""What was verified, as an in-toto statement: unsigned, for cosign or actions/attest to sign.

Statement v1 (https://in-toto.io/Statement/v1) with the predicate of a simple verification result
(https://in-toto.io/attestation/svr/v0.1): who verified, when, and which properties hold. Its subjects are the files
that the verdicts were read from, by their digests, as they were when they were read. A property is one of all of them.

The statement is about the adapters alone: what was found out about their fit to a base is left out, because a base is
no subject of it. This module does no I/O.
"""

from __future__ import annotations

import datetime
from typing import Any

from vera_tools._version import __version__
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.verifying.findings import MATCH
from vera_tools.verifying.report import CheckpointReport, VerifyReport

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://in-toto.io/attestation/svr/v0.1"
#: Who verified. Its version is part of it, because what a property means may change with it.
VERIFIER = f"pkg:pypi/vera-tools@{__version__}"
_SCOPE = "VERA_TOOLS_"


def statement(report: VerifyReport, *, at: datetime.datetime) -> dict[str, Any]:
    """The statement on what passed.

    Args:
        report: Of `verify` with `file_digests`.
        at: When it was verified, with a time zone.

    Raises:
        CheckFailedError: the exit code is not 0: nobody should sign for that.
        UsageError: nothing was verified, or no digests were asked for.
    """
    if report.exit_code:
        raise CheckFailedError("not everything passed", found=f"exit code {report.exit_code}")
    if not report.checkpoints:
        raise UsageError("nothing was verified that could be attested")
    if not all(checkpoint.files for checkpoint in report.checkpoints):
        raise UsageError("the digests of the files are not known", hint="verify with file_digests=True")
    subjects = {
        f"{_folder(checkpoint)}/{file.name}": file.sha256
        for checkpoint in report.checkpoints
        for file in checkpoint.files
    }
    held = [_properties(report, checkpoint) for checkpoint in report.checkpoints]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "verifier": {"id": VERIFIER},
            "timeCreated": at.astimezone(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "properties": [name for name in held[0] if all(name in others for others in held)],
        },
    }


def is_statement(document: object) -> bool:
    """Whether this is such a statement, of whatever version of vera-tools."""
    return (
        isinstance(document, dict)
        and document.get("_type") == STATEMENT
        and document.get("predicateType") == PREDICATE
        and "vera-tools@" in str(document.get("predicate"))
    )


def _folder(checkpoint: CheckpointReport) -> str:
    path = checkpoint.path.rstrip("/")
    named = [file.name for file in checkpoint.files if path.endswith(f"/{file.name}")]
    return path.removesuffix(f"/{named[0]}") if named else path


def _properties(report: VerifyReport, checkpoint: CheckpointReport) -> list[str]:
    """What holds of one checkpoint: its verdict where that is proof, each check that passed, each gate."""
    verdict = ["REPRODUCIBLE"] if checkpoint.verdict == "reproducible" else []
    passed = [
        check.id.upper().replace(".", "_")
        for check in checkpoint.checks
        if check.status == "pass" and check.id != MATCH and not check.id.startswith("base.")
    ]
    loads = [f"LOADS_EXACTLY:{answer.spec}" for answer in report.answers(checkpoint) if answer.exact]
    return [_SCOPE + name for name in dict.fromkeys([*verdict, *passed, *loads])]
