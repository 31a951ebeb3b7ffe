"""``vera-tools verify``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vera_tools.cli.shared import Output, base_option, labelled, output_options
from vera_tools.errors import UsageError
from vera_tools.files import atomic
from vera_tools.platforms import rows
from vera_tools.projections.identification import Match
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.report import printable
from vera_tools.verifying.loads import BASE_KINDS, Load
from vera_tools.verifying.report import VERDICTS, CheckpointReport, Verdict, VerifyReport
from vera_tools.verifying.verify import verify

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {
    "reproducible": "bold green",
    "assumed": "bold yellow",
    "unproven": "bold yellow",
    "drift": "bold red",
    "invalid": "bold red",
}
_MARKS = {"fail": "bold red", "warn": "yellow", "skip": "dim", "pass": "green"}
_ANSWERS = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("?", "yellow")}
_COUNTED = (("pass", "passed"), ("warn", "warned"), ("skip", "skipped"), ("fail", "FAILED"))


@click.command("verify")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option(
    "-R", "--recursive", is_flag=True, help="Search the folders for checkpoints; count other adapters as skipped."
)
@base_option
@click.option(
    "--require",
    type=click.Choice(VERDICTS),
    default="reproducible",
    show_default=True,
    help="The worst verdict that still exits 0.",
)
@click.option("--junit", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JUnit XML too.")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Checkpoints at a time."
)
@click.option("--allow-pickle", is_flag=True, help="Read legacy adapter_model.bin files (needs torch; weights_only).")
@click.option(
    "--log",
    metavar="FILE",
    help="Append a JSON line as each is done, and verify no commit again that FILE tells of. - is stdout.",
)
@output_options
def command(
    output: Output,
    *,
    checkpoints: tuple[str, ...],
    recursive: bool,
    base: str | None,
    require: Verdict,
    junit: Path | None,
    jobs: int,
    allow_pickle: bool,
    log: str | None,
) -> int:
    """Verify CHECKPOINTs, bit for bit.

    Are the projections what the config's key regenerates; is everything else intact; does it fit its base; and which
    loader would silently compute with something else?

    A CHECKPOINT is a folder, an adapter_model.safetensors file, or hf://owner/name[@revision][/subfolder]; hf://owner/*
    stands for every adapter of an owner's, and - for a list on standard input, one a line.
    """
    checkpoints = tuple(listed for path in checkpoints for listed in (_listed() if path == "-" else [path]))
    if log == "-" and output.json:
        raise UsageError("--json and --log - would both write to stdout")
    many = recursive or len(checkpoints) > 1 or any("*" in path for path in checkpoints)
    with output.progress("verifying") if many else contextlib.nullcontext() as progress:
        report = verify(
            *checkpoints,
            recursive=recursive,
            base=base,
            require=require,
            jobs=jobs,
            allow_pickle=allow_pickle,
            log=sys.stdout if log == "-" else log,
            progress=progress,
        )
    if junit:
        atomic.write_bytes(junit, report.to_junit().encode())
    if log == "-":
        return report.exit_code
    return output.emit(report, lambda console: show(report, console, verbose=output.verbose))


def _listed() -> list[str]:
    """The checkpoints that standard input lists; empty lines and comments left out."""
    lines = (line.strip() for line in sys.stdin)
    return [line for line in lines if line and not line.startswith("#")]


def show(report: VerifyReport, console: Console, *, verbose: bool) -> None:
    """Print a verify report for people: in full for one checkpoint, a line each for many."""
    single = len(report.checkpoints) == 1 and not report.failed
    for checkpoint in report.checkpoints:
        console.print(_headline(checkpoint))
        if single or verbose or not checkpoint.ok or checkpoint.verdict in ("drift", "invalid"):
            _show_details(checkpoint, console, verbose=verbose, loads=single or verbose)
    if not single:
        summary = report.summary
        failed = summary.pop("failed_checks")
        counts = ", ".join(f"{count} {verdict}" for verdict, count in summary.items() if count)
        lead = f"{failed} FAILED checks; " if failed else ""
        console.print(f"{len(report.checkpoints)} checkpoints: {lead}{counts or 'none'}")
    for path, error in report.failed:
        console.print(f"{path}: FAILED")
        labelled(console, "error", str(error), style=_MARKS["fail"])
    if report.skipped:
        kinds = [kind for _, kind in report.skipped]
        names = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
        console.print(f"skipped, not VeRA: {names}")
        if verbose:
            for path, kind in report.skipped:
                console.print(f"  {path}: {kind}")


def _headline(checkpoint: CheckpointReport) -> object:
    from rich.text import Text

    failed = sum(check.status == "fail" for check in checkpoint.checks)
    text = Text(f"{printable(checkpoint.path)}: ")
    text.append(checkpoint.verdict.upper(), style=_STYLES[checkpoint.verdict])
    if failed:
        text.append(f", {failed} check{'s' if failed > 1 else ''} failed", style="bold red")
    return text


def _show_details(checkpoint: CheckpointReport, console: Console, *, verbose: bool, loads: bool) -> None:
    for check in checkpoint.checks:
        if check.id == "projections.match" and check.status in ("pass", "skip"):
            proven = "assumed" if checkpoint.verdict == "assumed" else "proven"
            labelled(console, proven if check.status == "pass" else "unproven", check.message)
    if checkpoint.recipe:
        also = f" (same bits: {', '.join(r.name for r in checkpoint.also_matches)})" if checkpoint.also_matches else ""
        labelled(console, "recipe", f"{checkpoint.recipe.name}, key {checkpoint.recipe.prng_key}{also}")
    for name, match in zip(PROJECTIONS, checkpoint.projections, strict=True):
        if match.match not in ("identical", "absent"):
            labelled(console, name, _difference(match))
    if checkpoint.verdict != "invalid":
        labelled(console, "scope", checkpoint.scope)
    statuses = [check.status for check in checkpoint.checks]
    counts = [f"{statuses.count(s)} {word}" for s, word in _COUNTED if s in statuses]
    labelled(console, "checks", ", ".join(counts))
    for check in checkpoint.checks:
        if check.status in ("fail", "warn") or verbose:
            labelled(console, check.status, f"{check.id}: {check.message}", style=_MARKS[check.status])
    if loads and checkpoint.loads:
        _show_loads(checkpoint.loads, console, verbose=verbose)


def _difference(match: Match) -> str:
    parts = [f"{match.match}: {match.differing:.3g} of the elements differ"]
    if match.places:
        parts.append("at " + ", ".join(f"[{row}, {column}]" for row, column in match.places))
    figures = (("by at most", match.max_abs), ("ulps", match.max_ulp), ("relative norm", match.relative_norm))
    parts += [f"{label} {value:.3g}" for label, value in figures if value is not None]
    return ", ".join(parts)


_HEADING = "loads exactly, by dtype of the base"
#: As wide as the names of platforms may be, so that a terminal of 80 columns holds the table.
_NARROW = 38


def _show_loads(loads: Sequence[Load], console: Console, *, verbose: bool) -> None:
    """The loader table, with rows that say the same put together."""
    lines: list[tuple[str, tuple[bool | None, ...]]] = []
    by_platform = False
    for loader in dict.fromkeys(load.loader for load in loads):
        variants: dict[tuple[str, str], tuple[bool | None, ...]] = {}
        for load in loads:
            if load.loader == loader:
                options = ", ".join(f"{key}={value}" for key, value in load.options.items())
                place = (options, load.rounding)
                variants[place] = (*variants.get(place, ()), load.exact)
        default = {rounding: cells for (options, rounding), cells in variants.items() if not options}
        for options in dict.fromkeys(options for options, _ in variants):
            cells = {rounding: variants[options, rounding] for rounding in default}
            if options and cells == default:
                continue
            name = f"  {options}" if options else loader
            if len(set(cells.values())) == 1:
                lines.append((name, next(iter(cells.values()))))
            else:
                by_platform = True
                lines.append((name, ()))
                lines += [("  " + ", ".join(rows.places(rounding)), row) for rounding, row in cells.items()]
    _print_loads(lines, console)
    if by_platform and not verbose:
        console.print(f"  ({rows.caveat()})", style="dim")
    for rounding in rows.ROUNDINGS if verbose else ():
        labelled(console, rounding, rows.citation(rounding))
    for why in _reasons(loads) if verbose else ():
        labelled(console, "why", why)
    if not verbose and any(load.exact is False for load in loads):
        console.print("  (-v says why a loader is not exact)", style="dim")


def _print_loads(lines: list[tuple[str, tuple[bool | None, ...]]], console: Console) -> None:
    """Each name and its answers; a name too long for its column goes on below them."""
    from rich.text import Text

    width = (_NARROW if any(not cells for _, cells in lines) else len(_HEADING)) + 2
    if not console.soft_wrap and console.width < 2 + width + len("  ".join(BASE_KINDS.values())):
        console.print(Text(f"  {_HEADING}", style="bold"))
        for name, cells in lines:
            pairs = zip(BASE_KINDS.values(), cells, strict=True) if cells else ()
            answers = ", ".join(f"{dtype} {_ANSWERS[exact][0]}" for dtype, exact in pairs)
            console.print(Text(f"  {name}: {answers}".rstrip()))
        return
    console.print(Text(f"  {_HEADING:{width}}" + "  ".join(BASE_KINDS.values()), style="bold"))
    for name, cells in lines:
        indent = " " * (len(name) - len(name.lstrip()))
        first, *more = _wrapped(name.lstrip(), width - 2 - len(indent))
        line = Text(f"  {indent + first:{width}}")
        for kind, exact in zip(BASE_KINDS.values(), cells, strict=True) if cells else ():
            word, style = _ANSWERS[exact]
            line.append(f"{word:{len(kind) + 2}}", style=style)
        line.rstrip()
        console.print(line)
        for rest in more:
            console.print(Text(f"  {indent}{rest}"))


def _wrapped(names: str, width: int) -> list[str]:
    """A list of names on lines of their own, none of them broken."""
    lines = [""]
    for name in names.split(", "):
        if lines[-1] and len(lines[-1]) + 2 + len(name) > width:
            lines.append("")
        lines[-1] += f"{' ' if lines[-1] else ''}{name},"
    lines[-1] = lines[-1].removesuffix(",")
    return lines


def _reasons(loads: Sequence[Load]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for load in loads:
        if not load.exact:
            loaders = reasons.setdefault(load.why, [])
            name = " ".join([load.loader, *(f"{key}={value}" for key, value in load.options.items())])
            if name not in loaders and load.loader not in loaders:
                loaders.append(name)
    return [f"{', '.join(loaders)} {why}" for why, loaders in reasons.items()]
