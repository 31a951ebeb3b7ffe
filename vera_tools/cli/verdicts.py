"""How the verdicts of `verify` look for people; `push` and `pull` show them too.

One checkpoint: its verdict with the cause, one sentence on where it is safe to load, the facts, and what to do next.
Many: the good ones are counted, the others listed last by what is the matter with them, and the summary ends it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vera_tools.cli.shared import labelled, text_width, wrapped
from vera_tools.platforms import rows
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.report import printable
from vera_tools.verifying.advice import Step
from vera_tools.verifying.findings import MATCH, VERDICTS
from vera_tools.verifying.loads import BASE_KINDS, Load
from vera_tools.verifying.report import CheckpointReport, VerifyReport

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_STYLES = {
    "reproducible": "bold green",
    "assumed": "bold yellow",
    "unproven": "bold yellow",
    "drift": "bold red",
    "invalid": "bold red",
}
_FAILED = "bold red"
_MARKS = {"fail": "bold red", "warn": "yellow", "skip": "dim", "pass": "green"}
_ANSWERS = {True: ("yes", "green"), False: ("NO", "bold red"), None: ("?", "yellow")}
_COUNTED = (("pass", "passed"), ("warn", "warned"), ("skip", "skipped"), ("fail", "FAILED"))
#: Where each check is explained.
_PAGE = "docs/checks.md"


def show(report: VerifyReport, console: Console, *, verbose: bool) -> None:
    """Print a verify report: in full for one checkpoint; for many, what is not good, grouped by reason."""
    if len(report.checkpoints) == 1 and not report.failed and not report.partial:
        _show_one(report.checkpoints[0], report, console, verbose=verbose)
        _show_skipped(report, console, verbose=verbose)
        return
    for checkpoint in report.checkpoints if verbose else ():
        _show_one(checkpoint, report, console, verbose=True)
    _show_skipped(report, console, verbose=verbose)
    _show_groups(report, console)
    console.print(_summary(report))


def _show_one(checkpoint: CheckpointReport, report: VerifyReport, console: Console, *, verbose: bool) -> None:
    console.print(_headline(checkpoint, report))
    _wrap(console, checkpoint.safety)
    _show_details(checkpoint, console, verbose=verbose)
    if verbose and checkpoint.loads:
        _show_loads(checkpoint.loads, console)
    for name, words in report.gates(checkpoint):
        labelled(console, "loads", f"{name}: {words or 'no change' * bool(report.against_loads) or 'exact'}")
    _show_next(checkpoint, report, console)
    if not verbose:
        _wrap(console, f"({_remark(checkpoint)})", style="dim")


def _headline(checkpoint: CheckpointReport, report: VerifyReport) -> Text:
    from rich.text import Text

    text = Text(f"{printable(checkpoint.path)}: ")
    if checkpoint.failed:
        failed = ", ".join(check.id for check in checkpoint.failed if check.id != MATCH)
        text.append(f"FAILED {failed}".rstrip(), style=_FAILED)
        text.append("; " if checkpoint.verdict == "invalid" else "; projections ")
    text.append(checkpoint.verdict.upper(), style=_STYLES[checkpoint.verdict])
    if checkpoint.verdict == "drift":
        text.append(f", {printable(checkpoint.cause)}")
    for name, words in report.gates(checkpoint):
        if words:
            text.append(f"; {_said(words).upper()} ", style=_FAILED)
            text.append(f"with {name}")
    return text


def _show_details(checkpoint: CheckpointReport, console: Console, *, verbose: bool) -> None:
    for check in checkpoint.checks:
        if check.id == MATCH and (check.status == "pass" or (checkpoint.verdict, check.status) == ("unproven", "fail")):
            labelled(console, "proven" if checkpoint.verdict == "reproducible" else checkpoint.verdict, check.message)
    if checkpoint.recipe:
        nearest = any(match.match not in ("identical", "absent") for match in checkpoint.projections)
        also = ", ".join(recipe.name for recipe in checkpoint.also_matches) if verbose else ""
        key = f"key {checkpoint.recipe.prng_key}{f' (same bits: {also})' if also else ''}"
        labelled(console, "nearest" if nearest else "recipe", f"{checkpoint.recipe.name}, {key}")
    for name, match in zip(PROJECTIONS, checkpoint.projections, strict=True) if verbose else ():
        if match.match not in ("identical", "absent"):
            far = "" if match.relative_norm is None else f", relative norm {match.relative_norm:.2g}"
            labelled(console, name, f"{match.match}: different in {match.extent}{far}")
    if checkpoint.verdict != "invalid":
        labelled(console, "scope", checkpoint.scope)
    others = [check for check in checkpoint.checks if check.id != MATCH or check.status != "warn"]
    statuses = [check.status for check in others]
    labelled(console, "checks", ", ".join(f"{statuses.count(s)} {word}" for s, word in _COUNTED if s in statuses))
    for check in others:
        if verbose or check.status == "warn" or (check.status == "fail" and check.id != MATCH):
            labelled(console, check.status, f"{check.id}: {check.message}", style=_MARKS[check.status])


def _show_next(checkpoint: CheckpointReport, report: VerifyReport, console: Console) -> None:
    if step := report.next_of(checkpoint):
        _show_steps([step], console)


def _show_steps(steps: Sequence[Step], console: Console) -> None:
    """What to do, once for each sort of step, with the command for the first of them."""
    for words in dict.fromkeys(step.words for step in steps):
        alike = [step for step in steps if step.words == words]
        labelled(console, "next:", words + ("; the first:" if len(alike) > 1 else ""), style="bold")
        console.print(f"            {alike[0].command}", soft_wrap=True)  # whole, so that it can be copied


def _remark(checkpoint: CheckpointReport) -> str:
    """Where more is said."""
    ids = [check.id for check in checkpoint.checks if check.status in ("fail", "warn") and check.id != MATCH]
    parts = ["-v has every check" + (" and the table of loaders" if checkpoint.loads else "")]
    if ids:
        anchor = f"#{ids[0].replace('.', '')}" if len(ids) == 1 else ""
        parts.append(f"{_PAGE}{anchor} explains {ids[0] if len(ids) == 1 else 'the checks'}")
    caveat = rows.caveat()
    if caveat and "Apple" in checkpoint.safety:
        parts.append(caveat)
    return "; ".join(parts)


def _show_skipped(report: VerifyReport, console: Console, *, verbose: bool) -> None:
    if not report.skipped:
        return
    kinds = [kind for _, kind in report.skipped]
    names = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    console.print(f"skipped, not VeRA: {names}")
    for path, kind in report.skipped if verbose else ():
        console.print(f"  {path}: {kind}")


def _show_groups(report: VerifyReport, console: Console) -> None:
    """Those that are not good, by what is the matter with them, the worst last."""
    groups: dict[tuple[int, str, str], list[CheckpointReport]] = {}
    for checkpoint in report.checkpoints:
        if checkpoint.exit_code(report.require):
            step = checkpoint.next_step
            groups.setdefault((*_reason(checkpoint), step.words if step else ""), []).append(checkpoint)
    for (_, title, _), members in sorted(groups.items()):
        console.print(f"{title}: {len(members)}", style=_STYLES[members[0].verdict] if members[0].ok else _FAILED)
        for checkpoint in members:
            _hang(console, _because(checkpoint))
        _show_steps([step for member in members if (step := member.next_step)], console)
    for name, by_words in _by_gate(report).items():
        for said, refused in by_words.items():
            console.print(f"{said.upper()} with {name}: {len(refused)}", style=_FAILED)
            for checkpoint, words in refused:
                _hang(console, f"{checkpoint.path}{words}")
            # What is the matter with the others was said with what to do.
            sound = [one for one, _ in refused if not one.exit_code(report.require)]
            _show_steps([step for one in sound if (step := report.next_of(one))], console)
    if report.failed:
        console.print(f"FAILED, not verified: {len(report.failed)}", style=_FAILED)
        for path, error in report.failed:
            _hang(console, str(error) if path in str(error) else f"{path}: {error}")


def _said(words: str) -> str:
    """What a gate says, without where and why: "not exact", "may change"."""
    return re.split(r" \(|:", words)[0]


def _by_gate(report: VerifyReport) -> dict[str, dict[str, list[tuple[CheckpointReport, str]]]]:
    """By gate, and by what it says ("not exact", "may change"): the checkpoints that it does not let pass, and why."""
    found: dict[str, dict[str, list[tuple[CheckpointReport, str]]]] = {}
    for checkpoint in report.checkpoints:
        for name, words in report.gates(checkpoint):
            if words:
                said = _said(words)
                found.setdefault(name, {}).setdefault(said, []).append((checkpoint, words.removeprefix(said)))
    return found


def _reason(checkpoint: CheckpointReport) -> tuple[int, str]:
    """What is the matter: a group's rank and title."""
    failed = [check.id for check in checkpoint.failed if check.id != MATCH]
    rank, verdict = VERDICTS.index(checkpoint.verdict), checkpoint.verdict.upper()
    if failed:
        return len(VERDICTS) + rank, f"FAILED {failed[0]}" + (f", {verdict}" if verdict == "INVALID" else "")
    return rank, f"FAILED, {verdict}" if checkpoint.failed else verdict


