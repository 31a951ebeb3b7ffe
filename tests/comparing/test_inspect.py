"""`inspect`: counts against the tensors themselves, the paper's formula, and real LoRA."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vera_tools
from tests.adapters import CHECKPOINTS, GPT2, KEPT, NAMES, PAIR, SEED_ONLY, base_of, set_config
from tests.command import plain, run_cli, run_json, run_terminal
from tests.peers import base_model
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.files import safetensors

pytestmark = pytest.mark.capability


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_file(name):
    code, document = run_json("inspect", CHECKPOINTS / name, "--base", base_of(name))
    assert code == 0
    path = CHECKPOINTS / name / "adapter_model.safetensors"
    with safetensors.TensorFile.open(path) as file:
        sizes = {tensor: info.size for tensor, info in file.tensors.items()}
    pair = sum(size for tensor, size in sizes.items() if tensor in PAIR)
    assert document["parameters"]["trainable"] == sum(sizes.values()) - pair
    if document["projections_stored"]:
        assert document["parameters"]["projections"] == pair
    assert document["bytes"]["file"] == path.stat().st_size
    assert len(document["tensors"]) == len(sizes)
    assert document["in_max"] == max(layer["in_features"] for layer in document["layers"])


@pytest.mark.parametrize("name", [KEPT, GPT2])
def test_lora_count_is_what_peft_makes(name):
    import peft

    config = VeraConfig.from_pretrained(CHECKPOINTS / name)
    lora = peft.get_peft_model(
        base_model(name),
        peft.LoraConfig(r=config.r, target_modules=config.target_modules, fan_in_fan_out=config.fan_in_fan_out),
    )
    trainable, _ = lora.get_nb_trainable_parameters()
    assert vera_tools.inspect(CHECKPOINTS / name, base=base_of(name)).lora_parameters == trainable


def test_formula_of_the_paper_for_equal_shapes(tmp_path):
    """Table 1: L_tuned * (d_model + r)."""
    layers, d_model, r = 6, 40, 12
    tensors = {}
    for n in range(layers):
        prefix = f"base_model.model.layers.{n}.q_proj.vera_lambda_"
        tensors[prefix + "b"] = np.ones(d_model, np.float32)
        tensors[prefix + "d"] = np.ones(r, np.float32)
    safetensors.save(tmp_path / "adapter_model.safetensors", tensors, {})
    VeraConfig(r=r, target_modules=["q_proj"], save_projection=False).save_pretrained(tmp_path)
    report = vera_tools.inspect(tmp_path)
    assert report.vector_parameters == layers * (d_model + r)
    assert report.shape is None
    assert report.lora_parameters is None
    assert report.sizes["with_projections"] is None


def test_manifest_tells_in_features_without_the_base(checkpoint):
    folder = checkpoint(KEPT)
    assert vera_tools.inspect(folder).lora_parameters is None
    vera_tools.record(folder, base=base_of(KEPT))
    assert vera_tools.inspect(folder).lora_parameters == vera_tools.inspect(folder, base=base_of(KEPT)).lora_parameters


def test_unknown_keys_and_text(checkpoint):
    folder = checkpoint(SEED_ONLY)
    set_config(folder, arrow_config=None)
    result = run_cli("inspect", folder)
    assert result.returncode == 0
    assert "seed-only" in result.stdout
    assert "arrow_config" in result.stdout
    _, shown = run_terminal("inspect", folder)
    assert all(len(line) <= 80 for line in plain(shown).splitlines()[2:])


def test_in_features_are_known_alike_wherever_the_base_has_shorter_names(checkpoint, tmp_path):
    """A base that was saved without its head has "layers.0..." for the adapter's "model.layers.0..."."""
    folder, base = checkpoint(KEPT), tmp_path / "base"
    base.mkdir()
    tensors = load_file(base_of(KEPT) / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    vera_tools.record(folder, base=base)
    layers = vera_tools.inspect(folder).layers
    assert {layer.in_features for layer in layers} == {64}
    report = vera_tools.to_lora(folder, tmp_path / "lora")  # a warning would say that widths were assumed
    assert not report.widths_assumed
