"""The canonical text of a JSON document: literal texts, and the few lines of docs/manifest.md beside it."""

from __future__ import annotations

import hashlib
import json
import re

import pytest

from tests import ROOT
from vera_tools.files.canonical_json import Plain, canonical, sha256

TEXTS = {
    "null": "null",
    "true": "true",
    "false": "false",
    "0": "0",
    "-7": "-7",
    "18446744073709551616": "18446744073709551616",
    "18446744073709551617": "18446744073709551617",
    "8.0": "0x4020000000000000",
    "0.1": "0x3fb999999999999a",
    "1e-1": "0x3fb999999999999a",
    "0.10": "0x3fb999999999999a",
    "-0.0": "0x8000000000000000",
    "5e-324": "0x0000000000000001",
    '"0x3fb999999999999a"': '"0x3fb999999999999a"',
    '""': '""',
    r'"\u00e9\ud83d\ude00\/\u007f"': '"é😀/\x7f"',
    r'"\"\\\b\f\n\r\t\u0000\u001F\u2028"': '"\\"\\\\\\b\\f\\n\\r\\t\\u0000\\u001f\u2028"',
    "[ ]": "[]",
    "{ }": "{}",
    "[1, [2, null]]": "[1,[2,null]]",
    # By code points: U+FF61 comes before U+1F600, whose UTF-16 begins with D83D.
    '{"b": 1, "a": {"Z": 2, "": 3}, "\\ud83d\\ude00": 4, "\\uff61": 5, "B": 6}': (
        '{"B":6,"a":{"":3,"Z":2},"b":1,"｡":5,"😀":4}'
    ),
}


@pytest.mark.parametrize(("document", "text"), TEXTS.items(), ids=ascii)
def test_each_document_has_this_text(document, text):
    assert canonical(json.loads(document)) == text
    assert sha256(json.loads(document)) == hashlib.sha256(text.encode()).hexdigest()


WHOLE = {
    document: text for document, text in TEXTS.items() if not re.search(r"\d[.e]-?\d", document) or '"' in document
}


@pytest.mark.parametrize(("document", "text"), WHOLE.items(), ids=ascii)
def test_what_holds_no_float_is_written_the_same_by_pythons_own_encoder(document, text):
    assert canonical(Plain(json.loads(document))) == text
    assert canonical({"a": Plain(json.loads(document)), "b": 1.0}) == f'{{"a":{text},"b":0x3ff0000000000000}}'


def test_the_documentations_lines_give_the_same(tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(import hashlib.*?)```", (ROOT / "docs/manifest.md").read_text("utf-8"), re.S)
    document = {str(number): json.loads(text) for number, text in enumerate(TEXTS)}
    monkeypatch.chdir(tmp_path)
    for digest in (sha256(document), sha256({**document, "0": 0})):
        (tmp_path / "vera_manifest.json").write_text(json.dumps({"digest": digest, **document}), "utf-8")
        if digest == sha256(document):
            exec(program, {})
        else:
            with pytest.raises(AssertionError):
                exec(program, {})


@pytest.mark.parametrize("value", [b"x", {1, 2}, object(), {"a": b"x"}], ids=["bytes", "set", "object", "inside"])
def test_what_json_does_not_have_is_no_text(value):
    with pytest.raises(TypeError, match="JSON has no"):
        canonical(value)
