"""What comes from a file is text, wherever it is written: in Markdown, in Python, in YAML."""

from __future__ import annotations

import ast
import re

import pytest

from vera_tools.errors import FormatError
from vera_tools.files import markup

NASTY = [
    '"); __import__("os").system("id"); ("',
    "'); __import__('os').system('id'); ('",
    "a\n```\n<script>alert(1)</script>\n```python",
    "a\r\n\r\n# heading",
    "`; rm -rf ~; `",
    "a | b | [x](javascript:alert(1))",
    "</code></pre><img src=x onerror=alert(1)>",
    "\x1b]8;;http://x\x07link\x1b]8;;\x07\u202etxt",
    "\\",
    "\\\\`",
    "``` ````` ``",
    "\ud800",
    "&lt;script&gt;",
]


@pytest.mark.parametrize("text", [*NASTY, "main", "refs/pr/1", "owner/name", "é", "😀"], ids=ascii)
def test_a_literal_of_python(text):
    literal = markup.python(text)
    assert ast.literal_eval(literal) == text
    assert literal.isascii()
    assert "\n" not in literal
    assert len(ast.parse(f"f({literal})").body) == 1


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_code_ends_where_it_ends(text):
    inline = markup.code(text)
    fence = re.match("`+", inline)[0]
    assert inline.isprintable()
    assert inline.endswith(fence)
    assert fence not in re.split(f"(?<!`){fence}(?!`)", inline)[1]
    assert not re.search(r"(?<!\\)\|", inline)
    first, *lines, last = markup.code_block(text).split("\n")
    assert first == last
    assert set(first) == {"`"}
    assert all(first not in line for line in lines)
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_line_of_markdown(text):
    line = markup.markdown(text)
    assert line.isprintable()
    assert not re.search(r"(?<!\\)(?:\\\\)*[`<>\[\]|#*&]", re.sub(r"\\[^\\]", "", line).replace("\\\\", ""))


def test_yaml_that_is_small_and_plain():
    assert markup.yaml("a: [1, {b: c}]\nd: 2024-01-01", where="x")["a"] == [1, {"b": "c"}]


BOMB = "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "alias"),
        ("[" * 40 + "]" * 40, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "x" * (1 << 18), "too long"),
        ("a: !!python/object/apply:os.system [id]", "not YAML"),
        ("a: 2001-99-99", "not YAML"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: [1", "not YAML"),
        ("{a: 1}: b", "not YAML"),
        ("a: \x1b", "not YAML"),
    ],
    ids=["bomb", "deep", "deeper", "long", "object", "date", "number", "open", "key", "control"],
)
def test_yaml_that_is_not(text, words):
    with pytest.raises(FormatError, match=words) as caught:
        markup.yaml(text, where="README.md")
    assert str(caught.value).isprintable()
