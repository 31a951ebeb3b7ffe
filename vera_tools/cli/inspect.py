"""``vera-tools inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import (
    Output,
    base_option,
    examples,
    human_bytes,
    labelled,
    output_options,
    page_option,
)
from vera_tools.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.comparing.census import CensusReport
    from vera_tools.comparing.inspect import InspectReport


@click.command(
    "inspect", epilog=examples("inspect my-adapter", "inspect my-adapter --base my-base", "inspect -R registry")
)
@click.argument("checkpoints", type=REFERENCE, nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("-R", "--recursive", is_flag=True, help="Search the folders, and say what all checkpoints are together.")
@base_option
@click.option("--allow-pickle", is_flag=True, help="Read a legacy adapter_model.bin (needs torch; weights_only).")
@page_option
@output_options
def command(
    output: Output,
    *,
    checkpoints: tuple[str, ...],
    recursive: bool,
    base: str | None,
    allow_pickle: bool,
    page: Path | None,
) -> int:
    """Show what CHECKPOINT is: config, layers, shapes, dtypes, parameter and byte counts.

    With --base it also says what a LoRA of the same rank would take. Of several, or with -R: how many distinct pairs
    they have, which are copies, and what stripping would save.
    """
    if not recursive and len(checkpoints) == 1:
        if page:
            raise UsageError("--report is a page of many checkpoints", hint="add -R, or name several")
        report = vera_tools.inspect(checkpoints[0], base=base, allow_pickle=allow_pickle)
        return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))
    if click.get_current_context().get_parameter_source("base") is ParameterSource.COMMANDLINE:
        raise UsageError("--base goes with one checkpoint")
    if page:
        from vera_tools.files import atomic  # late: help and completion write nothing

        atomic.refuse_unwritable(page, atomic.PAGE)
    with output.progress("looking") as progress:
        many = vera_tools.census(*checkpoints, recursive=recursive, allow_pickle=allow_pickle, progress=progress)
    if page:
        from vera_tools.comparing.census_page import render
        from vera_tools.files import atomic
        from vera_tools.pages import Made

        atomic.write_bytes(page, render(many, made=Made.now(sys.argv[1:])).encode())
    return output.emit(many, lambda console: _show_many(many, console, verbose=output.verbose))


#: Pairs and groups of copies that are listed without -v.
_LISTED = 5


def _show_many(report: CensusReport, console: Console, *, verbose: bool) -> None:
    total = report.summary
    for entry in report.checkpoints if verbose else ():
        width = f"{entry.in_max or '?'} x {entry.out_max or '?'}"
        facts = f"r {entry.r}, key {entry.prng_key}, {width}, {entry.dtype}, {entry.pair}"
        console.print(f"{entry.path}: {facts}, {entry.layers} layers, {human_bytes(entry.file_bytes)}")
    console.print(f"{total['checkpoints']:,} VeRA checkpoints, {human_bytes(total['bytes'])}", style="bold")
    kinds = {
        "stored": "stored",
        "recorded": "recorded",
        "assumed": "recorded on an assumption",
        "unrecorded": "unrecorded",
    }
    counts = [f"{total[kind]:,} {words}" for kind, words in kinds.items() if total[kind]]
    labelled(console, "pairs", f"{', '.join(counts)}; {total['distinct_pairs']:,} distinct by key, shape and dtype")
    for entry, count in report.pairs[: None if verbose else _LISTED]:
        shape = (
            f"vera_A {[entry.r, entry.in_max]}, vera_B {[entry.out_max, entry.r]}" if entry.in_max else f"r {entry.r}"
        )
        labelled(console, "", f"{count:,} x key {entry.prng_key}, {shape}, {entry.dtype}")
    if len(report.pairs) > _LISTED and not verbose:
        labelled(console, "", f"and {len(report.pairs) - _LISTED:,} more (-v lists all)")
    labelled(console, "bases", f"{total['bases']:,} named")
    labelled(console, "manifests", f"{total['with_manifest']:,} of {total['checkpoints']:,}")
    labelled(console, "copies", f"{total['duplicates']:,} weights files are byte for byte another one's")
    for group in report.duplicates[: None if verbose else _LISTED]:
        labelled(console, "", ", ".join(group))
    saves = human_bytes(total["stripping_saves"])
    labelled(console, "stripping", f"saves up to {saves}: `verify` tells of which pairs it is proven")
    if report.skipped:
        kinds_of = [kind for _, kind in report.skipped]
        names = ", ".join(f"{kinds_of.count(kind)} {kind}" for kind in sorted(set(kinds_of)))
        console.print(f"skipped, not VeRA: {names}")
    for path, error in report.failed:
        console.print(f"FAILED {path}: {error}" if path not in str(error) else f"FAILED {error}", style="bold red")


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
