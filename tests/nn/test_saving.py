"""Nothing that was trained is lost in saving: given state dicts, partitioned parameters, vocabularies that grew."""

from __future__ import annotations

import subprocess
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests import ROOT
from tests.adapters import PAIR, WEIGHTS
from tests.nn.models import OPTIONS, VOCABULARY, Tiny, adapted, fresh, llama, logits, peft_model, randomise, some_ids
from tests.peers import QUIET_PEERS, load_peft
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel

pytestmark = QUIET_PEERS


def same_files(one, other):
    first, second = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert first.keys() == second.keys()
    for name in first:
        if name in PAIR:  # which bits PEFT draws depends on the machine, and is no matter here
            assert (first[name].shape, first[name].dtype) == (second[name].shape, second[name].dtype)
        else:
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
    return first


def partition(model):
    """Leave of every parameter what DeepSpeed's ZeRO-3 leaves: an empty one that knows its shape."""
    for parameter in model.parameters():
        parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
        parameter.data = parameter.data.new_empty(0)


class TestStateDict:
    def test_what_is_given_is_written_as_peft_writes_it(self, tmp_path):
        options = {"bias": "vera_only", "modules_to_save": ["lm_head"]}
        ours, peers = fresh(**options), peft_model(llama(), **options)
        for model, folder in ((ours, "ours"), (peers, "peers")):
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for name, tensor in state.items():
                if "vera_lambda" in name or "lm_head" in name:
                    tensor.fill_(len(name.replace("base_model.", "")) / 64)
            model.save_pretrained(tmp_path / folder, state_dict=state)
        written = same_files(tmp_path / "ours", tmp_path / "peers")
        assert all(tensor.max() > 0 for tensor in written.values())
        assert not any(p.any() for name, p in ours.named_parameters() if "lambda_b" in name)

    def test_a_part_of_it_or_something_else_is_refused(self, tmp_path):
        model = adapted()
        state = model.state_dict()
        vector = next(name for name in state if "lambda_b" in name)
        wrong = {
            "is not in state_dict": {name: tensor for name, tensor in state.items() if name != vector},
            "another shape": {**state, vector: state[vector][:-1]},
            "no values here": {**state, vector: state[vector][:0]},
            "on the meta device": {**state, vector: state[vector].to("meta")},
            "the projections are not the model's": {**state, "vera_B.default": state["vera_B.default"] + 1},
        }
        for words, given in wrong.items():
            with pytest.raises(UsageError, match=words):
                model.save_pretrained(tmp_path / "a", state_dict=given)
        assert not (tmp_path / "a").exists()


