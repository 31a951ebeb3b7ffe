"""The models that PEFT's tests ask the Hub for: the same architectures, tiny, in a cache as the Hub's client has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

#: A commit like any other; the cache of the Hub's client keeps each model below its own.
_COMMIT = "0" * 40
_TEXT: dict[str, Any] = {
    "initializer_range": 0.3,
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
#: Where nothing else gives a position a value, a row of padding is 0 in every layer; the tests' inputs are of 1 and 2.
_ROPE: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
_GPT: dict[str, Any] = {
    "initializer_range": 0.3,
    "vocab_size": 1000,
    "n_embd": 32,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_T5: dict[str, Any] = {
    "vocab_size": 1000,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 5,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}

#: Each repository that a test about VeRA names: the class that it was saved from, and the config of ours.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/opt-125m": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        "GPTJConfig",
        {**_GPT, "rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _ROPE),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _ROPE),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_ROPE, "head_dim": 8},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", _ROPE),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 1000,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 4,
            "decoder_ffn_dim": 4,
            "max_position_embeddings": 100,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    ),
    "facebook/opt-350m": ("OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "google/flan-t5-base": ("T5ForConditionalGeneration", "T5Config", _T5),
    "openai/whisper-large": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 1000,
            "d_model": 32,
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_source_positions": 20,
            "max_target_positions": 20,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "decoder_start_token_id": 1,
        },
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _TEXT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _TEXT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _TEXT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _TEXT),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _TEXT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _TEXT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _ROPE,
    ),
}


def make(cache: Path) -> None:
    """Make every model that is not there yet, of random weights, the same in every run.

    Args:
        cache: The folder that ``HF_HUB_CACHE`` names.
    """
    for repository, (model_class, config_class, options) in MODELS.items():
        folder = cache / f"models--{repository.replace('/', '--')}"
        if folder.exists():
            continue
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
        model.save_pretrained(folder / "snapshots" / _COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(_COMMIT)
