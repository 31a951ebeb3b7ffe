"""``vera-tools inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import Output, base_option, examples, human_bytes, labelled, output_options

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.comparing.inspect import InspectReport


@click.command("inspect", epilog=examples("inspect my-adapter", "inspect my-adapter --base my-base --json"))
@click.argument("checkpoint", type=REFERENCE)
@base_option
@click.option("--allow-pickle", is_flag=True, help="Read a legacy adapter_model.bin (needs torch; weights_only).")
@output_options
def command(output: Output, *, checkpoint: str, base: str | None, allow_pickle: bool) -> int:
    """Show what CHECKPOINT is: config, layers, shapes, dtypes, parameter and byte counts.

    With --base it also says what a LoRA of the same rank would take.
    """
    report = vera_tools.inspect(checkpoint, base=base, allow_pickle=allow_pickle)
    return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))


def _show(report: InspectReport, console: Console, *, verbose: bool) -> None:
    config, shape, sizes = report.config, report.shape, report.sizes
    console.print(f"{report.path}: VeRA, r {config['r']}, key {config['projection_prng_key']}", style="bold")
    base = config["base_model_name_or_path"] or "not named"
    labelled(console, "base", base + (f" at {config['revision']}" if config["revision"] else ""))
    stored = "stored" if report.projections_stored else "not stored (seed-only)"
    dimensions = f"vera_A {list(shape.vera_A)}, vera_B {list(shape.vera_B)}, " if shape else "in_max unknown, "
    labelled(console, "pair", f"{dimensions}{report.projection_dtype}, {stored}")
    labelled(console, "layers", f"{len(report.layers)}: {_kinds(report)}")
    others = f" and {report.other_parameters:,} in biases and saved modules" if report.other_parameters else ""
    labelled(console, "trained", f"{report.vector_parameters:,} parameters in vectors{others}")
    lora = report.lora_parameters
    if lora is not None:
        factor = lora / max(report.vector_parameters, 1)
        labelled(console, "as LoRA", f"{lora:,} parameters at the same rank, {factor:.1f} times as many")
    with_pair, without = sizes["with_projections"], sizes["without_projections"]
    assert without is not None
    labelled(console, "file", human_bytes(report.file_bytes))
    if with_pair is not None:
        text = f"{human_bytes(with_pair)} with projections, {human_bytes(without)} without"
        labelled(console, "sizes", f"{text} ({with_pair / max(without, 1):.1f} times smaller)")
    labelled(console, "manifest", "yes" if report.manifest else "no")
    if report.unknown_keys:
        labelled(console, "unknown", f"config keys that PEFT's VeRA does not know: {', '.join(report.unknown_keys)}")
    if verbose:
        for info in report.tensors:
            labelled(console, "tensor", f"{info.name} {info.dtype} {list(info.shape)}")


def _kinds(report: InspectReport) -> str:
    counts: dict[str, int] = {}
    for layer in report.layers:
        name = layer.module.rsplit(".", 1)[-1]
        width = "?" if layer.in_features is None else str(layer.in_features)
        kind = f"{name} ({width} to {layer.out_features})"
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())
