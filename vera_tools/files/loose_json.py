"""JSON as Python's own `json.load` reads it, with a note of everything in which that departs from JSON.

Other programs' configs are read so: what their own readers take in, a stricter reader has no reason to refuse. What
vera-tools writes itself is read by `strict_json`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
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
    """Parse what Python's `json.load` reads, and what it refuses although its meaning is clear.

    That is a byte-order mark, an integer's length, and what other programs let pass: comments, a comma after the last
    item, and control characters in texts.

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

    def parsed(text: str, *, strict: bool = True) -> Any:
        with uncollected():
            return json.loads(
                text,
                strict=strict,
                object_pairs_hook=unique,
                parse_constant=constant,
                parse_int=whole,
                parse_float=real,
            )

    if text.startswith("\ufeff"):
        refused.append("it begins with a byte-order mark")
    bare = text.removeprefix("\ufeff")
    try:
        try:
            document = parsed(bare)
        except json.JSONDecodeError as error:
            mended, what = mend(bare)
            try:
                document = parsed(mended, strict=False)
            except json.JSONDecodeError:
                raise FormatError(
                    f"not JSON: {error.msg}", where=f"{where}: line {error.lineno}, column {error.colno}"
                ) from error
            refused = list(dict.fromkeys((*refused, *(what or ["a control character in a text"]))))
    except RecursionError as error:
        raise FormatError("not JSON that can be read: nested too deeply", where=where) from error
    return Loose(document, tuple(refused), tuple(tolerated))


_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_COMMENT_OR_STRING, _COMMA_OR_STRING = re.compile(r'[/"]'), re.compile(r'[,"]')
_TO_A_BRACKET = re.compile(r"\s*[}\]]")


def mend(text: str) -> tuple[str, list[str]]:
    """The text without comments and without commas after the last item, and which of both it had.

    What stands in a text stays, and a text that does not end is left as it is. A comment becomes spaces, so that places
    stay where they were. Every character is looked at a few times at most, whatever there is.
    """
    found: dict[str, None] = {}

    def without(what: re.Pattern[str], text: str, replaced: Callable[[str, int], tuple[str, int]]) -> str:
        pieces, done = list[str](), 0
        while (mark := what.search(text, done)) is not None:
            start = mark.start()
            pieces.append(text[done:start])
            if text[start] == '"':
                string = _STRING.match(text, start)
                done = string.end() if string else len(text)
                pieces.append(text[start:done])
            else:
                piece, done = replaced(text, start)
                pieces.append(piece)
        return "".join((*pieces, text[done:]))

    def comment(text: str, start: int) -> tuple[str, int]:
        if text.startswith("//", start):
            stop = text.find("\n", start) % (len(text) + 1)  # to the end where there is no other line
        elif text.startswith("/*", start) and (end := text.find("*/", start + 2)) != -1:
            stop = end + 2
        else:
            return text[start:], len(text)  # no comment, and nothing that can be read
        found["comments"] = None
        return re.sub(r"[^\n]", " ", text[start:stop]), stop

    def comma(text: str, start: int) -> tuple[str, int]:
        if _TO_A_BRACKET.match(text, start + 1) is None:
            return ",", start + 1
        found["a comma after the last item"] = None
        return " ", start + 1

    mended = without(_COMMA_OR_STRING, without(_COMMENT_OR_STRING, text, comment), comma)
    return mended, list(found)


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
