"""Which modules are adapted, and what is said where it cannot be done."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.nn.models import OPTIONS, llama, peft_model
from tests.peers import QUIET_PEERS
from vera_tools.checkpoints.default_targets import DEFAULT_TARGETS
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel

pytestmark = QUIET_PEERS


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97, n_positions=64)).eval()


def names_of(model):
    from vera_tools.nn import VeraLinear

    return [name for name, module in model.model.named_modules() if isinstance(module, VeraLinear)]


def pefts(base, **options):
    from peft.tuners.vera.layer import VeraLayer

    model = peft_model(base, **options)
    return [name for name, module in model.base_model.model.named_modules() if isinstance(module, VeraLayer)]


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.k_proj", "mlp.up_proj"]},
        {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR"},
        {"target_modules": None},
        {"target_modules": ["model.layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_the_same_modules_as_peft(options):
    ours = VeraModel(llama(layers=3), VeraConfig(**{**OPTIONS, **options}))
    assert names_of(ours) == pefts(llama(layers=3), **options)


def test_conv1d_is_recognised_and_computed_as_peft_does():
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    ours, peers = VeraModel(gpt2(), VeraConfig(**{**OPTIONS, **options})), peft_model(gpt2(), **options)
    assert names_of(ours) == pefts(gpt2(), **options)
    assert ours.peft_config["default"].fan_in_fan_out is True
    assert ours.vera_A["default"].shape == peers.base_model.vera_A["default"].shape == (16, 32)
    assert ours.vera_B["default"].shape == (128, 16)


def test_fan_in_fan_out_follows_the_layers():
    wrong = VeraConfig(**{**OPTIONS, "fan_in_fan_out": True})
    with pytest.warns(VeraToolsWarning, match="Setting fan_in_fan_out to False"):
        assert VeraModel(llama(), wrong).peft_config["default"].fan_in_fan_out is False
    assert wrong.fan_in_fan_out is True, "the caller's config was changed"


def test_the_default_targets_are_pefts():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING as PEFTS

    assert DEFAULT_TARGETS == PEFTS


def test_a_model_without_a_default_says_what_it_has():
    with pytest.raises(UsageError, match=r"no default for the model type None; the model has 0, 2"):
        VeraModel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), VeraConfig(r=2))


def test_no_match_says_what_the_model_has():
    with pytest.raises(ValueError, match=r"\['query'\] matched nothing; the model has q_proj, k_proj, v_"):
        VeraModel(llama(), VeraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"matched nothing in layers_to_transform=7"):
        VeraModel(llama(), VeraConfig(r=2, target_modules=["q_proj"], layers_to_transform=7))


def test_a_name_that_matches_nothing_is_told():
    with pytest.warns(VeraToolsWarning, match="'qproj', 'heads' matched nothing"):
        VeraModel(llama(), VeraConfig(r=2, target_modules=["v_proj", "qproj"], modules_to_save=["heads"]))


@pytest.mark.parametrize("target", ["embed_tokens", "mlp", "norm"])
def test_a_layer_that_is_not_linear_is_named(target):
    with pytest.raises(UsageError, match=rf"{target}: only linear layers can be adapted"):
        VeraModel(llama(), VeraConfig(r=2, target_modules=[target]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchs_own_quantised_layers_are_refused():
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, torch.qint8)
    with pytest.raises(UsageError, match="0: torch's own quantised layers pass no gradient back"):
        VeraModel(quantised, VeraConfig(r=2, target_modules=["0"]))


def test_a_layer_whose_forward_is_never_called_is_refused_and_left_out_of_all_linear():
    def encoder():
        return nn.TransformerEncoderLayer(16, 2, 24)

    with pytest.raises(UsageError, match=r"self_attn.out_proj: torch.nn.MultiheadAttention reads this layer's weight"):
        VeraModel(encoder(), VeraConfig(r=2, target_modules=["out_proj"]))
    model = VeraModel(encoder(), VeraConfig(r=2, target_modules="all-linear"))
    assert names_of(model) == ["linear1", "linear2"]


def test_a_layer_without_a_shape_is_refused():
    with pytest.raises(UsageError, match="0: the layer has no shape yet"):
        VeraModel(nn.Sequential(nn.LazyLinear(4)), VeraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("name", ["self_attn", "q_proj"])
def test_what_another_adapter_has_changed_cannot_be_saved_whole(name):
    """A copy of it would hold a copy of the adapter, which would be trained and saved under names that mean nothing."""
    model = VeraModel(llama(), VeraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        UsageError, match=rf"layers\.0\.(self_attn\.)?{name}: a module that another adapter has changed"
    ):
        model.add_adapter("second", VeraConfig(r=2, target_modules=["up_proj"], modules_to_save=[name]))
    assert list(model.peft_config) == list(model.vera_A) == ["default"]
    assert names_of(model) == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]


def test_what_another_adapter_saves_whole_cannot_be_adapted():
    """Its copies would have to be adapted, each for itself."""
    model = VeraModel(llama(), VeraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp", "lm_head"]))
    for target, where in (("lm_head", "lm_head"), ("up_proj", r"model\.layers\.0\.mlp\.up_proj")):
        with pytest.raises(UsageError, match=rf"{where}: lies in .* which another adapter saves whole"):
            model.add_adapter("second", VeraConfig(r=2, target_modules=["q_proj", target]))
    model.add_adapter("second", VeraConfig(r=2, target_modules="all-linear"))
    found = [name for name in names_of(model) if "layers.0" in name]
    assert [name.rpartition(".")[2] for name in found] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("saved", ["attn", "proj"])
def test_nothing_is_both_adapted_and_saved_whole(saved):
    """An entry of modules_to_save saves whatever ends so, and keeps only whole parts of a path from being adapted."""
    base = llama()
    with pytest.raises(UsageError, match=r"q_proj: is adapted, and lies in a module that is saved whole"):
        VeraModel(base, VeraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved]))
    assert list(base.state_dict()) == list(llama().state_dict())


def test_a_container_cannot_be_saved_whole():
    with pytest.raises(UsageError, match=r"model\.layers: modules_to_save cannot be a container"):
        VeraModel(llama(), VeraConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers"]))
