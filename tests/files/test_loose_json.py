"""What is nested deeper than can be written again becomes null, and nothing above it."""

from __future__ import annotations

import json

import pytest

from vera_tools.errors import FormatError
from vera_tools.files.loose_json import MAX_DEPTH, parse_loosely, plain


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


MENDED = {
    '{"a": 1,}': ({"a": 1}, "a comma after the last item"),
    '[1, {"a": [2 , ], } ,\n]': ([1, {"a": [2]}], "a comma after the last item"),
    '// x\n{"a": 1 /* "y */, // "z\n"b": 2}//': ({"a": 1, "b": 2}, "comments"),
    '{"a": "b\tc"}': ({"a": "b\tc"}, "a control character in a text"),
}


@pytest.mark.parametrize("text", MENDED)
def test_what_other_programs_let_pass_is_read_and_named(text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    loose = parse_loosely(text, where="here")
    assert (loose.document, loose.refused) == (MENDED[text][0], (MENDED[text][1],))


INSIDE = ['"//"', '"/* x */"', '", ]"', '"\\"//"', '"\\\\" ', '"\\", }"']


@pytest.mark.parametrize("text", INSIDE)
def test_texts_keep_what_looks_like_a_comment_or_a_comma(text):
    loose = parse_loosely(f"[{text}, 1, ]", where="here")
    assert loose.document == [json.loads(text), 1]


@pytest.mark.parametrize("text", ["[1,,]", "{'a': 1}", "[1] x", "[1 /* ]", '["a', "[1]/", "", ",", "[1 2]"])
def test_what_means_nothing_is_refused_where_it_goes_wrong(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(FormatError, match=f"not JSON: {expected.value.msg}") as found:
        parse_loosely(text, where="here")
    assert f"line {expected.value.lineno}, column {expected.value.colno}" in str(found.value)


HOSTILE = ["//\n", "/*", '"\\"', ",", ", ", "/", '"', "/**/"]


@pytest.mark.parametrize("part", HOSTILE)
def test_a_hostile_text_takes_no_longer_than_its_length(part, monkeypatch):
    """Where each of a hundred thousand marks looked through the rest, this would take an hour."""
    with pytest.raises(FormatError):
        parse_loosely("[" + part * 100_000, where="here")
