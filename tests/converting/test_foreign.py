"""What other programs wrote: exact where it can be, refused by name where it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.adapters import CHECKPOINTS, CONFIG, GPT2, KEPT, base_of, config_of, edit, edit_json, set_config, tensors_of
from tests.command import run_cli, run_json
from tests.peers import base_model, distance
from tests.projections import torch_draws
from vera_tools import diff, from_foreign, strip_projections, verify
from vera_tools.errors import CheckFailedError, FormatError, NothingToDoError, NotVeraError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")


@pytest.fixture
def draft(checkpoint):
    """A checkpoint in the form that PEFT's draft gave it; the config's keys are those of such files on the Hub."""

    def make(name: str, **changes) -> Path:
        folder = checkpoint(name)

        def older(config):
            del config["peft_version"]
            config["init_vera_weights"] = config.pop("init_weights")
            config.update({"alpha_pattern": {}, "rank_pattern": {}, **changes})

        def shorter(tensors):
            for key in [key for key in tensors if ".base_layer.bias" in key]:
                tensors[key.replace(".base_layer.bias", ".bias")] = tensors.pop(key)

        edit_json(folder / CONFIG, older)
        edit(folder, shorter)
        return folder

    return make


@pytest.mark.parametrize("name", [GPT2, KEPT])
def test_pefts_draft_loads_in_peft_again(draft, name, tmp_path):
    from peft import PeftModel

    source = draft(name)
    report = from_foreign(source, tmp_path / "out")
    assert report.format == "peft-draft"
    assert report.renamed == (4 if name == GPT2 else 0)
    config = config_of(tmp_path / "out")
    assert config["init_weights"] is True
    assert not {"init_vera_weights", "rank_pattern", "alpha_pattern"} & config.keys()
    before, after = tensors_of(CHECKPOINTS / name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    model = PeftModel.from_pretrained(base_model(name), tmp_path / "out")
    assert distance(model, name) <= 1e-5
    assert verify(tmp_path / "out").exit_code == 0


def test_pefts_draft_in_place_and_stripped(draft, tmp_path):
    source = draft(KEPT)
    from_foreign(source, in_place=True)
    assert diff(source, CHECKPOINTS / KEPT).equal_in_effect
    strip_projections(source, tmp_path / "stripped")
    with pytest.raises(NothingToDoError, match="PEFT's form already"):
        from_foreign(source, tmp_path / "again")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_drafts_patterns_are_refused(draft, key, tmp_path):
    with pytest.raises(NotVeraError, match=f"{key}: no exact mapping to VeRA: it has ranks or scales of its own"):
        from_foreign(draft(KEPT, **{key: {"q_proj": 4}}), tmp_path / "out")


def test_a_drafts_embeddings_are_refused(draft, tmp_path):
    source = draft(KEPT)
    edit(source, lambda tensors: tensors.update({"base_model.vera_embedding_A": np.zeros((16, 99), np.float32)}))
    with pytest.raises(NotVeraError, match="it adapts embeddings"):
        from_foreign(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def kaiming(shape, key):
    """torch's own draw, as the trainer does it."""
    import torch

    generator = torch.Generator("cpu").manual_seed(key)
    bound = 3.0**0.5 * (2.0**0.5 / shape[1] ** 0.5)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator).numpy()


@pytest.fixture
def anima(tmp_path):
    """A training state over the fixture's base: same vectors, projections drawn with key and key + 1."""

    def make(*, key=7, metadata=None, shared=None, **more) -> Path:
        vera = tensors_of(CHECKPOINTS / KEPT)
        A, B = shared or (kaiming((16, 64), key), kaiming((64, 16), key + 1))
        tensors = {"vera_shared_A": A, "vera_shared_B": B, **more}
        for name, value in vera.items():
            if ".vera_lambda_" in name:
                module, _, vector = name.removeprefix("base_model.model.").rpartition(".")
                tensors[f"lora_unet_{module.replace('.', '_')}.{vector}"] = value
        path = tmp_path / "state" / "model.safetensors"
        path.parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file(tensors, path, metadata)
        return path

    return make


def test_an_anima_training_state(anima, tmp_path):
    report = from_foreign(anima(), tmp_path / "out", base=base_of(KEPT), prng_key=7)
    assert report.projections.recipe is not None
    assert report.projections.recipe.name == f"mt19937-f32-{torch_draws.rounding()}-split"
    assert report.projections.recipe.prng_key_B == 8
    before, after = tensors_of(CHECKPOINTS / KEPT), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert np.array_equal(after["base_model.vera_A"], kaiming((16, 64), 7))
    for name in before:
        if ".vera_lambda_" in name:
            assert np.array_equal(before[name], after[name])
    config = config_of(tmp_path / "out")
    assert (config["projection_prng_key"], config["r"], config["save_projection"]) == (7, 16, True)


def test_an_anima_adapter_computes_in_peft_what_it_is(anima, tmp_path):
    """With the fixture's own pair in the shared buffers, PEFT must compute the fixture's logits."""
    from peft import PeftModel

    vera = tensors_of(CHECKPOINTS / KEPT)
    path = anima(shared=(vera["base_model.vera_A"], vera["base_model.vera_B"]))
    from_foreign(path.parent, tmp_path / "out", base=base_of(KEPT))
    model = PeftModel.from_pretrained(base_model(KEPT), tmp_path / "out")
    assert distance(model, KEPT) <= 1e-5


