"""`convert --to gguf`: read by gguf's own reader, and with llama.cpp against the logits of PEFT (`slow`)."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

import vera_tools
from tests.adapters import BERT, CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit, edit_json, files_of
from tests.command import run_cli, run_json
from tests.converting import llama_cpp
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, FormatError, UnprovenError, UsageError
from vera_tools.files.safetensors import TensorFile

BASE = base_of(KEPT)


@pytest.fixture
def reader():
    return pytest.importorskip("gguf").GGUFReader


def tensors(found):
    return {tensor.name: np.array(tensor.data) for tensor in found.tensors}


def value(found, key):
    return found.get_field(key).contents()


def test_what_is_written(reader, tmp_path):
    """The LoRA of `to_lora` under llama.cpp's names; q's and k's rows as its Llama has them."""
    report = vera_tools.to_gguf(CHECKPOINTS / KEPT, tmp_path / "a.gguf", base=BASE)
    vera_tools.to_lora(CHECKPOINTS / KEPT, tmp_path / "lora", base=BASE)
    found = reader(tmp_path / "a.gguf")
    assert [value(found, key) for key in ("general.architecture", "general.type", "adapter.type")] == [
        "llama", "adapter", "lora"
    ]  # fmt: skip
    assert value(found, "adapter.lora.alpha") == report.r == 16
    assert json.loads(value(found, "vera_tools"))["recipe"]["name"] == "mt19937-f32-fused"
    got, expected = tensors(found), {}
    heads = {"q_proj": ("attn_q", 4), "k_proj": ("attn_k", 2), "v_proj": ("attn_v", 0), "o_proj": ("attn_output", 0)}
    heads |= {"gate_proj": ("ffn_gate", 0), "up_proj": ("ffn_up", 0), "down_proj": ("ffn_down", 0)}
    with TensorFile.open(tmp_path / "lora" / "adapter_model.safetensors") as file:
        for name in file.tensors:
            *_, number, _, module, matrix, _ = name.split(".")
            short, count = heads[module]
            rows = file.read(name)
            turned = llama_cpp.halves_in_turn(rows, count) if count and matrix == "lora_B" else rows
            expected[f"blk.{number}.{short}.weight.{matrix.lower()}"] = turned
    assert got.keys() == expected.keys()
    assert any("attn_q" in name for name in got)
    for name, tensor in expected.items():
        assert np.array_equal(got[name], tensor), name
    assert report.output_bytes == (tmp_path / "a.gguf").stat().st_size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower(reader, tmp_path, dtype):
    vera_tools.to_gguf(CHECKPOINTS / KEPT, tmp_path / "wide.gguf", base=BASE)
    code, document = run_json(
        "convert", CHECKPOINTS / KEPT, "--to", "gguf", "--base", BASE, "--dtype", dtype, "-o", tmp_path / "a.gguf"
    )
    assert (code, document["gguf"]["dtype"], document["gguf"]["architecture"]) == (0, dtype, "llama")
    wide, narrow = tensors(reader(tmp_path / "wide.gguf")), tensors(reader(tmp_path / "a.gguf"))
    assert wide.keys() == narrow.keys()
    for name, tensor in narrow.items():
        if dtype == "bfloat16":
            tensor = (tensor.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert np.allclose(tensor.astype(np.float32), wide[name], rtol=2**-8, atol=1e-6)


def test_an_assumption_stays_one(reader, tmp_path):
    with pytest.warns(AssumedRecipeWarning):
        report = vera_tools.to_gguf(CHECKPOINTS / SEED_ONLY, tmp_path / "a.gguf", base=base_of(SEED_ONLY))
    assert report.to_dict()["assumed"] is True
    assert json.loads(value(reader(tmp_path / "a.gguf"), "vera_tools"))["assumed"] is True
    with pytest.raises(UnprovenError):
        vera_tools.to_gguf(CHECKPOINTS / SEED_ONLY, tmp_path / "b.gguf", base=base_of(SEED_ONLY), strict=True)
    assert not (tmp_path / "b.gguf").exists()


def test_what_was_not_tried_is_refused_by_name(reader, tmp_path, checkpoint):
    folder = checkpoint(KEPT)
    base = shutil.copytree(BASE, tmp_path / "base")
    out = tmp_path / "a.gguf"
    with pytest.raises(CheckFailedError, match=r"not tried.*expected LlamaForCausalLM or .*BertForSequence"):
        vera_tools.to_gguf(CHECKPOINTS / BERT, out, base=base_of(BERT))
    edit_json(base / "config.json", lambda config: config.update(architectures=["GemmaForCausalLM"]))
    with pytest.raises(CheckFailedError, match="GemmaForCausalLM"):
        vera_tools.to_gguf(folder, out, base=base)
    edit_json(
        base / "config.json", lambda config: config.update(architectures=["LlamaForCausalLM"], num_hidden_layers=1)
    )
    with pytest.raises(CheckFailedError, match=r"layers\.1.*no layer that llama\.cpp's LoRA was tried on"):
        vera_tools.to_gguf(folder, out, base=base)
    edit_json(base / "config.json", lambda config: config.update(num_hidden_layers=2, num_attention_heads=3))
    with pytest.raises(CheckFailedError, match=r"heads.*expected a multiple of 6, found 64"):
        vera_tools.to_gguf(folder, out, base=base)
    edit_json(base / "config.json", lambda config: config.update(num_attention_heads="4"))
    with pytest.raises(FormatError, match="num_attention_heads"):
        vera_tools.to_gguf(folder, out, base=base)
    edit_json(folder / "adapter_config.json", lambda config: config.update(bias="vera_only"))
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    edit(folder, lambda tensors: tensors.__setitem__(name, np.zeros(64, np.float32)))
    with pytest.raises(CheckFailedError, match="no biases and no saved modules"):
        vera_tools.to_gguf(folder, out, base=BASE)
    assert not out.exists()


def test_what_goes_with_it(reader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = CHECKPOINTS / KEPT
    for arguments in (
        ("-o", "a.gguf"), ("--base", BASE), ("--base", BASE, "--in-place"), ("--base", BASE, "-R", "--out-dir", "x"),
        ("--base", BASE, "-o", "a.gguf", "--dtype", "float64"), ("--base", BASE, "-o", adapter),
    ):  # fmt: skip
        assert run_cli("convert", adapter, "--to", "gguf", *arguments).returncode == 2
    assert files_of(tmp_path) == {}
    result = run_cli("convert", adapter, "--to", "gguf", "--base", BASE, "-o", "a.gguf")
    assert result.returncode == 0
    assert result.stdout.startswith("a.gguf: llama.cpp LoRA of rank 16, alpha 16, ")
    assert run_cli("convert", adapter, "--to", "gguf", "--base", BASE, "-o", "a.gguf").returncode == 2
    assert run_cli("convert", adapter, "--to", "gguf", "--base", BASE, "-o", "a.gguf", "--overwrite").returncode == 0


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"needs the gguf package; pip install 'vera-tools\[gguf\]'"):
        vera_tools.to_gguf(CHECKPOINTS / KEPT, tmp_path / "a.gguf", base=BASE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_llama_cpp_computes_what_peft_computes(tmp_path, name):
    """On every linear layer of attention and MLP, with heads in groups; and the base alone, which shows the measure."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp_py_sync")
    peft, torch, transformers = (pytest.importorskip(module) for module in ("peft", "torch", "transformers"))
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    if name in ("Llama", "Qwen2"):
        config.head_dim = 16
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "base")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.VeraConfig(r=8, target_modules=layers, projection_prng_key=7))
    for key, parameter in adapted.named_parameters():
        if "vera_lambda" in key:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    ids = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38]
    with torch.no_grad():
        with_adapter = adapted(torch.tensor([ids])).logits[0].numpy()
        with adapted.disable_adapter():
            without = adapted(torch.tensor([ids])).logits[0].numpy()
    llama_cpp.write_base(tmp_path / "base", tmp_path / "base.gguf")
    vera_tools.to_gguf(tmp_path / "adapter", tmp_path / "adapter.gguf", base=tmp_path / "base")
    far = np.abs(with_adapter - without).max()
    assert np.abs(llama_cpp.logits(tmp_path / "base.gguf", ids) - without).max() < 1e-4 * np.abs(without).max()
    found = llama_cpp.logits(tmp_path / "base.gguf", ids, tmp_path / "adapter.gguf")
    assert np.abs(found - with_adapter).max() < 1e-4 * np.abs(with_adapter).max()
    assert far > 0.1 * np.abs(without).max()
