"""What PEFT warns of, `VeraModel` warns of too, and in its words: each scene is played on both."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch

import vera_tools.nn
from tests.nn.models import OPTIONS, llama, made
from tests.peers import QUIET_PEERS
from vera_tools.errors import VeraToolsWarning

pytestmark = QUIET_PEERS


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, n_positions=16))


def tied():
    return llama(tie_word_embeddings=True)


def two(library):
    model = made(library)
    model.add_adapter("second", library.VeraConfig(**OPTIONS))
    return model


def layer(model):
    return next(module for module in model.modules() if hasattr(module, "vera_lambda_b"))


def twice(model, names):
    for name in names:
        model.merge_adapter(adapter_names=[name])


def irregular(library):
    model = made(library)
    layer(model).enable_adapters(False)
    with model.disable_adapter():
        pass


def biased(library):
    with made(library, lambda: llama(attention_bias=True), bias="vera_only").disable_adapter():
        pass


def deleted(library):
    two(library).delete_adapter("default")


def chosen_while_merged(library):
    model = two(library)
    model.merge_adapter()
    model.set_adapter("second")


def resized(library, folder):
    llama().save_pretrained(folder / "base")
    base = type(llama()).from_pretrained(folder / "base")
    base.resize_token_embeddings(101, mean_resizing=False)
    library.get_peft_model(base, library.VeraConfig(**OPTIONS)).save_pretrained(folder / library.__name__)


def revised(library):
    library.get_peft_model(llama(), library.VeraConfig(**OPTIONS, revision="one"), revision="two")


SCENES = {
    "All adapters are already merged, nothing to do.": lambda library, _: twice(made(library), ["default"] * 2),
    "Already following adapters were merged default. You are now additionally merging second.": (
        lambda library, _: twice(two(library), ["default", "second"])
    ),
    "Already unmerged. Nothing to do.": lambda library, _: layer(made(library)).unmerge(),
    "Adapter cannot be set when the model is merged. Unmerging the model first.": (
        lambda library, _: chosen_while_merged(library)
    ),
    "Adapter default was active which is now deleted. Setting active adapter to second.": (
        lambda library, _: deleted(library)
    ),
    "Adapter name 'lambda' should not be contained in the prefix 'vera_lambda_'.": (
        lambda library, _: made(library).add_adapter("lambda", library.VeraConfig(**OPTIONS))
    ),
    "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but": (
        lambda library, _: made(library, tied, modules_to_save=["lm_head"])
    ),
    "Input and output embeddings are no longer tied after merging. Setting `tie_word_embeddings=False` in the model": (
        lambda library, _: made(library, tied, modules_to_save=["lm_head"]).merge_and_unload()
    ),
    "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.": (
        lambda library, _: made(library, gpt2, target_modules=["c_attn"])
    ),
    "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. Setting fan_in_fan_out to False.": (
        lambda library, _: made(library, fan_in_fan_out=True)
    ),
    "The model contains some adapter layers that are enabled and others that are disabled": (
        lambda library, _: irregular(library)
    ),
    "Careful, disabling adapter layers with bias configured to be 'vera_only' does not produce the same output": (
        lambda library, _: biased(library)
    ),
    "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning": resized,
    "peft config has already set base model revision to one, overwriting with revision two": (
        lambda library, _: revised(library)
    ),
}


@pytest.mark.parametrize("words", SCENES)
def test_in_pefts_words(words, tmp_path):
    for library, kind in ((peft, UserWarning), (vera_tools.nn, VeraToolsWarning)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            SCENES[words](library, tmp_path)
        said = [w for w in caught if str(w.message).startswith(words) and issubclass(w.category, kind)]
        assert said, library
        if library is vera_tools.nn:  # PEFT's point into PEFT
            assert {Path(warning.filename).parent for warning in said} == {Path(__file__).parent}


def test_nobody_is_warned_for_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = made(vera_tools.nn, bias="none", save_projection=False)
        model.merge_adapter()
        model.unmerge_adapter()
        with torch.no_grad(), model.disable_adapter():
            pass
        model.merge_and_unload()
