"""``vera-tools summarize``."""

from __future__ import annotations

from pathlib import Path

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.forms import (
    FORMATS,
    Form,
    Requirements,
    failed_only_option,
    file_options,
    requirement_options,
)
from vera_tools.cli.shared import Output, examples, output_options


@click.command(
    "summarize", epilog=examples("summarize one.jsonl two.jsonl", "summarize one.jsonl two.jsonl --junit report.xml")
)
@click.argument("logs", nargs=-1, required=True, type=REFERENCE, metavar="LOG...")
@requirement_options
@file_options
@click.option(
    "--format",
    "form",
    type=click.Choice([name for name in FORMATS if name != "jsonl"]),
    help="How stdout has it; --json is short for json.  [default: human]",
)
@failed_only_option
@output_options
def command(
    output: Output,
    *,
    logs: tuple[str, ...],
    requirements: Requirements,
    junit: Path | None,
    page: Path | None,
    form: str | None,
    failed_only: bool,
) -> int:
    """Make one report of the lines that several runs of `verify --log` wrote, as if one run had verified all.

    Of two lines on one checkpoint the later one holds. Verdicts, summary and exit code are those of one `verify`. A log
    whose run did not end, or of which lines are missing, and parts of which one is not there, exit with 4.
    """
    shown = Form.of(output, form, junit, page, failed_only=failed_only)
    return shown.show(vera_tools.summarize(*logs, **requirements))
