"""`verify --attest FILE`: an in-toto statement on what passed, and no older one where it did not."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vera_tools.cli.shared import write_line
from vera_tools.errors import UsageError, VeraToolsError
from vera_tools.files import atomic
from vera_tools.verifying import attestation

if TYPE_CHECKING:
    from vera_tools.verifying.report import VerifyReport

#: An attestation is no larger: some 200 bytes for each file.
_MOST = 1 << 28


def prepare(path: Path) -> None:
    """Find out before any work whether the file can be written, and remove an older one: a run may fail or be killed.

    Raises:
        UsageError: it cannot, or is something else than an attestation.
    """
    atomic.refuse_unwritable(path)
    if not path.exists():
        return
    hint = "choose another file, or delete it yourself"
    try:
        with path.open("rb") as stream:
            found = json.loads(stream.read(_MOST))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError("is there, and no attestation, so it is not replaced", where=path, hint=hint) from error
    if not attestation.is_statement(found):
        raise UsageError("is there, and no attestation, so it is not replaced", where=path, hint=hint)
    try:
        path.unlink()
    except OSError as error:
        raise UsageError(f"cannot be replaced: {error.strerror}", where=path) from error


def write(path: Path, report: VerifyReport, *, quiet: bool) -> None:
    """Write the statement, where all passed; else say that there is none.

    Raises:
        UsageError: nothing was verified.
        VeraToolsError: the file system refused.
    """
    if report.exit_code:
        if not quiet:
            write_line(f"{path}: not written, because not everything passed")
        return
    document = attestation.statement(report, at=datetime.datetime.now(datetime.timezone.utc))
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        data = text.encode()
    except UnicodeEncodeError as error:
        raise VeraToolsError("a path is not UTF-8, and a statement could not name it", where=path) from error
    atomic.write_bytes(path, data)
