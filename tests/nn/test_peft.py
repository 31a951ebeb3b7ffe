"""A loaded PEFT model gets the projections that its adapter was trained with."""

from __future__ import annotations

import peft
import pytest
import torch

from tests.adapters import CHECKPOINTS, KEPT, KEPT_NAMES, SEED_ONLY, files_of
from tests.nn.models import OPTIONS, adapted, fresh, llama, logits, peft_model, some_ids
from tests.peers import QUIET_PEERS, base_model, distance, load_peft
from vera_tools.errors import AssumedRecipeWarning, UnprovenError, UsageError
from vera_tools.nn import VeraConfig, VeraModel, load_adapter, save_adapter
from vera_tools.nn.peft import load, restore_projections
from vera_tools.nn.projection import same_bits

pytestmark = [pytest.mark.capability, *QUIET_PEERS]


def pair(model, name="default"):
    return [model.base_model.vera_A[name], model.base_model.vera_B[name]]


def draw_again(model):
    """What PEFT before 0.21 does on loading: leave the pair drawn from the key, here by an unfused kernel's values."""
    for tensor in pair(model):
        tensor += torch.finfo(tensor.dtype).eps * torch.rand(tensor.shape).to(tensor.dtype)


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_stored_projections_are_put_back(name):
    model = load_peft(base_model(name), CHECKPOINTS / name)
    right = [tensor.clone() for tensor in pair(model)]
    draw_again(model)
    report = restore_projections(model, CHECKPOINTS / name)
    assert report.changed
    assert report.origin == "stored"
    assert report.projections["vera_B"].differing > 0.5 * right[1].numel()
    for restored, tensor in zip(pair(model), right, strict=True):
        assert same_bits(restored, tensor)
    assert distance(model, name) <= (4e-3 if "bf16" in name else 1e-5)
    again = restore_projections(model, CHECKPOINTS / name)
    assert not again.changed
    assert "was right already" in str(again)


def test_all_layers_share_the_restored_pair():
    model = load_peft(base_model(KEPT), CHECKPOINTS / KEPT)
    draw_again(model)
    report = restore_projections(model, CHECKPOINTS / KEPT)
    layers = [module for module in model.modules() if hasattr(module, "vera_lambda_b")]
    assert report.layers == len(layers) > 1
    for layer in layers:
        assert layer.vera_A["default"].data_ptr() == model.base_model.vera_A["default"].data_ptr()


