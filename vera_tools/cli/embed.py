"""``vera-tools embed-projections``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.conversion import Where, destination_options, show_common
from vera_tools.cli.shared import Output, Resolving, examples, human_bytes, output_options, resolving_options

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.converting.embed import EmbedReport


@click.command(
    "embed-projections",
    epilog=examples(
        "embed-projections seed-only --base my-base -o whole", "embed-projections seed-only --base my-base --in-place"
    ),
)
@click.argument("checkpoint", type=REFERENCE)
@destination_options
@resolving_options
@output_options
def command(
    output: Output,
    *,
    checkpoint: str,
    where: Where,
    resolving: Resolving,
) -> int:
    """Put vera_A and vera_B into the seed-only CHECKPOINT.

    What is recorded decides how they are made, and is checked by digest. Where nothing is recorded, PEFT's recipe is
    assumed unless recipe options say otherwise, and --base or --in-features says how wide vera_A is.
    """
    embed = functools.partial(vera_tools.embed_projections, **resolving.arguments, **where.arguments)
    return where.run(output, "embed-projections", checkpoint, embed, _show)


def _show(report: EmbedReport, console: Console) -> None:
    console.print(f"{report.output}: embedded")
    console.print(f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}")
    if report.byte_exact:
        console.print("  original  adapter_model.safetensors is byte for byte the one that was stripped")
    show_common(report, console)
