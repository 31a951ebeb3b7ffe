"""A tiny Llama, adapters that real PEFT put on it, and what it computes with them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

IDS = torch.tensor([[1, 5, 9, 13, 2, 40, 33, 7]])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: Adapted layers; the two have different sizes.
TARGETS = ["q_proj", "v_proj"]


def llama(folder: Path | None = None, **config: Any) -> Any:
    """The base: the same weights in every call, or what lies in `folder`."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if folder is not None:
        return transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **config})).eval()


def trained(model: Any, **config: Any) -> Any:
    """PEFT's VeRA around `model`, every trained parameter moved."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.VeraConfig(**{"r": 4, "target_modules": TARGETS, **config})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "vera_lambda" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def logits(model: Any) -> torch.Tensor:
    """What a model says of `IDS`."""
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def distance(model: Any, expected: torch.Tensor) -> float:
    """The largest difference between a model's logits and others."""
    return float((logits(model) - expected).abs().max())


def load(folder: os.PathLike[str] | str, base: Any | None = None, **options: Any) -> Any:
    """An adapter as a user of PEFT loads it, without a word."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base or llama(), os.fspath(folder), **options).eval()
