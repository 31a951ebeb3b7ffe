"""``vera-tools convert``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.conversion import Where, destination_options, show_common
from vera_tools.cli.shared import Output, Resolving, examples, human_bytes, labelled, output_options, resolving_options
from vera_tools.converting.forms import FORMATS
from vera_tools.dtypes import FLOATS
from vera_tools.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.converting.foreign import ForeignReport
    from vera_tools.converting.llama_cpp import GgufReport
    from vera_tools.converting.lora import LoraReport


@click.command(
    "convert",
    epilog=examples(
        "convert my-adapter --to lora --base my-base -o my-lora",
        "convert my-adapter --to lora --base my-base --dtype bfloat16 -o my-lora-bf16",
    ),
)
@click.argument("checkpoint", type=REFERENCE)
@click.option("--to", type=click.Choice(["lora", "gguf"]), help="What to convert to.")
@click.option("--from", "form", type=click.Choice(["auto", *FORMATS]), help="Another program's form to bring in.")
@click.option("--prng-key", type=int, metavar="N", help="With --from anima: the key.  [default: as recorded, or 0]")
@click.option("--dtype", type=click.Choice(FLOATS), help="Dtype of lora_A and lora_B.  [default: float32]")
@destination_options
@resolving_options
@output_options
def command(
    output: Output,
    *,
    checkpoint: str,
    to: str | None,
    form: str | None,
    prng_key: int | None,
    dtype: str | None,
    where: Where,
    resolving: Resolving,
) -> int:
    """Write CHECKPOINT as the LoRA of rank r that it exactly is, or bring in another program's VeRA.

    --to lora is for servers and libraries that load LoRA and not VeRA. --base says how wide each adapted layer is;
    without it, all are taken to be as wide as vera_A. --to gguf writes one file, which llama.cpp loads with --lora; it
    needs --base, and knows Llama, Mistral, Qwen2 and Qwen3.

    --from takes what PEFT wrote before 0.11 (peft-draft) and the training state of the Anima trainer (anima, with
    --base for the modules' names), whose mapping to PEFT's form is exact, and refuses the rest by name.
    """
    if (to is None) == (form is None):
        raise UsageError("say either --to lora or gguf, or --from FORMAT")
    if form is not None:
        if dtype is not None:
            raise UsageError("--dtype goes with --to: what is brought in keeps its own")
        bring_in = functools.partial(
            vera_tools.from_foreign,
            format=None if form == "auto" else form,
            prng_key=prng_key,
            **resolving.arguments,
            **where.arguments,
        )
        return where.run(output, "convert", checkpoint, bring_in, _show_foreign)
    if prng_key is not None:
        raise UsageError("--prng-key goes with --from anima: a checkpoint of PEFT's has its own")
    if to == "gguf":
        return _to_gguf(output, checkpoint, where, resolving, dtype)
    convert = functools.partial(vera_tools.to_lora, dtype=dtype, **resolving.arguments, **where.arguments)
    return where.run(output, "convert", checkpoint, convert, _show)


def _to_gguf(output: Output, checkpoint: str, where: Where, resolving: Resolving, dtype: str | None) -> int:
    if where.recursive or where.in_place or where.out_dir is not None or where.output is None:
        raise UsageError("--to gguf writes one file of one adapter", hint="name it with -o, and leave the others out")
    if resolving.base is None:
        raise UsageError(
            "--to gguf needs the base, whose config tells how llama.cpp has it", hint="name it with --base"
        )
    known = resolving.arguments
    report = vera_tools.to_gguf(
        checkpoint,
        where.output,
        base=resolving.base,
        in_features=known["in_features"],
        recipe=known["recipe"],
        stored_dtype=known["stored_dtype"],
        strict=known["strict"],
        dtype=dtype or "float32",
        overwrite=where.overwrite,
        allow_pickle=where.allow_pickle,
    )
    return output.emit(report, lambda console: _show_gguf(report, console))


def _show_gguf(report: GgufReport, console: Console) -> None:
    console.print(
        f"{report.output}: llama.cpp LoRA of rank {report.r}, alpha {report.r}, {report.layers} layers, {report.dtype}"
    )
    console.print(f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}")
    record = report.projections
    recipe = record.recipe.name if record.recipe else "none known"
    labelled(console, "recipe", f"{recipe}{f' ({record.origin})' if record.assumed else ''}")
    labelled(console, "base", f"of architecture {report.architecture} in GGUF")
    for note in report.notes:
        labelled(console, "note", note)


def _show_foreign(report: ForeignReport, console: Console) -> None:
    console.print(f"{report.output}: brought in from {report.format}, {report.renamed} tensors renamed")
    console.print(f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}")
    show_common(report, console)


def _show(report: LoraReport, console: Console) -> None:
    console.print(f"{report.output}: LoRA of rank {report.r}, alpha {report.r}, {report.layers} layers, {report.dtype}")
    console.print(
        f"  weights   {human_bytes(report.input_bytes)} -> {human_bytes(report.output_bytes)}, "
        f"{report.factor:.1f} times as large"
    )
    show_common(report, console)
    for obstacle in report.vllm.obstacles:
        labelled(console, "vLLM", f"cannot take it: {obstacle}; use `vera-tools merge` instead")
    if not report.vllm.obstacles:
        conditions = f", provided that {' and '.join(report.vllm.conditions)}" if report.vllm.conditions else ""
        labelled(console, "vLLM", f"takes it with --max-lora-rank {report.vllm.max_lora_rank}{conditions}")
