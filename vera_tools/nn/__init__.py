"""VeRA adapters on live PyTorch models. The only part of vera-tools that imports torch."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn

from vera_tools.checkpoints import peft_arguments
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import UsageError, warn
from vera_tools.nn import io
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.model import VeraModel
from vera_tools.nn.state_dicts import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from vera_tools.nn.status import get_layer_status, get_model_status

__all__ = [
    "VeraConfig",
    "VeraLinear",
    "VeraModel",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_adapter",
    "save_adapter",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]


def get_peft_model(
    model: nn.Module,
    peft_config: VeraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> VeraModel:
    """PEFT's function of this name: a model with a new adapter, `VeraModel`.

    Args:
        model: A plain model.
        peft_config: What to adapt and how; it is copied.
        adapter_name: The adapter's name.
        mixed: False: adapters of one kind only.
        autocast_adapter_dtype: As `VeraModel`.
        revision: The base model's revision, for the config.
        low_cpu_mem_usage: As `VeraModel`.

    Warns:
        VeraToolsWarning: the config names another revision.

    Raises:
        UsageError: as `VeraModel`, or `mixed`.
    """
    peft_arguments.check({"mixed": mixed}, peft_arguments.CREATING)
    config = VeraConfig.of(peft_config)
    if revision is not None:
        if config.revision not in (None, revision):
            warn(
                f"peft config has already set base model revision to {config.revision}, overwriting with revision "
                f"{revision}"
            )
        config = dataclasses.replace(config, revision=revision)
    options = {"autocast_adapter_dtype": autocast_adapter_dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
    return VeraModel(model, config, adapter_name, **options)


def load_adapter(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    strict: bool = False,
    **options: Any,
) -> VeraModel:
    """Put a checkpoint's adapter on a model, with the projections that it was trained with.

    Args:
        model: A plain model, or a `VeraModel`, which then gets one more adapter.
        checkpoint: A folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        adapter_name: The adapter's name here.
        is_trainable: Whether it is to be trained on.
        strict: Refuse what can only be assumed, and what was assumed or stated when it was recorded.
        **options: As `VeraModel.from_pretrained` takes them.

    Returns:
        The `VeraModel`, which is `model` itself where that was one.

    Raises:
        FormatError, CheckFailedError, UnprovenError, UsageError: as `VeraModel.from_pretrained`.
    """
    if not isinstance(model, VeraModel):
        return VeraModel.from_pretrained(model, checkpoint, adapter_name, is_trainable, strict=strict, **options)
    model.load_adapter(checkpoint, adapter_name, is_trainable, strict=strict, **options)
    return model


def save_adapter(model: VeraModel, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write one adapter into a folder, in PEFT's format, with a manifest.

    Args:
        model: The model.
        folder: Where to; the adapter goes into the folder itself, whatever its name.
        adapter_name: Which adapter. Default: the active one.

    Raises:
        UsageError: no such adapter, several are active, or save_projection is off for projections that no recipe makes.
    """
    if adapter_name is None:
        if len(model.active_adapters) != 1:
            raise UsageError("not one active adapter", found=str(model.active_adapters), hint="name the adapter")
        adapter_name = model.active_adapters[0]
    io.save(model, os.fspath(folder), adapter_name)
