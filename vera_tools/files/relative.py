"""Names and relative paths that others chose: those a listing, an index, a manifest, a log or a provenance file holds.

Such a path is joined to a folder of ours, and what lies there is then read, copied or removed. So it must not lead out.
"""

from __future__ import annotations

import re
from typing import Any

from vera_tools.errors import FormatError, VeraToolsError

_DRIVE = re.compile(r"[A-Za-z]:")


def fault_of(path: Any) -> str | None:
    """What keeps this from being a path that stays in its folder, on any system, in words; None where nothing does."""
    if not isinstance(path, str):
        return "is no text"
    if not path:
        return "is empty"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "holds a backslash"
    if "\0" in path:
        return "holds a NUL"
    if _DRIVE.match(path):
        return "names a drive"
    if any(part in ("", ".", "..") for part in path.split("/")):
        return "holds an empty part, . or .."
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a character"
    return None


def refuse_path(path: Any, *, where: str, error: type[VeraToolsError] = FormatError) -> str:
    """A relative path that came from outside, once it is known that it stays in whatever folder it is joined to.

    Args:
        path: What was read, of any type.
        where: What it was read from.
        error: What to raise.

    Raises:
        VeraToolsError: of the given class: it is no text or empty, absolute, or holds ``..``, a backslash, a NUL, a
            drive, an empty part or half a character.
    """
    fault = fault_of(path)
    if fault is None:
        return str(path)
    shown = ascii(path)
    raise error(
        f"a file's path {fault}",
        where=where,
        expected="a path below its folder",
        found=shown if len(shown) <= 80 else f"{shown[:77]}...",
        hint="nothing of it was touched",
    )
