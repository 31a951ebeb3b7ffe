"""One class of each kind that file names alone do not tell: merged models against PEFT's live ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

import vera_tools
from tests.merging import live
from vera_tools.architectures import witness
from vera_tools.errors import CheckFailedError, LoadingWarning, UsageError
from vera_tools.merging import plan, tying

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

SEQ2SEQ = {"input_ids": live.IDS, "decoder_input_ids": live.IDS}


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---- tied parameters

GEMMA = r".*language_model.*\.q_proj"
TIED = {
    "head under another name": ("BertForMaskedLM", ["query"], "word_embeddings", None),
    "embedding under another name": ("MambaForCausalLM", ["in_proj"], "embeddings", None),
    "sees": ("Gemma3ForConditionalGeneration", GEMMA, "embed_tokens", None),
    "encoder, decoder and head": ("BartForConditionalGeneration", ["q_proj"], "shared", SEQ2SEQ),
    "always tied": ("T5ForConditionalGeneration", ["q"], "shared", SEQ2SEQ),
    "always tied, the encoder's alone": ("T5ForConditionalGeneration", ["q"], "encoder.embed_tokens", SEQ2SEQ),
    "scaled where it is tied": ("SwitchTransformersForConditionalGeneration", ["q"], "lm_head", SEQ2SEQ),
}


@pytest.mark.parametrize(("name", "targets", "saved", "inputs"), TIED.values(), ids=TIED)
def test_a_saved_table_that_is_tied(name, targets, saved, inputs, tmp_path):
    live.check(name, tmp_path, inputs=inputs, target_modules=targets, modules_to_save=[saved])


def test_a_head_that_is_a_target_and_tied_beside_a_vision_tower(tmp_path):
    live.check("Gemma3ForConditionalGeneration", tmp_path, target_modules=rf"{GEMMA}|lm_head")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    held = load_file(tmp_path / "out/model.safetensors")
    assert {"lm_head.weight", "language_model.model.embed_tokens.weight"} <= set(held)


def test_biases_that_are_tied_and_trained_stay_one(tmp_path):
    live.check("BertForMaskedLM", tmp_path, target_modules=["query"], bias="all")


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_a_tied_bias_of_a_head_that_is_a_target(name, tmp_path):
    live.check(name, tmp_path, target_modules=["query", "decoder"], bias="vera_only")


UNKNOWN = {
    "both unknown": ({"architectures": ["LlamaOfTomorrow"], "model_type": "llama_of_tomorrow"}, None),
    "a known type": ({"architectures": ["CustomForCausalLM"]}, "CustomForCausalLM"),
    "code of its own": (
        {"architectures": ["CustomForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling.CustomForCausalLM"}},
        None,
    ),
    "another type": ({"model_type": "mistral"}, "LlamaForCausalLM"),
}


@pytest.mark.parametrize(("changed", "named"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_named_class_of_which_nothing_is_known(changed, named, tmp_path):
    """Its model type's bare class has no head: a table that is tied to one would be replaced under both names."""
    config = transformers.LlamaConfig(**live.LLAMA, tie_word_embeddings=True)
    model_class = live.save_base("LlamaForCausalLM", tmp_path / "base", config)
    live.train(
        model_class.from_pretrained(tmp_path / "base"),
        tmp_path / "adapter",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
    )
    edit(tmp_path / "base/config.json", **changed)
    edit(tmp_path / "adapter/adapter_config.json", auto_mapping=named and {"base_model_class": named})
    (check,) = (
        check
        for check in vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base").checkpoints[0].checks
        if check.id == "base.class"
    )
    assert (check.status, "nothing is known of" in check.message) == ("warn", True)
    with pytest.raises(CheckFailedError, match=r"nothing is known of (LlamaOf|CustomFor|LlamaFor)"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")


def test_a_tied_table_without_a_config(tmp_path):
    """Whether it is tied only config.json says."""
    config = transformers.LlamaConfig(**live.LLAMA, tie_word_embeddings=True)
    model_class = live.save_base("LlamaForCausalLM", tmp_path / "base", config)
    for folder, saved in (("table", ["embed_tokens"]), ("plain", None)):
        model = model_class.from_pretrained(tmp_path / "base", config=config)
        live.train(model, tmp_path / folder, target_modules=["q_proj"], modules_to_save=saved)
    (tmp_path / "base/config.json").unlink()
    with pytest.raises(CheckFailedError, match=r"no config\.json is there, so nothing says what is one tensor"):
        vera_tools.merge(tmp_path / "table", base=tmp_path / "base", output=tmp_path / "out")
    assert len(vera_tools.merge(tmp_path / "plain", base=tmp_path / "base", output=tmp_path / "out").merged) == 2


def test_a_class_of_which_nothing_is_known(tmp_path):
    """What is tied in it nobody knows; a linear layer that is no table is what it seems."""
    config = transformers.LlamaConfig(**live.LLAMA, tie_word_embeddings=True)
    model_class = live.save_base("LlamaForCausalLM", tmp_path / "base", config)
    path = tmp_path / "base/config.json"
    written = {**json.loads(path.read_text()), "architectures": ["LlamaOfTomorrow"], "model_type": "llama_of_tomorrow"}
    path.write_text(json.dumps(written))
    for folder, saved in (("table", ["embed_tokens"]), ("plain", None)):
        model = model_class.from_pretrained(tmp_path / "base", config=config)
        live.train(model, tmp_path / folder, target_modules=["q_proj"], modules_to_save=saved)
    with pytest.raises(CheckFailedError, match="nothing is known of LlamaOfTomorrow"):
        vera_tools.merge(tmp_path / "table", base=tmp_path / "base", output=tmp_path / "out")
    assert len(vera_tools.merge(tmp_path / "plain", base=tmp_path / "base", output=tmp_path / "out").merged) == 2


# ---- kinds


@pytest.mark.parametrize("targets", [["c_proj", "lm_head"], ["c_attn", "c_proj", "c_fc"]])
def test_square_conv1d_beside_others(targets, tmp_path):
    """PEFT saves the fan_in_fan_out of the layer that it made last."""
    live.check("GPT2LMHeadModel", tmp_path, target_modules=targets)


def test_a_square_linear_head_beside_conv1d(tmp_path):
    live.check("GPT2ForTokenClassification", tmp_path, target_modules=["c_proj", "classifier"])


def test_a_layer_that_is_never_called_stays_as_it_is(tmp_path):
    """SigLIP's pooling head: torch.nn.MultiheadAttention reads the weight of its output layer past PEFT's."""
    config = transformers.SiglipVisionConfig(**live.VISION)
    model_class = live.save_base("SiglipVisionModel", tmp_path / "base", config)
    torch.manual_seed(2)
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    adapted = live.train(
        model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj", "out_proj"]
    )
    with pytest.warns(LoadingWarning, match=r"head\.attention\.out_proj: adapted, and left as in the base"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out"))
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert {name for name in before if name.endswith("out_proj.weight")} - changed == {
        name for name in before if name.endswith("head.attention.out_proj.weight")
    }
    with torch.no_grad():
        expected = adapted.eval()(**inputs).pooler_output
        found = model_class.from_pretrained(tmp_path / "out").eval()(**inputs).pooler_output
    assert abs(found - expected).max() <= 2e-5 * abs(expected).max()


# ---- names


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_both_towers_of_a_model_whose_files_have_other_names(name, tmp_path):
    live.check(name, tmp_path, target_modules=["q_proj", "v_proj"])


def test_a_saved_head_that_stands_in_the_file_under_its_old_name(tmp_path):
    live.check("GPTNeoXForCausalLM", tmp_path, target_modules=["query_key_value"], modules_to_save=["lm_head"])
    assert "embed_out.weight" in load_file(tmp_path / "out/model.safetensors")


# ---- parts of tensors


def test_two_modules_that_are_one_tensor_in_the_file(tmp_path):
    torch.manual_seed(2)
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16)}
    live.check("Dinov2Model", tmp_path, inputs=inputs, target_modules=["gate_proj", "q_proj"])
    assert any("weights_in" in name for name in load_file(tmp_path / "out/model.safetensors"))


