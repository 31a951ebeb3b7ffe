"""A registry's verdicts as one page: what each checkpoint's is, and why."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from vera_tools import listing
from vera_tools.dtypes import BITS, CODES
from vera_tools.listing import Filter, Row, State
from vera_tools.pages import Made
from vera_tools.report import worst
from vera_tools.verifying.findings import MATCH
from vera_tools.verifying.loads import OLD_PEFT, PEFT
from vera_tools.verifying.report import CheckpointReport, VerifyReport

#: What a row may be, from the best to the worst.
_STATES = (
    State("reproducible", "✓", "good"),
    State("assumed", "≈", "unsure"),
    State("unproven", "?", "unsure"),
    State("drift", "≠", "bad"),
    State("invalid", "✗", "bad"),
    State("not verified", "!", "bad"),
    State("skipped", "–", "plain"),
)
_BY_NAME = {state.name: state for state in _STATES}
_PEFT = {
    "every": "exact with PEFT everywhere",
    "some": "exact with PEFT in places",
    "none": "not safe with PEFT",
    "unknown": "not known to be safe with PEFT",
}
_NO_BASE = "no base named"


def render(report: VerifyReport, *, made: Made | None = None) -> str:
    """The page of many checkpoints' report."""
    rows = sorted(_rows(report), key=_rank)
    codes = [report.exit_code_of(one) for one in report.checkpoints] + [one.exit_code for one in report.failed]
    bad = sum(map(bool, codes))
    total = len(report.checkpoints) + len(report.failed)
    say = f"✗ {bad:,} of {total:,} checkpoints are not good" if bad else f"✓ all {total:,} checkpoints are good"
    say = f"{say}: {report.tally.partition(': ')[2]}"
    if report.partial:
        say += "; the run was interrupted: there are more"
    good = not worst(codes) and not report.partial
    required = f"Good is what is {report.require} or better, and of which no check failed"
    gates = "".join(f", and exact with {spec}" for spec in report.require_loads)
    tiles = []
    if failed := sum(not checkpoint.ok for checkpoint in report.checkpoints):
        tiles.append(listing.tile(f"{failed:,}", "✗ failed a check", "bad"))
    if saves := sum(map(_saves, report.checkpoints)):
        tiles.append(listing.tile(listing.human(saves), "saved by stripping"))
    return listing.render(
        "vera-tools verify",
        heading="VeRA adapters: can their projections be made again, bit for bit?",
        said=f"{required}{gates}.",
        banner=(good, say),
        rows=rows,
        states=_STATES,
        tiles=tiles,
        state_label="verdict",
        filters=[
            Filter("kind", "kind of adapter"),
            Filter("base", "base model"),
            Filter("peft", "safe to load", _PEFT),
        ],
        made=made,
    )


def _rank(row: Row) -> tuple[object, ...]:
    """The worst first, and what is skipped last."""
    order = -1 if row.state.name == "skipped" else _STATES.index(row.state)
    return row.good, row.tone is None, -order, row.path


def _rows(report: VerifyReport) -> Iterator[Row]:
    for checkpoint in report.checkpoints:
        good = not report.exit_code_of(checkpoint)
        step = None if good else checkpoint.next_step
        failed = [f"{check.id}: {check.message}" for check in checkpoint.failed if check.id != MATCH]
        advised = [f"next: {step.words}"] if step else []
        refused = [f"{name}: {words}" for name, words in report.gates(checkpoint) if words]
        cause = [checkpoint.cause] if checkpoint.verdict != "invalid" or not failed else []
        kind = "VERA" if checkpoint.save_projection is not None else "unreadable"
        base, peft, saves = checkpoint.base or _NO_BASE, _with_peft(checkpoint), _saves(checkpoint)
        facts = [base, *([_PEFT[peft]] if checkpoint.verdict != "invalid" else [])]
        facts += [f"strip saves {listing.human(saves)}"] if saves else []
        yield Row(
            checkpoint.path,
            _BY_NAME[checkpoint.verdict],
            good,
            "bad" if checkpoint.failed else None,
            ", a check FAILED" if checkpoint.failed and checkpoint.verdict != "invalid" else "",
            {"kind": kind, "base": base, "peft": peft},
            facts + ([kind] if kind != "VERA" else []),
            () if good else tuple(dict.fromkeys([*cause, *failed, *refused, checkpoint.safety, *advised])),
            step.command if step else None,
        )
    for path, error in report.failed:
        chosen = {"kind": "unreadable", "base": _NO_BASE}
        yield Row(path, _BY_NAME["not verified"], good=False, chosen=chosen, facts=["unreadable"], words=[str(error)])
    for path, kind in report.skipped:
        yield Row(path, _BY_NAME["skipped"], chosen={"kind": kind or "unknown"}, facts=[kind or "unknown"])


def _with_peft(checkpoint: CheckpointReport) -> str:
    """Where PEFT computes with the trained projections, by its defaults."""
    if checkpoint.safety.startswith("Not known"):
        return "unknown"
    if checkpoint.verdict == "invalid" or not checkpoint.safety.startswith("Safe"):
        return "none"
    exact = [load.exact for load in checkpoint.loads if load.loader in (OLD_PEFT, PEFT) and not load.options]
    return "every" if all(exact) else "some" if any(exact) else "none"


def _saves(checkpoint: CheckpointReport) -> int:
    """Bytes that `strip-projections` takes out: only what is proven to come back is taken."""
    if not checkpoint.projections_stored or checkpoint.verdict != "reproducible" or not checkpoint.ok:
        return 0
    pairs = [(match.shape, match.dtype) for match in checkpoint.projections]
    return sum(prod(shape) * BITS[CODES[dtype]] // 8 for shape, dtype in pairs if shape and dtype)
