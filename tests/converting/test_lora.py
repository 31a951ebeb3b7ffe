"""The LoRA export computes what the VeRA adapter does, in PEFT and in transformers' own adapter loading."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import safetensors.numpy

from tests.adapters import (
    BERT,
    CHECKPOINTS,
    GPT2,
    KEPT,
    KEPT_NAMES,
    NAMES,
    SEED_ONLY,
    base_of,
    config_of,
    edit,
    set_config,
    tensors_of,
)
from tests.command import run_process
from tests.memory import traced_peak
from tests.peers import base_model, distance
from vera_tools import record, strip_projections, to_lora
from vera_tools.checkpoints.manifest import Manifest
from vera_tools.errors import (
    AssumedRecipeWarning,
    AssumedShapeWarning,
    CheckFailedError,
    NotVeraError,
    UnprovenError,
    UsageError,
)
from vera_tools.files.safetensors import TensorFile

FLOAT32 = [name for name in NAMES if "bf16" not in name and "noavx" not in name]
TOLERANCE = {"f32": 1e-5, "bf16": 4e-3}

pytestmark = pytest.mark.filterwarnings(
    "ignore::vera_tools.errors.LoadingWarning", "ignore::vera_tools.errors.AssumedRecipeWarning"
)


def recipe_of(name):
    """What made a seed-only fixture, where it is not what is assumed."""
    return "mt19937-f32-separate" if name.endswith("seedonly-noavx") else None


@pytest.mark.parametrize("name", NAMES)
def test_peft_computes_the_same(name, tmp_path):
    from peft import PeftModel

    to_lora(CHECKPOINTS / name, tmp_path / "lora", base=base_of(name), recipe=recipe_of(name))
    model = PeftModel.from_pretrained(
        base_model(name), tmp_path / "lora"
    )  # warns, that is fails, where keys are missing
    assert distance(model, name) <= TOLERANCE["bf16" if "bf16" in name else "f32"]
    assert distance(base_model(name), name) > 1e-4  # or the comparison above would prove nothing


@pytest.mark.parametrize("name", FLOAT32)
def test_transformers_own_adapter_loading_computes_the_same(name, tmp_path):
    to_lora(CHECKPOINTS / name, tmp_path / "lora", base=base_of(name))
    model = base_model(name)
    model.load_adapter(str(tmp_path / "lora"))
    assert distance(model.eval(), name) <= TOLERANCE["f32"]


@pytest.mark.parametrize("name", [GPT2, BERT])
def test_saving_again_with_peft_loses_nothing(name, tmp_path):
    from peft import PeftModel

    to_lora(CHECKPOINTS / name, tmp_path / "lora", base=base_of(name))
    model = PeftModel.from_pretrained(base_model(name), tmp_path / "lora")
    model.save_pretrained(tmp_path / "again")
    before, after = tensors_of(tmp_path / "lora"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_the_product_is_the_weight_update(name, tmp_path):
    """B' A' against the definition, in double precision, layer by layer, for the slices that each layer uses."""
    to_lora(CHECKPOINTS / name, tmp_path / "lora", base=base_of(name))
    vera = {key: value.astype(np.float64) for key, value in tensors_of(CHECKPOINTS / name).items()}
    lora = {key: value.astype(np.float64) for key, value in tensors_of(tmp_path / "lora").items()}
    modules = {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}
    assert modules == {key.removesuffix(".vera_lambda_b") for key in vera if key.endswith(".vera_lambda_b")}
    for module in modules:
        down, up = lora[f"{module}.lora_A.weight"], lora[f"{module}.lora_B.weight"]
        b, d = vera[f"{module}.vera_lambda_b"], vera[f"{module}.vera_lambda_d"]
        A, B = vera["base_model.vera_A"][:, : down.shape[1]], vera["base_model.vera_B"][: b.size]
        update = (b[:, None] * B) @ (d[:, None] * A)
        assert np.abs(up @ down - update).max() <= 1e-6 * np.abs(update).max()


def test_layers_of_different_widths_take_their_slices(tmp_path):
    to_lora(CHECKPOINTS / GPT2, tmp_path / "lora", base=base_of(GPT2))
    shapes = {key: value.shape for key, value in tensors_of(tmp_path / "lora").items() if "lora_" in key}
    heights = {shape[0] for key, shape in shapes.items() if ".lora_B." in key}
    assert heights == {144, 192}


def test_the_config_says_lora(tmp_path):
    to_lora(CHECKPOINTS / GPT2, tmp_path / "lora", base=base_of(GPT2))
    vera, lora = config_of(CHECKPOINTS / GPT2), config_of(tmp_path / "lora")
    assert (lora["peft_type"], lora["bias"], lora["r"], lora["lora_alpha"]) == ("LORA", "lora_only", 12, 12)
    for key in ("fan_in_fan_out", "modules_to_save", "task_type", "layers_to_transform", "base_model_name_or_path"):
        assert lora[key] == vera[key]
    assert sorted(lora["target_modules"]) == sorted(vera["target_modules"])


def test_targets_left_to_the_model_type_become_explicit(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    set_config(source, target_modules=None)
    to_lora(source, tmp_path / "lora", base=base_of(source.name))
    assert "model.layers.0.self_attn.q_proj" in config_of(tmp_path / "lora")["target_modules"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype(dtype, tmp_path):
    report = to_lora(CHECKPOINTS / KEPT, tmp_path / "lora", base=base_of(KEPT), dtype=dtype)
    with TensorFile.open(tmp_path / "lora" / "adapter_model.safetensors") as file:
        assert {info.dtype for info in file.tensors.values()} == {dtype}
    assert report.dtype == dtype
    with pytest.raises(UsageError, match="not a dtype for LoRA"):
        to_lora(CHECKPOINTS / KEPT, tmp_path / "x", dtype="int8")


def test_the_manifest_says_what_it_was_made_from(tmp_path):
    name = "peft-0.21.2-llama-bf16-kept"
    report = to_lora(CHECKPOINTS / name, tmp_path / "lora", base=base_of(name))
    manifest = Manifest.from_json((tmp_path / "lora" / "vera_manifest.json").read_text())
    assert manifest.projections == report.projections
    assert manifest.projections.recipe is not None
    assert manifest.projections.recipe.name == "mt19937-f32-fused-via-bf16"
    with TensorFile.open(tmp_path / "lora" / "adapter_model.safetensors") as file:
        assert {key: value.sha256 for key, value in manifest.tensors.items()} == {
            k: file.sha256(k) for k in file.tensors
        }
    with pytest.raises(NotVeraError):
        to_lora(tmp_path / "lora", tmp_path / "again")


def test_stripped_gives_the_same_lora(tmp_path):
    name = "peft-0.21.2-llama-f32-kept-noavx"
    strip_projections(CHECKPOINTS / name, tmp_path / "stripped")
    to_lora(CHECKPOINTS / name, tmp_path / "a", base=base_of(name))
    to_lora(tmp_path / "stripped", tmp_path / "b", base=base_of(name))
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


def test_two_processes_write_the_same_bytes(tmp_path):
    """The safetensors library orders metadata at random in every process; nothing here does."""
    for seed in ("1", "2"):
        options = ("--to", "lora", "--base", base_of(GPT2), "-o", tmp_path / seed)
        assert run_process("convert", CHECKPOINTS / GPT2, *options, env={"PYTHONHASHSEED": seed}).returncode == 0
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_widths_come_from_the_base_the_manifest_or_are_assumed(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    with pytest.warns(AssumedShapeWarning, match="taking in_features 64 for all"):
        report = to_lora(source, tmp_path / "assumed")
    assert report.widths_assumed
    with pytest.raises(UnprovenError, match="how wide each adapted layer is"):
        to_lora(source, tmp_path / "strict", strict=True)
    record(source, base=base_of(source.name))
    report = to_lora(source, tmp_path / "recorded", strict=True)
    assert not report.widths_assumed


def test_vectors_that_do_not_fit(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    name = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
    edit(source, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(CheckFailedError, match="do not fit the projections"):
        to_lora(source, tmp_path / "lora", base=base_of(source.name))
    assert not (tmp_path / "lora").exists()


def test_seed_only_without_a_record(tmp_path):
    with pytest.warns(AssumedRecipeWarning):
        report = to_lora(CHECKPOINTS / SEED_ONLY, tmp_path / "lora", base=base_of(SEED_ONLY))
    assert report.projections.assumed
    with pytest.raises(UnprovenError):
        to_lora(CHECKPOINTS / SEED_ONLY, tmp_path / "strict", base=base_of(SEED_ONLY), strict=True)


def test_memory_does_not_grow_with_the_lora(tmp_path):
    """64 layers over one pair: the LoRA is 40 times the adapter, and is written in pieces."""
    r, width, layers = 64, 2048, 64
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        module = f"base_model.model.layers.{layer}.q"
        tensors[f"{module}.vera_lambda_b"] = rng.random(width, np.float32)
        tensors[f"{module}.vera_lambda_d"] = rng.random(r, np.float32)
    (tmp_path / "vera").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "vera" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "VERA", "r": r, "target_modules": ["q"], "save_projection": False}
    (tmp_path / "vera" / "adapter_config.json").write_text(json.dumps(config))
    record(tmp_path / "vera", in_features=width)
    convert = functools.partial(to_lora, tmp_path / "vera")
    with pytest.warns(AssumedShapeWarning):
        convert(tmp_path / "warm-up")  # imports are not what is measured
    with pytest.warns(AssumedShapeWarning):
        peak, report = traced_peak(lambda: convert(tmp_path / "lora"))
    adapter = report.input_bytes + 4 * 2 * r * width
    assert report.output_bytes > 40 * adapter
    assert peak <= 2 * adapter


Q0 = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        (f"base_model.model.{Q0}.vera_lambda_b", f"{Q0}: vera_lambda_b"),
        (f"base_model.model.{Q0}.vera_lambda_d", f"{Q0}: vera_lambda_d"),
        ("base_model.vera_A", "vera_A"),
        ("base_model.vera_B", "vera_B"),
    ],
)
def test_values_that_are_not_finite_are_refused(tensor, named, value, checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors[tensor].reshape(-1).__setitem__(5, value))
    with pytest.raises(CheckFailedError, match=f"adapter_model.safetensors: {named}: holds NaN or infinity"):
        to_lora(source, tmp_path / "lora", base=base_of(KEPT))
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_so_they_are_in_what_is_carried_over(checkpoint, tmp_path):
    source = checkpoint(BERT)
    head = "base_model.model.classifier.weight"
    edit(source, lambda tensors: tensors[head].reshape(-1).__setitem__(5, np.nan))
    with pytest.raises(CheckFailedError, match=f"adapter_model.safetensors: {head}: holds NaN or infinity"):
        to_lora(source, tmp_path / "lora", base=base_of(BERT))


def test_values_too_large_for_the_dtype_are_refused(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors[f"base_model.model.{Q0}.vera_lambda_b"].fill(1e6))
    with pytest.raises(CheckFailedError, match=rf"{Q0}: lora_B would hold values too large for float16; .*--dtype"):
        to_lora(source, tmp_path / "lora", base=base_of(KEPT), dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    to_lora(source, tmp_path / "lora", base=base_of(KEPT))


@pytest.mark.parametrize("stripped", [False, True])
def test_in_features_that_contradict_what_is_known_are_refused(stripped, tmp_path):
    source = CHECKPOINTS / KEPT
    if stripped:
        strip_projections(source, tmp_path / "stripped")
        source = tmp_path / "stripped"
    with pytest.raises(UsageError, match=r"in_features contradicts the (stored|record).*expected 64, found 128"):
        to_lora(source, tmp_path / "lora", in_features=128)
    assert not (tmp_path / "lora").exists()
