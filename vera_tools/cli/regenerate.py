"""``vera-tools regenerate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import (
    Output,
    RecipeOptions,
    base_option,
    examples,
    in_features_option,
    labelled,
    output_options,
    overwrite_option,
    recipe_options,
    strict_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.converting.regenerate import RegenerateReport


@click.command(
    "regenerate",
    epilog=examples(
        "regenerate --checkpoint my-adapter",
        "regenerate --key 42 --rank 16 --in-features 64 --out-features 64 -o pair.safetensors",
    ),
)
@click.option(
    "--checkpoint", type=REFERENCE, metavar="CHECKPOINT", help="Whose projections; or give a key and the shape."
)
@click.option("--key", type=int, metavar="K", help="projection_prng_key.")
@click.option("--rank", type=click.IntRange(1), metavar="R", help="Rows of vera_A, columns of vera_B.")
@in_features_option
@click.option("--out-features", type=click.IntRange(1), metavar="N", help="Largest out_features of the adapted layers.")
@base_option
@recipe_options
@strict_option
@click.option("-o", "--output", "path", type=REFERENCE, metavar="FILE", help="Write them there.")
@overwrite_option
@output_options
def command(
    output: Output,
    *,
    checkpoint: str | None,
    key: int | None,
    rank: int | None,
    in_features: int | None,
    out_features: int | None,
    base: str | None,
    recipe_options: RecipeOptions,
    strict: bool,
    path: str | None,
    overwrite: bool,
) -> int:
    """Draw vera_A and vera_B from the key, bit-identical to torch, without torch.

    Name a checkpoint, or all of --key, --rank, --in-features and --out-features. Without -o only the report is made.
    """
    report = vera_tools.regenerate(
        checkpoint,
        key=key,
        r=rank,
        in_features=in_features,
        out_features=out_features,
        base=base,
        recipe=recipe_options.name,
        stored_dtype=recipe_options.stored_dtype,
        output=path,
        overwrite=overwrite,
        strict=strict,
    )
    return output.emit(report, lambda console: _show(report, console))


def _show(report: RegenerateReport, console: Console) -> None:
    record = report.record
    assert record.recipe is not None
    console.print(f"{record.recipe.name}, key {record.recipe.prng_key} ({report.origin})", style="bold")
    for name, digest in record.sha256.items():
        labelled(console, name, f"{record.dtype} {list(record.shape.of(name))} sha256 {digest}")
    if report.output:
        labelled(console, "written", report.output)
