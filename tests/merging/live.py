"""Tiny real models, adapted and trained by PEFT: what its live model computes, and what a merged one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import VeraConfig, get_peft_model

import vera_tools

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TEXT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**TEXT, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}
BERT = {**TEXT, "intermediate_size": 48, "max_position_embeddings": 32}
VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
}  # fmt: skip


def gemma3() -> Any:
    """A model that sees: a language model, a vision tower, and a head tied to the embedding of the first."""
    text = transformers.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=16, bos_token_id=1, eos_token_id=2)
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )


def llava() -> Any:
    """Another one, whose file's names are not its modules'."""
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLAMA),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=60,
    )


def gpt2(**options: Any) -> Any:
    """Layers that are Conv1D, some of them square."""
    return transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, pad_token_id=0, **options
    )


#: Tiny configurations, by the class that is made of them.
CONFIGS: dict[str, Callable[[], Any]] = {
    "BartForConditionalGeneration": lambda: transformers.BartConfig(**BART, **TOKENS),
    "BertForMaskedLM": lambda: transformers.BertConfig(**BERT),
    "BertForSequenceClassification": lambda: transformers.BertConfig(**BERT, num_labels=3),
    "Dinov2Model": lambda: transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8, use_swiglu_ffn=True
    ),
    "GPT2ForTokenClassification": lambda: gpt2(num_labels=32),
    "GPT2LMHeadModel": lambda: gpt2(tie_word_embeddings=False),
    "GPTNeoXForCausalLM": lambda: transformers.GPTNeoXConfig(**BERT, tie_word_embeddings=False),
    "Gemma3ForConditionalGeneration": gemma3,
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**LLAMA),
    "LlavaForConditionalGeneration": llava,
    "MambaForCausalLM": lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "PhiForCausalLM": lambda: transformers.PhiConfig(**LLAMA),
    "RobertaForMaskedLM": lambda: transformers.RobertaConfig(**BERT),
    "SwitchTransformersForConditionalGeneration": lambda: transformers.SwitchTransformersConfig(
        **T5, **TOKENS, num_decoder_layers=2, num_experts=2, expert_capacity=8
    ),
    "T5ForConditionalGeneration": lambda: transformers.T5Config(**T5, **TOKENS),
}


def save_base(name: str, folder: Path, config: Any = None) -> Any:
    """A model in which every parameter has values of its own, saved as transformers saves it; its class."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(config or CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model_class


def train(model: Any, folder: Path, **options: Any) -> Any:
    """Adapt a model by PEFT, give whatever is trained values of its own, and save it."""
    adapted = get_peft_model(model, VeraConfig(**{"r": 4, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                scale = 0.4 if "lambda" in name else 0.1
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    adapted.save_pretrained(folder)
    return adapted


def outputs(model: Any, inputs: Any = None) -> np.ndarray:
    """The model's logits, or its last hidden state."""
    with torch.no_grad():
        found = model.eval()(**(inputs or {"input_ids": IDS}))
    first = found.logits if hasattr(found, "logits") else found[0]
    return first.float().numpy()


def check(name: str, tmp_path: Path, *, inputs: Any = None, **options: Any) -> None:
    """Make a base and an adapter, merge them, and compare with PEFT's live model."""
    check_base(save_base(name, tmp_path / "base"), tmp_path, inputs=inputs, **options)


def check_base(model_class: Any, tmp_path: Path, *, inputs: Any = None, **options: Any) -> None:
    """The same with the base that is there; the merged one loads without a missing or an unexpected tensor."""
    before = outputs(model_class.from_pretrained(tmp_path / "base"), inputs)
    adapted = train(model_class.from_pretrained(tmp_path / "base"), tmp_path / "adapter", **options)
    expected = outputs(adapted, inputs)
    vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "out", verify=True)
    model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    scale = np.abs(expected).max()
    assert np.abs(outputs(model, inputs) - expected).max() <= 2e-5 * scale
    assert np.abs(before - expected).max() >= 1e-3 * scale
