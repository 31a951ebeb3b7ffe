"""What is nested deeper than can be written again becomes null, and nothing above it."""

from __future__ import annotations

import pytest

from vera_tools.files.loose_json import MAX_DEPTH, plain


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}], ids=["list", "object"])
def test_what_is_nested_too_deeply_becomes_null(wrap):
    tolerated = {}
    assert plain(nested(MAX_DEPTH, wrap), tolerated) == nested(MAX_DEPTH, wrap)
    assert not tolerated
    cut = plain(nested(MAX_DEPTH + 1, wrap), tolerated)
    for _ in range(MAX_DEPTH):
        (cut,) = cut if isinstance(cut, list) else cut.values()
    assert cut is None
    assert list(tolerated) == [f"a value nested more than {MAX_DEPTH} deep"]
