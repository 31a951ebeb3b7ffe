"""`record`: the manifest of a checkpoint that exists already."""

from __future__ import annotations

import hashlib
import json

import pytest
from safetensors.numpy import load_file

import vera_tools
from tests.adapters import (
    BERT,
    KEPT,
    NAMES,
    SEED_ONLY,
    WEIGHTS,
    base_of,
    edit,
    edit_manifest,
    files_of,
    flip,
    set_config,
    tensors_of,
)
from tests.command import run_cli, run_json
from tests.merging.models import make_base
from tests.peers import base_model, distance, load_peft
from tests.verifying.reports import failed, message_of, one
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Manifest
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    FormatError,
    LoadingWarning,
    UsageError,
    VeraToolsWarning,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedRecipeWarning")
def test_touches_nothing_else_and_twice_is_the_same(name, checkpoint):
    folder = checkpoint(name)
    before = files_of(folder)
    first = vera_tools.record(folder, base=base_of(name))
    after = files_of(folder)
    assert after.keys() - before.keys() == {MANIFEST_NAME}
    assert {key: after[key] for key in before} == before
    second = vera_tools.record(folder, base=base_of(name))
    assert files_of(folder) == after
    assert (first.renewed, second.renewed, second.changed) == (False, True, False)


def test_digests_and_base_are_the_files_own(checkpoint):
    folder = checkpoint(KEPT)
    code, document = run_json("record", folder, "--base", base_of(KEPT))
    assert code == 0
    assert document["origin"] == "stored"
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    stored = tensors_of(folder)
    assert manifest.tensors.keys() == stored.keys()
    for name, array in stored.items():
        assert manifest.tensors[name].sha256 == hashlib.sha256(array.tobytes()).hexdigest()
        assert manifest.tensors[name].shape == array.shape
    base = load_file(base_of(KEPT) / "model.safetensors")
    assert len(manifest.base.weights) == 4
    for name, record in manifest.base.weights.items():
        assert record.sha256 == hashlib.sha256(base[name].tobytes()).hexdigest()


def test_recipe_options_are_taken_at_their_word_but_marked(checkpoint):
    name = "peft-0.21.2-llama-f32-seedonly-noavx"
    folder = checkpoint(name)
    code, document = run_json("record", folder, "--base", base_of(name), "--rounding", "separate")
    assert code == 0
    assert document["recipe"]["name"] == "mt19937-f32-separate"
    assert document["assumed"] is True
    code, document = run_json("record", folder, "--base", base_of(name), "--rounding", "fused")
    assert code == 2
    assert "recorded already" in document["error"]["what"]


def test_renewing_keeps_what_was_known_of_the_base(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder, base=base_of(KEPT))
    weights = json.loads((folder / MANIFEST_NAME).read_text())["base"]["weights"]
    vera_tools.record(folder)
    assert json.loads((folder / MANIFEST_NAME).read_text())["base"]["weights"] == weights


def test_unknown_projections_are_recorded_without_a_recipe(checkpoint):
    folder = checkpoint(KEPT)
    flip(folder / WEIGHTS, -3)
    report = vera_tools.record(folder)
    assert report.manifest.projections.recipe is None
    assert "no known recipe" in run_cli("record", folder).stdout
    entry = vera_tools.verify(folder).checkpoints[0]
    assert entry.verdict == "drift"
    assert entry.ok


def test_wrong_base_is_refused_and_nothing_written(checkpoint):
    folder = checkpoint(SEED_ONLY)
    with pytest.raises(
        CheckFailedError,
        match=r"no such module.*: a BertForSequenceClassification \(data of",
    ):
        vera_tools.record(folder, base=base_of(BERT))
    assert not (folder / MANIFEST_NAME).exists()


def test_seed_only_needs_in_max(checkpoint):
    with pytest.raises(UsageError, match="in_max"):
        vera_tools.record(checkpoint(SEED_ONLY))


def test_peft_goes_on_loading(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder, base=base_of(KEPT))
    assert distance(load_peft(base_model(KEPT), folder), KEPT) <= 1e-5


def test_hub_reference_is_refused():
    code, document = run_json("record", "hf://owner/name")
    assert code == 2
    assert "pull it first" in document["error"]["hint"]


def test_a_folder_in_the_manifests_place_is_named(checkpoint):
    folder = checkpoint(KEPT)
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(FormatError, match=f"{MANIFEST_NAME}: this is a folder, not a file"):
        vera_tools.record(folder)
    code, document = run_json("verify", folder)
    assert code == 1
    (check,) = [check for check in document["checkpoints"][0]["checks"] if check["id"].startswith("manifest.")]
    assert check["status"] == "fail"
    assert "this is a folder, not a file" in check["message"]
    assert "no manifest" not in document["checkpoints"][0]["scope"]


def test_a_checkpoint_without_an_adapted_layer_has_nothing_to_record(checkpoint):
    folder = checkpoint(SEED_ONLY)
    edit(folder, dict.clear)
    code, document = run_json("record", folder)
    assert code == 4
    assert document["error"]["what"] == "there is no adapted layer"
    assert MANIFEST_NAME not in files_of(folder)


