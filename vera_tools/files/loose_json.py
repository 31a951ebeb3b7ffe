"""JSON as Python's own `json.load` reads it, with a note of everything in which that departs from JSON.

Other programs' configs are read so: what their own readers take in, a stricter reader has no reason to refuse. What
vera-tools writes itself is read by `strict_json`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from vera_tools.errors import FormatError
from vera_tools.files.strict_json import uncollected

#: Python refuses to read integers of more digits (`sys.set_int_max_str_digits`).
MAX_DIGITS = 4300
#: How deep a value may be nested that is written again: what is deeper makes other programs give up.
MAX_DEPTH = 64
_MAX_BITS = 1024  # of 1.8e308


@dataclass(frozen=True)
class Loose:
    """A text that was read loosely.

    Attributes:
        document: As `json.load` gives it: the last of several equal keys counts, NaN and infinity are floats.
        refused: Why Python's `json.load` does not read the text, one clause each; empty where it does.
        tolerated: What `json.load` lets pass and JSON does not have, one clause each.
    """

    document: Any
    refused: tuple[str, ...]
    tolerated: tuple[str, ...]


def parse_loosely(text: str, *, where: str) -> Loose:
    """Parse what Python's `json.load` reads, and what it refuses only for a byte-order mark or a number's length.

    Args:
        text: The file's text.
        where: The file.

    Raises:
        FormatError: nothing can be made of it.
    """
    refused: list[str] = []
    tolerated: dict[str, None] = {}

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            tolerated[f"duplicate key {twice!r}: the last one counts"] = None
        return result

    def constant(name: str) -> float:
        tolerated[f"{name} is not JSON"] = None
        return float(name)

    def real(number: str) -> float:
        if math.isinf(value := float(number)):
            tolerated[f"the number {_cut(number)} is too large: it is read as infinity"] = None
        return value

    def whole(number: str) -> int | float:
        if len(number.lstrip("-")) <= MAX_DIGITS:
            return int(number)
        refused.append(f"an integer of {len(number)} digits")
        return math.copysign(math.inf, -1 if number.startswith("-") else 1)

    if text.startswith("\ufeff"):
        refused.append("it begins with a byte-order mark")
    try:
        with uncollected():
            document = json.loads(
                text.removeprefix("\ufeff"),
                object_pairs_hook=unique,
                parse_constant=constant,
                parse_int=whole,
                parse_float=real,
            )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"not JSON: {error.msg}", where=f"{where}: line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise FormatError("not JSON that can be read: nested too deeply", where=where) from error
    return Loose(document, tuple(refused), tuple(tolerated))


def plain(value: Any, tolerated: dict[str, None], *, depth: int = 0) -> Any:
    """The value without what JSON does not have, so that it can be written again.

    Numbers that are not finite, or too large to be, become null; half a character (an unpaired surrogate) becomes the
    replacement character; what is nested deeper than `MAX_DEPTH` becomes null.

    Args:
        value: What `parse_loosely` gave.
        tolerated: Gets one clause, as a key, for each kind of replacement.
        depth: How deep the value lies.
    """
    if isinstance(value, str):
        if value.isascii():
            return value
        whole = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        if whole != value:
            tolerated["half a character, which no text can hold"] = None
        return whole
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # noted when it was read
    if is_beyond_floats(value):
        tolerated["an integer beyond 1.8e308"] = None
        return None
    if not isinstance(value, dict | list):
        return value
    if depth == MAX_DEPTH:
        tolerated[f"a value nested more than {MAX_DEPTH} deep"] = None
        return None
    if isinstance(value, list):
        return [plain(item, tolerated, depth=depth + 1) for item in value]
    return {
        plain(key, tolerated, depth=depth + 1): plain(item, tolerated, depth=depth + 1) for key, item in value.items()
    }


def is_beyond_floats(value: Any) -> bool:
    """Whether this is an integer that is infinite to every reader that takes numbers for floats."""
    return isinstance(value, int) and value.bit_length() > _MAX_BITS


def _cut(number: str) -> str:
    return number if len(number) <= 40 else f"{number[:40]}..."
