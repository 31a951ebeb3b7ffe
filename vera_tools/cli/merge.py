"""``vera-tools merge``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools import blas
from vera_tools.cli.completion import FOLDER, REFERENCE
from vera_tools.cli.executors import dask_option, executor_of
from vera_tools.cli.shared import (
    Once,
    Output,
    RecipeOptions,
    dry_run_option,
    examples,
    human_bytes,
    labelled,
    output_options,
    overwrite_option,
    part_option,
    recipe_options,
    strict_option,
)
from vera_tools.errors import UsageError
from vera_tools.parts import Part

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.merging.merge import MergeReport

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@click.command(
    "merge",
    epilog=examples(
        "merge my-adapter --base my-base -o merged --verify",
        "merge my-adapter checkpoint-200 --base my-base --weight 0.5 --weight 0.5 -o both",
    ),
)
@click.argument("checkpoints", nargs=-1, required=True, type=REFERENCE, metavar="CHECKPOINT...")
@click.option(
    "--base",
    cls=Once,
    required=True,
    type=REFERENCE,
    metavar="BASE",
    help="Base model: a folder, a safetensors file, hf://owner/name or s3://...",
)
@click.option("-o", "--output", "out", required=True, type=FOLDER, metavar="OUT", help="The folder to make.")
@click.option(
    "--weight", "weights", type=float, multiple=True, metavar="W", help="Once for each CHECKPOINT. Default: 1."
)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Cast all weights to it.")
@click.option(
    "--max-shard-size", metavar="SIZE", help="New files of at most SIZE, e.g. 5GB. Default: the base's files."
)
@click.option("--resize-vocabulary", is_flag=True, help="Make BASE's tables as large as those that the adapter saved.")
@click.option(
    "--tokenizer",
    type=click.Choice(["base", "adapter"]),
    default="base",
    help="Whose tokenizer and chat template go with the result. Default: base.",
)
@click.option("--verify", is_flag=True, help="Read the result back and prove it before it appears.")
@click.option("--resume", is_flag=True, help="Go on from the files that an interrupted merge has finished.")
@part_option("--shard", help="Write only part I of N of the files; other processes write the others.")
@click.option("--finish", is_flag=True, help="Check what the N processes wrote and make OUT appear.")
@click.option("--allow-nonfinite", is_flag=True, help="Merge NaN and infinity too.")
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin too, by torch with weights_only.")
@click.option("--sync", is_flag=True, help="Flush the weights to disk before OUT appears.")
@click.option(
    "--jobs", type=click.IntRange(1), metavar="N", help="Workers. Default: one for each BLAS thread, up to 8."
)
@dask_option
@overwrite_option
@dry_run_option
@recipe_options
@strict_option
@output_options
def command(
    output: Output,
    *,
    checkpoints: tuple[str, ...],
    base: str,
    out: str,
    weights: tuple[float, ...],
    dtype: str | None,
    max_shard_size: str | None,
    resize_vocabulary: bool,
    tokenizer: str,
    verify: bool,
    resume: bool,
    part: Part | None,
    finish: bool,
    allow_nonfinite: bool,
    allow_pickle: bool,
    sync: bool,
    jobs: int | None,
    dask: str | None,
    overwrite: bool,
    dry_run: bool,
    recipe_options: RecipeOptions,
    strict: bool,
) -> int:
    """Bake one adapter or several into the weights of BASE, one tensor at a time, into the new folder OUT.

    Products are summed in float32 and rounded once. Tensors that no adapter touches are copied byte for byte, and so
    are config, tokenizer and code files. OUT appears whole or not at all; BASE is never written to.
    """
    blas.start_alone()
    with executor_of(dask) as executor, output.progress("merging", unit="bytes") as progress:
        report = vera_tools.merge(
            checkpoints,
            base=base,
            output=out,
            weights=weights or None,
            dtype=dtype,
            max_shard_size=parse_size(max_shard_size) if max_shard_size else None,
            resize_vocabulary=resize_vocabulary,
            tokenizer=tokenizer,
            recipe=recipe_options.name,
            stored_dtype=recipe_options.stored_dtype or "float32",
            strict=strict,
            allow_nonfinite=allow_nonfinite,
            allow_pickle=allow_pickle,
            verify=verify,
            resume=resume,
            part=part,
            finish=finish,
            overwrite=overwrite,
            sync=sync,
            jobs=jobs,
            progress=progress,
            dry_run=dry_run,
            executor=executor,
        )
    return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))


def parse_size(text: str) -> int:
    """Bytes from "5GB", "500 MB", "2GiB" or a bare number.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError("not a size", expected="for example 5GB, 500MB or 2GiB", found=text)
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _show(report: MergeReport, console: Console, *, verbose: bool) -> None:
    rate = report.bytes_written / report.seconds if report.seconds else 0
    state = "merged" if report.finished else "part written; end with --finish"
    state = "would be merged; nothing was written" if report.dry_run else state
    console.print(f"{report.path}: {state}", style="bold")
    for adapter in report.adapters:
        recipe = adapter["recipe"]["name"] if adapter["recipe"] else "no known recipe"
        assumed = " (assumed)" if adapter["assumed"] else ""
        weight = "" if adapter["weight"] == 1 else f", weight {adapter['weight']:g}"
        labelled(console, "adapter", f"{adapter['path']}: r {adapter['r']}, {recipe}{assumed}{weight}")
    labelled(console, "base", report.base)
    counts = [
        f"{len(report.merged)} merged ({report.parameters:,} elements)",
        f"{len(report.replaced)} replaced" if report.replaced else "",
        f"{len(report.added)} added" if report.added else "",
        f"{report.cast} cast" if report.cast else "",
        f"{report.copied} copied byte for byte" if report.copied else "",
    ]
    labelled(console, "tensors", ", ".join(filter(None, counts)))
    for name in report.merged if verbose else ():
        labelled(console, "", name)
    if report.resumed:
        labelled(console, "resumed", f"{len(report.resumed)} files were finished already")
    files = "1 file" if len(report.shards) == 1 else f"{len(report.shards)} files"
    written = f"{human_bytes(report.bytes_written)} in {files}, {report.seconds:.1f} s, {human_bytes(int(rate))}/s"
    if report.dry_run:
        labelled(console, "to write", f"{human_bytes(report.bytes_total)} of weights, {', '.join(report.shards)}")
    else:
        labelled(console, "written", written)
    if report.verified is not None:
        proven = report.verified
        found = f"{proven.copied} tensors by digest, {proven.computed} computed again in float64: "
        exact = f"all {proven.elements:,} elements are correctly rounded"
        near = (
            f"all {proven.elements:,} elements within float32 summation error, {proven.off:,} of them not the nearest"
        )
        labelled(console, "verified", found + (near if proven.off else exact))
        if report.loading.asked:
            name = report.loading.model_class or "the class"
            taken = f"{report.loading.asked} builds {name} and takes every tensor, none missing, none unexpected"
            labelled(console, "loads", taken)
    if report.loading.known_by == "names alone" or verbose:
        name = report.loading.model_class or "a class that config.json does not name"
        labelled(console, "class", f"{name}, known by {report.loading.known_by}")
