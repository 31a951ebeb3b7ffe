"""``vera-tools record``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import Output, Resolving, examples, labelled, output_options, resolving_options

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.verifying.record import RecordReport


@click.command("record", epilog=examples("record my-adapter", "record seed-only --base my-base"))
@click.argument("checkpoint", type=REFERENCE)
@resolving_options
@output_options
def command(
    output: Output,
    *,
    checkpoint: str,
    resolving: Resolving,
) -> int:
    """Write or renew the manifest of CHECKPOINT, touching nothing else.

    The manifest records the recipe, the digests of the projections and of every tensor, and the config, so that
    `verify` can prove from now on that nothing changed. Of a seed-only checkpoint with nothing recorded, PEFT's recipe
    is assumed unless recipe options state another: its verdict is then `assumed`, not `reproducible`.
    """
    report = vera_tools.record(
        checkpoint,
        **resolving.arguments,
    )
    return output.emit(report, lambda console: _show(report, console))


def _show(report: RecordReport, console: Console) -> None:
    record = report.manifest.projections
    state = "written" if not report.renewed else "renewed" if report.changed else "already up to date"
    console.print(f"{report.manifest_path}: {state}", style="bold")
    recipe = record.recipe.name if record.recipe else "no known recipe makes these projections"
    labelled(console, "recipe", f"{recipe}{f' ({record.origin})' if record.assumed else ''}")
    labelled(console, "pair", f"vera_A {list(record.shape.vera_A)}, vera_B {list(record.shape.vera_B)}, {record.dtype}")
    labelled(console, "tensors", f"{len(report.manifest.tensors)} with shape, dtype and sha256")
    if report.manifest.base.weights:
        labelled(console, "base", f"{len(report.manifest.base.weights)} adapted weights")
