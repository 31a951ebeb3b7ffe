"""JSON that Python's own parser would let pass."""

from __future__ import annotations

import pytest

from vera_tools.errors import FormatError
from vera_tools.files.strict_json import parse_json


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('{"a": "text", "b": 1.5, "c": 1e999}', ": c"),
        ('{"a": 1, "b": {"c": [0.5, "x", [-1e400]]}}', ": c"),
        ('{"a": 1' + "0" * 5000 + "}", ": a"),
        ('["x", 1e999]', ""),
    ],
)
def test_a_number_that_is_too_large_is_named_by_its_key(text, name):
    with pytest.raises(FormatError, match=f"^a.json{name}: a number is too large"):
        parse_json(text, where="a.json")
