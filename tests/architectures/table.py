"""The outcomes of the sweep as a compact file, and as the page of documentation that shows them.

`write` makes both of a whole run; a test makes the page again of the file that is there.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from tests import FIXTURES, ROOT
from tests.architectures.judging import BADLY, CRASH, PEFT_OFF, REFUSED, RIGHT, WRONG
from vera_tools.architectures import data

PAGE = ROOT / "docs" / "architectures.md"
FILE = FIXTURES / "sweep" / "outcomes.json"

#: Everything that is compared, in the order of the letters that `FILE` has for each class.
COLUMNS = [
    *(f"{adapter}/saved/{command}" for adapter in ("linear", "saved") for command in ("verify", "merge", "lora")),
    *(
        f"{adapter}/{base}/{command}"
        for adapter in ("linear", "saved")
        for base in ("own", "older")
        for command in ("verify", "merge")
    ),
]
LETTERS = {RIGHT: ".", REFUSED: "r", WRONG: "W", BADLY: "B", CRASH: "C", PEFT_OFF: "p"}
_OUTCOMES = {letter: outcome for outcome, letter in LETTERS.items()}

_ADAPTERS = {"linear": "all linear layers", "saved": "embedding and head saved too"}
_BASES = {"saved": "as on the Hub", "own": "modules' names", "older": "older names"}
_COMMANDS = {"verify": "`verify --base`", "merge": "`merge --verify`", "lora": "`convert --to lora`"}

_INTRODUCTION = """\
# Which architectures were tried

<!-- Written by `python -m tests.architectures.sweep --table`; do not edit. -->

{tried} of the {all} classes that the auto classes of transformers {transformers} name were tried: built small, with
random weights, and adapted with PEFT {peft}, VeRA on all linear layers, and once more with the input embedding and the
head in `modules_to_save` beside them. The vectors were then given other values. What each command made of the adapter
was loaded, by transformers or by PEFT, and compared with PEFT's live model: its outputs where it could be run, and
every weight.

Bases have the names that their files have on the Hub; once more the names of the modules in memory; and once more older
ones: without the base model's prefix, with `LayerNorm.gamma` and `beta`, tied weights as tensors of their own. Where
PEFT itself does not get its adapter back on the same base, nothing can be right: "PEFT itself is off".

| adapter | base | command | right | refused | wrong or not loading | PEFT itself is off |
|---|---|---|---|---|---|---|
"""


def write(documents: Iterable[dict[str, Any]]) -> None:
    """Write the file and the page that ship, from the lines of a run."""
    found = compact(documents)
    FILE.write_text(_json(found), "utf-8")
    PAGE.write_text(page(found), "utf-8")


def _json(document: dict[str, Any]) -> str:
    """One class a line, so that what a change alters can be read in a comparison of two commits."""
    lines = []
    for key, value in document.items():
        if isinstance(value, dict):
            entries = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{entries}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def compact(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The outcomes of a run: a letter for each of `COLUMNS`, and the reasons for what is not right."""
    classes, reasons, untested = {}, {}, {}
    for document in sorted(documents, key=lambda one: one["class"]):
        name = document["class"]
        if not document["pairs"]:
            untested[name] = _reason(document["why"])
            continue
        letters = {}
        for pair in document["pairs"]:
            column = f"{pair['adapter']}/{pair['base']}/{pair['command']}"
            outcome = pair["outcome"]
            if pair["peft"] != RIGHT and outcome in (RIGHT, REFUSED):
                outcome = PEFT_OFF
            letters[column] = LETTERS[outcome]
            if outcome != RIGHT:
                why = f"PEFT: {pair['peft']}" if outcome == PEFT_OFF else pair["reason"]
                code = f"exit {pair['exit_code']}: " if outcome == REFUSED else ""
                reasons.setdefault(name, {}).setdefault(code + _reason(why), []).append(column)
        classes[name] = "".join(letters.get(column, " ") for column in COLUMNS).rstrip()
    versions = {name: metadata.version(name) for name in ("transformers", "peft", "torch")}
    versions["torch"] = versions["torch"].partition("+")[0]
    return {
        **versions,
        "columns": COLUMNS,
        "letters": _OUTCOMES,
        "classes": classes,
        "reasons": reasons,
        "untested": untested,
    }


def _reason(text: str) -> str:
    """A reason without the folders of the run."""
    return re.sub(r"\S*/(bases/(saved|own|older)|linear|saved|out)(?=[:/ ])", "...", text)[:240]


def page(found: dict[str, Any]) -> str:
    """The page of documentation that shows these outcomes."""
    tallies = _tallies(found)
    tried, known = len(found["classes"]) + len(found["untested"]), len(data.tables()["classes"])
    lines = _INTRODUCTION.format(**found, tried=tried, all=known).splitlines()
    for column in COLUMNS:
        tally = tallies[column]
        if not tally:
            continue
        adapter, base, command = column.split("/")
        bad = tally[WRONG] + tally[BADLY] + tally[CRASH]
        cells = [
            _ADAPTERS[adapter],
            _BASES[base],
            _COMMANDS[command],
            tally[RIGHT],
            tally[REFUSED],
            bad,
            tally[PEFT_OFF],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"{len(found['classes'])} classes; {len(found['untested'])} more have nothing to compare, see below."]
    for title, outcomes in (
        ("Refused", (REFUSED,)), ("Wrong, or not loading", (WRONG, BADLY, CRASH)), ("PEFT itself is off", (PEFT_OFF,)),
    ):  # fmt: skip
        lines += _grouped(title, found, {LETTERS[outcome] for outcome in outcomes})
    wholly = [name for name, letters in found["classes"].items() if set(letters) <= {".", " "}]
    lines += ["", "## Right in everything", "", ", ".join(wholly) + "."]
    lines += ["", "## Nothing to compare", "", "| why | classes |", "|---|---|"]
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, why in found["untested"].items():
        groups[_general(why)].append(name)
    lines += [f"| {_cell(why)} | {', '.join(names)} |" for why, names in sorted(groups.items())]
    return "\n".join(lines) + "\n"


def _tallies(found: dict[str, Any]) -> dict[str, collections.Counter[str]]:
    tallies: dict[str, collections.Counter[str]] = {column: collections.Counter() for column in COLUMNS}
    for letters in found["classes"].values():
        for column, letter in zip(COLUMNS, letters, strict=False):
            if letter != " ":
                tallies[column][_OUTCOMES[letter]] += 1
    return tallies


def _grouped(title: str, found: dict[str, Any], letters: set[str]) -> list[str]:
    """A section of reasons, each with the commands that it stops and the classes."""
    groups: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    examples: dict[tuple[str, str], str] = {}
    for name, reasons in found["reasons"].items():
        for reason, columns in reasons.items():
            of = [column for column in columns if found["classes"][name][COLUMNS.index(column)] in letters]
            for command in dict.fromkeys(column.rpartition("/")[2] for column in of):
                key = (_COMMANDS[command], _general(reason))
                groups[key].append(name)
                examples.setdefault(key, reason)
    if not groups:
        return []
    lines = ["", f"## {title}", "", "| command | reason, with the first class's names | classes |", "|---|---|---|"]
    for key, names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]), item[0][1])):
        lines.append(f"| {key[0]} | {_cell(examples[key])} | {', '.join(dict.fromkeys(names))} |")
    return lines


def _general(reason: str) -> str:
    """A reason without the names and numbers that differ from class to class, cut where it goes into detail."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\S*[._]\S*|\d\S*", "*", reason)
    return re.sub(r"(\*[ ,]*)+", "* ", text)[:70].strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").strip()
