"""What a model and its layers say about their adapters, and the switches on them; PEFT is the peer."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch

from tests.nn.models import OPTIONS, fresh, llama, logits, peft_model, randomise, some_ids
from tests.peers import QUIET_PEERS
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel, get_layer_status, get_model_status

pytestmark = QUIET_PEERS

# Both need a pair of the same shapes: PEFT cannot hold two.
SECOND = {**OPTIONS, "target_modules": ["q_proj", "v_proj"]}
FIRST = {**OPTIONS, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}


def both():
    """The same two adapters on our model and on PEFT's; the second is on more layers and saves no module."""
    ours, peers = VeraModel(llama(), VeraConfig(**FIRST)), peft_model(llama(), **FIRST)
    ours.add_adapter("second", VeraConfig(**SECOND))
    peers.add_adapter("second", peft.VeraConfig(**SECOND))
    randomise(ours), randomise(peers)
    return ours, peers


CHANGES = {
    "nothing": lambda model, layers: None,
    "the second is active": lambda model, layers: model.set_adapter("second"),
    "frozen": lambda model, layers: model.set_requires_grad("default", False),
    "both trainable": lambda model, layers: model.set_requires_grad(["default", "second"]),
    "one layer frozen": lambda model, layers: layers[0].set_requires_grad("default", requires_grad=False),
    "one layer disabled": lambda model, layers: layers[0].enable_adapters(False),
    "one layer's choice": lambda model, layers: layers[0].set_adapter("second", inference_mode=True),
    "merged": lambda model, layers: [layer.merge(adapter_names=["second"]) for layer in layers],
    "one layer merged": lambda model, layers: layers[0].merge(adapter_names=["second"]),
}


# A saved module that the active adapter has no copy of makes PEFT's active adapters irregular, and its disabled layers
# become frozen, and trainable when they are enabled again, whatever they were before.
UNLIKE = {"the second is active": {"active_adapters"}, "one layer disabled": {"requires_grad", "trainable_params"}}


@pytest.mark.parametrize("what", CHANGES)
def test_the_status_is_pefts(what):
    ours, peers = both()
    change, unlike = CHANGES[what], UNLIKE.get(what, set())
    change(ours, list(ours.vera_layers().values()))
    change(
        peers, [m for m in peers.modules() if type(m).__module__ == "peft.tuners.vera.layer" and hasattr(m, "merge")]
    )
    expected = ["vera.Linear"] * 4 + ["ModulesToSaveWrapper"]
    assert [status.module_type for status in get_layer_status(ours)] == expected
    mine, theirs = ([dataclasses.asdict(status) for status in model.get_layer_status()] for model in (ours, peers))
    for status in theirs:  # PEFT counts the shared pair's other adapters as devices of a layer that does not have them
        status["devices"] = {name: status["devices"][name] for name in status["available_adapters"]}
    mine.append(dataclasses.asdict(get_model_status(ours)))
    theirs.append(dataclasses.asdict(peers.get_model_status()))
    mine, theirs = ([{k: v for k, v in s.items() if k not in unlike} for s in statuses] for statuses in (mine, theirs))
    assert mine == theirs


def test_a_saved_module_without_parameters_has_a_status():
    model = fresh(modules_to_save=["rotary_emb"])
    assert model.get_layer_status()[-1].requires_grad == {}
    assert model.get_model_status().requires_grad == {"default": True}


def test_disabling_the_layers_computes_the_base_until_they_are_enabled():
    ours, peers = both()
    base, want = logits(llama(), some_ids()), logits(ours, some_ids())
    for model in (ours, peers):
        model.disable_adapter_layers()
        assert torch.equal(logits(model, some_ids()), base)
        assert model.get_model_status().enabled is False
        model.enable_adapter_layers()
        torch.testing.assert_close(logits(model, some_ids()), want, rtol=0, atol=1e-5)
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    ours.merge_adapter()
    ours.disable_adapter_layers()
    assert torch.equal(logits(ours, some_ids()), base)
    assert trainable == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    with ours.disable_adapter():
        pass
    assert torch.equal(logits(ours, some_ids()), base)
    ours.enable_adapter_layers()
    assert torch.equal(logits(ours, some_ids()), want)


def test_disabling_one_merged_layer_takes_its_adapter_out():
    model, _ = both()
    layer = next(iter(model.vera_layers().values()))
    before = layer.weight.clone()
    model.merge_adapter()
    layer.enable_adapters(False)
    assert torch.equal(layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_trained_biases_are_the_adapters_too(bias):
    options = {**OPTIONS, "bias": bias, "target_modules": ["q_proj"]}
    model = VeraModel(llama(attention_bias=True), VeraConfig(**options))
    biases = [p for name, p in model.named_parameters() if name.endswith(".bias") and p.requires_grad]
    assert len(biases) == (2 if bias == "vera_only" else 8)
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    assert all(p.requires_grad for p in biases)
    with pytest.warns(VeraToolsWarning, match=f"'{bias}' .* the biases that adapter 'default' has trained stay"):
        model.disable_adapter_layers()
    with pytest.warns(VeraToolsWarning, match="Careful, disabling") as caught, model.disable_adapter():
        pass
    assert caught[0].filename == __file__


def test_a_model_without_adapters_has_no_status():
    ours, peers = fresh(), peft_model(llama())
    for model in (ours, peers):
        model.unload()
        with pytest.raises(ValueError, match="No adapter layers found in the model"):
            model.get_layer_status()


def test_an_unknown_adapter_is_named():
    model, _ = both()
    with pytest.raises(UsageError, match="Adapter third does not exist"):
        model.set_requires_grad("third")


def test_the_active_config():
    model, _ = both()
    assert model.active_peft_config is model.peft_config["default"]
    model.set_adapter(["default", "second"])
    assert model.active_adapter == ["default", "second"]
    assert model.active_peft_config is model.peft_config["default"]
    for name in ("default", "second"):
        model.delete_adapter(name)
    with pytest.raises(UsageError, match="no adapter is active"):
        _ = model.active_peft_config
