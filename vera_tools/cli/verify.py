"""``vera-tools verify``."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.shared import Output, base_option, examples, output_options
from vera_tools.errors import UsageError
from vera_tools.files import atomic
from vera_tools.verifying.findings import VERDICTS, Verdict

if TYPE_CHECKING:
    from vera_tools.verifying.report import VerifyReport

FORMATS = ("human", "json", "jsonl", "github", "junit")


@click.command(
    "verify", epilog=examples("verify my-adapter --base my-base", "verify -R registry --jobs 4 --junit report.xml")
)
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option(
    "-R", "--recursive", is_flag=True, help="Search the folders for checkpoints; count other adapters as skipped."
)
@base_option
@click.option(
    "--base-digests/--no-base-digests",
    default=None,
    help="Hash the base's weights of which a manifest has digests.  [default: where the base lies on disk]",
)
@click.option(
    "--require",
    type=click.Choice(VERDICTS),
    default="reproducible",
    show_default=True,
    help="The worst verdict that still exits 0.",
)
@click.option(
    "--require-loads",
    multiple=True,
    metavar="SPEC",
    help="Exit 1 where such a loader is not exact: peft>=0.21[:DTYPE][:PLATFORM][:torch==VERSION]. Repeatable.",
)
@click.option(
    "--against-loads",
    metavar="SPEC",
    help="Exit 1 where a move from --require-loads to SPEC changes the projections, and list which.",
)
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JUnit XML too.")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    help="How stdout has it; --json is short for json; jsonl is a line for each as it is done.  [default: human]",
)
@click.option("--failed-only", is_flag=True, help="Print the paths alone of those that are not good, one a line.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Checkpoints at a time."
)
@click.option("--allow-pickle", is_flag=True, help="Read legacy adapter_model.bin files (needs torch; weights_only).")
@click.option(
    "--log",
    metavar="FILE",
    help="Append a JSON line as each is done, and verify no commit again that FILE tells of. - is stdout.",
)
@output_options
def command(
    output: Output,
    *,
    checkpoints: tuple[str, ...],
    recursive: bool,
    base: str | None,
    base_digests: bool | None,
    require: Verdict,
    require_loads: tuple[str, ...],
    against_loads: str | None,
    junit: Path | None,
    form: str | None,
    failed_only: bool,
    jobs: int,
    allow_pickle: bool,
    log: str | None,
) -> int:
    """Verify CHECKPOINTs, bit for bit.

    Are the projections what the config's key regenerates; is everything else intact; does it fit its base; and which
    loader would silently compute with something else?

    A CHECKPOINT is a folder, an adapter_model.safetensors file, or hf://owner/name[@revision][/subfolder]; hf://owner/*
    stands for every adapter of an owner's, and - for a list on standard input, one a line.
    """
    listed = _listed() if "-" in checkpoints else []
    checkpoints = tuple(path for path in checkpoints if path != "-")
    if output.json and form not in (None, "json"):
        raise UsageError(f"--json and --format {form} would both write to stdout")
    form = "json" if output.json else form or ("jsonl" if log == "-" else "human")
    if log == "-" and form != "jsonl":
        raise UsageError(f"--format {form} and --log - would both write to stdout", hint="name a file")
    if form == "jsonl" and log not in (None, "-"):
        raise UsageError("--format jsonl prints the lines that --log writes to a file", hint="pass one of the two")
    if failed_only and form != "human":
        raise UsageError("--failed-only prints paths alone, which is a form of its own")
    if junit:
        atomic.refuse_unwritable(junit)
    output = replace(output, json=form == "json")
    many = recursive or len(checkpoints) + len(listed) > 1 or any("*" in path for path in checkpoints)
    with output.progress("verifying") if many else contextlib.nullcontext() as progress:
        report = vera_tools.verify(
            *checkpoints,
            recursive=recursive,
            base=base,
            base_digests=base_digests,
            require=require,
            require_loads=require_loads,
            against_loads=against_loads,
            jobs=jobs,
            allow_pickle=allow_pickle,
            log=sys.stdout if form == "jsonl" else log,
            progress=progress,
            listed=listed,
        )
    if junit:
        atomic.write_bytes(junit, report.to_junit().encode())
    if form == "jsonl" or (output.quiet and form != "json"):
        return report.exit_code
    if failed_only:
        for path in _not_good(report):
            print(path)
    elif form == "junit":
        print(report.to_junit(), end="")
    elif form == "github":
        from vera_tools.cli import github

        for line in github.workflow_commands(report):
            print(line)
        github.write_summary(report)
    else:
        from vera_tools.cli.verdicts import show

        return output.emit(report, lambda console: show(report, console, verbose=output.verbose))
    return report.exit_code


def _not_good(report: VerifyReport) -> list[str]:
    """The paths of those that are not good, as they were named, for another command to take."""
    found = [checkpoint.path for checkpoint in report.checkpoints if report.exit_code_of(checkpoint)]
    return [*found, *(path for path, _ in report.failed)]


def _listed() -> list[str]:
    """The checkpoints that standard input lists; empty lines and comments left out."""
    lines = (line.strip() for line in sys.stdin)
    return [line for line in lines if line and not line.startswith("#")]
