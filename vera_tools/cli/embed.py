"""``vera-tools embed-projections``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from vera_tools.cli.conversion import Where, destination_options, show_common
from vera_tools.cli.shared import (
    Output,
    RecipeOptions,
    base_option,
    human_bytes,
    in_features_option,
    output_options,
    recipe_options,
    strict_option,
)
from vera_tools.converting.embed import EmbedReport, embed_projections

if TYPE_CHECKING:
    from rich.console import Console


@click.command("embed-projections")
@click.argument("checkpoint")
@destination_options
@base_option
@in_features_option
@recipe_options
@strict_option
@output_options
def command(
    output: Output,
    *,
    checkpoint: str,
    where: Where,
    base: str | None,
    in_features: int | None,
    recipe_options: RecipeOptions,
    strict: bool,
) -> int:
    """Put vera_A and vera_B into the seed-only CHECKPOINT.

    What is recorded decides how they are made, and is checked by digest. Where nothing is recorded, PEFT's recipe is
    assumed unless recipe options say otherwise, and --base or --in-features says how wide vera_A is.
    """
    return where.run(
        output,
        "embed-projections",
        checkpoint,
        lambda source, target: embed_projections(
            source,
            target,
            base=base,
            in_features=in_features,
            recipe=recipe_options.name,
            stored_dtype=recipe_options.stored_dtype or "float32",
            strict=strict,
            in_place=where.in_place,
            overwrite=where.overwrite,
            allow_pickle=where.allow_pickle,
        ),
        _show,
    )


def _show(report: EmbedReport, console: Console) -> None:
    console.print(f"{report.output}: embedded")
    console.print(f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}")
    if report.byte_exact:
        console.print("  original  adapter_model.safetensors is byte for byte the one that was stripped")
    show_common(report, console)
