"""The report of `verify` for GitHub Actions: an annotation for each checkpoint that is not good, and a step summary.

https://docs.github.com/actions/reference/workflow-commands-for-github-actions has the form of both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vera_tools.errors import UsageError
from vera_tools.report import printable
from vera_tools.verifying.findings import MATCH
from vera_tools.verifying.report import CheckpointReport, VerifyReport

#: GitHub names the file here to which a step appends its summary.
SUMMARY = "GITHUB_STEP_SUMMARY"


def workflow_commands(report: VerifyReport) -> Iterator[str]:
    """Workflow commands, one a line: an error, or a warning for what is unproven or assumed alone."""
    for checkpoint in report.checkpoints:
        code = report.exit_code_of(checkpoint)
        if code:
            level = "warning" if code == 3 else "error"
            yield _annotation(level, _title(checkpoint), f"{checkpoint.path}: {_words(checkpoint, report)}")
    if report.partial:
        yield _annotation("error", "interrupted", "interrupted before all were verified")
    for path, error in report.failed:
        yield _annotation("error", "not verified", str(error) if path in str(error) else f"{path}: {error}")


def write_summary(report: VerifyReport) -> None:
    """Append the step summary, where GitHub asks for one.

    Raises:
        UsageError: it cannot be written.
    """
    _append("\n".join(_summary(report)) + "\n")


def refuse_unwritable_summary() -> None:
    """Find out before any work whether the step summary can be written.

    Raises:
        UsageError: it cannot.
    """
    _append("")


def _append(text: str) -> None:
    path = os.environ.get(SUMMARY)
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"the step summary cannot be written: {error.strerror}", where=path) from error


def _summary(report: VerifyReport) -> Iterator[str]:
    yield "### vera-tools verify"
    yield ""
    yield report.tally + "; INTERRUPTED, there are more" * report.partial
    rows = [
        (checkpoint.path, _title(checkpoint), _words(checkpoint, report))
        for checkpoint in report.checkpoints
        if report.exit_code_of(checkpoint)
    ]
    rows += [(path, "not verified", str(error)) for path, error in report.failed]
    if rows:
        yield ""
        yield "| checkpoint | | why, and what to do |"
        yield "|---|---|---|"
        yield from (f"| {' | '.join(map(_cell, row))} |" for row in rows)
    yield ""


def _title(checkpoint: CheckpointReport) -> str:
    failed = ", ".join(check.id for check in checkpoint.failed if check.id != MATCH)
    return f"FAILED {failed}" if failed else checkpoint.verdict.upper()


def _words(checkpoint: CheckpointReport, report: VerifyReport) -> str:
    failed = [f"{check.id}: {check.message}" for check in checkpoint.failed if check.id != MATCH]
    gates = [f"{name}: {words}" for name, words in report.gates(checkpoint) if words]
    cause = [] if failed or (gates and checkpoint.verdict == "reproducible") else [checkpoint.cause]
    step = checkpoint.next_step
    return "; ".join([*failed, *cause, *gates, *([f"next: {step.words}: {step.command}"] if step else [])])


def _annotation(level: str, title: str, message: str) -> str:
    name = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{_escaped(message)}"


def _escaped(text: str) -> str:
    # What would steer a terminal is shown; then nothing but a per cent sign can begin an escape of GitHub's.
    return printable(text).replace("%", "%25")


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table, in which a name can begin neither a cell nor a tag."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return "".join(f"\\{c}" if c in "`*_[]" else c for c in text)