class TestPartitioned:
    """Parameters partitioned by hand, as ZeRO-3 does it; `test_with_deepspeed` has the real one, where it is there."""

    def test_empty_tensors_are_refused_and_gathered_ones_written(self, tmp_path):
        model = adapted(bias="vera_only")
        model.save_pretrained(tmp_path / "whole")
        state, counted = model.state_dict(), model.get_nb_trainable_parameters()
        state = {name: tensor.clone() for name, tensor in state.items()}
        partition(model)
        assert model.get_nb_trainable_parameters() == counted
        with pytest.raises(UsageError, match=r"lambda_b: has no values here.*state_dict=accelerator.get_state_dict"):
            model.save_pretrained(tmp_path / "a")
        assert not (tmp_path / "a").exists()
        model.save_pretrained(tmp_path / "a", state_dict=state)
        same_files(tmp_path / "a", tmp_path / "whole")
        manifests = [(tmp_path / folder / "vera_manifest.json").read_text() for folder in ("a", "whole")]
        assert manifests[0] == manifests[1]
        with pytest.raises(UsageError, match="spread over processes"):
            model.merge_adapter()

    def test_shapes_are_found_where_the_base_is_partitioned_before(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
        whole, parts = (GPT2LMHeadModel(GPT2Config(**shape)) for _ in range(2))
        partition(parts)
        models = [
            VeraModel(base, VeraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)) for base in (whole, parts)
        ]
        assert models[0].get_nb_trainable_parameters() == models[1].get_nb_trainable_parameters()
        assert torch.equal(models[0].vera_A["default"], models[1].vera_A["default"])

    @pytest.mark.slow
    def test_with_deepspeed(self, tmp_path):
        why = "needs DeepSpeed (pip install deepspeed); above it is partitioned by hand"
        pytest.importorskip("deepspeed", reason=why)
        command = [sys.executable, "-m", "tests.nn.deepspeed_worker", str(tmp_path)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        vectors = [tensor for name, tensor in load_file(tmp_path / WEIGHTS).items() if name.endswith("lambda_b")]
        assert all(vector.abs().max() > 0 for vector in vectors)


class TestVocabulary:
    @pytest.fixture
    def grown(self, tmp_path, monkeypatch):
        """A base whose vocabulary was resized since it was saved, the same in every call; it knows where it lies."""
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        llama().save_pretrained(tmp_path / "base")

        def make():
            model = type(llama()).from_pretrained(tmp_path / "base").eval()
            torch.manual_seed(1)
            model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
            return model

        return make

    def test_embeddings_are_saved_and_loaded_as_peft_does(self, grown, tmp_path):
        ours, peers = VeraModel(grown(), VeraConfig(**OPTIONS)), peft_model(grown())
        randomise(ours), randomise(peers)
        with pytest.warns(VeraToolsWarning, match=rf"resized .*: {VOCABULARY + 6} tokens, and {VOCABULARY}"):
            ours.save_pretrained(tmp_path / "ours")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peers.save_pretrained(tmp_path / "peers")
        written = same_files(tmp_path / "ours", tmp_path / "peers")
        assert {name for name in written if "lambda" not in name and "vera_" not in name} == {
            "base_model.model.lm_head.weight",
            "base_model.model.model.embed_tokens.weight",
        }
        ids = some_ids() + 6  # new tokens among them
        for folder in ("ours", "peers"):
            for load in (load_peft, VeraModel.from_pretrained):
                base = llama()
                torch.manual_seed(2)  # the rows that are added here have other values
                base.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
                torch.testing.assert_close(logits(load(base, tmp_path / folder), ids), logits(ours, ids))
        with pytest.raises(CheckFailedError, match=r"vocabulary is not as large.*resize_token_embeddings\(103\)"):
            VeraModel.from_pretrained(llama(), tmp_path / "ours")

    def test_asked_for_or_not(self, grown, tmp_path):
        ours, peers = VeraModel(grown(), VeraConfig(**OPTIONS)), peft_model(grown())
        for wanted in (True, False):
            for model, name in ((ours, "ours"), (peers, "peers")):
                model.save_pretrained(tmp_path / f"{name}-{wanted}", save_embedding_layers=wanted)
            written = same_files(tmp_path / f"ours-{wanted}", tmp_path / f"peers-{wanted}")
            assert ("base_model.model.lm_head.weight" in written) is wanted
        tied = VeraModel(llama(tie_word_embeddings=True), VeraConfig(**OPTIONS))
        tied.save_pretrained(tmp_path / "tied", save_embedding_layers=True)
        VeraModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path / "tied")
        with pytest.warns(VeraToolsWarning, match="says of no layer that it is an embedding"):
            VeraModel(Tiny(), VeraConfig(r=2, target_modules=["0"])).save_pretrained(
                tmp_path / "tiny", save_embedding_layers=True
            )

    def test_an_adapted_head_is_saved_as_peft_does(self, tmp_path):
        options = {"target_modules": ["q_proj", "lm_head"]}
        ours, peers = fresh(**options), peft_model(llama(), **options)
        randomise(ours), randomise(peers)
        with pytest.warns(VeraToolsWarning, match="lm_head is adapted"):
            ours.save_pretrained(tmp_path / "ours")
        with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
            peers.save_pretrained(tmp_path / "peers")
        assert "base_model.model.lm_head.base_layer.weight" in same_files(tmp_path / "ours", tmp_path / "peers")
        again = VeraModel.from_pretrained(llama(), tmp_path / "peers")
        torch.testing.assert_close(logits(again, some_ids()), logits(peers, some_ids()), rtol=0, atol=1e-5)

    def test_a_merged_head_is_neither_saved_nor_loaded_into(self, tmp_path):
        """Its weight would come back with the adapter in it, and get it once more; PEFT saves and loads it so."""
        model = fresh(target_modules=["q_proj", "lm_head"])
        randomise(model)
        with pytest.warns(VeraToolsWarning, match="lm_head is adapted"):
            model.save_pretrained(tmp_path / "a")
        model.merge_adapter()
        for save in (lambda: model.save_pretrained(tmp_path / "b"), model.to_lora):
            with (
                pytest.warns(VeraToolsWarning, match="lm_head is adapted"),
                pytest.raises(UsageError, match="lm_head: is saved with the adapter, and an adapter is merged into it"),
            ):
                save()
        with pytest.raises(UsageError, match=r"brings weights of the base, and an adapter is merged into these"):
            model.load_adapter(tmp_path / "a", "second")
        assert not (tmp_path / "b").exists()
        assert list(model.peft_config) == ["default"]

    def test_a_base_that_cannot_be_asked_is_said(self, tmp_path):
        base = llama()
        base.name_or_path = str(tmp_path)
        model = VeraModel(base, VeraConfig(**OPTIONS))
        model.save_pretrained(tmp_path / "a")  # no config there, as PEFT has it
        (tmp_path / "config.json").write_text("{")
        with pytest.warns(VeraToolsWarning, match=r"could not be found out.*save_embedding_layers=True"):
            model.save_pretrained(tmp_path / "b")

    def test_on_the_meta_device_they_are_loaded_too(self, tmp_path):
        model = adapted()
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        with torch.device("meta"):
            base = llama()
        again = VeraModel.from_pretrained(base, tmp_path)
        assert torch.equal(again.model.model.embed_tokens.weight, model.model.model.embed_tokens.weight)


