"""`VeraModel.to_lora` against `convert --to lora` of the saved adapter, and in the real PEFT."""

from __future__ import annotations

import peft
import pytest
import torch

from tests.nn.models import OPTIONS, adapted, bert, llama, randomise, some_ids, tiny, two_adapters
from tests.peers import QUIET_PEERS
from vera_tools import to_lora
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.nn import VeraConfig, VeraModel

pytestmark = QUIET_PEERS


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()


def on(base, **options):
    model = VeraModel(base, VeraConfig(**{"r": 4, **options}))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "vera_lambda" not in name:
                parameter.add_(0.1)
    return model.eval()


def half_vectors():
    model = VeraModel(llama(torch.float16), VeraConfig(**OPTIONS), autocast_adapter_dtype=False)
    randomise(model)
    return model


def other_pair(model):
    model.vera_A["default"] += 1
    return model


MODELS = {
    "kept": adapted,
    "its own projections": lambda: other_pair(adapted()),
    "seed-only": lambda: adapted(save_projection=False),
    "bfloat16": lambda: adapted(torch.bfloat16),
    "half vectors": half_vectors,
    "float64": lambda: on(llama(torch.float64), target_modules=["q_proj", "down_proj"]),
    "Conv1D, all biases": lambda: on(gpt2(), target_modules=["c_attn", "c_proj"], bias="all", fan_in_fan_out=True),
    "own biases": lambda: on(bert(), target_modules=["query"], bias="vera_only"),
    "a head": lambda: on(bert(), target_modules=["query", "value"], task_type="SEQ_CLS"),
    "a pattern": lambda: on(llama(), target_modules=r".*\.(q|k)_proj"),
    "no transformers": tiny,
}


@pytest.mark.filterwarnings("ignore:.*from what key 7 gives:vera_tools.errors.LoadingWarning")
@pytest.mark.parametrize("what", MODELS)
def test_it_is_what_convert_makes_of_the_checkpoint(what, tmp_path):
    model = MODELS[what]()
    lora = model.to_lora()
    lora.save_pretrained(tmp_path / "live")
    model.save_pretrained(tmp_path / "vera")
    report = to_lora(tmp_path / "vera", tmp_path / "converted")
    assert not report.widths_assumed
    for name in ("adapter_model.safetensors", "adapter_config.json", "vera_manifest.json"):
        assert (tmp_path / "live" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


@pytest.mark.parametrize("what", ["kept", "float64", "Conv1D, all biases", "own biases", "a head", "no transformers"])
def test_peft_computes_the_same_with_it(what):
    model = MODELS[what]()
    lora = model.to_lora()
    config = peft.LoraConfig(**lora.config)
    plain = {"float64": lambda: llama(torch.float64), "kept": llama, "no transformers": lambda: tiny().unload()}
    base = plain.get(what, gpt2 if "Conv1D" in what else bert)()
    theirs = peft.get_peft_model(base, config).eval()
    result = peft.set_peft_model_state_dict(theirs, lora.state_dict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key or "modules_to_save" in key]
    with torch.no_grad():
        given = torch.randn(3, 6) if what == "no transformers" else some_ids()
        ours, peers = (getattr(output, "logits", output) for output in (model(given), theirs(given)))
    torch.testing.assert_close(peers, ours, rtol=0, atol=1e-12 if what == "float64" else 2e-6)
    for name, layer in model.vera_layers().items():
        delta = theirs.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert torch.equal(delta, layer.get_delta_weight("default"))


def test_each_of_several_adapters_with_its_own_pair(tmp_path):
    model = two_adapters(r=8, target_modules=["q_proj"])
    for name in ("default", "second"):
        expected = to_lora(save(model, name, tmp_path), tmp_path / f"lora-{name}", dtype="bfloat16")
        lora = model.to_lora(name, dtype="bfloat16")
        lora.save_pretrained(tmp_path / f"live-{name}")
        weights = [tmp_path / f"{kind}-{name}/adapter_model.safetensors" for kind in ("lora", "live")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert (lora.config["r"], len(lora.state_dict)) == (expected.r, 2 * expected.layers)
    with pytest.raises(UsageError, match="exists"):
        lora.save_pretrained(tmp_path / "live-second")
    lora.save_pretrained(tmp_path / "live-second", overwrite=True)


def save(model, name, folder):
    model.save_pretrained(folder / "vera")
    return folder / "vera" if name == "default" else folder / "vera" / name


def test_training_on_leaves_it_as_it_was():
    model = on(bert(), target_modules=["query"], task_type="SEQ_CLS", bias="all")
    lora = model.to_lora()
    before = {name: tensor.clone() for name, tensor in lora.state_dict.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    assert all(torch.equal(lora.state_dict[name], tensor) for name, tensor in before.items())


def test_what_is_merged_or_disabled_makes_no_difference():
    model = adapted()
    expected = model.to_lora().state_dict
    model.merge_adapter()
    for change in (lambda: None, model.unmerge_adapter, model.disable_adapter_layers):
        change()
        found = model.to_lora().state_dict
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_lora_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(UsageError, match="Adapter third does not exist"):
        model.to_lora("third")
    with pytest.raises(UsageError, match="not a dtype for LoRA"):
        model.to_lora(dtype="int8")
    model.vera_layers()["model.layers.0.mlp.down_proj"].vera_lambda_b["default"].data.fill_(1e6)
    with pytest.raises(CheckFailedError, match="too large for float16"):
        model.to_lora(dtype="float16")
    model.vera_layers()["model.layers.0.mlp.down_proj"].vera_lambda_b["default"].data[0] = float("nan")
    with pytest.raises(CheckFailedError, match=r"the adapter 'default': .*vera_lambda_b: holds NaN"):
        model.to_lora()


def test_layers_on_which_peft_loads_no_lora_are_refused(monkeypatch):
    model = adapted()
    monkeypatch.setattr(type(model.model.config), "model_type", "deepseek_v3")
    with pytest.raises(CheckFailedError, match="no LoRA that PEFT loads"):
        model.to_lora()
