"""``vera-tools verify``."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools import blas
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.executors import dask_option, executor_of
from vera_tools.cli.forms import (
    FORMATS,
    Form,
    Requirements,
    failed_only_option,
    file_options,
    requirement_options,
)
from vera_tools.cli.shared import Output, base_option, examples, output_options, part_option, write_line
from vera_tools.errors import UsageError, was_interrupt
from vera_tools.parts import Part

if TYPE_CHECKING:
    from vera_tools.verifying.report import VerifyReport


@click.command(
    "verify", epilog=examples("verify my-adapter --base my-base", "verify -R registry --jobs 4 --junit report.xml")
)
@click.argument("checkpoints", nargs=-1, required=True, type=REFERENCE, metavar="CHECKPOINT...")
@click.option(
    "-R", "--recursive", is_flag=True, help="Search the folders for checkpoints; count other adapters as skipped."
)
@base_option
@click.option(
    "--base-digests/--no-base-digests",
    default=None,
    help="Hash the base's weights of which a manifest has digests.  [default: where the base lies on disk]",
)
@requirement_options
@file_options
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="How stdout has it; --json is short for json; jsonl is a line for each as it is done.  [default: human]",
)
@failed_only_option
@click.option(
    "--attest",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Where all passes, write an in-toto statement on it, for cosign or actions/attest to sign.",
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Checkpoints at a time. Default: one for each CPU.")
@dask_option
@part_option(help="Verify only part I of N, for other machines to verify the others; `summarize` puts them together.")
@click.option("--allow-pickle", is_flag=True, help="Read legacy adapter_model.bin files (needs torch; weights_only).")
@click.option(
    "--log",
    type=REFERENCE,
    metavar="FILE",
    help="Append a JSON line as each is done, and verify nothing again that FILE tells of and that did not change. "
    "- is stdout.",
)
@output_options
def command(
    output: Output,
    *,
    checkpoints: tuple[str, ...],
    recursive: bool,
    base: str | None,
    base_digests: bool | None,
    requirements: Requirements,
    junit: Path | None,
    page: Path | None,
    form: str | None,
    failed_only: bool,
    attest: Path | None,
    jobs: int | None,
    dask: str | None,
    part: Part | None,
    allow_pickle: bool,
    log: str | None,
) -> int:
    """Verify CHECKPOINTs, bit for bit.

    Are the projections what the config's key regenerates; is everything else intact; does it fit its base; and which
    loader would silently compute with something else?

    A CHECKPOINT is a folder, an adapter_model.safetensors file, hf://owner/name[@revision][/subfolder], or an address
    such as s3://bucket/adapter; hf://owner/* stands for every adapter of an owner's, and - for a list on standard
    input, one a line, taken as it is.
    """
    blas.start_alone()
    if log == "-" and not output.json:
        form = form or "jsonl"
    shown = Form.of(output, form, junit, page, failed_only=failed_only)
    if log == "-" and shown.name != "jsonl":
        raise UsageError(f"--format {shown.name} and --log - would both write to stdout", hint="name a file")
    if shown.name == "jsonl" and log not in (None, "-"):
        raise UsageError("--format jsonl prints the lines that --log writes to a file", hint="pass one of the two")
    if attest and shown.name == "jsonl":
        raise UsageError("--attest does not go with --format jsonl or --log -, which print lines of a log")
    if attest:
        from vera_tools.cli import attest as attesting

        attesting.prepare(attest)
    try:
        listed = _listed() if "-" in checkpoints else []
        checkpoints = tuple(path for path in checkpoints if path != "-")
        many = recursive or len(checkpoints) + len(listed) > 1 or any("*" in path for path in checkpoints)
        bar = shown.output.progress("verifying") if many else contextlib.nullcontext()
        with executor_of(dask) as executor, bar as progress:
            report = vera_tools.verify(
                *checkpoints,
                recursive=recursive,
                base=base,
                base_digests=base_digests,
                **requirements,
                jobs=jobs,
                allow_pickle=allow_pickle,
                log=sys.stdout if shown.name == "jsonl" else log,
                progress=progress,
                listed=listed,
                part=part,
                file_digests=attest is not None,
                executor=executor,
            )
    except BaseException as error:
        if not was_interrupt(error):
            raise
        partial: VerifyReport | None = getattr(error, "report", None)
        report = partial or _nothing(requirements)  # an earlier report that stays would pass for this run's
        hint = "" if log or not partial else "; with --log FILE, a later run goes on from where it stopped"
        write_line(f"interrupted{hint}")
    if attest:
        attesting.write(attest, report, quiet=output.quiet)
    return shown.show(report)


def _nothing(requirements: Requirements) -> VerifyReport:
    """The report of a run that was interrupted before it came to verify anything."""
    from vera_tools.verifying.gathering import Gathered

    return Gathered(**requirements).report(partial=True)


def _listed() -> list[str]:
    """The checkpoints that standard input lists: a line is a path, whatever it begins or ends with; none is empty.

    Raises:
        UsageError: there is no standard input.
    """
    if sys.stdin is None:  # closed by the caller, as by the shell's <&-
        raise UsageError("standard input is closed", where="-", expected="a list of checkpoints, one a line")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
    lines = (line.removesuffix("\n") for line in sys.stdin)
    return [line for line in lines if line]
