"""Names and rows: which parameter a key leads to, and which rows of which tensor a parameter is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.architectures import assembling
from tests.architectures.known import known
from vera_tools import installed
from vera_tools.architectures import data, pieces
from vera_tools.architectures.layout import Layout
from vera_tools.architectures.renaming import Gathered, Operation, Step, replay
from vera_tools.checkpoints import placement
from vera_tools.errors import CheckFailedError

# ---- names, as they lie on the Hub

NAMES = [
    ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("LlamaForCausalLM", "layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("LlamaModel", "model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
    ("GPT2LMHeadModel", "h.11.attn.c_attn.weight", "transformer.h.11.attn.c_attn.weight"),
    ("GPTNeoXForCausalLM", "embed_out.weight", "lm_head.weight"),
    ("BertForMaskedLM", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ("BertForMaskedLM", "embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
    (
        "ViTForImageClassification",
        "vit.encoder.layer.0.attention.attention.query.weight",
        "vit.layers.0.attention.q_proj.weight",
    ),
    (
        "LlavaForConditionalGeneration",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    ("LlavaForConditionalGeneration", "language_model.lm_head.weight", "lm_head.weight"),
    (
        "LlavaForConditionalGeneration",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
    ),
    (
        "LlavaForConditionalGeneration",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
    ),
    (
        "Qwen2_5_VLForConditionalGeneration",
        "model.layers.0.mlp.gate_proj.weight",
        "model.language_model.layers.0.mlp.gate_proj.weight",
    ),
    ("Qwen2_5_VLForConditionalGeneration", "visual.blocks.0.attn.qkv.weight", "model.visual.blocks.0.attn.qkv.weight"),
]


@pytest.mark.parametrize(("name", "key", "parameter"), NAMES)
def test_a_key_leads_to_its_parameter(name, key, parameter):
    layout = Layout(known(name), {key: (8, 4)})
    assert known(name).parameter_of(key) == parameter
    assert layout.names == (parameter,)
    (piece,) = layout.pieces(parameter)
    assert piece.is_whole
    assert (piece.key, piece.parameter) == (key, parameter)
    assert layout.pieces_of(key) == (piece,)
    assert layout.unexpected == ()


def test_keys_that_lead_nowhere():
    layout = Layout(known("LlamaForCausalLM"), {"model.layers.0.other.weight": (1,), "rotary_emb.inv_freq": (1,)})
    assert layout.unexpected == ("model.layers.0.other.weight",)
    assert layout.architecture.parameter_of("model.layers.0.other.weight") is None
    assert layout.pieces_of("rotary_emb.inv_freq") == ()
    with pytest.raises(CheckFailedError, match="the files hold no tensor for this parameter"):
        layout.pieces("lm_head.weight")


def test_of_two_keys_for_one_parameter_the_first_in_order_counts():
    layout = Layout(known("LlamaForCausalLM"), {"model.norm.weight": (4,), "norm.weight": (4,)})
    assert layout.names == ("model.norm.weight",)
    assert layout.superseded == ("norm.weight",)


@pytest.mark.parametrize(
    ("name", "shapes", "parameter", "key"),
    [
        ("GPT2LMHeadModel", {"h.0.attn.c_attn.weight": (4, 12)}, "lm_head.weight", "lm_head.weight"),
        ("LlavaForConditionalGeneration", {}, "lm_head.weight", "lm_head.weight"),
        ("BertForMaskedLM", {}, "cls.predictions.decoder.weight", "cls.predictions.decoder.weight"),
        ("LlamaForCausalLM", {}, "model.nothing.weight", None),
    ],
)
def test_the_name_under_which_a_parameter_is_added(name, shapes, parameter, key):
    assert Layout(known(name), shapes).key_for(parameter) == key


def test_where_its_own_name_would_lead_elsewhere_another_is_found():
    """HunYuan-VL takes every "model." for the language model's: its head is out of the way, a new embedding is not."""
    step = Step(("^lm_head",), ("model.norm",))
    found = dataclasses.replace(known("LlamaForCausalLM"), steps=(step,))
    layout = Layout(found, {})
    assert layout.key_for("model.norm.weight") == "model.norm.weight"
    assert layout.key_for("lm_head.weight") == "model.lm_head.weight"


def test_of_several_sources_the_longest_that_matches_counts():
    step = Step(("a", "a.b"), ("x",))
    assert step.apply("a.b.c", set()) == ("x.c", 1)
    assert step.apply("a.c", set()) == ("x.c", 0)
    assert step.apply("a_c", set()) == ("a_c", None)


def test_a_model_inside_one_of_its_own_class_is_renamed_with_it():
    class_inside = [("", "LlavaModel", "llava"), ("inner", "LlavaModel", "llava"), ("other", "ViTModel", "vit")]
    scopes = [step.scope for step in data._steps(class_inside, "")]
    assert "inner" not in scopes
    assert "other" in scopes


def test_a_guarded_step_waits_for_its_guard():
    step = Step((r"(\d+)\.norm0", r"(\d+)\.norm1"), (r"\1.norm1", r"\1.norm2"), guarded=True)

    def leads(*keys):
        found = replay(keys, [step], prefix="", stores={"0.norm1", "0.norm2"}.__contains__)
        return {key: name for name, entry in found.gathered.items() for key in entry.keys[0]}

    assert leads("0.norm1", "0.norm2") == {"0.norm1": "0.norm1", "0.norm2": "0.norm2"}
    assert leads("0.norm1", "0.norm0") == {"0.norm0": "0.norm1", "0.norm1": "0.norm2"}


