"""The data on transformers' classes: its form, that it is what transformers says, and that the replay of it is right."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import FIXTURES, ROOT
from vera_tools import schema
from vera_tools.checkpoints import architecture_probe, architectures, pieces
from vera_tools.checkpoints.architectures import Tie
from vera_tools.checkpoints.layout import Layout
from vera_tools.checkpoints.renaming import Step, natural_order, replay
from vera_tools.errors import CheckFailedError

#: One class of each kind that decides otherwise: what it stands for, and its name.
KINDS = {
    "plain": "LlamaForCausalLM",
    "Conv1D": "GPT2LMHeadModel",
    "Conv1D beside Linear": "ImageGPTForImageClassification",
    "two towers, older prefixes": "LlavaForConditionalGeneration",
    "tower renamed inside": "Qwen2_5_VLForConditionalGeneration",
    "prefix of another form": "PaliGemmaForConditionalGeneration",
    "renamed throughout": "ViTForImageClassification",
    "renamed stages": "SwinForImageClassification",
    "head under its old name": "GPTNeoXForCausalLM",
    "tied with a bias": "BertForMaskedLM",
    "tied under another name": "WhisperForConditionalGeneration",
    "three tables in one": "T5ForConditionalGeneration",
    "encoder and decoder tables": "BartForConditionalGeneration",
    "tied in a state space": "MambaForCausalLM",
    "tied by a pattern": "ZambaForCausalLM",
    "experts": "Qwen2MoeForCausalLM",
    "experts of two towers": "DeepseekV3ForCausalLM",
    "gates fused in the model": "MiniMaxM3SparseForConditionalGeneration",
    "queries fused in the file": "NomicBertModel",
    "queries fused and permuted": "Kimi_K25ForConditionalGeneration",
    "interleaved": "InklingForConditionalGeneration",
    "numbers shifted": "Inkling2ForConditionalGeneration",
    "scopes within scopes": "DeepseekV4ForCausalLM",
    "backbone by configuration": "DetrForObjectDetection",
    "classifier": "RobertaForSequenceClassification",
}


@functools.cache
def document():
    return architectures.data()


def config_of(name: str, **entries):
    return {"architectures": [name], **entries}


def known(name: str, **entries):
    found = architectures.architecture(config_of(name, **entries))
    assert found is not None
    return found


# ---- the data


def test_the_data_is_as_its_schema_says():
    schema.validate(document(), "architectures.v1", where="fixtures/architectures")
    assert len(document()["classes"]) > 1400
    assert set(document()["classes"]) & set(document()["not_built"]) == set()


def test_it_is_compact():
    (file,) = (FIXTURES / "architectures").glob("*.json")
    assert file.stat().st_size < 1 << 20


def test_every_reference_leads_to_a_structure():
    def references(node):
        if isinstance(node, str):
            return {node[1:]} if node.startswith("@") else set()
        inside = node.values() if isinstance(node, dict) else node
        return set().union(*(references(child) for child in inside))

    used = set().union(*(references(entry.get("modules", f"@{n}")) for n, entry in document()["classes"].items()))
    used |= set().union(*(references(node) for node in document()["structures"].values()))
    assert used == set(document()["structures"])


def test_every_expression_compiles():
    for name in document()["conversions"]:
        for step in architectures._conversions(name):
            assert Step.from_document(step, scope=None, prefix="")._pattern, name
            for operation in step.get("operations", ()):
                assert hasattr(pieces._Conversion, f"_{operation['name']}"), operation


def _generate(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FIXTURES / "architectures" / "generate.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_classes_generated_again_are_the_same():
    """One of each kind: entries are equal, and every module that is built is in the data."""
    made = json.loads(_generate("--only", ",".join(KINDS.values())))
    assert made["transformers"] == document()["transformers"]
    assert made["conversions"] == document()["conversions"]
    assert set(made["classes"]) == set(KINDS.values())
    for name, entry in made["classes"].items():
        committed = document()["classes"][name]
        assert {key: value for key, value in entry.items() if key != "modules"} == {
            key: value for key, value in committed.items() if key != "modules"
        }
        there = set(known(name).tree.walk())
        assert set(architectures.Tree(entry.get("modules", f"@{name}"), made["structures"]).walk()) <= there, name


@pytest.mark.slow
def test_all_of_it_generated_again_is_the_same():
    _generate("--check")


# ---- the replay, against transformers


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_is_what_transformers_does(kind):
    from tests.architectures import proof

    assert proof.problems(KINDS[kind]) == []
