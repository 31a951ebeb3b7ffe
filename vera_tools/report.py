"""What every capability returns: a typed report that knows its JSON form and its exit code.

Reports hold data only. How one looks in a terminal is the business of the command that shows it (`vera_tools.cli`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from vera_tools._version import TOOL
from vera_tools.errors import UsageError, VeraToolsError

#: Called with (done, total, what) as work goes on; total is 0 where it is unknown.
Progress = Callable[[int, int, str], None]


#: Exit codes from best to worst: of several, the worst wins.
SEVERITY = (0, 3, UsageError.exit_code, 5, 1, 4)


def worst(codes: Iterable[int]) -> int:
    """The exit code that stands for all of these."""
    return max(codes, key=SEVERITY.index, default=0)


class Document:
    """A dataclass with a JSON form: its fields under their own names, in their order.

    Where a document differs from the fields, the class writes `to_dict` out.
    """

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports and files."""
        return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def plain(value: Any) -> Any:
    """The value as JSON has it: documents as dicts, tuples as lists."""
    if isinstance(value, Document):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


class Report(ABC):
    """Base of all reports. `name` is the report's name in its schema, e.g. "verify" for vera-tools/verify/v1."""

    name: ClassVar[str]

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """Everything but the schema and the tool. A long list may be an iterator, whose items are made one by one."""

    @property
    def exit_code(self) -> int:
        """0 all well; 1 drift, or a check failed; 3 unproven; 4 unreadable, malformed or not VeRA."""
        return 0

    def __repr__(self) -> str:
        """One line: what it reports on, and its exit code."""
        named = [getattr(self, name, None) for name in ("path", "checkpoint", "output", "a")]
        what = next((f" {value!r}" for value in named if isinstance(value, str)), "")
        return f"<{type(self).__name__}{what}: exit code {self.exit_code}>"

    def to_dict(self, *, defaults: Sequence[Document] = ()) -> dict[str, Any]:
        """The JSON document, valid against ``schemas/<name>.v1.schema.json``; figures that are not finite are None.

        Args:
            defaults: Options of the call that the command line did not give.
        """
        result: dict[str, Any] = _finite(self._members(defaults))
        return result

    def _members(self, defaults: Sequence[Document]) -> dict[str, Any]:
        named = {"defaults": plain(defaults)} if defaults else {}
        return {"schema": f"vera-tools/{self.name}/v1", "tool": dict(TOOL), **named, **self.body()}

    def to_json(self, *, defaults: Sequence[Document] = ()) -> str:
        """The document as text: ASCII, because a path may be no UTF-8 and an output no Unicode."""
        return "".join(self.json_pieces(defaults=defaults))

    def json_pieces(self, *, defaults: Sequence[Document] = ()) -> Iterator[str]:
        """The same text, piece by piece."""
        before = "{\n"
        for name, value in self._members(defaults).items():
            yield f"{before}  {json.dumps(name)}: "
            before = ",\n"
            if not isinstance(value, Iterator):
                yield _indented(value, 2)
                continue
            between = "[\n"
            for item in value:
                yield f"{between}    {_indented(item, 4)}"
                between = ",\n"
            yield "[]" if between == "[\n" else "\n  ]"
        yield "\n}"


def error_document(error: VeraToolsError) -> str:
    """The ``error/v1`` document, as ASCII text."""
    document = {"schema": "vera-tools/error/v1", "tool": dict(TOOL), "error": error.to_dict()}
    return json.dumps(document, indent=2)


def printable(text: str) -> str:
    """The text with what would steer a terminal or hide itself (controls, bidi marks, lone surrogates) as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _indented(value: Any, depth: int) -> str:
    """The value's text where its first line stands so deep; a line break in a string is an escape."""
    return json.dumps(_finite(value), indent=2, allow_nan=False).replace("\n", "\n" + " " * depth)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
