"""``vera-tools pull``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.client import client_output
from vera_tools.cli.completion import FOLDER
from vera_tools.cli.shared import (
    Output,
    base_option,
    examples,
    in_features_option,
    labelled,
    output_options,
    strict_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.hub.pull import PullReport


@click.command(
    "pull", epilog=examples("pull you/my-adapter -o here", "pull hf://you/my-adapter@main -o pinned --base my-base")
)
@click.argument("repo")
@click.option("-o", "--output", "target", required=True, type=FOLDER, metavar="OUT", help="Folder to write.")
@click.option("--revision", metavar="REV", help="Branch, tag, commit or refs/pr/N.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Further files to take. Repeatable.")
@click.option("--allow-pickle", is_flag=True, help="Take adapter_model.bin too; reading it needs torch (weights_only).")
@click.option("--embed", is_flag=True, help="Write vera_A and vera_B in, so that PEFT >= 0.21 loads it exactly.")
@base_option
@in_features_option
@strict_option
@click.option("--force", is_flag=True, help="Keep it although it is drift or invalid, or a check failed.")
@click.option("--overwrite", is_flag=True, help="Replace OUT where it exists.")
@output_options
def command(
    output: Output,
    *,
    repo: str,
    target: str,
    revision: str | None,
    include: tuple[str, ...],
    allow_pickle: bool,
    embed: bool,
    base: str | None,
    in_features: int | None,
    strict: bool,
    force: bool,
    overwrite: bool,
) -> int:
    """Fetch the checkpoint REPO from the Hub and verify it; OUT appears whole or not at all.

    REPO is owner/name or hf://owner/name[@revision][/subfolder]. The revision is pinned to a commit. Every file is
    compared with the Hub's digests after it arrived, which the Hub's client does not do, and then the checkpoint is
    verified as by `verify`. vera_provenance.json beside the unchanged files names the commit and the digests.
    """
    with client_output(output):
        report = vera_tools.pull(
            repo,
            target,
            revision=revision,
            include=include,
            allow_pickle=allow_pickle,
            embed=embed,
            base=base,
            in_features=in_features,
            strict=strict,
            force=force,
            overwrite=overwrite,
        )
    return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))


def _show(report: PullReport, console: Console, *, verbose: bool) -> None:
    from vera_tools.cli.verdicts import show
    from vera_tools.verifying.report import VerifyReport

    origin = f"{report.repo}/{report.subfolder}" if report.subfolder else report.repo
    console.print(f"{report.output}: pulled from {origin}")
    labelled(console, "commit", report.commit + (" (from the local cache)" if report.offline else ""))
    size = sum(file.size for file in report.files)
    labelled(console, "files", f"{len(report.files)}, {size:,} bytes, every digest is the Hub's")
    if verbose:
        for file in report.files:
            labelled(console, "", f"{file.path}: {file.checked} ok, sha256 {file.sha256}")
    if report.embedded:
        labelled(console, "embedded", "vera_A and vera_B were written in")
    show(VerifyReport((report.verification,)), console, verbose=verbose)
