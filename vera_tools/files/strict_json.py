"""JSON as files hold it, parsed strictly: what `json.loads` lets pass in silence is refused."""

from __future__ import annotations

import contextlib
import gc
import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vera_tools.errors import FormatError, cut

_MAX_DIGITS = 4000  # Python refuses to parse a few more


def parse_json(text: str, *, where: str, finite: bool = True, paths: bool = False) -> Any:
    """`json.loads`, strict where JSON files go wrong in silence: duplicate keys, numbers and text that cannot be.

    A byte-order mark before it is no part of it.

    Args:
        text: The file's text.
        where: The file.
        finite: Refuse NaN and infinity, which JSON does not have; Python writes and reads them all the same.
        paths: Take what stands for the bytes of a path that is no UTF-8, as Python has them (``surrogateescape``).

    Raises:
        FormatError: not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if oversized:
            refuse_oversized(next((f": {name}" for name, value in pairs if _holds_infinity(value)), ""))
        if len(result) != len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise FormatError(f"duplicate key {cut(repr(twice))}", where=where)
        return result

    def refuse(constant: str) -> float:
        raise FormatError(f"{constant} is not JSON", where=where)

    oversized: list[str] = []  # the numbers that Python cannot hold; infinity stands for them until their key is known

    def whole(number: str) -> int | float:
        return int(number) if len(number) <= _MAX_DIGITS else real("1e999", number)

    def real(number: str, written: str | None = None) -> float:
        if math.isinf(value := float(number)):
            oversized.append(written or number)
        return value

    def refuse_oversized(key: str) -> None:
        raise FormatError(
            "a number is too large", where=where + key, expected="at most 1.8e308", found=f"{oversized[0][:40]}..."
        )

    try:
        with uncollected():
            document = json.loads(
                text.removeprefix("\ufeff"),
                object_pairs_hook=unique,
                parse_constant=refuse if finite else float,
                parse_int=whole,
                parse_float=real,
            )
        if oversized:
            refuse_oversized("")
        if "\\ud" in text.lower():  # an escaped surrogate; half a pair is no character and could not be written again
            json.dumps(document, ensure_ascii=False).encode(errors="surrogateescape" if paths else "strict")
        return document
    except json.JSONDecodeError as error:
        raise FormatError(
            f"not JSON: {error.msg}", where=f"{where}: line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise FormatError("not JSON that can be read: nested too deeply", where=where) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise FormatError("not JSON: half a character", where=where, expected="a pair", found=half) from error


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Look for no garbage: while a large document grows there is none, and looking takes longer than parsing.

    Whatever threads do at the same time, in the end it is on again where it was.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _holds_infinity(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_holds_infinity, value))
    return isinstance(value, float) and math.isinf(value)
