"""A registry as one page: what each checkpoint's verdict is and why, to be searched and sorted out in a browser.

Every checkpoint is a row of the page itself, so that it can be printed, and read where no script runs. The script only
hides rows. A browser lays out those of ten thousand rows that are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from vera_tools.dtypes import BITS, CODES
from vera_tools.pages import Made, document, text
from vera_tools.report import worst
from vera_tools.verifying.findings import MATCH, VERDICTS
from vera_tools.verifying.loads import OLD_PEFT, PEFT
from vera_tools.verifying.report import CheckpointReport, VerifyReport

#: Words for each state of a row, from the best to the worst.
_STATES = (*VERDICTS, "failed", "skipped")
_MARKS = dict(zip(_STATES, "✓≈?≠✗!–", strict=True))
_PEFT = {
    "every": "exact with PEFT everywhere",
    "some": "exact with PEFT in places",
    "none": "not safe with PEFT",
    "unknown": "not known to be safe with PEFT",
}
_NO_BASE = "no base named"

_STYLE = """
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 16px 0 0;
  padding: 0; list-style: none; }
.tiles li { background: var(--paper); border: 1px solid var(--line); border-left-width: 6px; border-radius: 6px;
  padding: 8px 12px; } .tiles b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 10px; margin: 18px 0 6px; }
label { font-size: 12px; color: var(--soft); display: block; min-width: 0; }
select, input { font: inherit; font-size: 14px; width: 100%; padding: 6px 8px; color: var(--ink);
  background: var(--paper); border: 1px solid var(--line); border-radius: 5px; }
:focus-visible { outline: 3px solid var(--blue); outline-offset: 1px; }
.rows { margin: 0; padding: 0; list-style: none; }
.rows li { background: var(--paper); border: 1px solid var(--line); border-left: 6px solid var(--soft);
  border-radius: 6px; padding: 8px 12px; margin-top: 6px; content-visibility: auto; contain-intrinsic-size: auto 64px; }
