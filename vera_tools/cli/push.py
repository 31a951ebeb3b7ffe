"""``vera-tools push``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.client import client_output
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import (
    Output,
    base_option,
    dry_run_option,
    examples,
    in_features_option,
    labelled,
    output_options,
    strict_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.hub.push import PushReport


@click.command(
    "push", epilog=examples("push my-adapter you/my-adapter", "push my-adapter you/small-adapter --strip --private")
)
@click.argument("checkpoint", type=REFERENCE)
@click.argument("repo")
@click.option("--strip", is_flag=True, help="Push it without vera_A and vera_B, if they are proven regenerable.")
@click.option("--embed", is_flag=True, help="Push it with vera_A and vera_B, if it lacks them.")
@click.option("--private", is_flag=True, help="Create a private repository; refuse one that is public.")
@click.option("--revision", "--branch", metavar="BRANCH", help="Branch to push to; made where it is missing.")
@click.option("--create-pr", is_flag=True, help="Propose it as a pull request.")
@click.option("--no-create", is_flag=True, help="Create neither repository nor branch.")
@click.option("-m", "--message", metavar="TEXT", help="Commit message.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Further files to push. Repeatable.")
@click.option("--overwrite-card", is_flag=True, help="Start from the local README.md, not from the Hub's.")
@base_option
@in_features_option
@strict_option
@click.option("--force", is_flag=True, help="Push it although it is drift or invalid, or a check failed.")
@dry_run_option
@output_options
def command(
    output: Output,
    *,
    checkpoint: str,
    repo: str,
    strip: bool,
    embed: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    no_create: bool,
    message: str | None,
    include: tuple[str, ...],
    overwrite_card: bool,
    base: str | None,
    in_features: int | None,
    strict: bool,
    force: bool,
    dry_run: bool,
) -> int:
    """Verify CHECKPOINT and upload it to REPO on the Hub, with a manifest and a model card.

    REPO is owner/name or hf://owner/name[@branch][/subfolder]. Drift and invalid checkpoints are refused. The local
    files are not touched; the text of a card that is there already is kept. Pushing the same content again makes no
    commit.
    """
    with client_output(output):
        report = vera_tools.push(
            checkpoint,
            repo,
            base=base,
            in_features=in_features,
            strip=strip,
            embed=embed,
            private=private,
            revision=revision,
            create_pr=create_pr,
            create=not no_create,
            message=message,
            include=include,
            overwrite_card=overwrite_card,
            strict=strict,
            force=force,
            dry_run=dry_run,
        )
    return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))


def _show(report: PushReport, console: Console, *, verbose: bool) -> None:
    from vera_tools.cli.verdicts import show
    from vera_tools.verifying.report import VerifyReport

    if report.dry_run:
        console.print(f"{report.endpoint}/{report.repo}: nothing was sent")
    else:
        console.print(report.commit_url)
    if report.pr_url:
        labelled(console, "proposed", report.pr_url)
    kind = "private repository" if report.private else "repository"
    if report.created:
        labelled(console, "created", f"the {kind} {report.repo}")
    if report.dry_run and not report.commit:
        labelled(console, "create", f"the {kind} {report.repo}")
    if not report.committed and not any(file.status != "unchanged" for file in report.files):
        labelled(console, "commit", "none made: the Hub holds exactly this already")
    for file in report.files:
        if verbose or file.status != "unchanged":
            labelled(console, file.status or "", f"{file.path} ({file.size:,} bytes)")
    if report.left_out:
        labelled(console, "left out", ", ".join(report.left_out))
    for note in report.notes:
        labelled(console, "note", note)
    if report.card is not None and (verbose or report.dry_run):
        labelled(console, "card", "")
        for line in report.card.splitlines():
            console.print(f"    {line}")
    if verbose:
        show(VerifyReport((report.verification,)), console, verbose=True)
    else:
        labelled(console, "verified", f"{report.verification.verdict}; {report.verification.scope}")
