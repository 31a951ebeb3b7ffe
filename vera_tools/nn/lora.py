"""A live adapter as the LoRA of rank r that it exactly is: what ``convert --to lora`` makes of its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vera_tools.architectures.architecture import Architecture
from vera_tools.checkpoints import destination
from vera_tools.checkpoints.checkpoint import MODULES
from vera_tools.checkpoints.manifest import BaseRecord, ProjectionRecord
from vera_tools.checkpoints.placement import known_under
from vera_tools.converting import peft_lora
from vera_tools.converting.factors import Factors, computed_in, lora_config, named_matrices
from vera_tools.converting.lora import write_lora
from vera_tools.dtypes import FLOATS
from vera_tools.errors import UsageError
from vera_tools.files import atomic
from vera_tools.files.safetensors import Deferred
from vera_tools.nn import io, state_dicts
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.live import base_record
from vera_tools.nn.projection import to_array, to_tensor


@dataclass(frozen=True, repr=False)
class Lora:
    """A LoRA adapter, as PEFT takes it.

    Attributes:
        config: Its adapter_config.json; ``peft.LoraConfig(**lora.config)`` makes the object of it.
        state_dict: Its tensors, by the names that a checkpoint gives them, on the CPU: for
            ``peft.set_peft_model_state_dict``.
        projections: Recipe, shapes and digests of the pair that it was made from.
        base: What is known of the base model.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    projections: ProjectionRecord
    base: BaseRecord

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write it, with a manifest that says which pair it was made from. Of several processes, call it in one.

        Args:
            save_directory: The folder to write; it appears whole or not at all.
            overwrite: Replace it where it exists.

        Raises:
            UsageError: it exists, and `overwrite` is false, or cannot be where it was asked for.
        """
        path = destination.refuse_output(save_directory, overwrite=overwrite)
        tensors = {name: to_array(tensor) for name, tensor in self.state_dict.items()}
        with atomic.folder(path, overwrite=overwrite) as folder:
            write_lora(folder, self.config, tensors, self.projections, base=self.base)


def to_lora(model: Adapters, adapter_name: str = "default", *, dtype: str | None = None) -> Lora:
    """An adapter as the LoRA of rank r that it exactly is, with its biases and saved modules.

    Bit for bit what ``vera-tools convert --to lora`` makes of the saved adapter. Under FSDP every process has to
    call this, because the vectors are gathered.

    Args:
        model: The model.
        adapter_name: Which adapter.
        dtype: Of lora_A and lora_B. Default: float64 where the adapter is, else float32.

    Returns:
        Config and tensors, and a method that writes them.

    Raises:
        UsageError: no such adapter, no such dtype, or a tensor has no values here.
        CheckFailedError: a value of lora_A or lora_B would not be finite, or PEFT does not load LoRA on such layers
            of such a base.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError("not a dtype for LoRA", expected=" or ".join(FLOATS), found=dtype)
    model.check_known([adapter_name])
    layers = {name: layer for name, layer in model.vera_layers().items() if layer.has(adapter_name)}
    label = f"the adapter {adapter_name!r}"
    kind, known = _class_of_base(model)
    peft_lora.refuse_unloadable(layers, kind, known, label=label)
    record = model.record_of(adapter_name)
    pair = model.stored_pair(adapter_name, record.dtype)
    named = state_dicts.named(model, adapter_name, save_embedding_layers="auto")
    arrays = {name: to_array(tensor) for name, tensor in state_dicts.gathered(model, dict(sorted(named.items())))}
    work = computed_in({record.dtype, *(array.dtype.name for array in arrays.values())})
    factors = Factors(label, record.shape, lambda name, start, stop: pair[name][start:stop], work, dtype or work)
    made: dict[str, Deferred] = {}
    for name, layer in layers.items():
        b, d = (arrays.pop(f"{MODULES}{name}.{which}") for which in layer.adapter_layer_names)
        made |= named_matrices(name, factors.of(name, b, d, layer.in_features))
    tensors = {name: array.copy() for name, array in arrays.items()}  # the model goes on training its own
    tensors |= {name: np.concatenate([np.asarray(piece) for piece in own.pieces()]) for name, own in made.items()}
    config = io.config_to_save(model, adapter_name)
    return Lora(
        lora_config(config, layers, r=record.shape.r, kind=kind),
        {name: to_tensor(tensor) for name, tensor in tensors.items()},
        record,
        base_record(model.plan_of(adapter_name).bases, config),
    )


def _class_of_base(model: Adapters) -> tuple[str | None, Architecture | None]:
    """The base's model type, and what is known of its class, where it is one of transformers'."""
    config: Any = getattr(model.model, "config", None)
    document: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    kind = document.get("model_type")
    if not isinstance(kind, str):
        return None, None
    return kind, known_under(document, io.class_of(model.model).__name__)
