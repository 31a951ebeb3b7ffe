"""A registry as one page: a row for each checkpoint, to be searched and sorted out in a browser.

Every checkpoint is a row of the page itself, so that it can be printed, and read where no script runs. The script only
hides rows. A browser lays out those of ten thousand rows that are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from vera_tools.pages import Made, document, text

#: How a state looks: the colour is never all that tells it, because each has a mark and a word.
Tone = Literal["good", "unsure", "bad", "plain"]

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
.s-good { border-left-color: var(--blue) !important; } .s-good .state { color: var(--blue); }
.s-unsure { border-left-color: var(--plum) !important; border-left-style: dashed !important; }
.s-unsure .state { color: var(--plum); }
.s-bad { border-left-color: var(--red) !important; border-left-style: double !important; }
.s-bad .state { color: var(--red); }
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
class State:
    """What a row may be, in one word.

    Attributes:
        name: The word.
        mark: A sign for it.
        tone: How it looks.
    """

    name: str
    mark: str
    tone: Tone


@dataclass(frozen=True)
class Row:
    """One thing on the page.

    Attributes:
        path: What it is called.
        state: What it is.
        good: Whether nothing has to be done about it.
        tone: How the row looks, where not as its state does.
        note: What stands behind the state.
        chosen: What it is found by, by the names of filters.
        facts: What it is, in a few words each.
        words: What is said of it, each a line of its own.
        command: What to do.
    """

    path: str
    state: State
    good: bool = True
    tone: Tone | None = None
    note: str = ""
    chosen: Mapping[str, str] = field(default_factory=dict)
    facts: Sequence[str] = ()
    words: Sequence[str] = ()
    command: str | None = None


@dataclass(frozen=True)
class Filter:
    """One choice among rows: each value that a row may have under `name`, in words; by default the most frequent first.

    Attributes:
        name: In lower case.
        label: The same in words.
        values: Each value, and words for it; None where a value is its own words.
    """

    name: str
    label: str
    values: Mapping[str, str] | None = None


def render(
    title: str,
    *,
    heading: str,
    said: str,
    banner: tuple[bool, str] | None,
    rows: Sequence[Row],
    states: Sequence[State],
    tiles: Iterable[str],
    state_label: str,
    filters: Iterable[Filter],
    made: Made | None,
) -> str:
    """The page.

    Args:
        title: Its title.
        heading: What it answers.
        said: What stands under that; plain text.
        banner: Whether all is well, and that in words.
        rows: What is on it, in order.
        states: Those that rows may be in, in order.
        tiles: What all are together, beside how many are in each state; see `tile`.
        state_label: What a state is called.
        filters: What else to choose rows by.
        made: When, where and by what it was made.
    """
    counts = Counter(row.state.name for row in rows)
    shown = [tile(f"{counts[s.name]:,}", f"{s.mark} {s.name}", s.tone) for s in states if counts[s.name]]
    body = [
        f"<h1>{text(heading)}</h1>",
        f"<p>{text(said)}</p>",
        *([f'<p class="banner {"yes" if banner[0] else "no"}">{text(banner[1])}</p>'] if banner else []),
        f'<ul class="tiles">{"".join([*shown, *tiles])}</ul>',
        _form(rows, states, state_label, filters),
        '<ol class="rows">',
        *map(_item, rows),
        "</ol>",
    ]
    return document(title, "\n".join(body), made=made, style=_STYLE, script=_SCRIPT)


def tile(number: str, words: str, tone: Tone | None = None) -> str:
    """One number and what it counts; `tone` where that is a state."""
    kind = "state" if tone else "facts"
    return f'<li class="s-{tone or "plain"}"><b>{text(number)}</b> <span class="{kind}">{text(words)}</span></li>'


def _form(rows: Sequence[Row], states: Sequence[State], state_label: str, filters: Iterable[Filter]) -> str:
    counts = Counter(row.state.name for row in rows)
    problems = sum(not row.good for row in rows)
    values = [("problems", f"all that are not good ({problems:,})")] if problems else []
    values += [(state.name, f"{state.name} ({counts[state.name]:,})") for state in states if counts[state.name]]
    fields = [_choice("state", state_label, values)]
    for one in filters:
        found = Counter(row.chosen[one.name] for row in rows if one.name in row.chosen)
        names = {name: words for name, words in (one.values or {}).items() if found[name]}
        named = names or {name: name for name, _ in found.most_common()}
        fields.append(
            _choice(one.name, one.label, [(name, f"{words} ({found[name]:,})") for name, words in named.items()])
        )
    return (
        f'<form class="screen" hidden>{"".join(fields)}'
        '<label>path holds<input name="path" type="search" autocomplete="off"></label></form>\n'
        f'<p class="facts"><span id="shown" role="status">{len(rows):,} shown</span></p>'
    )


def _choice(name: str, label: str, values: Iterable[tuple[str, str]]) -> str:
    options = "".join(f'<option value="{text(value)}">{text(words)}</option>' for value, words in values)
    return f'<label>{text(label)}<select name="{name}"><option value="">all</option>{options}</select></label>'


def _item(row: Row) -> str:
    chosen = "".join(f' data-{name}="{text(value)}"' for name, value in row.chosen.items())
    lines = "".join(f"<p>{text(words)}</p>" for words in row.words)
    command = f"<p><code>{text(row.command)}</code></p>" if row.command else ""
    state = row.state
    return (
        f'<li class="s-{row.tone or state.tone}" data-state="{text(state.name)}" data-good="{int(row.good)}"{chosen}>'
        f'<div class="head"><span class="path">{text(row.path)}</span> '
        f'<span class="state">{state.mark} {text(state.name + row.note)}</span></div>'
        f'<div class="facts">{text("; ".join(row.facts))}</div>{lines}{command}</li>'
    )


def human(count: int) -> str:
    """Bytes, in words."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"