@pytest.mark.parametrize("saved", [["gate_proj"], ["gate_proj", "up_proj"]])
def test_saved_modules_that_are_parts_of_one_tensor_in_the_file(saved, tmp_path):
    inputs = {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
    live.check("Dinov2Model", tmp_path, inputs=inputs, target_modules=["q_proj"], modules_to_save=saved)
    assert any("weights_in" in name for name in load_file(tmp_path / "out/model.safetensors"))


# ---- adapters that contradict themselves, or the base


def without_the_head(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "classifier" not in name}, path)


def with_fewer_layers(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": [0]}))


def with_more_targets(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["query", "key"]}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_the_head, "trained, but not in the file: classifier.bias, classifier.weight"),
        (with_fewer_layers, "not in target_modules: bert.encoder.layer.1.attention.self.query"),
        (with_more_targets, "for which there are no vectors: bert.encoder.layer.0.attention.self.key"),
    ],
)
def test_what_verify_says_peft_would_load_otherwise_is_refused(change, words, tmp_path):
    model_class = live.save_base("BertForSequenceClassification", tmp_path / "base")
    model = model_class.from_pretrained(tmp_path / "base")
    live.train(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS")
    change(tmp_path / "adapter")
    with pytest.raises(CheckFailedError, match=words):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base")
    assert report.exit_code == 1


# ---- a vocabulary that was resized


def train_resized(tmp_path, saved, tied):
    config = transformers.LlamaConfig(**live.LLAMA, tie_word_embeddings=tied)
    model_class = live.save_base("LlamaForCausalLM", tmp_path / "base", config)
    model = model_class.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    options = {"target_modules": ["q_proj"], "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    return model_class, live.outputs(live.train(model, tmp_path / "adapter", **options))


@pytest.mark.parametrize(("saved", "tied"), [(["embed_tokens", "lm_head"], False), (None, True), (None, False)])
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_tables_of_a_resized_vocabulary(saved, tied, tmp_path):
    model_class, expected = train_resized(tmp_path, saved, tied)
    with pytest.raises(CheckFailedError, match="merge with --resize-vocabulary"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    options = {"resize_vocabulary": True, "verify": True}
    vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", **options)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 70
    assert "--resize-vocabulary" in json.loads((tmp_path / "out/vera_merge.json").read_text())["redo"]
    found = live.outputs(model_class.from_pretrained(tmp_path / "out"))
    assert found.shape == expected.shape == (1, 8, 70)
    assert abs(found - expected).max() <= 2e-5 * abs(expected).max()


def test_a_resized_table_that_is_not_in_the_adapter(tmp_path):
    train_resized(tmp_path, ["embed_tokens", "lm_head"], tied=False)
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if "lm_head" not in name}, path)
    with pytest.raises(CheckFailedError, match=r"not hold every table .*expected a saved tensor of 70 rows"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", resize_vocabulary=True)


def test_the_adapters_own_tokenizer(tmp_path):
    model_class = live.save_base("LlamaForCausalLM", tmp_path / "base")
    live.train(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj"])
    arguments = {"base": tmp_path / "base", "overwrite": True, "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="no adapter brings a tokenizer"):
        vera_tools.merge(tmp_path / "adapter", tokenizer="adapter", **arguments)
    for folder, text in (("base", "old"), ("adapter", "new")):
        (tmp_path / folder / "chat_template.jinja").write_text(text)
    (tmp_path / "base/tokenizer.json").write_text("{}")
    with pytest.warns(LoadingWarning, match=r"a tokenizer of its own \(chat_template.jinja\)"):
        report = vera_tools.merge(tmp_path / "adapter", **arguments)
    assert "--tokenizer adapter" in report.notes[0]
    assert (tmp_path / "out/chat_template.jinja").read_text() == "old"
    report = vera_tools.merge(tmp_path / "adapter", tokenizer="adapter", **arguments)
    assert report.notes == ()
    assert (tmp_path / "out/chat_template.jinja").read_text() == "new"
    assert not (tmp_path / "out/tokenizer.json").exists()


# ---- the proof that the result loads


def prepared(tmp_path, **options):
    model_class = live.save_base("BertForMaskedLM", tmp_path / "base")
    options = {"target_modules": ["query"], "modules_to_save": ["word_embeddings"], **options}
    live.train(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **options)
    return {"base": tmp_path / "base", "output": tmp_path / "out", "verify": True}


def test_what_is_proven_of_loading(tmp_path):
    report = vera_tools.merge(tmp_path / "adapter", **prepared(tmp_path))
    found = report.to_dict()["loading"]
    assert (found["class"], found["known_by"]) == ("BertForMaskedLM", "data of transformers 5.23.0")
    assert found["parameters"] == len(transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").state_dict())
    assert found["asked"] is None


@pytest.mark.long
@pytest.mark.usefixtures("asks")
def test_the_installed_transformers_is_asked(tmp_path, monkeypatch):
    arguments = prepared(tmp_path)
    report = vera_tools.merge(tmp_path / "adapter", **arguments)
    assert report.loading.asked == f"transformers {transformers.__version__}"
    answer = witness.ask_transformers(json.loads((tmp_path / "out/config.json").read_text()), "BertForMaskedLM")
    name = "cls.predictions.decoder.weight"
    changes = {
        "tensors unexpected": {key: shape for key, shape in answer.parameters.items() if key != name},
        "loads no tensor of this shape": {**answer.parameters, name: (65, 32)},
    }
    for words, parameters in changes.items():
        other = dataclasses.replace(answer, parameters=parameters)
        monkeypatch.setattr(witness, "ask_transformers", lambda *_, other=other: other)
        with pytest.raises(CheckFailedError, match=words):
            vera_tools.merge(tmp_path / "adapter", **{**arguments, "output": tmp_path / "other"})
        assert not (tmp_path / "other").exists()


def test_a_plan_that_leaves_a_tied_parameter_out_is_found(tmp_path, monkeypatch):
    arguments = prepared(tmp_path)
    real = tying.untying
    monkeypatch.setattr(plan, "untying", lambda *inputs: dataclasses.replace(real(*inputs), added={}))
    with pytest.raises(CheckFailedError, match="the result would lack a parameter"):
        vera_tools.merge(tmp_path / "adapter", **arguments)
    monkeypatch.setattr(plan, "untying", lambda *inputs: dataclasses.replace(real(*inputs), added={}, config=None))
    with pytest.raises(CheckFailedError, match="would load another tensor than was planned"):
        vera_tools.merge(tmp_path / "adapter", **arguments)