def test_a_layers_own_choice_of_adapters_is_merged_as_it_is_computed(tmp_path):
    results = []
    for make in (lambda: VeraModel(llama(), VeraConfig(**OPTIONS)), lambda: peft_model(llama())):
        model = make()
        config = VeraConfig if isinstance(model, VeraModel) else peft.VeraConfig
        model.add_adapter("second", config(**OPTIONS))
        randomise(model)
        for name, layer in model.named_modules():
            if hasattr(layer, "vera_lambda_b"):
                layer.set_adapter(["default", "second"] if "q_proj" in name else ["second"])
        computed = logits(model, some_ids())
        model.merge_adapter()
        torch.testing.assert_close(logits(model, some_ids()), computed, rtol=0, atol=1e-5)
        model.unmerge_adapter()
        merged = logits(model.merge_and_unload(), some_ids())
        torch.testing.assert_close(merged, computed, rtol=0, atol=1e-5)
        results.append(computed)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_a_safe_merge_looks_at_a_layers_own_choice():
    model = adapted()
    model.add_adapter("second", VeraConfig(**OPTIONS))
    layer = next(iter(model.vera_layers().values()))
    layer.set_adapter(["second"])
    with torch.no_grad():
        layer.vera_lambda_b["second"].fill_(torch.nan)
    with pytest.raises(CheckFailedError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in model.vera_layers().values())


@pytest.mark.parametrize("kind", [nn.ParameterDict, nn.ParameterList])
def test_a_container_of_parameters_is_no_module_to_save(kind):
    def base():
        model = Tiny()
        value = nn.Parameter(torch.ones(2))
        model.extra = kind({"x": value} if kind is nn.ParameterDict else [value])
        return model

    options = {"r": 2, "target_modules": ["0"], "modules_to_save": ["extra"]}
    with pytest.raises(TypeError, match="modules_to_save"):
        peft.get_peft_model(base(), peft.VeraConfig(**options))
    model = base()
    with pytest.raises(UsageError, match=rf"extra: modules_to_save cannot be a container.*{kind.__name__}"):
        VeraModel(model, VeraConfig(**options))
    assert isinstance(model.inner[0], nn.Linear)
