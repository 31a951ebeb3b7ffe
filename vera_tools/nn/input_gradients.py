"""Embeddings whose output requires gradients, without which reentrant checkpointing of frozen layers trains nothing."""

from __future__ import annotations

from typing import Any

from torch import nn


def require_input_gradients(model: nn.Module) -> nn.Module:
    """Let a model's embeddings require gradients; nothing is done where it says of no layer that it is one."""
    enable = getattr(model, "enable_input_require_grads", None)
    embeddings = getattr(model, "get_input_embeddings", None)
    if callable(enable):
        enable()
    elif callable(embeddings):
        embeddings().register_forward_hook(_require_gradient)
    return model


def _require_gradient(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A hook; a function of the module's own, so that models can be pickled."""
    output.requires_grad_(True)


def require_where_checkpointing(model: nn.Module) -> None:
    """The same for a model that checkpoints already."""
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        require_input_gradients(model)
