"""Regular expressions from files: what `re` says, and an end to those that have none."""

from __future__ import annotations

import re
import time

import pytest

from tests.adapters import KEPT, set_config
from tests.command import run_json
from vera_tools.checkpoints import expressions
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.expressions import Expression
from vera_tools.errors import FormatError

NAME = "model.layers.12.self_attn.q_proj"


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(q|k|v)_proj",
        r"model\.(layers\.\d+\.)+self_attn\.[qv]_proj",
        r"(.*\.)*q_proj",
        r"(?:^|.*?\.)layers\.(?P<index>\d+)\.",
        "x",
    ],
)
def test_the_answer_is_that_of_re(expression, whole):
    found = (re.fullmatch if whole else re.match)(expression, NAME)
    answer = expressions.match(Expression(expression, "here", whole), NAME)
    assert answer == (None if found is None else found.groupdict())


@pytest.mark.parametrize("expression", ["(.*.*)*x", "(a|a)(a|a)" * 20 + "x", ".*" * 12 + "x", "(?x)(.*) # \n *x"])
def test_what_has_no_end_is_refused_in_time(monkeypatch, expression):
    monkeypatch.setattr(expressions, "LIMIT", 0.1)
    start = time.monotonic()
    with pytest.raises(
        FormatError, match=r"adapter_config\.json: target_modules: the regular expression takes too long"
    ):
        VeraConfig(target_modules=expression).targets("a" * 60)
    assert time.monotonic() - start < 5


def test_usual_expressions_need_no_other_process(monkeypatch):
    monkeypatch.setattr(expressions.subprocess, "run", None)
    for expression in (
        r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"^(?!.*visual).*\.[qv]_proj$",
    ):
        assert VeraConfig(target_modules=expression).targets(NAME)


def test_verify_ends_on_a_hostile_config(checkpoint):
    folder = checkpoint(KEPT)
    set_config(folder, target_modules="(.*.*)*x")
    code, document = run_json("verify", folder)
    assert code == 4
    assert "target_modules: the regular expression takes too long" in document["checkpoints"][0]["checks"][0]["message"]
