"""``vera-tools strip-projections``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.conversion import Where, destination_options, show_common
from vera_tools.cli.shared import Output, dry_run_option, examples, human_bytes, labelled, output_options

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.converting.strip import StripReport


@click.command(
    "strip-projections",
    epilog=examples("strip-projections my-adapter -o small", "strip-projections -R registry --out-dir small-registry"),
)
@click.argument("checkpoint", type=REFERENCE)
@destination_options
@click.option("--force", is_flag=True, help="Strip what the config's key does not give. Without a recipe it is lost.")
@dry_run_option
@output_options
def command(output: Output, *, checkpoint: str, where: Where, force: bool, dry_run: bool) -> int:
    """Take vera_A and vera_B out of CHECKPOINT, once it is proven that they can be made again.

    The stored pair is regenerated and compared bit by bit first. Recipe, shapes and digests are recorded, and
    `embed-projections` gives back the original files byte for byte.
    """
    return where.run(
        output,
        "strip-projections",
        checkpoint,
        lambda source, target: vera_tools.strip_projections(
            source,
            target,
            in_place=where.in_place,
            force=force,
            overwrite=where.overwrite,
            allow_pickle=where.allow_pickle,
            dry_run=dry_run,
        ),
        _show,
        dry_run=dry_run,
    )


def _show(report: StripReport, console: Console) -> None:
    from vera_tools.converting.strip import exact_in_peft
    from vera_tools.platforms import rows
    from vera_tools.verifying.loads import BASE_KINDS

    state = "would be stripped; nothing was written" if report.dry_run else "stripped"
    console.print(f"{report.output}: {state}" + (", and the projections are lost" if report.forced else ""))
    console.print(
        f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}, "
        f"{human_bytes(report.saved_bytes)} saved, {report.factor:.1f} times smaller"
    )
    show_common(report, console)
    if report.damage:
        console.print("  loads exactly nowhere: the adapter is damaged or incomplete")
        for check in report.damage:
            labelled(console, "fail", f"{check.id}: {check.message}")
        return
    if report.projections.assumed and not report.forced:
        console.print(f"  loads exactly, if the recipe is right that was {report.projections.origin}")
        console.print("    vera-tools  on any machine and base")
        return
    exact = exact_in_peft(report.loads)
    console.print("  loads exactly")
    labelled(console, "", f"vera-tools {'nowhere' if report.forced else 'on any machine and base'}")
    elsewhere: list[str] = []
    for rounding in rows.ROUNDINGS:
        bases = [BASE_KINDS[dtype] for (where, dtype), is_exact in exact.items() if where == rounding and is_exact]
        if bases:
            labelled(console, "", f"PEFT on {' and '.join(bases)} bases: {', '.join(rows.places(rounding))}")
        else:
            elsewhere += rows.places(rounding)
    if elsewhere:
        labelled(console, "not", f"PEFT on {', '.join(elsewhere)}")
    labelled(console, "", f"({rows.caveat()})")
    if not all(exact.values()) and not report.forced:
        labelled(console, "elsewhere", report.remedy)
