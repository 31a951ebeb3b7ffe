"""What the HTML pages share: one self-contained document, in the light and in the dark, on paper and on a telephone.

A page loads nothing, and runs no script but the one that it was made with: its security policy names the digest of that
script. What comes from a file is text, by `text`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from vera_tools._version import TOOL
from vera_tools.report import printable

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #52606d; --paper: #fff; --ground: #f4f5f7; --line: #d9dde3;
  --blue: #005a8d; --blue-ground: #dbeaf7; --red: #a4380a; --red-ground: #fdebd8; --plum: #7a3d6c;
  --plum-ground: #f3e3f0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #a3b0bd; --paper: #1b2127; --ground: #12161a;
  --line: #3a444e; --blue: #7cc4f5; --blue-ground: #123247; --red: #ffb38a; --red-ground: #452413; --plum: #e3a9d4;
  --plum-ground: #3d2137; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); margin: 0; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 0 0 8px; }
p { margin: 4px 0 12px; max-width: 90ch; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px;
  margin-top: 18px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 7px; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); }
tbody th { font-weight: 600; }
th small, td small { display: block; font-weight: 400; color: var(--soft); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: 12px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; } td code { overflow-wrap: break-word; }
.banner { font-size: 17px; font-weight: 600; padding: 10px 14px; border-radius: 6px; }
p.banner { margin: 14px 0 0; max-width: none; }
.banner.yes { background: var(--blue-ground); border-left: 6px solid var(--blue); }
.banner.no { background: var(--red-ground); border-left: 6px double var(--red); }
footer { color: var(--soft); font-size: 12px; margin-top: 18px; overflow-wrap: anywhere; }
@media (max-width: 640px) { main { padding: 18px 12px 32px; } section { padding: 14px 12px; } h1 { font-size: 21px; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #333; --paper: #fff; --ground: #fff; --line: #999;
    --blue: #00416a; --blue-ground: #fff; --red: #7a2500; --red-ground: #fff; --plum: #57264c; --plum-ground: #fff; }
  @page { margin: 12mm; }
  body { font-size: 11px; } main { max-width: none; padding: 0; }
  section { border: 0; padding: 8px 0; } .scroll { overflow: visible; }
  table { font-size: 9px; } th, td { overflow-wrap: anywhere; padding: 4px; } tr, figure { break-inside: avoid; }
  thead { display: table-header-group; } .screen { display: none; }
}
"""


@dataclass(frozen=True)
class Made:
    """When, where and by what a page was made."""

    date: str
    host: str
    command: str

    @classmethod
    def now(cls, arguments: Sequence[str]) -> Made:
        """By this command line, in this moment."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        return cls(date, platform.node(), shlex.join(["vera-tools", *arguments]))


def text(value: str) -> str:
    """What comes from a file or a user, as it may stand between tags and in attributes."""
    return html.escape(printable(value), quote=True)


def document(title: str, body: str, *, made: Made | None, style: str = "", script: str = "") -> str:
    """The whole page.

    Args:
        title: Its title; plain text.
        body: What stands in it; HTML.
        made: When, where and by what it was made; None leaves that out.
        style: CSS beyond what all pages have.
        script: The one script that may run.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {source}; base-uri 'none'"
    by = f": {text(made.date)}, on {text(made.host)}, <code>{text(made.command)}</code>" if made else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>{TOOL['name']} {TOOL['version']}{by}</footer>\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )
