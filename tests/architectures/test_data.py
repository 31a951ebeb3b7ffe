"""The data on transformers' classes: its form, that it is what transformers says, that its replay is right."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys

import pytest

from tests import FIXTURES, ROOT
from tests.architectures.known import known
from vera_tools import schema
from vera_tools.architectures import data, pieces, witness
from vera_tools.architectures.architecture import Tie
from vera_tools.architectures.layout import Layout
from vera_tools.architectures.renaming import Operation, Step
from vera_tools.architectures.trees import Tree
from vera_tools.errors import UnprovenError

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
    return data.tables()


# ---- the data


def test_the_data_is_as_its_schema_says():
    (file,) = (FIXTURES / "architectures").glob("*.json")
    schema.validate(json.loads(file.read_text("utf-8")), "architectures.v1", where="fixtures/architectures")
    assert len(document()["classes"]) > 1400
    assert set(document()["classes"]) & set(document()["not_built"]) == set()


def test_entries_are_parsed_one_by_one_as_the_whole_is():
    (file,) = (FIXTURES / "architectures").glob("*.json")
    whole = json.loads(file.read_text("utf-8"))
    assert whole.keys() == document().keys()
    for name, table in whole.items():
        if isinstance(table, dict):
            found = document()[name]
            assert len(found) == len(table)
            assert dict(found) == table
            assert all(key in found and found.get(key) == value for key, value in table.items())
            assert [key for key in ("", "Llama", '"', "of tomorrow", 3, None) if key in found] == []
        else:
            assert document()[name] == table


def test_every_auto_class_takes_what_the_data_says():
    taken = {}
    for name, entry in document()["classes"].items():
        for auto, model_types in data._autos(entry):
            taken |= dict.fromkeys(((auto, model_type) for model_type in model_types), name)
    assert len(taken) > 1500
    others = [(auto, model_type) for auto in {auto for auto, _ in taken} for model_type in ("", '"', "bert", "gpt2")]
    for auto, model_type in (*taken, *others):
        assert data._chosen.__wrapped__(auto, model_type) == taken.get((auto, model_type))


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
        for step in data._conversions(name):
            assert Step.from_document(step, scope=None, prefix="")._pattern, name
            for operation in step.get("operations", ()):
                assert hasattr(pieces._Conversion, f"_{operation['name']}"), operation


def _generate(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FIXTURES / "architectures" / "generate.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_classes_generated_again_are_the_same():
    """One of each kind: entries are equal, and every module that is built is in the data."""
    pytest.importorskip("transformers")
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
        assert set(Tree(entry.get("modules", f"@{name}"), made["structures"]).walk()) <= there, name


@pytest.mark.exhaustive
def test_all_of_it_generated_again_is_the_same():
    _generate("--check")


# ---- the replay, against transformers


@pytest.mark.parametrize("kind", KINDS)
def test_the_replay_is_what_transformers_does(kind):
    from tests.architectures import proof

    assert proof.problems(KINDS[kind]) == []


def test_the_proof_sees_what_is_wrong(monkeypatch):
    """Each thing that the proof compares, broken on purpose."""
    from tests.architectures import proof

    whole = document()

    def broken(name, **changes):
        classes = {**whole["classes"], name: {**whole["classes"][name], **changes}}
        monkeypatch.setattr(data, "tables", lambda: {**whole, "classes": classes})
        return {problem.split(":")[0] for problem in proof.problems(name)}

    assert "embeddings" in broken("GPT2LMHeadModel", output_embeddings="transformer.wte")
    assert {"targets, None", "embeddings"} <= broken("GPT2LMHeadModel", output_embeddings="transformer.h.0.attn.c_attn")
    assert {"ties", "values"} <= broken("GPT2LMHeadModel", ties=[])
    assert {"renaming, bare", "renaming, longer"} <= broken("LlamaForCausalLM", base_model_prefix="other")
    assert {"values", "renaming, saved"} <= broken("GPTNeoXForCausalLM", submodels=[])
    assert {"values", "kinds"} <= broken("LlamaForCausalLM", modules="@GPT2LMHeadModel")


# ---- ties

TIES = [
    ("LlamaForCausalLM", {}, False),
    ("LlamaForCausalLM", {"tie_word_embeddings": True}, True),
    ("GPT2LMHeadModel", {}, True),
    ("GPT2LMHeadModel", {"tie_word_embeddings": False}, False),
    ("T5ForConditionalGeneration", {"tie_word_embeddings": False}, True),
    ("LlavaForConditionalGeneration", {"text_config": {"tie_word_embeddings": True}}, True),
    ("LlavaForConditionalGeneration", {"tie_word_embeddings": True}, True),
    ("LlavaForConditionalGeneration", {"text_config": {"tie_word_embeddings": False}}, False),
]


@pytest.mark.parametrize(("name", "entries", "tied"), TIES)
def test_what_config_json_ties(name, entries, tied):
    found = known(name, **entries)
    assert bool(found.tied()) == tied
    assert any("lm_head.weight" in group for group in found.tied()) == tied


def test_the_source_of_a_tie_comes_first():
    found = known("T5ForConditionalGeneration")
    assert found.tied() == (
        ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    )
    assert found.tied_to("lm_head.weight") == "shared.weight"
    assert found.tied_to("shared.weight") is None


def test_two_modules_are_tied_with_all_that_is_in_them():
    found = known("PPDocLayoutV3ForObjectDetection")
    files = ["model.enc_bbox_head.layers.0.weight", "model.enc_bbox_head.layers.0.bias", "model.mask_query_head.x"]
    assert found.tied(files) == (
        ("model.enc_bbox_head.layers.0.weight", "model.decoder.bbox_embed.layers.0.weight"),
        ("model.enc_bbox_head.layers.0.bias", "model.decoder.bbox_embed.layers.0.bias"),
    )


def test_a_switch_decides_which_tables_marian_ties():
    tables = {"model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "model.shared.weight"}
    (group,) = known("MarianMTModel").tied()
    assert tables < set(group)
    (group,) = known("MarianMTModel", share_encoder_decoder_embeddings=False).tied()
    assert set(group) == {"lm_head.weight", "model.decoder.embed_tokens.weight"}


def test_what_only_the_model_can_tell_is_said_so():
    found = known("ZambaForCausalLM")
    assert found.may_be_tied("model.layers.7.shared_transf.self_attn.q_proj.weight")
    assert not found.may_be_tied("model.layers.7.mamba.in_proj.weight")


def test_the_holder_of_a_tied_parameter_is_found_either_way():
    found = known("GPT2LMHeadModel")
    usual = Layout(found, {"wte.weight": (8, 4)})
    assert usual.holder("lm_head.weight") == "transformer.wte.weight"
    swapped = Layout(found, {"lm_head.weight": (8, 4)})
    assert swapped.holder("transformer.wte.weight") == "lm_head.weight"
    assert swapped.holder("transformer.wpe.weight") is None


def test_of_two_ties_for_one_parameter_the_last_counts():
    ties = (Tie("", r"box.(?![0])\d+", "box.0"), Tie("", "box", "model.box"))
    found = dataclasses.replace(known("LlamaForCausalLM"), ties=ties)
    assert found.tied_to("box.1.weight") == "model.box.1.weight"


def test_the_holder_is_found_where_a_pattern_ties():
    ties = (Tie("", r"model.layers.(?!0\.)\d+.mlp", "model.layers.0.mlp"),)
    found = dataclasses.replace(known("LlamaForCausalLM"), ties=ties)
    layout = Layout(found, {"model.layers.3.mlp.up_proj.weight": (4, 4)})
    assert layout.holder("model.layers.0.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert layout.holder("model.layers.5.mlp.up_proj.weight") == "model.layers.3.mlp.up_proj.weight"
    assert layout.holder("model.layers.5.mlp.down_proj.weight") is None


def test_a_name_that_is_converted_is_no_name_to_add_under():
    step = Step(("lm_head",), ("lm_head",), (Operation("Transpose"),))
    layout = Layout(dataclasses.replace(known("LlamaForCausalLM"), steps=(step,)), {})
    assert layout.key_for("lm_head.weight") is None


def test_a_head_that_some_other_converter_would_take_gets_no_name():
    step = Step(("lm_head",), ("model.embed_tokens",), (Operation("Conv3dToLinear"),))
    layout = Layout(dataclasses.replace(known("LlamaForCausalLM"), steps=(step,)), {})
    assert layout.key_for("model.embed_tokens.weight") == "model.embed_tokens.weight"
    assert layout.key_for("lm_head.weight") is None


def test_both_sides_of_a_tie_may_be_one_expression():
    tie = Tie("", r"encoder.layers\.(?:[^.]+\.)*weight", r"decoder.layers\.(?:[^.]+\.)*weight")
    assert tie.source_of("encoder.layers.0.mlp.weight") == "decoder.layers.0.mlp.weight"
    assert tie.source_of("encoder.norm.weight") is None
    assert tie.names is None


# ---- parts that the configuration chooses


def test_another_language_model_is_put_in_the_place_of_the_default():
    found = known("LlavaForConditionalGeneration", text_config={"model_type": "gpt2"})
    assert found.kind("model.language_model.h.0.attn.c_attn") == "Conv1D"
    assert found.kind("model.language_model.layers.0.self_attn.q_proj") is None
    experts = known("LlavaForConditionalGeneration", text_config={"model_type": "qwen2_moe"})
    key = "language_model.model.layers.0.mlp.experts.0.down_proj.weight"
    layout = Layout(experts, {key: (4, 3)})
    assert layout.names == ("model.language_model.layers.0.mlp.experts.down_proj",)
    assert found.unknown == experts.unknown == ()


def test_a_part_of_an_unknown_class_is_unknown_and_nothing_else():
    found = known("LlavaForConditionalGeneration", vision_config={"model_type": "of tomorrow"})
    assert found.is_unknown("model.vision_tower.encoder.layers.0.mlp.fc1")
    layout = Layout(found, {"vision_tower.anything": (1,), "language_model.lm_head.weight": (8, 4), "more": (1,)})
    assert layout.unexpected == ("more",)
    assert layout.names == ("lm_head.weight",)


# ---- classes

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CLASSES = [
    (LLAMA, None, "LlamaForCausalLM"),
    (LLAMA, "SequenceClassification", "LlamaForSequenceClassification"),
    ({"model_type": "gpt2"}, "CausalLM", "GPT2LMHeadModel"),
    ({"model_type": "gpt2"}, None, None),
    ({"model_type": "of tomorrow"}, "CausalLM", None),
]


@pytest.mark.parametrize(("config", "auto", "name"), CLASSES)
def test_the_class_of_a_configuration(config, auto, name):
    assert data.class_for(config, auto) == name


def test_a_class_that_the_data_lacks_is_none():
    assert data.architecture({"architectures": ["OfTomorrow"]}) is None
    assert data.architecture({}) is None


def test_numbers_at_the_end_of_a_name_are_any_numbers():
    found = known("NllbMoeForConditionalGeneration")
    assert found.kind("model.encoder.layers.3.ffn.experts.expert_200.fc1") == "Linear"
    assert found.kind("model.encoder.layers.3.ffn.experts.expert_x.fc1") is None


def test_kinds_and_targets():
    found = known("GPT2LMHeadModel")
    assert found.kind("transformer.h.0.mlp.c_fc") == "Conv1D"
    assert found.kind("lm_head") == "Linear"
    assert found.kind("transformer.wte") == "Embedding"
    assert found.kind("transformer.h.0") == "Module"
    assert found.kind("transformer.nothing") is None
    assert (found.input_embeddings, found.output_embeddings) == ("transformer.wte", "lm_head")
    assert found.is_linear_target("transformer.h.0.mlp.c_fc")
    assert not found.is_linear_target("lm_head")
    classifier = known("BertForSequenceClassification")
    assert classifier.is_linear_target("classifier")
    assert not classifier.is_linear_target("classifier", task_type="SEQ_CLS")


def test_layers_that_compute_otherwise_are_named():
    assert known("DeepseekV4ForCausalLM").computes_otherwise("model.layers.0.self_attn.o_a_proj") is not None
    assert known("LlamaForCausalLM").computes_otherwise("model.layers.0.self_attn.o_proj") is None


def test_ties_by_patterns_are_found_from_either_side():
    """A file holds the decoder's alone, or the encoder's."""
    tie = Tie("model", r"encoder.text.layers\.(?:[^.]+\.)*weight", r"decoder.layers\.(?:[^.]+\.)*weight")
    source, target = "model.decoder.layers.3.q.weight", "model.encoder.text.layers.3.q.weight"
    assert tie.source_of(target) == source
    assert tie.target_of(source) == target
    assert tie.target_of("model.decoder.norm.weight") is None
    assert tie.target_of("model.encoder.text.layers.3.q.weight") is None
    named = Tie("", "lm_head", "model.embed_tokens")
    assert named.target_of("model.embed_tokens.weight") == "lm_head.weight"
    assert Tie("", r"box.(?![0])\d+", "box.0").target_of("box.0.weight") is None


# ---- the installed transformers


@pytest.mark.long
def test_transformers_asked_about_one_configuration():
    import transformers

    config = transformers.LlavaConfig(
        text_config={"model_type": "qwen2", "num_hidden_layers": 2, "tie_word_embeddings": True},
        vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 1},
    )
    document = json.loads(config.to_json_string())
    asked = witness.ask_transformers(document, "LlavaForConditionalGeneration")
    ours = data.architecture(document, "LlavaForConditionalGeneration")
    assert asked.origin == f"transformers {transformers.__version__}"
    assert asked.parameters
    assert all(ours.stores(name) for name in asked.parameters)
    assert not asked.stores("model.language_model.layers.2.self_attn.q_proj.weight")
    assert asked.steps == ours.steps
    assert asked.tied() == ours.tied() != ()
    assert asked.kind("model.language_model.layers.1.self_attn.q_proj") == "Linear"
    assert (asked.input_embeddings, asked.output_embeddings) == (ours.input_embeddings, ours.output_embeddings)
    files = {name: (1, 1) for name in asked.parameters if name != "lm_head.weight"}
    assert Layout(asked, files).missing == ()
    del files["model.language_model.norm.weight"]
    assert Layout(asked, files).missing == ("model.language_model.norm.weight",)
    assert Layout(ours, files).missing is None


@pytest.mark.long
@pytest.mark.parametrize(("name", "config", "found"), [
    ("OfTomorrow", {}, "has no class OfTomorrow"),
    ("LlamaForCausalLM", {"hidden_size": 30, "num_attention_heads": 7}, "."),
])  # fmt: skip
def test_what_transformers_cannot_build_is_said(name, config, found):
    pytest.importorskip("transformers")
    with pytest.raises(UnprovenError, match=found):
        witness.ask_transformers(config, name)