# ---- parts of tensors


def test_experts_are_slices_of_one_parameter():
    shapes = {
        f"model.layers.0.mlp.experts.{expert}.{part}.weight": (3, 5)
        for expert in range(12)
        for part in ("gate_proj", "up_proj")
    }
    layout = Layout(known("Qwen2MoeForCausalLM"), shapes)
    assert layout.names == ("model.layers.0.mlp.experts.gate_up_proj",)
    (piece,) = layout.pieces_of("model.layers.0.mlp.experts.10.up_proj.weight")
    assert (piece.rows, piece.of) == (slice(None), slice(10 * 6 + 3, 11 * 6))


def test_a_converter_that_lacks_a_source_is_refused():
    layout = Layout(known("Qwen2MoeForCausalLM"), {"model.layers.0.mlp.experts.0.up_proj.weight": (3, 5)})
    with pytest.raises(CheckFailedError, match="a part of the parameter is not in the file"):
        layout.pieces("model.layers.0.mlp.experts.gate_up_proj")


def test_fused_queries_are_rows_of_one_tensor():
    key = "encoder.layers.0.attn.Wqkv.weight"
    layout = Layout(known("NomicBertModel"), {key: (12, 4)})
    assert [piece.rows for piece in layout.pieces_of(key)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert layout.pieces("layers.0.self_attn.k_proj.weight")[0].rows == slice(4, 8)
    assert layout.kind("layers.0.self_attn.k_proj") == "Linear"


def test_permuted_rows_are_numbers():
    gathered = Gathered("q.weight", Step(("wq",), ("q",), (Operation("PermuteForRope"),)), {0: ["wq.weight"]})
    (piece,) = pieces.pieces(gathered, {"wq.weight": (8, 3)}, heads=lambda part: 2)["q.weight"]
    assert piece.rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_heads_come_from_the_part_that_a_converter_names():
    name = "Kimi_K25ForConditionalGeneration"
    assert known(name, vision_config={"num_attention_heads": 6}).heads("vision_config") == 6
    assert known(name).heads("vision_config") == 16
    with pytest.raises(CheckFailedError, match="is not known"):
        known("LlamaForCausalLM").heads("vision_config")


def test_how_rows_are_divided_may_have_to_be_told():
    step = Step(("qkv",), ("q", "k"), (Operation("Split"),))
    gathered = Gathered("a.q.weight", step, {0: ["a.qkv.weight"]})
    with pytest.raises(CheckFailedError, match="follows from the model's shapes alone"):
        pieces.pieces(gathered, {"a.qkv.weight": (6, 2)}, heads=lambda part: 1)
    found = pieces.pieces(gathered, {"a.qkv.weight": (6, 2)}, heads=lambda part: 1, parameters={"a.q.weight": (4, 2)})
    assert [found[name][0].rows for name in ("a.q.weight", "a.k.weight")] == [slice(0, 4), slice(4, 6)]


@pytest.mark.parametrize(("check", "parameter", "transposed"), [
    (False, None, True), (True, (2, 3), True), (True, (3, 2), False),
])  # fmt: skip
def test_a_tensor_may_lie_the_other_way_round(check, parameter, transposed):
    arguments = (("check_dims", check), ("dim0", 0), ("dim1", 1))
    gathered = Gathered("gate.weight", Step(("g",), ("gate",), (Operation("Transpose", arguments),)), {0: ["g.weight"]})
    tensor = np.arange(6).reshape(3, 2)
    shapes = {} if parameter is None else {"gate.weight": parameter}
    parts = pieces.pieces(gathered, {"g.weight": (3, 2)}, heads=lambda part: 1, parameters=shapes)["gate.weight"]
    assert parts[0].transposed == transposed
    expected = tensor.T if transposed else tensor
    made = assembling.assemble(parts, lambda key: tensor, expected.shape)
    assert np.array_equal(made, expected)
    assert np.array_equal(assembling.take_apart(parts, lambda name: made, tensor.shape), tensor)


@pytest.mark.parametrize(("name", "asked"), [("Molmo2Model", True), ("LlamaForCausalLM", False)])
def test_transformers_is_asked_where_shapes_decide(monkeypatch, name, asked):
    """Where it is installed: else what needs a shape is refused, with the advice to install it."""
    calls = []
    monkeypatch.setattr(placement.witness, "is_there", lambda: True)
    monkeypatch.setattr(installed, "version", lambda name: "5.23.0")
    monkeypatch.setattr(placement.witness, "ask_transformers", lambda config, name: calls.append(name) or known(name))
    found = placement.known_under({"model_type": known(name).model_type, "architectures": [name]}, name)
    assert (found.needs_shapes, calls) == (asked, [name] if asked else [])


def test_whether_it_does_may_have_to_be_told():
    arguments = (("check_dims", True), ("dim0", 0), ("dim1", 1))
    gathered = Gathered("gate.weight", Step(("g",), ("gate",), (Operation("Transpose", arguments),)), {0: ["g.weight"]})
    with pytest.raises(CheckFailedError, match="follows from the model's shape alone"):
        pieces.pieces(gathered, {"g.weight": (3, 2)}, heads=lambda part: 1)