def test_a_manifest_that_an_editor_marked_is_read(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    path = folder / MANIFEST_NAME
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    report = vera_tools.verify(folder)
    assert report.exit_code == 0
    assert report.checkpoints[0].scope.startswith("projections, vectors and config are covered; ")


def test_unknown_keys_of_a_manifest_are_named_in_plain_words(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    edit_manifest(folder, lambda manifest: manifest.update(extra=1, more=2))
    shown = " ".join(run_cli("verify", folder).stdout.split())
    assert "unknown key 'extra', 'more'" in shown
    assert "nevaluated" not in shown


def test_saved_again_after_training_on_it_is_renewed(checkpoint):
    """Real PEFT loads, changes the vectors, and saves into the same folder."""
    import torch

    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    model = load_peft(base_model(KEPT), folder, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    report = one(folder)
    assert failed(report) == {"manifest.stale"}
    assert report.verdict == "reproducible"
    assert "record" in message_of(report, "manifest.stale")
    with pytest.warns(VeraToolsWarning, match="8 of 10 tensors"):
        assert vera_tools.record(folder).changed
    assert not failed(one(folder))
    assert vera_tools.verify(folder).exit_code == 0


@pytest.mark.parametrize(
    ("kind", "fewer", "stale"),
    [("vera_lambda", 0, True), ("vera_lambda_b", 0, True), ("vera_lambda_b", 1, False)],
)
def test_training_moves_every_vector(checkpoint, kind, fewer, stale):
    """Where one kind of vectors is frozen, the other."""
    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    moved = [name for name in tensors_of(folder) if kind in name][fewer:]
    edit(folder, lambda tensors: [tensors[name].__iadd__(1) for name in moved])
    assert ("manifest.stale" in failed(one(folder))) is stale
    assert vera_tools.verify(folder).exit_code == 1


@pytest.fixture
def assumed(checkpoint):
    """A seed-only adapter that is recorded on an assumption."""
    folder = checkpoint(SEED_ONLY)
    with pytest.warns(AssumedRecipeWarning):
        vera_tools.record(folder, base=base_of(SEED_ONLY))
    return folder


def test_what_was_assumed_may_be_stated_later(assumed):
    result = run_cli("record", assumed, "--rounding", "fused")
    assert result.returncode == 0
    assert "renewed" in result.stdout
    assert "mt19937-f32-fused (stated)" in result.stdout
    assert Manifest.from_json((assumed / MANIFEST_NAME).read_text()).projections.origin == "stated"
    assert "already up to date" in run_cli("record", assumed, "--rounding", "fused").stdout
    again = run_cli("record", assumed, "--rounding", "separate")
    assert again.returncode == 2
    assert "another recipe is recorded already" in again.stderr


def test_what_is_stated_against_the_proof_is_refused(checkpoint):
    folder = checkpoint(KEPT)
    for options, said in (
        (("--rounding", "separate"), "expected mt19937-f32-fused, which gives exactly what is stored"),
        (("--stored-dtype", "bfloat16"), "expected projections in float32"),
    ):
        result = run_cli("record", folder, *options)
        assert result.returncode == 2
        assert said in result.stderr
        assert not (folder / MANIFEST_NAME).exists()
    assert run_cli("record", folder, "--rounding", "fused").returncode == 0
    (folder / MANIFEST_NAME).unlink()
    edit(folder, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), 1))
    with pytest.raises(UsageError, match="expected no known recipe, which gives exactly what is stored"):
        vera_tools.record(folder, recipe="mt19937-f32-fused")


def test_what_the_weights_file_says_itself_is_not_stated_over(assumed, tmp_path):
    vera_tools.embed_projections(assumed, tmp_path / "embedded")
    with pytest.warns(LoadingWarning):
        vera_tools.strip_projections(tmp_path / "embedded", tmp_path / "stripped")
    with pytest.raises(UsageError, match="the weights file says itself that its recipe was assumed"):
        vera_tools.record(tmp_path / "stripped", recipe="mt19937-f32-fused")


@pytest.mark.parametrize("width", [3, 200])
def test_a_width_that_the_base_contradicts_is_refused(width, checkpoint):
    folder, base = checkpoint(SEED_ONLY), base_of(SEED_ONLY)
    with pytest.raises(UsageError, match=r"in_features contradicts the base model.*leave it out"):
        vera_tools.record(folder, base=base, in_features=width, recipe="mt19937-f32-fused")
    vera_tools.record(folder, in_features=width, recipe="mt19937-f32-fused")
    before = (folder / MANIFEST_NAME).read_bytes()
    with pytest.raises(CheckFailedError, match="the width was stated wrongly: delete the record") as found:
        vera_tools.record(folder, base=base)
    assert found.value.found == str(width)
    assert (folder / MANIFEST_NAME).read_bytes() == before
    with pytest.raises(UsageError, match=r"in_features contradicts the record.*record the checkpoint anew"):
        vera_tools.record(folder, in_features=4)


def test_a_pair_that_is_too_narrow_for_the_base_is_refused(checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    shapes = {
        f"model.layers.{n}.self_attn.{p}_proj": (rows, 80) for n in range(2) for p, rows in (("q", 64), ("v", 32))
    }
    with pytest.raises(CheckFailedError, match=r"do not have the width of this base.*expected in_max 80"):
        vera_tools.record(folder, base=make_base(tmp_path / "base", shapes, dtype="float32"))


def test_another_base_in_the_config_is_told_of_and_keeps_the_record(checkpoint):
    folder = checkpoint(KEPT)
    set_config(folder, base_model_name_or_path="one")
    vera_tools.record(folder, base=base_of(KEPT))
    set_config(folder, base_model_name_or_path="another")
    with pytest.warns(VeraToolsWarning) as told:
        report = vera_tools.record(folder)
    assert any("names another as the base, the manifest one: " in str(one.message) for one in told)
    assert len(report.manifest.base.weights) == 4