def _because(checkpoint: CheckpointReport) -> str:
    failed = [check for check in checkpoint.failed if check.id != MATCH]
    if not failed:
        return f"{checkpoint.path}: {checkpoint.cause}" if checkpoint.verdict == "drift" else checkpoint.path
    message = failed[0].message
    more = f" (and {', '.join(check.id for check in failed[1:])})" if failed[1:] else ""
    return (message if checkpoint.path in message else f"{checkpoint.path}: {message}") + more


def _summary(report: VerifyReport) -> Text:
    from rich.text import Text

    text = Text(report.tally)
    text.highlight_regex(r"[\d,]+ (FAILED a check|NOT VERIFIED)", _FAILED)
    for name, members in _by_gate(report).items():
        for said, refused in members.items():
            text.append(f"; {len(refused)} {said.upper()}", style=_FAILED)
            text.append(f" with {name}")
    if report.from_log:
        text.append(f"; {report.from_log} taken from the log")
    if report.partial:
        text.append("; INTERRUPTED, there are more", style=_FAILED)
    return text


def _wrap(console: Console, text: str, *, style: str = "") -> None:
    """A sentence below a headline."""
    for line in wrapped(printable(text), text_width(console) - 2):
        console.print(f"  {line}", style=style)


def _hang(console: Console, text: str) -> None:
    """A line of a list, wrapped with its continuation further in."""
    first, *rest = wrapped(printable(text), text_width(console) - 6)
    console.print(f"  {first}")
    for line in rest:
        console.print(f"      {line}")


_HEADING = "loads exactly, by dtype of the base"
#: As wide as the names of platforms may be, so that a terminal of 80 columns holds the table.
_NARROW = 38


def _show_loads(loads: Sequence[Load], console: Console) -> None:
    """The loader table, with rows that say the same put together."""
    lines: list[tuple[str, tuple[bool | None, ...]]] = []
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
                lines.append((name, ()))
                lines += [("  " + ", ".join(rows.places(rounding)), row) for rounding, row in cells.items()]
    _print_loads(lines, console)
    for rounding in rows.ROUNDINGS:
        labelled(console, rounding, rows.citation(rounding))
    for why in _reasons(loads):
        labelled(console, "why", why)


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
        first, *more = _names(name.lstrip(), width - 2 - len(indent))
        line = Text(f"  {indent + first:{width}}")
        for kind, exact in zip(BASE_KINDS.values(), cells, strict=True) if cells else ():
            word, style = _ANSWERS[exact]
            line.append(f"{word:{len(kind) + 2}}", style=style)
        line.rstrip()
        console.print(line)
        for rest in more:
            console.print(Text(f"  {indent}{rest}"))


def _names(names: str, width: int) -> list[str]:
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