@pytest.mark.parametrize("options", [{"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}])
def test_projections_that_peft_rounds_on_a_bfloat16_base_are_exact_afterwards(options, tmp_path):
    trained = adapted(torch.bfloat16)
    save_adapter(trained, tmp_path / "a")
    model = load_peft(llama(torch.bfloat16), tmp_path / "a", **options)
    assert not same_bits(pair(model)[0].float(), trained.vera_A["default"]), "PEFT rounds no more: change this test"
    report = restore_projections(model, tmp_path / "a")
    assert report.changed
    assert report.widened is ("autocast_adapter_dtype" in options)
    assert same_bits(pair(model)[0], trained.vera_A["default"])
    assert same_bits(pair(model)[1], trained.vera_B["default"])
    assert (logits(model, some_ids()) - logits(trained, some_ids())).abs().max() <= 4e-3


def test_a_recorded_seed_only_pair_is_regenerated(tmp_path):
    """An adapter trained on bfloat16 and loaded onto float32: PEFT draws it without the rounding."""
    name = "peft-0.21.2-llama-bf16-seedonly"
    with pytest.warns(AssumedRecipeWarning):
        save_adapter(VeraModel.from_pretrained(base_model(name), CHECKPOINTS / name), tmp_path / "a")
    model = load_peft(base_model(SEED_ONLY), tmp_path / "a")
    with pytest.raises(UnprovenError, match="was assumed when it was recorded"):
        restore_projections(model, tmp_path / "a", strict=True)
    report = restore_projections(model, tmp_path / "a")
    assert report.origin == "recorded"
    assert report.recipe.name == "mt19937-f32-fused-via-bf16"
    assert report.changed
    assert all(same_bits(tensor, tensor.bfloat16().float()) for tensor in pair(model))
    assert report.to_dict()["projections"]["vera_A"]["differing"] > 0
    assert "restored" in str(report)


def test_nothing_recorded_is_assumed_or_refused():
    name = "peft-0.21.2-llama-f32-seedonly-noavx"
    model = load_peft(base_model(name), CHECKPOINTS / name)
    with pytest.raises(UnprovenError):
        restore_projections(model, CHECKPOINTS / name, strict=True)
    with pytest.warns(AssumedRecipeWarning):
        assert restore_projections(model, CHECKPOINTS / name).origin == "assumed"


def test_loading_and_restoring_in_one_line(tmp_path):
    trained = adapted(save_projection=False)
    save_adapter(trained, tmp_path / "a")
    model = load(peft.PeftModel, llama(), tmp_path / "a", strict=True)
    assert isinstance(model, peft.PeftModel)
    assert same_bits(pair(model)[0], trained.vera_A["default"])
    torch.testing.assert_close(logits(model.eval(), some_ids()), logits(trained, some_ids()), rtol=0, atol=1e-5)


def test_an_adapter_on_the_hub_is_loaded_and_restored(hub, tmp_path):
    """The wanted one is at a tag, in a subfolder; its branch holds another one by now."""
    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "sub/"))
    tagged = repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    other = {path: hub.store(data, large=False) for path, data in files_of(CHECKPOINTS / SEED_ONLY, "sub/").items()}
    hub.commit(repo, "refs/heads/main", tagged, other, "another", "ann")
    for reference, options in (("hf://ann/x@v1/sub", {}), ("hf://ann/x", {"revision": "v1", "subfolder": "sub"})):
        model = load(peft.PeftModel, base_model(KEPT), reference, strict=True, **options)
        assert distance(model.eval(), KEPT) <= 1e-5
    # Here PEFT draws the pair without the rounding that is recorded.
    rounded = CHECKPOINTS / "peft-0.21.2-llama-bf16-seedonly"
    with pytest.warns(AssumedRecipeWarning):
        save_adapter(VeraModel.from_pretrained(base_model(rounded.name), rounded), tmp_path / "a")
    hub.add_repo("ann/y", files_of(tmp_path / "a"))
    model = load(peft.PeftModel, base_model(SEED_ONLY), "hf://ann/y")
    assert all(same_bits(tensor, tensor.bfloat16().float()) for tensor in pair(model))


def test_merged_adapters_are_refused_because_they_could_not_be_taken_out_again():
    model = load_peft(base_model(KEPT), CHECKPOINTS / KEPT)
    model.merge_adapter()
    draw_again(model)
    wrong = [tensor.clone() for tensor in pair(model)]
    with pytest.raises(UsageError, match=r"'default' is merged.*unmerge_adapter"):
        restore_projections(model, CHECKPOINTS / KEPT)
    assert all(map(same_bits, pair(model), wrong))


def test_a_class_that_makes_the_base_itself_is_refused():
    with pytest.raises(UsageError, match=r"AutoPeftModelForCausalLM.*restore_projections"):
        load(peft.AutoPeftModelForCausalLM, llama(), CHECKPOINTS / KEPT)


def test_a_model_with_pefts_adapters_is_refused(tmp_path):
    save_adapter(fresh(), tmp_path / "a")
    model = peft_model(llama())
    names = list(model.state_dict())
    for base in (model, model.get_base_model()):
        with pytest.raises(UsageError, match="already carries PEFT adapters"):
            load_adapter(base, tmp_path / "a")
    assert list(model.state_dict()) == names
    VeraModel.from_pretrained(model.unload(), tmp_path / "a")


def test_pefts_own_config_is_taken(tmp_path):
    options = {**OPTIONS, "target_modules": {"v_proj", "q_proj"}, "task_type": peft.TaskType.CAUSAL_LM}
    model = VeraModel(llama(), peft.VeraConfig(**options))
    same = VeraModel(llama(), VeraConfig(**{**options, "task_type": "CAUSAL_LM"}))
    assert model.peft_config["default"].to_dict() == same.peft_config["default"].to_dict() | {
        "peft_version": peft.__version__
    }
    model.add_adapter("second", peft.VeraConfig(**{**options, "r": 3}))
    assert model.peft_config["second"].r == 3
    save_adapter(model, tmp_path / "a")
    load_peft(llama(), tmp_path / "a")


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(UsageError, match="LORA, not VeRA"):
        VeraModel(llama(), peft.LoraConfig(r=4))
    with pytest.raises(UsageError, match=r"not an adapter config.*found builtins.int"):
        VeraModel(llama(), 4)


def test_a_model_without_the_adapter_is_refused(tmp_path):
    save_adapter(fresh(), tmp_path / "a")
    with pytest.raises(UsageError, match="no VeRA adapter 'other'"):
        restore_projections(peft_model(llama()), tmp_path / "a", "other")
