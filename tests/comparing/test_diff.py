"""diff: what is equal, what is not and by how much, and whether it changes what the adapter does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.adapters import (
    BERT,
    CHECKPOINTS,
    CONFIG,
    KEPT,
    KEPT_NAMES,
    NAMES,
    PAIR,
    SEED_ONLY,
    base_of,
    drop_pair,
    edit,
    edit_json,
    set_config,
    tensors_of,
)
from tests.command import run_cli, run_json
from vera_tools import diff, embed_projections, strip_projections
from vera_tools.errors import AssumedRecipeWarning, UnprovenError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj."

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")


@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedRecipeWarning")
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_equals_itself(name):
    report = diff(CHECKPOINTS / name, CHECKPOINTS / name, base=base_of(name))
    assert report.equal
    assert report.equal_in_effect
    assert report.exit_code == 0
    assert report.relative_norm == 0.0


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_the_stripped_form_is_equal_in_effect(name, tmp_path):
    strip_projections(CHECKPOINTS / name, tmp_path / "stripped")
    report = diff(CHECKPOINTS / name, tmp_path / "stripped")
    assert not report.equal
    assert report.equal_in_effect
    assert report.exit_code == 1
    assert report.tensors_only == (("base_model.vera_A", "base_model.vera_B"), ())
    assert report.config == (("save_projection", True, False),)
    embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert diff(CHECKPOINTS / name, tmp_path / "embedded").equal


def test_one_bit_of_one_vector(checkpoint):
    source = checkpoint(KEPT)

    def change(tensors):
        vector = tensors[Q0 + "vera_lambda_b"]
        vector[7] = np.nextafter(vector[7], np.float32(np.inf))

    edit(source, change)
    report = diff(CHECKPOINTS / KEPT, source)
    (tensor,) = report.tensors
    assert (tensor.name, tensor.differing, tensor.max_ulp) == (Q0 + "vera_lambda_b", 1 / 64, 1)
    assert tensor.max_abs is not None
    assert 0 < tensor.max_abs < 1e-6
    assert tensor.cosine == pytest.approx(1.0)
    assert not report.equal_in_effect
    moved = [layer for layer in report.layers or () if layer.difference]
    assert [layer.module for layer in moved] == ["model.layers.0.self_attn.q_proj"]
    assert 0 < moved[0].relative_norm < 1e-7


def test_figures_against_numpy(checkpoint):
    source = checkpoint(KEPT)
    rng = np.random.default_rng(5)
    name = "base_model.vera_B"
    edit(source, lambda tensors: tensors.update({name: rng.normal(size=(64, 16)).astype(np.float32)}))
    report = diff(CHECKPOINTS / KEPT, source)
    (tensor,) = report.tensors
    a, b = (tensors_of(folder)[name].astype(np.float64).ravel() for folder in (CHECKPOINTS / KEPT, source))
    assert tensor.max_abs == np.abs(a - b).max()
    assert tensor.differing == np.mean(a != b)
    assert tensor.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_effect_against_the_weights_themselves():
    """Two runs on different machines: every tensor differs a little, and the update by what its factors say."""
    other = KEPT + "-noavx"
    report = diff(CHECKPOINTS / KEPT, CHECKPOINTS / other, base=base_of(KEPT))
    a, b = (
        {key: value.astype(np.float64) for key, value in tensors_of(CHECKPOINTS / name).items()}
        for name in (KEPT, other)
    )

    def update(x):
        up = x[Q0 + "vera_lambda_b"][:, None] * x["base_model.vera_B"]
        return up @ (x[Q0 + "vera_lambda_d"][:, None] * x["base_model.vera_A"])

    (layer,) = (x for x in report.layers or () if x.module == "model.layers.0.self_attn.q_proj")
    expected = np.linalg.norm(update(a) - update(b)) / np.linalg.norm(update(a))
    assert layer.relative_norm == pytest.approx(expected, rel=1e-6)


def test_another_dtype_with_the_same_values(checkpoint):
    source = checkpoint("peft-0.20.0-llama-bf16-kept")

    def change(tensors):
        for name in PAIR:
            tensors[name] = tensors[name].astype(np.float64)

    edit(source, change)
    report = diff(CHECKPOINTS / source.name, source)
    assert not report.equal
    assert report.equal_in_effect
    assert [(t.dtypes, t.differing, t.max_ulp) for t in report.tensors] == [(("float32", "float64"), 0.0, None)] * 2


def test_other_shapes_names_and_values_that_are_not_finite(checkpoint):
    source = checkpoint(KEPT)

    def change(tensors):
        tensors["base_model.model.extra"] = tensors.pop(Q0 + "vera_lambda_d")
        tensors["base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_d"][0] = np.nan
        tensors["base_model.vera_A"] = tensors["base_model.vera_A"][:, :40].copy()

    edit(source, change)
    report = diff(CHECKPOINTS / KEPT, source)
    assert report.tensors_only == ((Q0 + "vera_lambda_d",), ("base_model.model.extra",))
    figures = {tensor.name: tensor for tensor in report.tensors}
    assert figures["base_model.vera_A"].shapes == ((16, 64), (16, 40))
    nan = figures["base_model.model.model.layers.1.self_attn.q_proj.vera_lambda_d"]
    assert (nan.max_abs, nan.max_ulp, nan.cosine, nan.differing) == (None, None, None, 1 / 16)
    assert report.equal_in_effect is False
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_saved_head_that_differs_is_an_effect(checkpoint):
    source = checkpoint(BERT)
    edit(source, lambda tensors: tensors["base_model.model.classifier.bias"].__iadd__(np.float32(1)))
    report = diff(CHECKPOINTS / source.name, source)
    assert report.relative_norm == 0.0
    assert report.equal_in_effect is False


def test_the_order_of_target_modules_means_nothing(checkpoint):
    source = checkpoint(KEPT)
    edit_json(source / CONFIG, lambda config: config["target_modules"].reverse())
    assert diff(CHECKPOINTS / KEPT, source).equal
    edit_json(source / CONFIG, lambda config: config.pop("inference_mode"))
    set_config(source, vera_dropout=0.25, new_in_peft=1)
    report = diff(CHECKPOINTS / KEPT, source)
    assert report.config == (("inference_mode", True, False), ("vera_dropout", 0.0, 0.25))
    assert report.config_only == ((), ("new_in_peft",))
    assert report.exit_code == 1
    assert report.equal_in_effect


def test_what_lies_beside_decides_nothing(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (source / "README.md").write_text("one")
    (other / "README.md").write_text("another")
    (other / "vera_manifest.json").write_text("{")
    report = diff(source, other)
    assert report.exit_code == 0
    assert (report.beside["README.md"], report.beside["vera_manifest.json"]) == ("different", "only in b")


def test_seed_only_against_its_kept_twin_takes_its_width(checkpoint, tmp_path):
    """What PEFT itself writes with save_projection=False: nothing is recorded, so the recipe is assumed aloud."""
    source = checkpoint(KEPT)
    drop_pair(source)
    with pytest.warns(AssumedRecipeWarning):
        report = diff(CHECKPOINTS / KEPT, source)
    assert report.equal_in_effect


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", [Q0 + "vera_lambda_b", Q0 + "vera_lambda_d", "base_model.vera_A", "base_model.vera_B"])
def test_values_that_are_not_finite_leave_the_effect_unknown(name, value, checkpoint):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors[name].reshape(-1).__setitem__(3, value))
    for sides in ((CHECKPOINTS / KEPT, source), (source, CHECKPOINTS / KEPT)):
        report = diff(*sides)
        assert report.equal_in_effect is None
        assert report.why_not == f"{source}: {name}: holds NaN or infinity"


@pytest.mark.parametrize("swapped", [False, True])
def test_projections_that_are_lost_leave_the_effect_unknown(swapped, checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors["base_model.vera_A"].__imul__(np.float32(2)))
    strip_projections(source, tmp_path / "lost", force=True)
    sides = (source, tmp_path / "lost")
    report = diff(*(sides[::-1] if swapped else sides))
    assert report.equal_in_effect is None
    assert "the record names no recipe" in str(report.why_not)


@pytest.mark.parametrize("swapped", [False, True])
def test_seed_only_takes_the_recipe_of_the_other(swapped, checkpoint):
    """A pair that was drawn otherwise than PEFT does today; the twin says how."""
    name = KEPT + "-noavx"
    source = checkpoint(name)
    drop_pair(source)
    sides = (CHECKPOINTS / name, source)
    with pytest.warns(AssumedRecipeWarning, match=r"assuming mt19937-f32-separate, which made those of"):
        report = diff(*(sides[::-1] if swapped else sides))
    assert report.equal_in_effect is True
    with pytest.raises(UnprovenError, match="nothing records"):
        diff(*sides, strict=True)


def test_a_difference_that_rests_on_an_assumption_is_not_certain(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit(other, lambda tensors: tensors["base_model.vera_A"].__imul__(np.float32(2)))
    drop_pair(source)
    with pytest.warns(AssumedRecipeWarning):
        report = diff(source, other)
    assert report.equal_in_effect is None
    assert report.relative_norm
    assert "the recipe is assumed" in str(report.why_not)
    assert "not certain: " in run_cli("diff", source, other).stdout


def test_an_unknown_pair_leaves_the_effect_unknown():
    report = diff(CHECKPOINTS / SEED_ONLY, CHECKPOINTS / KEPT)
    assert report.layers is None
    assert report.equal_in_effect is None
    assert "the layer width is unknown" in str(report.why_not)


def test_command(checkpoint, tmp_path):
    strip_projections(CHECKPOINTS / KEPT, tmp_path / "stripped")
    code, document = run_json("diff", CHECKPOINTS / KEPT, tmp_path / "stripped")
    assert (code, document["equal"], document["equal_in_effect"]) == (1, False, True)
    result = run_cli("diff", CHECKPOINTS / KEPT, tmp_path / "stripped")
    assert (result.returncode, result.stderr) == (1, "")
    assert "not equal, but equal in effect" in result.stdout
    assert run_cli("diff", CHECKPOINTS / KEPT, CHECKPOINTS / KEPT).returncode == 0
    code, document = run_json("diff", CHECKPOINTS / KEPT, CHECKPOINTS / (KEPT + "-noavx"))
    assert code == 1
    assert 1e-8 < document["effect"]["relative_norm"] < 1e-5
