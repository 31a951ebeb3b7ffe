"""What PEFT itself finds of an adapter when it loads it on its base, and what `verify` says of that beforehand."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

import vera_tools
from tests.merging import live
from vera_tools.architectures import data
from vera_tools.checkpoints.targeting import Targeting
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.nn import VeraModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

FILE = "adapter_model.safetensors"


def make(name, folder, config=None, **options):
    """A base, an adapter of PEFT's on it, and what the live model says."""
    model_class = live.save_base(name, folder / "base", config)
    model = model_class.from_pretrained(folder / "base")
    return model_class, live.outputs(live.train(model, folder / "adapter", **options))


def peft(model_class, folder, adapter="adapter"):
    return live.outputs(PeftModel.from_pretrained(model_class.from_pretrained(folder / "base"), folder / adapter))


def rename(folder, old, new):
    tensors = load_file(folder / "adapter" / FILE)
    (folder / "renamed").mkdir()
    shutil.copy(folder / "adapter/adapter_config.json", folder / "renamed")
    renamed = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "renamed" / FILE, metadata={"format": "pt"})
    return renamed


def said(report, name):
    (found,) = (check for check in report.checkpoints[0].checks if check.id == name)
    return found


# ---- names of no module

LLAVA = r".*language_model.*\.q_proj"
NAMES = {
    "an older class that sees": (
        "LlavaForConditionalGeneration",
        LLAVA,
        "model.language_model",
        "language_model.model",
    ),
    "another wrapper inside": ("LlamaForCausalLM", ["q_proj"], "model.layers", "model.module.layers"),
    "around the model": ("LlamaForCausalLM", ["q_proj"], "model.model.layers", "model.ema_model.model.layers"),
}


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize(("name", "targets", "old", "new"), NAMES.values(), ids=NAMES)
def test_names_that_peft_does_not_find(name, targets, old, new, task, tmp_path):
    model_class, expected = make(name, tmp_path, target_modules=targets, task_type=task)
    rename(tmp_path, old, new)
    untrained = live.outputs(model_class.from_pretrained(tmp_path / "base"))
    assert abs(peft(model_class, tmp_path) - expected).max() == 0
    assert abs(peft(model_class, tmp_path, "renamed") - untrained).max() == 0  # PEFT loads, and drops all of it
    assert vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base", require_loads="peft>=0.21").exit_code == 0
    report = vera_tools.verify(tmp_path / "renamed", base=tmp_path / "base")
    assert report.exit_code == 1
    assert said(report, "base.class").status == "fail"
    assert not any(load.exact for load in report.checkpoints[0].loads)
    with pytest.raises(CheckFailedError, match="are missing from the checkpoint"):
        VeraModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "renamed")
    with pytest.raises(CheckFailedError, match="no LoRA that PEFT loads"):
        vera_tools.to_lora(tmp_path / "renamed", tmp_path / "lora", base=tmp_path / "base")
    vera_tools.merge(tmp_path / "renamed", base=tmp_path / "base", output=tmp_path / "out", verify=True)
    merged = live.outputs(model_class.from_pretrained(tmp_path / "out"))
    assert abs(merged - expected).max() <= 2e-5 * abs(expected).max()


def test_names_that_the_bases_tensors_alone_explain(tmp_path):
    """No class has them, and the base does not name its own: the adapter does."""
    model_class, _ = make("LlamaForCausalLM", tmp_path, target_modules=["q_proj"])
    config = json.loads((tmp_path / "base/config.json").read_text())
    del config["architectures"]
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    rename(tmp_path, "model.model.layers", "model.wrapped_net.layers")
    untrained = live.outputs(model_class.from_pretrained(tmp_path / "base"))
    assert abs(peft(model_class, tmp_path, "renamed") - untrained).max() == 0
    report = vera_tools.verify(tmp_path / "renamed", base=tmp_path / "base")
    assert (report.exit_code, said(report, "base.class").status) == (1, "fail")


