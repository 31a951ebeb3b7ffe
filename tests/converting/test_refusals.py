"""What is asked of an adapter before a LoRA, a file for llama.cpp or a merged model is made of it."""

from __future__ import annotations

import numpy as np
import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, base_of, config_of, edit, replace_pair, set_config
from tests.command import run_cli
from tests.peers import base_model, distance
from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError, FormatError, LoadingWarning, VeraToolsError
from vera_tools.projections.recipe import Recipe

BASE = base_of(KEPT)
LAYER = "base_model.model.model.layers.1.self_attn.v_proj"


def to_gguf(adapter, output, **options):
    pytest.importorskip("gguf")
    return vera_tools.to_gguf(adapter, output, **options)


#: Each makes something else of an adapter and its base.
MAKERS = {
    "lora": lambda adapter, base, out, **options: vera_tools.to_lora(adapter, out, base=base, **options),
    "gguf": lambda adapter, base, out, **options: to_gguf(adapter, out, base=base, **options),
    "merged": lambda adapter, base, out, **options: vera_tools.merge(adapter, base=base, output=out, **options),
}


def without_a_layer(folder):
    edit(folder, lambda tensors: [tensors.pop(f"{LAYER}.vera_lambda_{letter}") for letter in "bd"])


#: What PEFT would load as something else than what the file holds, and the check that says so.
CONTRADICTIONS = {
    "another target": (lambda folder: set_config(folder, target_modules=["q_proj"]), "tensors.unexpected"),
    "another layer": (lambda folder: set_config(folder, layers_to_transform=[0]), "tensors.unexpected"),
    "a layer less": (without_a_layer, "base.modules"),
    "a head that is not there": (lambda folder: set_config(folder, modules_to_save=["norm"]), "tensors.saved"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("change", "check"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_refused_with_the_check_that_tells_of_it(make, change, check, checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    change(folder)
    with pytest.raises(CheckFailedError, match=f"this is {check} of `vera-tools verify") as found:
        make(folder, BASE, tmp_path / "out")
    (report,) = vera_tools.verify(folder, base=BASE).checkpoints
    assert found.value.what in {one.message for one in report.checks if (one.id, one.status) == (check, "fail")}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", ["int32", "int64", "bool", "float8_e4m3fn"])
def test_vectors_of_no_dtype_that_vera_computes_in_are_refused(make, dtype, checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: tensors.update({f"{LAYER}.vera_lambda_b": np.ones(32, np_dtype(dtype))}))
    said = rf"not a floating-point dtype that VeRA computes in: {LAYER}.vera_lambda_b {dtype}; `vera-tools verify`"
    with pytest.raises(FormatError, match=said):
        make(folder, BASE, tmp_path / "out")
    assert vera_tools.verify(folder).exit_code == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_saved_module_of_integers_is_refused_on_a_base_of_floats(make, checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    set_config(folder, modules_to_save=["model.norm"])
    edit(folder, lambda tensors: tensors.update({"base_model.model.model.norm.weight": np.ones(64, np.int32)}))
    report = vera_tools.verify(folder, base=BASE)
    said = {check.id: check.message for check in report.checkpoints[0].checks}["base.parameters"]
    assert (report.exit_code, said) == (1, "model.norm.weight is int32, the base's float32")
    with pytest.raises(VeraToolsError, match=r"int32|holds no biases and no saved modules"):
        make(folder, BASE, tmp_path / "out")


def test_without_a_base_the_config_alone_contradicts(checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    set_config(folder, target_modules=["q_proj"])
    with pytest.raises(CheckFailedError, match=r"tensors\.unexpected of `vera-tools verify`"):
        vera_tools.to_lora(folder, tmp_path / "out")


def test_what_is_not_refused_gives_peft_the_same_logits(checkpoint, tmp_path):
    """The layers named one by one in layers_to_transform, which LoRA and VeRA read alike."""
    import peft

    folder = checkpoint(KEPT)
    set_config(folder, layers_to_transform=[0, 1])
    vera_tools.to_lora(folder, tmp_path / "lora", base=BASE)
    assert config_of(tmp_path / "lora")["layers_to_transform"] == [0, 1]
    assert distance(peft.PeftModel.from_pretrained(base_model(KEPT), tmp_path / "lora"), KEPT) <= 1e-5


#: Pairs that the config's key does not give.
DRIFTS = {
    "another key": (lambda folder: replace_pair(folder, Recipe(prng_key=102)), "were made with key 102"),
    "a changed element": (
        lambda folder: edit(folder, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), np.float32(2))),
        r"differs from what key 101 gives in 1 place: \[0, 0\]",
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(("change", "said"), DRIFTS.values(), ids=DRIFTS)
def test_a_pair_that_is_not_the_keys_is_taken_with_a_warning_and_strictly_refused(
    make, change, said, checkpoint, tmp_path
):
    folder = checkpoint(KEPT)
    change(folder)
    with pytest.warns(LoadingWarning, match=said) as warned:
        make(folder, BASE, tmp_path / "out")
    assert len(warned) == 1
    with pytest.raises(CheckFailedError, match=said):
        make(folder, BASE, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_so_is_a_recorded_one_that_was_stripped_by_force(make, checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    set_config(folder, projection_prng_key=102)
    with pytest.warns(LoadingWarning, match="exactly nowhere"):
        vera_tools.strip_projections(folder, in_place=True, force=True)
    said = "projection_prng_key 102, and the recorded pair was made with key 101"
    with pytest.warns(LoadingWarning, match=said):
        make(folder, BASE, tmp_path / "out")
    with pytest.raises(CheckFailedError, match=said):
        make(folder, BASE, tmp_path / "strict", strict=True)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_another_base_than_the_recorded_one_is_refused(make, checkpoint, tmp_path):
    folder, other = checkpoint(KEPT), checkpoint(BASE.name)
    vera_tools.record(folder, base=BASE)
    edit(
        other,
        lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].__setitem__((0, 0), 9),
        file="model.safetensors",
    )
    make(folder, BASE, tmp_path / "right")
    with pytest.raises(CheckFailedError, match="not that of the base that the adapter was recorded with"):
        make(folder, other, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_copy_of_the_base_in_another_dtype_is_told_of(checkpoint, tmp_path):
    folder, other = checkpoint(KEPT), checkpoint(BASE.name)
    vera_tools.record(folder, base=BASE)
    edit(
        other,
        lambda tensors: tensors.update({name: tensor.astype(np.float16) for name, tensor in tensors.items()}),
        file="model.safetensors",
    )
    with pytest.warns(LoadingWarning, match=r"or another copy of it: .*\(4 of 4 weights\)"):
        vera_tools.to_lora(folder, tmp_path / "out", base=other)


def test_adapter_and_base_in_each_others_place(tmp_path):
    result = run_cli("merge", BASE, "--base", CHECKPOINTS / KEPT, "-o", tmp_path / "out")
    assert result.returncode == 4
    assert "this is an adapter: name it as CHECKPOINT" in result.stderr


@pytest.mark.parametrize("command", [("merge", "-o", "out"), ("convert", "--to", "lora", "-o", "out"), ("verify",)])
def test_two_bases_are_refused(command, tmp_path):
    name, *options = command
    result = run_cli(name, CHECKPOINTS / KEPT, *options, "--base", BASE, "--base", "other", cwd=tmp_path)
    assert result.returncode == 2
    assert "--base is given 2 times" in result.stderr
    assert not (tmp_path / "out").exists()
