"""What the pages of the reference and of the atlases show, as Markdown and HTML made from the code and its data.

A page has a comment ``<!-- site: NAME -->`` in the place where `NAME()` of this module goes.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import vera_tools
from vera_tools.cli.shared import CLOSED
from vera_tools.errors import VeraToolsError
from vera_tools.platforms import atlas, rows
from vera_tools.platforms.names import PLATFORMS
from vera_tools.report import SEVERITY
from vera_tools.verifying.check_ids import CHECK_IDS
from vera_tools.verifying.findings import VERDICTS
from vera_tools.verifying.report import _EXIT_CODES, INTERRUPTED

ROOT = Path(__file__).parent.parent.parent
DTYPES = ("float32", "float64", "bfloat16", "float16")


def with_contents(text: str) -> str:
    """A page that lists pages, with its lists as tables of contents too: a part for each heading that has any."""
    contents = []
    for section in re.split(r"^##? ", text, flags=re.MULTILINE)[1:]:
        pages = re.findall(r"^(?:-|\d+\.) \[.*?\]\(([^)#:]+\.md)\)", section, re.MULTILINE)
        if pages:
            caption = section.partition("\n")[0]
            contents.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n")
    return text + "\n" + "\n".join(contents)


def _directive(name: str, argument: str, **options: str) -> str:
    lines = [f".. {name}:: {argument}", *(f"   :{key}: {value}" for key, value in options.items())]
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```\n"


# Commands and Python


def commands() -> str:
    """Every command with its options, from what the command line itself parses with."""
    return _directive("click", "vera_tools.cli:cli", prog="vera-tools", nested="full")


def python() -> str:
    """Every public name of `vera_tools`."""
    parts = []
    for name in sorted(set(vera_tools.__all__) - {"__version__"}, key=str.lower):
        kind = "autoclass" if isinstance(getattr(vera_tools, name), type) else "autofunction"
        # What VeraModel is built on is shown with it, down to torch.nn.Module.
        inherited = {"inherited-members": "Module"} if name == "VeraModel" else {}
        parts.append(f"### {name}\n\n" + _directive(kind, f"vera_tools.{name}", **inherited))
    return "\n".join(parts)


def errors() -> str:
    """Every error and warning."""
    return _directive("automodule", "vera_tools.errors")


def live() -> str:
    """What those who train, and those who stay with PEFT, import by its own name."""
    names = ("nn.peft.save", "nn.peft.record", "nn.peft.load", "nn.peft.restore_projections")
    functions = [_directive("autofunction", f"vera_tools.{name}") for name in names]
    functions.append(_directive("autoclass", "vera_tools.nn.trainer.VeraCallback", members=""))
    return "\n".join([*functions, _directive("autofunction", "vera_tools.testing.assert_reproducible")])


# Exit codes, checks, schemas


def exit_codes() -> str:
    """Which code says what: errors, verdicts, and what a shell adds."""
    lines = ["| code | verdicts | error |", "|---|---|---|"]
    kinds = [VeraToolsError, *_below(VeraToolsError)]
    for code in sorted(SEVERITY):
        verdicts = ", ".join(f"`{verdict}`" for verdict in VERDICTS if _EXIT_CODES[verdict] == code)
        named = [kind for kind in kinds if kind.exit_code == code and kind is not VeraToolsError]
        said = "; ".join(f"`{kind.__name__}`: {_first_line(kind)}" for kind in named)
        lines.append(f"| {code} | {verdicts} | {said} |")
    lines.append(f"| {INTERRUPTED} | | interrupted (Ctrl-C), as shells have it |")
    lines.append(f"| {CLOSED} | | whoever read the output went away, as shells have it |")
    order = ", ".join(str(code) for code in reversed(SEVERITY))
    return "\n".join(lines) + f"\n\nOf several checkpoints the most severe code wins, in this order: {order}.\n"


def _below(kind: type[VeraToolsError]) -> Iterator[type[VeraToolsError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").partition("\n")[0].rstrip(".")


def checks() -> str:
    """Every check's id, what it looks at, and its page."""
    lines = ["| id | what it looks at |", "|---|---|"]
    for check, meaning in CHECK_IDS.items():
        lines.append(f"| [`{check}`](../checks.md#{_anchor(check)}) | {meaning} |")
    return "\n".join(lines) + "\n"


def _anchor(heading: str) -> str:
    """The anchor that GitHub, and MyST after it, give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def schemas() -> str:
    """Every schema: what it is of, its members, and the document itself."""
    parts = []
    for path in sorted((ROOT / "schemas").glob("*.json")):
        document = json.loads(path.read_text("utf-8"))
        parts.append(f"## {path.name.removesuffix('.schema.json')}\n\n{_plain(document['title'])}.")
        parts.append(_plain(document.get("description", "")))
        parts.append(_members(document))
        text = html.escape(path.read_text("utf-8"))
        parts.append(f"[{path.name}](../../schemas/{path.name})")
        parts.append(
            f"<details><summary>the schema</summary>\n<pre>{text.rstrip()}</pre>\n</details>".replace("\n\n", "\n")
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _members(document: dict[str, Any]) -> str:
    found = document.get("properties", {})
    if not found:
        return ""
    lines = ["| member | value | |", "|---|---|---|"]
    for name, one in found.items():
        needed = "required" if name in document.get("required", ()) else ""
        about = one.get("description", "") if isinstance(one, dict) else ""
        note = "; ".join(part for part in (needed, _plain(about)) if part)
        lines.append(f"| `{name}` | {_value(one)} | {note} |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """A text that Markdown leaves as it is."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _value(one: Any) -> str:
    """A schema of one member, in a few words."""
    if not isinstance(one, dict):
        return ""
    if "const" in one:
        return f"`{json.dumps(one['const'])}`"
    if "enum" in one:
        return ", ".join(f"`{json.dumps(value)}`" for value in one["enum"])
    if "$ref" in one:
        whole, _, part = one["$ref"].partition("#")
        name = whole.removeprefix("urn:vera-tools:").replace(":", ".")
        inner = f"`{part.rpartition('/')[2]}`" if part else ""
        return " of ".join(filter(None, (inner, f"[{name}](#{_anchor(name)})" if name else "this schema")))
    for key, word in (("anyOf", " or "), ("oneOf", " or "), ("allOf", " and ")):
        if key in one:
            return word.join(filter(None, (_value(part) for part in one[key])))
    kinds = one.get("type", "")
    text = kinds if isinstance(kinds, str) else " or ".join(kinds)
    return f"{text} of {inner}" if text == "array" and (inner := _value(one.get("items"))) else text


