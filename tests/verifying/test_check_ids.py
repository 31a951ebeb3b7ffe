"""The table of check ids is complete: whatever the source reports is in it, and documented."""

from __future__ import annotations

import ast
import re

from tests import ROOT
from vera_tools.verifying.check_ids import CHECK_IDS

_ID = re.compile(r"(config|tensors|metadata|manifest|base|projections)\.[A-Za-z_]+")


def reported() -> set[str]:
    """Every id in the source of verifying/ that stands where a check's id stands: the first text of a call."""
    found = set()
    for path in (ROOT / "vera_tools" / "verifying").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found |= {text for text in texts[:1] if _ID.fullmatch(text)}
    return found | {"tensors.lambda_b", "tensors.lambda_d"}  # named after the vectors that they look at


def test_every_check_is_in_the_table_and_nothing_else_is():
    assert reported() == set(CHECK_IDS)


def test_every_check_is_documented_in_the_words_of_the_table():
    text = (ROOT / "docs" / "verify.md").read_text("utf-8")
    assert [check for check, meaning in CHECK_IDS.items() if f"| `{check}` | {meaning} |" not in text] == []