def test_names_of_the_bare_model(tmp_path):
    """Around that PEFT finds them, around the class that the task is for it does not: nobody can know."""
    make("LlamaForCausalLM", tmp_path, target_modules=["q_proj"], task_type="CAUSAL_LM")
    rename(tmp_path, "model.model.layers", "model.layers")
    report = vera_tools.verify(tmp_path / "renamed", base=tmp_path / "base")
    assert (report.exit_code, said(report, "base.class").status) == (0, "warn")
    assert "the adapter has the names of LlamaModel" in said(report, "base.class").message
    assert vera_tools.verify(tmp_path / "renamed", base=tmp_path / "base", require_loads="peft>=0.21").exit_code == 1
    lora = vera_tools.to_lora(tmp_path / "renamed", tmp_path / "lora", base=tmp_path / "base")
    assert any("around a LlamaForCausalLM, PEFT drops it in silence" in note for note in lora.notes)


# ---- saved modules

NESTED = {
    "one entry": ("BertForSequenceClassification", ["query"], ["embeddings"]),
    "two entries": ("LlamaForCausalLM", ["q_proj"], ["mlp", "up_proj"]),
}


@pytest.mark.parametrize(("name", "targets", "saved"), NESTED.values(), ids=NESTED)
def test_saved_modules_inside_each_other(name, targets, saved, tmp_path):
    model_class, _ = make(name, tmp_path, target_modules=targets, modules_to_save=saved)
    with pytest.raises(KeyError):
        peft(model_class, tmp_path)
    for base in (None, tmp_path / "base"):
        report = vera_tools.verify(tmp_path / "adapter", base=base)
        assert (report.exit_code, said(report, "tensors.saved").status) == (1, "fail")
        assert not any(load.exact for load in report.checkpoints[0].loads)
    with pytest.raises(CheckFailedError, match=r"modules_to_save means .* and, inside it, "):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    with pytest.raises(CheckFailedError, match=r"modules_to_save means .* and, inside it, "):
        vera_tools.to_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    with pytest.raises(UsageError, match=r"modules_to_save means .* and this module inside it"):
        VeraModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_second_adapter_that_saves_more_of_a_saved_module(tmp_path):
    options = {"target_modules": ["query"]}
    model_class, _ = make("BertForSequenceClassification", tmp_path, **options, modules_to_save=["bert.embeddings"])
    other = model_class.from_pretrained(tmp_path / "base")
    live.train(other, tmp_path / "nested", **options, modules_to_save=["embeddings"])
    model = VeraModel.from_pretrained(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"modules_to_save means bert\.embeddings and this module inside it"):
        model.load_adapter(tmp_path / "nested", "second")


def test_many_entries_mean_what_few_do():
    few = ["mlp", "up_proj", "model.norm", "d"]
    many = [*few, *(f"other{number}" for number in range(20))]
    rules = [Targeting(frozenset(), None, None, (), tuple(names), "") for names in (few, many)]
    for module in ("model.mlp", "model.mlp.up_proj", "xup_proj", "model.norm", "norm", "", "head", "mlp.x"):
        assert rules[0].means(module) == rules[1].means(module) == module.endswith(tuple(few))
    assert rules[1].nested("model.mlp.up_proj.weight") == ("model.mlp", "model.mlp.up_proj")
    assert rules[1].nested("model.mlp.gate_proj.weight") is None


