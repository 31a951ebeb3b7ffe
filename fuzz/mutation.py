"""Bytes to changes: the same bytes always make the same change of a file, a text or a document."""

from __future__ import annotations

import copy
import json
import struct
from typing import Any

#: What stands in the place of a value. Each has broken some reader somewhere.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**53 + 1, 2**62, 2**63, 2**64, 10**4000, -(2**63) - 1, 0.5,
    -0.0, 1e308, float("nan"), float("inf"), "", "x", "VERA", ".", "..", "../x", "a" * 300, "\0", "\n", "\ud800", "é",
    "(?i)x", "(a+)+", "a{99999999999999999999}", "(?P<idx>x)", "\\", "[", "(" * 200, "hf://", "hf://a/b@c", [], {},
    [None], [[]], {"a": None}, ["x"], [0], [-1], [2**62] * 18, [1] * 65, [8, 0], [0, 8], [[[[[[[[]]]]]]]],
)  # fmt: skip


class Source:
    """A reader of bytes that never ends: after the last one come zeros."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def byte(self) -> int:
        """The next one."""
        self._place += 1
        return self._data[self._place - 1] if self._place <= len(self._data) else 0

    def below(self, most: int) -> int:
        """A number from 0 to `most` - 1, of as few bytes as hold it."""
        number, room = 0, 1
        while room < most:
            number, room = number * 256 + self.byte(), room * 256
        return number % most if most else 0

    def rest(self) -> bytes:
        """What was not read."""
        rest, self._place = self._data[self._place :], len(self._data)
        return rest


def changed(document: Any, source: Source) -> Any:
    """A copy of a parsed document with up to four changes."""
    document = [copy.deepcopy(document)]  # in a list, so that the whole can be replaced too
    for _ in range(1 + source.below(4)):
        _change(document, source)
    return document[0]


def _change(document: list[Any], source: Source) -> None:
    holder: Any = document
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = keys[source.below(len(keys))]
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or source.below(4) == 0:
            break
        holder = inner
    else:
        return
    if not keys:
        return
    what = source.below(8)
    if what < 5:
        holder[key] = copy.deepcopy(ODD[source.below(len(ODD))])
    elif what == 5 and holder is not document:
        del holder[key]
    elif what == 6:
        holder[key] = [holder[key]] * (1 + source.below(3))
    elif isinstance(holder, dict):
        holder[str(ODD[source.below(len(ODD))])[:300]] = holder[key]
    else:
        holder.append(copy.deepcopy(holder[key]))


def text_of(document: Any, source: Source) -> bytes:
    """The document as JSON; sometimes with a byte changed, or cut off."""
    try:
        data = json.dumps(document).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of too many digits for Python to write
        return b"9" * 5000
    return damaged(data, source) if source.below(8) == 0 else data


def damaged(data: bytes, source: Source) -> bytes:
    """Bytes with up to three of them changed, inserted or taken out, or the end cut off."""
    result = bytearray(data)
    for _ in range(1 + source.below(3)):
        place, what = source.below(len(result) + 1), source.below(6)
        if what == 0:
            del result[place:]
        elif what == 1:
            result[place:place] = bytes([source.byte()])
        elif what == 2:
            del result[place : place + 1 + source.below(8)]
        elif place < len(result):
            result[place] ^= 1 << source.below(8) if what < 5 else source.byte()
    return bytes(result)


def with_header(data: bytes, source: Source) -> bytes:
    """A safetensors file with its header's document changed, and its length told right."""
    (length,) = struct.unpack("<Q", data[:8])
    document = changed(json.loads(data[8 : 8 + length]), source)
    header = text_of(document, source)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]