.rows li[hidden] { display: none; }
.rows .head { display: flex; flex-wrap: wrap; gap: 2px 12px; align-items: baseline; }
.rows .path { font-weight: 600; overflow-wrap: anywhere; flex: 1 1 320px; }
.rows p { font-size: 13px; margin: 2px 0 0; max-width: none; overflow-wrap: anywhere; }
.facts { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.state { font-weight: 700; font-size: 12px; letter-spacing: .03em; }
.s-reproducible { border-left-color: var(--blue) !important; } .s-reproducible .state { color: var(--blue); }
.s-assumed, .s-unproven { border-left-color: var(--plum) !important; border-left-style: dashed !important; }
.s-assumed .state, .s-unproven .state { color: var(--plum); }
.s-drift, .s-invalid, .s-failed { border-left-color: var(--red) !important; border-left-style: double !important; }
.s-drift .state, .s-invalid .state, .s-failed .state { color: var(--red); }
@media print { .rows li { content-visibility: visible; break-inside: avoid; } }
"""

_SCRIPT = """
"use strict";
const form = document.querySelector("form"), shown = document.getElementById("shown");
const rows = Array.from(document.querySelectorAll(".rows li"));
const names = rows.map(row => row.querySelector(".path").textContent.toLowerCase());
function apply() {
  const wanted = Array.from(form.querySelectorAll("select")).filter(s => s.value).map(s => [s.name, s.value]);
  const words = form.elements.path.value.toLowerCase();
  let count = 0;
  rows.forEach((row, i) => {
    const fits = names[i].includes(words) && wanted.every(([name, value]) =>
      name === "state" && value === "problems" ? row.dataset.good === "0" : row.dataset[name] === value);
    row.hidden = !fits;
    count += fits;
  });
  shown.textContent = count.toLocaleString("en") + " of " + rows.length.toLocaleString("en") + " shown";
}
form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", event => event.preventDefault());
form.addEventListener("reset", () => setTimeout(apply));
apply();
"""


@dataclass(frozen=True)
class _Row:
    """One thing on the page.

    Attributes:
        path: What it is called.
        state: A verdict, "failed" or "skipped".
        kind: The kind of adapter.
        good: Whether it passes.
        base: The base that it names, or was checked against.
        peft: A key of _PEFT; None where there is no adapter to load.
        saves: Bytes that stripping saves.
        words: What is said of it, each a line of its own.
        command: What to do.
        failed: A check failed, whatever the verdict.
    """

    path: str
    state: str
    kind: str
    good: bool
    base: str | None = None
    peft: str | None = None
    saves: int = 0
    words: tuple[str, ...] = ()
    command: str | None = None
    failed: bool = False

    @property
    def rank(self) -> tuple[object, ...]:
        """The worst first, and what is skipped last."""
        order = -1 if self.state == "skipped" else _STATES.index(self.state)
        return self.good, not self.failed, -order, self.path


def render(report: VerifyReport, *, made: Made | None = None) -> str:
    """The page of many checkpoints' report."""
    rows = sorted(_rows(report), key=lambda row: row.rank)
    codes = [report.exit_code_of(one) for one in report.checkpoints] + [one.exit_code for one in report.failed]
    bad = sum(map(bool, codes))
    total = len(report.checkpoints) + len(report.failed)
    say = f"✗ {bad:,} of {total:,} checkpoints are not good" if bad else f"✓ all {total:,} checkpoints are good"
    if report.partial:
        say += "; the run was interrupted: there are more"
    good = not worst(codes) and not report.partial
    required = f"Good is what is {report.require} or better, and of which no check failed"
    gates = "".join(f", and exact with {spec}" for spec in report.require_loads)
    body = [
        "<h1>VeRA adapters: can their projections be made again, bit for bit?</h1>",
        f"<p>{text(required + gates)}.</p>",
        f'<p class="banner {"yes" if good else "no"}">{text(say)}</p>',
        _tiles(rows),
        _filters(rows),
        '<ol class="rows">',
        *map(_item, rows),
        "</ol>",
    ]
    return document("vera-tools verify", "\n".join(body), made=made, style=_STYLE, script=_SCRIPT)


def _rows(report: VerifyReport) -> Iterator[_Row]:
    for checkpoint in report.checkpoints:
        good = not report.exit_code_of(checkpoint)
        step = None if good else checkpoint.next_step
        failed = [f"{check.id}: {check.message}" for check in checkpoint.failed if check.id != MATCH]
        refused = [f"{name}: {words}" for name, words in report.gates(checkpoint) if words]
        cause = [checkpoint.cause] if checkpoint.verdict != "invalid" or not failed else []
        yield _Row(
            checkpoint.path,
            checkpoint.verdict,
            "VERA" if checkpoint.save_projection is not None else "unreadable",
            good,
            checkpoint.base,
            _with_peft(checkpoint),
            _saves(checkpoint),
            () if good else tuple(dict.fromkeys([*cause, *failed, *refused, checkpoint.safety])),
            step.command if step else None,
            bool(checkpoint.failed),
        )
    for path, error in report.failed:
        yield _Row(path, "failed", "unreadable", good=False, words=(str(error),))
    for path, kind in report.skipped:
        yield _Row(path, "skipped", kind or "unknown", good=True)


def _with_peft(checkpoint: CheckpointReport) -> str | None:
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


def _tiles(rows: list[_Row]) -> str:
    counts = Counter(row.state for row in rows)
    tiles = [
        f'<li class="s-{state}"><b>{counts[state]:,}</b> <span class="state">{_MARKS[state]} {state}</span></li>'
        for state in _STATES
        if counts[state]
    ]
    failed = sum(row.failed for row in rows)
    if failed:
        tiles.append(f'<li class="s-failed"><b>{failed:,}</b> <span class="state">✗ failed a check</span></li>')
    saves = sum(row.saves for row in rows)
    if saves:
        tiles.append(f'<li><b>{_bytes(saves)}</b> <span class="facts">saved by stripping</span></li>')
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def _filters(rows: list[_Row]) -> str:
    states = Counter(row.state for row in rows)
    problems = sum(not row.good for row in rows)
    verdicts = [("problems", f"all that are not good ({problems:,})")] if problems else []
    verdicts += [(state, f"{state} ({states[state]:,})") for state in _STATES if states[state]]
    kinds = Counter(row.kind for row in rows)
    bases = Counter(row.base or _NO_BASE for row in rows if row.state != "skipped")
    peft = Counter(row.peft for row in rows)
    choices = {
        "state": ("verdict", verdicts),
        "kind": ("kind of adapter", [(kind, f"{kind} ({count:,})") for kind, count in kinds.most_common()]),
        "base": ("base model", [(base, f"{base} ({count:,})") for base, count in bases.most_common()]),
        "peft": ("safe to load", [(key, f"{words} ({peft[key]:,})") for key, words in _PEFT.items() if peft[key]]),
    }
    fields = []
    for name, (label, values) in choices.items():
        options = "".join(f'<option value="{text(value)}">{text(words)}</option>' for value, words in values)
        fields.append(f'<label>{label}<select name="{name}"><option value="">all</option>{options}</select></label>')
    return (
        f'<form class="screen" hidden>{"".join(fields)}'
        '<label>path holds<input name="path" type="search" autocomplete="off"></label></form>\n'
        f'<p class="facts"><span id="shown" role="status">{len(rows):,} shown</span></p>'
    )


def _item(row: _Row) -> str:
    facts = [row.base or _NO_BASE] if row.state not in ("skipped", "failed") else []
    facts += [_PEFT[row.peft]] if row.peft and row.state != "invalid" else []
    facts += [f"strip saves {_bytes(row.saves)}"] if row.saves else []
    facts += [row.kind] if row.kind != "VERA" else []
    base = "" if row.state == "skipped" else f' data-base="{text(row.base or _NO_BASE)}"'
    peft = f' data-peft="{row.peft}"' if row.peft else ""
    lines = "".join(f"<p>{text(words)}</p>" for words in row.words)
    command = f"<p>next: <code>{text(row.command)}</code></p>" if row.command else ""
    flag = ", a check FAILED" if row.failed and row.state != "invalid" else ""
    return (
        f'<li class="s-{"failed" if row.failed else row.state}" data-state="{row.state}" data-kind="{text(row.kind)}" '
        f'data-good="{int(row.good)}"{base}{peft}><div class="head"><span class="path">{text(row.path)}</span> '
        f'<span class="state">{_MARKS[row.state]} {row.state}{flag}</span></div>'
        f'<div class="facts">{text("; ".join(facts))}</div>{lines}{command}</li>'
    )


def _bytes(count: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
