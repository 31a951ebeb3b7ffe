"""Saved embeddings and heads that are one parameter: PEFT's LoRA with ensure_weight_tying is the peer."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.nn.models import OPTIONS, bert, llama, logits, randomise, some_ids
from tests.peers import QUIET_PEERS, load_peft
from vera_tools.errors import CheckFailedError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel, get_peft_model_state_dict, set_peft_model_state_dict

pytestmark = QUIET_PEERS

TARGETS = {"r": 8, "target_modules": ["q_proj"]}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def tied_llama():
    return llama(tie_word_embeddings=True)


def tied(base=None, saved=EMBEDDING, **options):
    config = VeraConfig(**TARGETS, modules_to_save=[saved], ensure_weight_tying=True, **options)
    return VeraModel(base if base is not None else tied_llama(), config)


def copies(model, name="default"):
    return [model.get_submodule(f"model.{part}").modules_to_save[name].weight for part in (EMBEDDING, HEAD)]


def step(model):
    ids = some_ids()
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    return model.eval()


@pytest.mark.parametrize("saved", [EMBEDDING, "embed_tokens", HEAD])
def test_training_moves_both_as_in_peft(saved):
    ours = tied(saved=saved)
    assert set(ours.peft_config["default"].modules_to_save) == {saved, HEAD if saved != HEAD else EMBEDDING}
    config = peft.LoraConfig(**TARGETS, lora_alpha=8, modules_to_save=[saved], ensure_weight_tying=True)
    peers = peft.get_peft_model(tied_llama(), config)
    one, other = copies(step(ours))
    theirs = step(peers).base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert one is other
    torch.testing.assert_close(one, theirs, rtol=0, atol=1e-6)
    # Apart, the embedding gets its own part of the gradient only.
    with pytest.warns(VeraToolsWarning, match="`ensure_weight_tying` is not set to True: .* are one parameter"):
        apart = VeraModel(tied_llama(), VeraConfig(**TARGETS, modules_to_save=[EMBEDDING, HEAD]))
    one, other = copies(step(apart))
    assert not torch.allclose(one, theirs, rtol=0, atol=1e-4)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("save_projection", [True, False])
def test_it_is_saved_and_loaded(save_projection, tmp_path):
    model = step(tied(save_projection=save_projection))
    randomise(model)
    model.save_pretrained(tmp_path)
    expected = logits(model, some_ids())
    again = VeraModel.from_pretrained(tied_llama(), tmp_path, is_trainable=True)
    assert again.peft_config["default"].ensure_weight_tying
    one, other = copies(again)
    assert one is other
    assert torch.equal(logits(again.eval(), some_ids()), expected)
    torch.testing.assert_close(logits(load_peft(tied_llama(), tmp_path), some_ids()), expected, rtol=0, atol=1e-5)
    with torch.device("meta"):
        base = tied_llama()
    on_meta = VeraModel.from_pretrained(base, tmp_path)
    one, other = copies(on_meta)
    assert one is other
    assert torch.equal(one, copies(model)[0])


def test_values_that_differ_are_not_tied(tmp_path):
    model = tied()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"base_model.model.{HEAD}.weight"][0, 0] += 1
    save_file(tensors, path)
    (tmp_path / "vera_manifest.json").unlink()  # which would tell of the change first
    base = tied_llama()
    before = list(base.state_dict())
    with pytest.raises(CheckFailedError, match=r"model\.embed_tokens\.weight and lm_head\.weight: ensure"):
        VeraModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == before
    state = get_peft_model_state_dict(model)
    with pytest.raises(CheckFailedError, match="the values are not the same"):
        set_peft_model_state_dict(model, {**state, **{k: v for k, v in tensors.items() if HEAD in k}})
    set_peft_model_state_dict(model, {name: tensor + 1 for name, tensor in state.items()})
    assert torch.equal(copies(model)[0], state[f"base_model.model.{EMBEDDING}.weight"])


def test_each_adapter_has_its_own():
    model = tied()
    model.add_adapter("second", VeraConfig(**TARGETS, modules_to_save=[HEAD], ensure_weight_tying=True))
    with pytest.warns(VeraToolsWarning, match="not set to True"):
        model.add_adapter("apart", VeraConfig(**TARGETS, modules_to_save=[HEAD]))
    (one, other), (third, fourth) = copies(model), copies(model, "second")
    assert one is other
    assert third is fourth
    assert one is not third
    assert model.peft_config["apart"].modules_to_save == [HEAD]
    counted = VeraModel(tied_llama(), VeraConfig(**TARGETS)).get_nb_trainable_parameters()[0] + one.numel()
    assert model.get_nb_trainable_parameters()[0] == counted


def test_merging_leaves_them_tied_or_says_that_they_are_not(tmp_path):
    model = step(tied())
    expected = logits(model, some_ids())
    merged = model.merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "tied")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "tied"), some_ids()), expected)

    with pytest.warns(VeraToolsWarning, match="not set to True"):
        model = step(VeraModel(tied_llama(), VeraConfig(**TARGETS, modules_to_save=[HEAD])))
    expected = logits(model, some_ids())
    with pytest.warns(VeraToolsWarning, match="Input and output embeddings are no longer tied after merging"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path / "apart")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "apart"), some_ids()), expected)


def test_where_there_is_nothing_to_tie():
    with pytest.warns(VeraToolsWarning, match="no tied modules were found in the model"):
        VeraModel(llama(), VeraConfig(**TARGETS, modules_to_save=[HEAD], ensure_weight_tying=True))
    with pytest.warns(VeraToolsWarning, match="no tied modules are added in `modules_to_save`"):
        VeraModel(tied_llama(), VeraConfig(**OPTIONS, ensure_weight_tying=True))


def test_a_tie_that_would_save_more_than_was_asked_for_is_told():
    embeddings = {"r": 4, "target_modules": ["query"], "modules_to_save": ["word_embeddings"]}
    with pytest.warns(
        VeraToolsWarning, match=r"decoder\.bias are one parameter, and will not be one any more"
    ) as caught:
        model = VeraModel(bert("MaskedLM"), VeraConfig(**embeddings, ensure_weight_tying=True))
    assert len(caught) == 1
    assert model.peft_config["default"].modules_to_save == ["word_embeddings", "cls.predictions.decoder"]
    table, decoder = (wrapper.modules_to_save["default"] for wrapper in model.saved_modules().values())
    assert table.weight is decoder.weight
    merged = model.merge_and_unload()
    assert merged.cls.predictions.decoder.weight is merged.bert.embeddings.word_embeddings.weight


def test_it_is_written_where_it_is_true():
    assert "ensure_weight_tying" not in VeraConfig().to_dict()
    assert VeraConfig.from_dict(VeraConfig(ensure_weight_tying=True).to_dict()).ensure_weight_tying