# The atlases


def torch_releases() -> str:
    """A table for each dtype: what each release of torch draws on each platform with each kind of kernels."""
    drawn = _drawn()
    columns = sorted({place for place, _, _ in drawn}, key=lambda place: (list(PLATFORMS).index(place[0]), place[1]))
    releases = sorted({minor for _, minor, _ in drawn})
    parts = []
    for dtype in DTYPES:
        here = [place for place in columns if any((place, minor, dtype) in drawn for minor in releases)]
        head = ["torch", *(f"{platform}, {capability}" for platform, capability in here)]
        body = [
            [f"{minor[0]}.{minor[1]}", *(drawn.get((place, minor, dtype), ("", "")) for place in here)]
            for minor in releases
        ]
        parts.append(f"### {dtype}\n\n{_table(head, body)}")
    return "\n".join(parts)


Place = tuple[str, str]


def _drawn() -> dict[tuple[Place, rows.Minor, str], tuple[str, str]]:
    """(platform and kernels, minor release, dtype): what stands in the cell, and its class."""
    found = {}
    for entry in (*atlas.entries(), *atlas.platform_entries()):
        for row in entry.environments:
            minor = rows.minor_of(row.torch)
            for dtype, stream in row.streams.items():
                if stream.recipe and row.platform and minor:
                    kind = " ".join(filter(None, (stream.recipe.half_sampling, stream.recipe.rounding)))
                    found[(row.platform, row.cpu_capability or ""), minor, dtype] = (kind, kind)
    for document in atlas.platform_documents().values():
        minor = rows.minor_of(document["torch"])
        assert minor is not None
        for one in document["entries"]:
            place = (one["platform"], one["capability"] or "")
            if one["evidence"] == rows.READ:
                found.setdefault((place, minor, "float32"), (f"{one['rounding']} (read)", one["rounding"]))
    return found


def platforms() -> str:
    """The runs of releases that draw alike, and for each build that was read its compiler and instructions."""
    lines = ["| platform | known as | torch | float32 draws | evidence |", "|---|---|---|---|---|"]
    for span in rows.spans():
        known = PLATFORMS[span.platform]
        lines.append(f"| `{span.platform}` | {known} | {span.torch} | {span.rounding} | {span.evidence} |")
    parts = ["\n".join(lines), "### What the builds' machine code says"]
    for document in sorted(atlas.platform_documents().values(), key=lambda one: _release(one["torch"])):
        for one in document["entries"]:
            if one["evidence"] == rows.READ:
                code = html.escape("\n".join(one["instructions"]))
                title = f"torch {document['torch']}, {one['platform']}, {one['capability']}: {one['rounding']}"
                made = html.escape(f"{document['wheel']['file']}, compiled with {document['compiler']}")
                parts.append(f"<details><summary>{title}</summary>\n<p>{made}</p>\n<pre>{code}</pre>\n</details>")
    return "\n\n".join(parts) + "\n"


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


_OUTCOMES = {".": ("right", "right"), "r": ("refused", "refused"), "p": ("PEFT itself", "off")}


def architectures() -> str:
    """A row for each class of transformers that was tried: what came of each command."""
    document = json.loads((ROOT / "fixtures/sweep/outcomes.json").read_text("utf-8"))
    words = {"linear": "all linear", "saved": "and embedding, head", "own": "modules' names", "older": "older names"}
    names = {"verify": "verify", "merge": "merge", "lora": "to LoRA"}
    head = ["class"]
    for column in document["columns"]:
        adapter, base, command = column.split("/")
        head.append(f"{names[command]}: {words[adapter]}" + (f"; {words[base]}" if base != "saved" else ""))
    body = []
    for name, letters in document["classes"].items():
        cells = [_OUTCOMES.get(letter, (document["letters"].get(letter, ""), "bad")) for letter in letters]
        cells = [("", "") if letter == " " else cell for cell, letter in zip(cells, letters, strict=True)]
        body.append([name, *cells, *[("", "")] * (len(document["columns"]) - len(cells))])
    return _table(head, body, tall=True)


def _table(head: Iterable[str], body: Iterable[list[Any]], *, tall: bool = False) -> str:
    """An HTML table; a cell is a text, or a text and a class."""
    escape: Callable[[str], str] = html.escape
    lines = [f'<div class="scroll{" tall" if tall else ""}"><table class="atlas"><thead><tr>']
    lines += [f"<th>{escape(text)}</th>" for text in head]
    lines.append("</tr></thead><tbody>")
    for first, *cells in body:
        row = "".join(f'<td class="{escape(kind)}">{escape(text)}</td>' for text, kind in cells)
        lines.append(f"<tr><th>{escape(first)}</th>{row}</tr>")
    return "\n".join([*lines, "</tbody></table></div>\n"])
