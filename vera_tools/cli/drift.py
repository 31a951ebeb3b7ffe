"""``vera-tools drift``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import vera_tools
from vera_tools.cli.completion import REFERENCE
from vera_tools.cli.shared import (
    Output,
    base_option,
    examples,
    in_features_option,
    labelled,
    output_options,
    overwrite_option,
    strict_option,
)
from vera_tools.drifting.choices import DEVICES, TIMEOUT
from vera_tools.dtypes import FLOATS

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.drifting.drift import DriftReport
    from vera_tools.platforms.streams import Environment


@click.command("drift", epilog=examples("drift", "drift --checkpoint my-adapter --device cpu --save drift.json"))
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="D",
    help=f"Device to draw on ({', '.join(DEVICES)}). Default: all here.",
)
@click.option("--python", "pythons", multiple=True, metavar="EXE", help="A further interpreter that has torch.")
@click.option("--venv", "venvs", multiple=True, metavar="DIR", help="A virtual environment that has torch.")
@click.option("--torch", "torches", multiple=True, metavar="VERSION", help="A torch release, fetched and run by uv.")
@click.option(
    "--capability",
    "capabilities",
    multiple=True,
    metavar="C",
    help="CPU capability to force (default, avx2, ...). Default: all weaker ones.",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(FLOATS),
    help="torch's default dtype at the draw. Default: all four.",
)
@click.option(
    "--checkpoint",
    type=REFERENCE,
    metavar="C",
    help="An adapter: measure against its own projections, and the effect on it.",
)
@base_option
@in_features_option
@strict_option
@click.option(
    "--save", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the report as JSON."
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A saved report to compare with; exit 1 where two disagree.",
)
@click.option(
    "--report",
    "page",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.html",
    help="Write one self-contained page (needs vera-tools[html]).",
)
@overwrite_option
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=TIMEOUT,
    show_default=True,
    help="Seconds a probe may take.",
)
@output_options
def command(
    output: Output,
    *,
    devices: tuple[str, ...],
    pythons: tuple[str, ...],
    venvs: tuple[str, ...],
    torches: tuple[str, ...],
    capabilities: tuple[str, ...],
    dtypes: tuple[str, ...],
    checkpoint: str | None,
    base: str | None,
    in_features: int | None,
    strict: bool,
    save: Path | None,
    against: tuple[Path, ...],
    page: Path | None,
    overwrite: bool,
    timeout: float,
) -> int:
    """What each torch, CPU capability and device here draws, and what that does to an adapter.

    Exits 1 where a row that runs by itself is not exact for the checkpoint's recipe (without a checkpoint: PEFT's usual
    one), or where two reports disagree or share nothing to compare. Forced capabilities inform.
    """
    from vera_tools.files import atomic

    for written in (save, page):
        if written is not None:
            atomic.refuse_existing(written, overwrite=overwrite)
    if page is not None:
        from vera_tools.drifting import page as drift_page

        drift_page.require()
    with output.progress("probing") as progress:
        report = vera_tools.drift(
            device=devices,
            python=pythons,
            venv=venvs,
            torch=torches,
            capability=capabilities or None,
            dtype=dtypes or FLOATS,
            checkpoint=checkpoint,
            base=base,
            in_features=in_features,
            strict=strict,
            against=against,
            timeout=timeout,
            progress=progress,
        )
    if save is not None:
        atomic.write_bytes(save, (report.to_json() + "\n").encode())
    if page is not None:
        from vera_tools.pages import Made

        atomic.write_bytes(page, drift_page.render(report, made=Made.now(sys.argv[1:])).encode())
    return output.emit(report, lambda console: _show(report, console, verbose=output.verbose))


def _show(report: DriftReport, console: Console, *, verbose: bool) -> None:
    target = report.target
    wanted = target.recipe.name if target.recipe else "the stored pair, which no known recipe makes"
    console.print(f"wanted: {wanted}{' (assumed)' if target.assumed else ''}", soft_wrap=True)
    title = object()
    for row in report.environments:
        if title != (title := (row.interpreter, row.torch)):
            console.print()
            console.print(_title(row), style="bold", soft_wrap=True)
        _row(row, console, verbose=verbose)
    if report.comparison is not None:
        _compare(report, console)


def _title(row: Environment) -> str:
    name = row.interpreter or "this interpreter"
    return f"{name}: torch {row.torch}, Python {row.python}, {row.system} {row.machine}" if row.torch else name


def _row(row: Environment, console: Console, *, verbose: bool) -> None:
    state = {
        True: "exact",
        False: "DRIFT" if row.native else "differs",
        None: row.status if row.status != "ok" else "unknown",
    }[row.exact]
    style = {True: "green", False: "red" if row.native else "yellow", None: "red"}[row.exact]
    where = row.kernels if row.torch else "as it runs by itself" if row.native else f"{row.cpu_capability} (forced)"
    labelled(console, state, f"{where}: {row.gets}", style=style)
    if row.platform:
        labelled(console, "", f"{'platform':9} {row.platform}")
    for dtype, stream in row.streams.items():
        detail = f" ({stream.error})" if stream.error else ""
        also = f", also {', '.join(stream.also_matches)}" if stream.also_matches and verbose else ""
        labelled(console, "", f"{dtype:9} {stream.label}{detail}{also}")
    if verbose and row.cpu_model and row.device == "cpu":
        labelled(console, "", f"on {row.cpu_model}")
    if row.known is not None:
        agrees = "draws what" if row.known["agrees"] else "DOES NOT draw what"
        labelled(console, "", f"{agrees} the atlas has for {row.known['entry']}")
    elif row.torch and row.device == "cpu":
        labelled(console, "", "not in the atlas")
    if row.effect is not None:
        _effect(row, console)


def _effect(row: Environment, console: Console) -> None:
    assert row.effect is not None
    worst, logits = row.effect["worst"], row.effect["logits"]
    if worst:
        labelled(console, "", f"weight updates change by up to {worst['relative_change']:.1e} ({worst['module']})")
    else:
        labelled(console, "", "every weight update is zero: the adapter is untrained")
    if logits:
        labelled(
            console,
            "",
            f"logits change by up to {logits['max_abs']:.1e} of {logits['largest']:.2g}, "
            f"the first choice in {logits['argmax_changed']} of {logits['positions']} positions",
        )
    elif row.effect["logits_why_not"]:
        labelled(console, "", f"logits not compared: {row.effect['logits_why_not']}")


def _compare(report: DriftReport, console: Console) -> None:
    comparison = report.comparison
    assert comparison is not None
    console.print()
    console.print(comparison.verdict, style="bold" if comparison.agree else "bold red", soft_wrap=True)
    for dtype, groups in comparison.groups.items():
        for number, group in enumerate(groups):
            label = comparison.rows[group[0]][1].streams[dtype].label
            console.print(f"  {dtype if number == 0 else '':9} {label}")
            for position in group:
                name, row = comparison.rows[position]
                console.print(f"              {name}: {row.title}", soft_wrap=True)
