"""Merged models of shapes that fixtures/ does not have, against PEFT's own forward pass before it merges anything."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

import vera_tools
from vera_tools.errors import FormatError, LoadingWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

FILE = "adapter_model.safetensors"
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        **options,
    )


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, pad_token_id=0
    )


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


def adapt(model, folder, **options):
    """Adapt a model by PEFT, give every vector a value of its own, save it, and return its logits."""
    adapted = get_peft_model(model, VeraConfig(r=8, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return logits(adapted)


def check(model_class, base, tmp_path, expected, *, tolerance=2e-5, **load):
    vera_tools.merge(tmp_path / "adapter", base=base, output=tmp_path / "out", verify=True)
    merged = model_class.from_pretrained(tmp_path / "out", **load)
    before = logits(model_class.from_pretrained(base, **load))
    assert np.abs(logits(merged) - expected).max() <= tolerance
    assert np.abs(before - expected).max() >= 20 * tolerance


def test_square_conv1d(tmp_path):
    model = transformers.GPT2LMHeadModel(gpt2())
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["attn.c_proj", "mlp.c_proj"], fan_in_fan_out=True)
    check(transformers.GPT2LMHeadModel, tmp_path / "base", tmp_path, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_layer_without_rows(dtype, tmp_path):
    """MobileBERT's head projects to what its embeddings are narrower by: to nothing, where they are not."""
    torch.manual_seed(0)
    config = transformers.MobileBertConfig(
        vocab_size=64, hidden_size=32, embedding_size=32, intra_bottleneck_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    model = transformers.MobileBertForMaskedLM(config)
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["query", "value", "cls.predictions.dense"])
    base, out = tmp_path / "base", tmp_path / "out"
    vera_tools.merge(tmp_path / "adapter", base=base, output=out, verify=True, dtype=dtype)
    if dtype is None:
        merged = transformers.MobileBertForMaskedLM.from_pretrained(out)
        assert np.abs(logits(merged) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gpt2_whose_base_was_saved_without_its_head(tmp_path):
    model = transformers.GPT2LMHeadModel(gpt2())
    model.transformer.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    check(transformers.GPT2LMHeadModel, tmp_path / "base", tmp_path, expected)


def test_an_adapter_of_the_bare_model_on_a_base_with_a_head(tmp_path):
    model = transformers.LlamaForCausalLM(llama())
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model.model, VeraConfig(r=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lambda" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    check(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path, logits(model))


def test_a_classifier_on_a_base_without_one(tmp_path):
    config = llama(num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    model.model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    with pytest.warns(LoadingWarning, match="the base has no score"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", verify=True)
    merged = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert np.abs(logits(merged) - expected).max() <= 2e-5


@pytest.mark.parametrize(
    ("task", "ending", "labels"),
    [
        ("SEQ_CLS", "ForSequenceClassification", 3),
        ("TOKEN_CLS", "ForTokenClassification", 5),
        ("QUESTION_ANS", "ForQuestionAnswering", 2),
    ],
)
@pytest.mark.parametrize("base_class", ["LlamaForCausalLM", "BertModel"])
def test_what_a_new_head_needs_in_the_config(base_class, task, ending, labels, tmp_path):
    family = "Bert" if base_class == "BertModel" else "Llama"
    model_class = getattr(transformers, family + ending)
    model = model_class(llama(num_labels=labels)) if family == "Llama" else bert(model_class, num_labels=labels)
    trunk = getattr(model, model.base_model_prefix)
    if base_class == "LlamaForCausalLM":
        base = transformers.LlamaForCausalLM(llama())
        base.model.load_state_dict(trunk.state_dict())
    else:  # with the pooler that a classifier needs, and the trunk's names without their prefix
        base = transformers.BertModel(model.config)
        base.config.num_labels = 2
        base.load_state_dict(trunk.state_dict(), strict=False)
    base.save_pretrained(tmp_path / "base")
    targets = ["q_proj"] if family == "Llama" else ["query"]
    adapted = get_peft_model(model, VeraConfig(r=8, target_modules=targets, task_type=task))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lambda" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.warns(LoadingWarning) as caught:
        report = vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    assert [str(warning.message) for warning in caught] == [f"{tmp_path / 'out'}: {note}" for note in report.notes]
    settings = {key: json.loads(value) for key, value in re.findall(r'"(\w+)": (\[[^]]*\]|\d+)', report.notes[0])}
    assert settings["architectures"] == [family + ending]
    assert settings.get("num_labels", 2) == labels
    path = tmp_path / "out/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    # A class that gives the trunk another name is told so.
    mapping = json.loads(report.notes[1].partition("key_mapping=")[2].rstrip(")")) if report.notes[1:] else None
    assert (mapping is not None) == (model_class is transformers.LlamaForQuestionAnswering)
    loaded = getattr(transformers, settings["architectures"][0])
    merged, info = loaded.from_pretrained(tmp_path / "out", output_loading_info=True, key_mapping=mapping)
    assert merged.config.num_labels == labels
    assert not info["missing_keys"]
    ids = torch.tensor(IDS)
    with torch.no_grad():
        found, expected = merged.eval()(ids), adapted.eval()(ids)
    assert (found[0] - expected[0]).abs().max() <= 2e-5


def test_nothing_is_said_of_a_head_that_the_config_describes(tmp_path):
    model = transformers.LlamaForSequenceClassification(llama(num_labels=3))
    model.model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    adapt(model, tmp_path / "adapter", target_modules=["q_proj"], task_type="SEQ_CLS")
    report = vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out")
    assert report.added == ("score.weight",)
    assert report.notes == ()


def bert(model_class, **options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, **options
    )
    return model_class(config)


def test_all_biases_and_a_saved_head(tmp_path):
    model = bert(transformers.BertForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["query"], task_type="SEQ_CLS", bias="all")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    wrapped = {n for n in saved if ".modules_to_save." in n or ".original_module." in n}
    assert wrapped, "PEFT no longer saves these biases twice"
    check(transformers.BertForSequenceClassification, tmp_path / "base", tmp_path, expected)
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "peft"))
    assert set(ours) == set(theirs)
    save_file({n: t for n, t in saved.items() if n != "base_model.model.classifier.bias"}, tmp_path / "adapter" / FILE)
    with pytest.raises(FormatError, match="itself missing"):
        vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "other")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_output_layer(tied, tmp_path):
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    check(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_embedding(tied, tmp_path):
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    check(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path, expected)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_output_layer(tied, tmp_path):
    model = transformers.LlamaForCausalLM(llama(tie_word_embeddings=tied))
    model.save_pretrained(tmp_path / "base")
    expected = adapt(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    check(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 2.0**-6)])
def test_half_precision_bases_as_peft_merges_them(dtype, tolerance, tmp_path):
    transformers.LlamaForCausalLM(llama()).to(dtype).save_pretrained(tmp_path / "base")
    load = {"dtype": dtype}
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", **load)
    adapt(model, tmp_path / "adapter", target_modules="all-linear")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", **load)
    expected = logits(PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload())
    check(transformers.LlamaForCausalLM, tmp_path / "base", tmp_path, expected, tolerance=tolerance, **load)


def test_several_adapters_as_peft_merges_them(tmp_path):
    for n in range(2):
        model = transformers.LlamaForCausalLM(llama())
        model.save_pretrained(tmp_path / "base")
        torch.manual_seed(n)
        adapted = get_peft_model(model, VeraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lambda" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / f"a{n}")
    folders = [tmp_path / "a0", tmp_path / "a1"]
    vera_tools.merge(folders, base=tmp_path / "base", output=tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(model, folders[0], adapter_name="zero")
    peft.load_adapter(folders[1], adapter_name="one")
    expected = logits(peft.merge_and_unload(adapter_names=["zero", "one"]))
    found = logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    assert np.abs(found - expected).max() <= 2e-5
