"""The table of check ids is complete: whatever the source reports is in it, and documented."""

from __future__ import annotations

import ast
import re

from tests import ROOT
from vera_tools.verifying.advice import REMEDIES
from vera_tools.verifying.check_ids import CHECK_IDS
from vera_tools.verifying.findings import MATCH, REQUIRED

_ID = re.compile(r"(config|tensors|metadata|manifest|base|projections)\.[A-Za-z_]+")


def reported() -> set[str]:
    """Every id in the source of verifying/ that stands where a check's id stands: the first text of a call."""
    found = set()
    for path in (ROOT / "vera_tools" / "verifying").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                found |= {text for text in texts[:1] if _ID.fullmatch(text)}
    return found | {
        MATCH,
        REQUIRED,
        "tensors.lambda_b",
        "tensors.lambda_d",
    }  # two are named after what they look at


def test_every_check_is_in_the_table_and_nothing_else_is():
    assert reported() == set(CHECK_IDS)


def test_every_check_is_documented_in_the_words_of_the_table():
    """What it looks at, how it comes about, what to do; under a heading that the report's link leads to."""
    text = (ROOT / "docs" / "checks.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (\S+)\n\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(sections) == list(CHECK_IDS)
    for check, meaning in CHECK_IDS.items():
        words = " ".join(sections[check].split())
        assert words.startswith(f"*{meaning}.* "), check
        assert "- How it comes about: " in words, check
        assert "- What to do: " in words, check


def test_what_may_fail_has_a_remedy():
    never = {"metadata.assumed", "manifest.assumed", "base.recorded", MATCH, REQUIRED}
    assert set(REMEDIES) == set(CHECK_IDS) - never - {"tensors.lambda_b", "tensors.lambda_d"}
    for words, command in REMEDIES.values():
        assert not words.endswith(".")
        assert command.split()[0] in ("vera-tools", "{again}", "{record}", "{anew}")