def test_a_pair_that_grew_is_taken_over_as_it_is(anima, tmp_path):
    """The trainer draws again when a wider layer comes along, and keeps the part that it had."""
    A, B = kaiming((16, 64), 7), kaiming((64, 16), 8)
    A[:, :40] = kaiming((16, 40), 7)
    report = from_foreign(anima(shared=(A, B)), tmp_path / "out", base=base_of(KEPT), prng_key=7)
    assert report.projections.recipe is None
    assert np.array_equal(tensors_of(tmp_path / "out")["base_model.vera_A"], A)
    assert verify(tmp_path / "out").exit_code == 1  # no key makes it, and that is said


def test_the_key_is_read_from_the_training_arguments(anima, tmp_path):
    arguments = {"vera_projection_prng_key": "7", "adapter_type": "vera"}
    path = anima(metadata={"ss_network_args": json.dumps(arguments)})
    report = from_foreign(path, tmp_path / "out", base=base_of(KEPT))
    assert report.projections.recipe is not None
    assert report.projections.recipe.prng_key == 7


def test_what_an_anima_state_must_have(anima, tmp_path):
    with pytest.raises(UsageError, match="only the base says what the modules are called"):
        from_foreign(anima(), tmp_path / "out")
    with pytest.raises(CheckFailedError, match="the base has no such module"):
        from_foreign(anima(), tmp_path / "out", base=base_of(GPT2))
    vector = np.zeros(4, np.float32)
    with pytest.raises(NotVeraError, match=r"train_norm_x\.weight: no exact mapping"):
        from_foreign(anima(**{"train_norm_x.weight": vector}), tmp_path / "out", base=base_of(KEPT))
    both = {"lora_te_x.vera_lambda_b": vector, "lora_te_x.vera_lambda_d": vector}
    with pytest.raises(NotVeraError, match="it adapts two models"):
        from_foreign(anima(**both), tmp_path / "out", base=base_of(KEPT))
    with pytest.raises(FormatError, match="vera_lambda_d is missing"):
        from_foreign(anima(**{"lora_unet_x.vera_lambda_b": vector}), tmp_path / "out", base=base_of(KEPT))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_blocks_0.lora_down.weight", "LORA"),
        ("base_model.randlora_A", "RANDLORA"),
        ("base_model.pvera_A", "PVERA"),
        ("lora_unet_blocks_0.lokr_w1", "LOKR"),
        ("something.else", "UNKNOWN"),
    ],
)
def test_the_rest_is_refused_by_name(tensor, kind, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({tensor: np.zeros((2, 2), np.float32)}, path)
    result = run_cli("convert", path, "--from", "auto", "-o", tmp_path / "out")
    assert result.returncode == 4
    assert len(result.stderr.splitlines()) == 1
    assert "no exact mapping to VeRA" in result.stderr
    assert kind in result.stderr


@pytest.mark.parametrize(
    ("tensor", "kind", "why"),
    [
        ("base_model.randlora_A", "RANDLORA", "RandLora sums many bases"),
        ("base_model.pvera_A", "PVERA", "PVeRA samples its vectors"),
        ("base_model.model.x.lora_A.weight", "LORA", "LoRA's matrices are trained"),
    ],
)
def test_an_adapter_of_another_kind_is_told_why(checkpoint, tensor, kind, why, tmp_path):
    """Opening it refuses it already, without the reason that conversion has."""
    source = checkpoint(KEPT)
    edit(source, lambda tensors: [tensors.clear(), tensors.update({tensor: np.zeros((2, 2), np.float32)})])
    with pytest.raises(FormatError, match=f"this holds {kind} tensors, not VeRA's; adapter_config.json is a VeRA"):
        from_foreign(source, tmp_path / "out")
    set_config(source, peft_type=kind)
    with pytest.raises(NotVeraError, match=rf"adapter_config\.json: no exact mapping to VeRA: {why}"):
        from_foreign(source, tmp_path / "out")


def test_adapter_hub_is_refused_by_name(tmp_path):
    config = {"config": {"architecture": "lora", "r": 8, "vera_d": 0.1}, "model_class": "RobertaAdapterModel"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(NotVeraError, match="adapter-hub"):
        from_foreign(tmp_path, tmp_path / "out")


def test_command(draft, anima, tmp_path):
    code, document = run_json("convert", draft(GPT2), "--from", "auto", "-o", tmp_path / "a")
    assert (code, document["from"], document["renamed"]) == (0, "peft-draft", 4)
    options = ("--from", "anima", "--base", base_of(KEPT), "--prng-key", 7)
    code, document = run_json("convert", anima(), *options, "-o", tmp_path / "b")
    recipe = f"mt19937-f32-{torch_draws.rounding()}-split"
    assert (code, document["from"], document["recipe"]["name"]) == (0, "anima", recipe)
    for wrong in ([], ["--to", "lora", "--from", "auto"], ["--from", "auto", "--dtype", "float16"]):
        assert run_cli("convert", CHECKPOINTS / KEPT, *wrong, "-o", tmp_path / "c").returncode == 2
