"""Merging adapters into the base weights, and taking them out again; PEFT is the peer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.nn.models import OPTIONS, Tiny, adapted, llama, logits, peft_model, randomise, some_ids, two_adapters
from tests.peers import QUIET_PEERS
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel
from vera_tools.nn.projection import same_bits

pytestmark = QUIET_PEERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_gives_back_the_original_bits(dtype):
    model = adapted(dtype)
    before = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    layer = next(iter(model.vera_layers().values()))
    assert not torch.equal(layer.weight, before["model.model.layers.0.self_attn.q_proj.base_layer.weight"])
    arithmetic = layer.weight - layer.get_delta_weight("default").to(dtype)
    assert not torch.equal(arithmetic, before["model.model.layers.0.self_attn.q_proj.base_layer.weight"])
    model.unmerge_adapter()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)


def test_merged_weights_are_pefts():
    ours, peers = adapted(), peft_model(llama())
    randomise(peers)
    ours, peers = ours.merge_and_unload(), peers.merge_and_unload()
    for (name, mine), theirs in zip(ours.state_dict().items(), peers.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)


def test_merging_several_and_taking_one_away():
    model = two_adapters()
    model.merge_adapter(["default"])
    once = {name: layer.weight.clone() for name, layer in model.vera_layers().items()}
    with pytest.warns(VeraToolsWarning, match="were merged default. You are now additionally merging second"):
        model.merge_adapter(["second"])
    assert next(iter(model.vera_layers().values())).merged_adapters == ["default", "second"]
    with pytest.warns(VeraToolsWarning, match="All adapters are already merged"):
        model.merge_adapter(["second"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['second'\] while they are merged"):
        model.delete_adapter("second")
    model.unmerge_adapter()
    model.delete_adapter("second")
    model.merge_adapter()
    assert all(torch.equal(layer.weight, once[name]) for name, layer in model.vera_layers().items())


def test_safe_merge_refuses_and_leaves_every_weight_alone():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    list(model.vera_layers().values())[-1].vera_lambda_b["default"].data[0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(CheckFailedError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
    after = model.state_dict()
    assert all(same_bits(before[name], after[name]) for name in before if "vera_lambda" not in name)


def test_safe_merge_sees_what_overflows_the_weights_own_dtype():
    model = adapted(torch.float16)
    next(iter(model.vera_layers().values())).vera_lambda_b["default"].data.fill_(1e6)
    with pytest.raises(CheckFailedError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_merge_and_unload_returns_the_plain_model_with_a_progress_bar(capsys):
    model = adapted()
    want = logits(model, some_ids())
    plain = model.merge_and_unload(progressbar=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Merging" in captured.err
    assert plain.state_dict().keys() == llama().state_dict().keys()
    torch.testing.assert_close(logits(plain, some_ids()), want, rtol=0, atol=1e-5)


def test_merge_and_unload_of_named_adapters():
    model = two_adapters()
    model.set_adapter("second")
    want = logits(model, some_ids())
    model.set_adapter("default")
    torch.testing.assert_close(
        logits(model.merge_and_unload(adapter_names=["second"]), some_ids()), want, rtol=0, atol=1e-5
    )


def test_unload_gives_back_the_base():
    model = adapted()
    model.merge_adapter()
    plain = model.unload()
    want = llama().state_dict()
    assert all(same_bits(tensor, want[name]) for name, tensor in plain.state_dict().items())
    VeraModel(plain, VeraConfig(**OPTIONS))  # and it can be adapted again


def test_choosing_an_adapter_while_one_is_merged_takes_it_out():
    model = two_adapters()
    base = copy.deepcopy(model.model.model.layers[0].self_attn.q_proj.weight)
    model.merge_adapter()
    with pytest.warns(VeraToolsWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    assert torch.equal(model.model.model.layers[0].self_attn.q_proj.weight, base)


def test_a_tied_weight_is_told():
    base = llama(tie_word_embeddings=True)
    with pytest.warns(VeraToolsWarning, match=r"lm_head is tied to model.embed_tokens.weight"):
        VeraModel(base, VeraConfig(**{**OPTIONS, "target_modules": ["lm_head", "q_proj"]}))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("first", ["weight_norm", "meta"])
def test_a_weight_that_nothing_can_be_merged_into_is_refused_before_any_is_merged(how, first):
    """Merged into weight_norm's, which is computed anew at every use, an update would be gone in silence."""
    base = Tiny()
    last = base.inner[2]
    base.inner[2] = nn.utils.parametrizations.weight_norm(last) if first == "weight_norm" else last.to("meta")
    model = VeraModel(base, VeraConfig(r=4, target_modules=["inner.0", "inner.2"]))
    before = base.inner[0].weight.clone()
    with pytest.raises(UsageError, match=r"inner\.2: the weight is (computed from|on the meta device)"):
        getattr(model, how)()
    assert torch.equal(model.model.inner[0].base_layer.weight, before)


def test_nothing_is_merged_while_adapters_are_disabled():
    model = adapted()
    with model.disable_adapter(), pytest.raises(UsageError, match="adapters are disabled"):
        model.merge_adapter()
    model.merge_adapter()
