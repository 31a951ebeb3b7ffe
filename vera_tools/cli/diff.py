"""``vera-tools diff``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import (
    Output,
    base_option,
    examples,
    in_features_option,
    output_options,
    page_option,
    strict_option,
)
from vera_tools.report import printable

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.comparing.diff import DiffReport, TensorDifference

_SHOWN = 10  # tensors and layers listed without -v


@click.command(
    "diff", epilog=examples("diff checkpoint-100 checkpoint-200", "diff my-adapter seed-only --base my-base")
)
@click.argument("a", type=REFERENCE)
@click.argument("b", type=REFERENCE)
@base_option
@in_features_option
@strict_option
@click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin too, by torch with weights_only.")
@page_option
@output_options
def command(
    output: Output,
    *,
    a: str,
    b: str,
    base: str | None,
    in_features: int | None,
    strict: bool,
    allow_pickle: bool,
    page: Path | None,
) -> int:
    """Compare checkpoints A and B: config, tensors, and the updates that they make to a base's weights.

    Exits 0 only where config and tensors are equal. Differences in metadata, manifest and model card are
    reported, and do not count.
    """
    if page:
        from vera_tools.files import atomic  # late: help and completion write nothing

        atomic.refuse_unwritable(page, atomic.PAGE)
    with output.progress("comparing layers") as progress:
        report = vera_tools.diff(
            a,
            b,
            base=base,
            in_features=in_features,
            strict=strict,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if page:
        from vera_tools.comparing.page import render
        from vera_tools.files import atomic
        from vera_tools.pages import Made

        atomic.write_bytes(page, render(report, made=Made.now(sys.argv[1:])).encode())
    return output.emit(report, lambda console: _show(report, console, limit=None if output.verbose else _SHOWN))


def _show(report: DiffReport, console: Console, *, limit: int | None) -> None:
    console.print(f"A {report.a}")
    console.print(f"B {report.b}")
    lines = [f"{key}: {_value(one)} -> {_value(two)}" for key, one, two in report.config]
    lines += [f"{key}: only in {side}" for side, keys in zip("AB", report.config_only, strict=True) for key in keys]
    count = "1 key differs" if len(lines) == 1 else f"{len(lines)} keys differ"
    console.print(f"config   {count if lines else 'equal'}")
    for line in lines:
        console.print(f"  {line}")
    lines = [f"{name}: only in {side}" for side, names in zip("AB", report.tensors_only, strict=True) for name in names]
    lines += [_tensor(tensor) for tensor in report.tensors]
    console.print(f"tensors  {report.equal_tensors} equal" + (f", {len(lines)} not" if lines else ""))
    _list(lines, console, limit)
    if report.layers is None:
        console.print(f"effect   unknown: {report.why_not}")
    elif report.equal_in_effect:
        console.print("effect   equal: both make exactly the same updates to a base's weights")
    else:
        moved = sorted(report.layers, key=lambda layer: -layer.difference)
        total = report.relative_norm
        console.print(
            "effect   "
            + ("A has no effect and B has" if total is None else f"the weight updates differ by {total:.3g}")
            + " (Frobenius norm, relative to A)"
        )
        figures = [
            f"{layer.module}: " + ("only B has one" if layer.relative_norm is None else f"{layer.relative_norm:.3g}")
            for layer in moved
            if layer.difference
        ]
        _list(figures, console, limit)
        if report.why_not:
            console.print(f"  not certain: {report.why_not}")
        if not report.others_equal:
            console.print("  biases or saved modules differ too")
    sides = {"only in a": "only in A", "only in b": "only in B"}
    states = ", ".join(
        f"{name} {sides.get(state, state)}" for name, state in report.beside.items() if state not in ("equal", "absent")
    )
    if states:
        console.print(f"not compared: {states}")
    verdict = "equal" if report.equal else "not equal, but equal in effect" if report.equal_in_effect else "not equal"
    console.print(f"verdict  {verdict}")


def _list(lines: list[str], console: Console, limit: int | None) -> None:
    for line in lines[:limit]:
        console.print(*f"  {line}".split("\n"), sep="\n")
    if limit is not None and len(lines) > limit:
        console.print(f"  and {len(lines) - limit} more (-v lists all)")


def _tensor(tensor: TensorDifference) -> str:
    if tensor.shapes[0] != tensor.shapes[1]:
        return f"{tensor.name}: {list(tensor.shapes[0])} -> {list(tensor.shapes[1])}"
    parts = [f"{tensor.dtypes[0]} -> {tensor.dtypes[1]}"] if tensor.dtypes[0] != tensor.dtypes[1] else []
    if tensor.differing is not None:
        parts.append(f"{tensor.differing:.2%} differ")
    if tensor.max_abs is not None:
        parts.append(f"at most {tensor.max_abs:.3g}")
    if tensor.max_ulp is not None:
        parts.append(f"{tensor.max_ulp} ulp")
    if tensor.cosine is not None:
        parts.append(f"cosine {tensor.cosine:.6f}")
    return f"{printable(tensor.name)}:\n    {', '.join(parts)}"  # with the name on one line, 80 columns would not do


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