@pytest.mark.parametrize("name", ["lm_head.modules_to_save.weight", "lm_head.modules_to_save.default.weight"])
def test_a_saved_module_under_the_name_that_it_has_inside_its_wrapper(name, tmp_path):
    model_class, _ = make("LlamaForCausalLM", tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    rename(tmp_path, "lm_head.weight", name)
    with pytest.raises(KeyError):
        peft(model_class, tmp_path, "renamed")
    report = vera_tools.verify(tmp_path / "renamed")
    assert (report.exit_code, said(report, "tensors.saved").status) == (1, "fail")
    assert name in said(report, "tensors.saved").message


def test_an_entry_that_means_no_module(tmp_path):
    saved = ["wte", "embed_tokens", "lm_head"]
    model_class, expected = make("LlamaForCausalLM", tmp_path, target_modules=["q_proj"], modules_to_save=saved)
    assert abs(peft(model_class, tmp_path) - expected).max() == 0
    assert vera_tools.verify(tmp_path / "adapter").exit_code == 1  # without a base nobody knows that it has none
    report = vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base")
    assert (report.exit_code, said(report, "tensors.saved").status) == (0, "warn")
    vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", verify=True)
    merged = live.outputs(model_class.from_pretrained(tmp_path / "out"))
    assert abs(merged - expected).max() <= 2e-5 * abs(expected).max()


def test_what_may_be_a_module():
    llama = data.architecture({"model_type": "llama"}, "LlamaForCausalLM")
    assert llama is not None
    there = ("lm_head", "layers.1.mlp", "mlp", "_proj", "model", "1.mlp")
    assert [name for name in (*there, "wte", "layer.1.mlp", "mlps") if llama.may_have_module(name)] == list(there)


def test_a_tied_head_that_is_not_in_the_file_is_missed(tmp_path):
    """The base's file has no such tensor, and the class has such a module."""
    tied = transformers.LlamaConfig(**live.LLAMA, tie_word_embeddings=True)
    saved = ["embed_tokens", "lm_head"]
    model_class, _ = make("LlamaForCausalLM", tmp_path, tied, target_modules=["q_proj"], modules_to_save=saved)
    tensors = load_file(tmp_path / "adapter" / FILE)
    save_file({name: t for name, t in tensors.items() if "lm_head" not in name}, tmp_path / "adapter" / FILE)
    with pytest.raises(KeyError):
        peft(model_class, tmp_path)
    report = vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base")
    assert (report.exit_code, said(report, "tensors.saved").status) == (1, "fail")


# ---- tables that PEFT saves unasked

TABLES = {
    "a head that is not called so": ("BertForMaskedLM", ["query"], True),
    "an embedding that is not called so": ("MambaForCausalLM", ["x_proj"], True),
    "a head with a bias": ("PhiForCausalLM", ["q_proj", "lm_head"], False),
}


@pytest.mark.parametrize(("name", "targets", "resized"), TABLES.values(), ids=TABLES)
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_tables_that_peft_saves_unasked(name, targets, resized, tmp_path):
    model_class = live.save_base(name, tmp_path / "small")
    model = model_class.from_pretrained(tmp_path / "small")
    if resized:
        model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "base")
    expected = live.outputs(live.train(model, tmp_path / "adapter", target_modules=targets))
    assert abs(peft(model_class, tmp_path) - expected).max() == 0
    for base in (None, tmp_path / "base"):
        assert vera_tools.verify(tmp_path / "adapter", base=base).exit_code == 0
    vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", verify=True)
    merged = live.outputs(model_class.from_pretrained(tmp_path / "out"))
    assert abs(merged - expected).max() <= 2e-5 * abs(expected).max()
    vera_tools.to_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")
    if resized:
        vera_tools.merge(
            tmp_path / "adapter",
            base=tmp_path / "small",
            output=tmp_path / "grown",
            resize_vocabulary=True,
            verify=True,
        )
        grown = live.outputs(model_class.from_pretrained(tmp_path / "grown"))
        assert grown.shape == expected.shape


def test_another_tensor_is_no_table_of_this_class(tmp_path):
    make("LlamaForCausalLM", tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / FILE
    tensors = load_file(path)
    tensors["base_model.model.cls.predictions.decoder.bias"] = tensors["base_model.vera_A"][0].clone()  # BERT's
    save_file(tensors, path, metadata={"format": "pt"})
    report = vera_tools.verify(tmp_path / "adapter", base=tmp_path / "base")
    assert (report.exit_code, said(report, "tensors.unexpected").status) == (1, "fail")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
