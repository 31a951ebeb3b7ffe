"""A VeRA adapter in a live PEFT model: its layers, the pair that they share, and what is known of the base.

Nothing here imports PEFT: its layers are known by their attributes, its model by its class's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.keys import VECTORS, WRAPPERS
from vera_tools.checkpoints.manifest import BaseRecord, TensorRecord
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.nn.base_layers import PLAIN, kind_of, whole_shape
from vera_tools.nn.projection import dtype_name, same_bits
from vera_tools.projections.pair import PROJECTIONS

#: What PEFT calls the module that makes the projections and holds the adapted model.
_TUNER = "peft.tuners.vera.model"


@dataclass(frozen=True)
class LiveAdapter:
    """An adapter as a model holds it now.

    Attributes:
        name: The adapter's name in the model.
        layers: Its layers, by their names in the base model.
        tuner: PEFT's own model around the base, or None where the adapter was injected without one.
    """

    name: str
    layers: dict[str, Any]
    tuner: Any

    def tensors(self) -> tuple[Tensor, Tensor]:
        """vera_A (r, in_max) and vera_B (out_max, r), whole, in the dtype and on the device where they are.

        Raises:
            UsageError: they hold no values here, or each process has a part of them only.
            CheckFailedError: the layers do not share one pair.
        """
        pair = []
        for name in PROJECTIONS:
            held = {
                id(tensor): tensor for layer in self.layers.values() for tensor in [getattr(layer, name)[self.name]]
            }
            first, *others = (self._whole(name, tensor) for tensor in held.values())
            if not all(same_bits(first.cpu(), other.cpu()) for other in others):
                raise CheckFailedError(
                    f"the layers of the adapter {self.name!r} hold different {name}",
                    expected="one pair for all",
                    found=f"{len(held)} tensors",
                    hint="vera_tools.nn.peft.restore_projections puts the checkpoint's into all of them",
                )
            pair.append(first)
        return pair[0], pair[1]

    def _whole(self, name: str, tensor: Tensor) -> Tensor:
        where = f"{name} of the adapter {self.name!r}"
        if tensor.device.type == "meta":
            raise UsageError(
                "is on the meta device: there are no values to record",
                where=where,
                hint="load the adapter first, or make it without low_cpu_mem_usage",
            )
        spread: Any = tensor
        if hasattr(spread, "full_tensor"):
            # Gathering would wait for all processes, and often only the one that saves is here.
            if not all(placement.is_replicate() for placement in spread.placements):
                raise UsageError(
                    "is spread over processes, and this one has a part of it only",
                    where=where,
                    hint="record it before the model is sharded, or leave buffers out of the sharding",
                )
            tensor = spread.to_local()
        return tensor

    @property
    def persistent(self) -> bool:
        """Whether PEFT made the adapter to be saved with its pair; then it loads no checkpoint without one."""
        return bool(getattr(getattr(self.tuner, "vera_A", None), "persistent", False))

    @property
    def bases(self) -> dict[str, nn.Module]:
        """The layers under the adapter, by their names in the base model."""
        return {name: layer.get_base_layer() for name, layer in self.layers.items()}

    @property
    def untouched(self) -> bool:
        """Whether no vector was trained or loaded yet: the adapter does nothing, so any pair is the right one."""
        return not any(has_values(layer.vera_lambda_b[self.name]) for layer in self.layers.values())


def base_record(layers: Mapping[str, nn.Module], config: VeraConfig) -> BaseRecord:
    """What a manifest says of a base: name and revision, shapes and dtypes of the adapted weights.

    Left out are weights that are quantised, which have other shapes and values, and those that are not whole here.

    Args:
        layers: The layers under the adapter, by their names in the base.
        config: The adapter's, which names the base.
    """
    weights = {}
    for module, layer in layers.items():
        weight = getattr(layer, "weight", None)
        if kind_of(layer) is PLAIN and isinstance(weight, Tensor) and len(shape := whole_shape(weight)) == 2:
            weights[f"{module}.weight"] = TensorRecord(tuple(shape), dtype_name(weight.dtype), None)
    return BaseRecord(config.base_model_name_or_path, config.revision, weights)


def find(model: nn.Module, adapter_name: str) -> LiveAdapter:
    """The adapter of a name in a model, wrapped or not, that PEFT has adapted.

    Raises:
        UsageError: there is none.
    """
    tuner = tuner_of(model)
    root = model if tuner is None else tuner.model
    layers = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): module
        for name, module in root.named_modules()
        if is_layer(module, adapter_name)
    }
    if not layers:
        raise UsageError(
            f"the model has no VeRA adapter {adapter_name!r}",
            hint="load the checkpoint with PEFT first; once it is unloaded or merged for good, the adapter is gone",
        )
    return LiveAdapter(adapter_name, layers, tuner)


def is_layer(module: nn.Module, adapter_name: str) -> bool:
    """Whether this is a VeRA layer of PEFT's that has the adapter."""
    parts = (getattr(module, name, None) for name in (*VECTORS, *PROJECTIONS))
    return hasattr(module, "base_layer") and all(part is not None and adapter_name in part for part in parts)


def is_tuner(module: nn.Module) -> bool:
    """Whether this is PEFT's ``VeraModel``, which makes the projections."""
    return any(cls.__module__ == _TUNER for cls in type(module).__mro__)


def tuner_of(model: nn.Module) -> Any:
    """PEFT's ``VeraModel`` in a model, or None."""
    return next((module for module in model.modules() if is_tuner(module)), None)


def adapter_names(model: nn.Module) -> list[str]:
    """Every VeRA adapter that PEFT has put on a model."""
    found = (getattr(module, "vera_lambda_b", None) for module in model.modules() if hasattr(module, "base_layer"))
    names = dict.fromkeys(name for vectors in found if vectors is not None for name in vectors)
    return [name for name in names if any(is_layer(module, name) for module in model.modules())]


def has_values(vector: Tensor) -> bool:
    """Whether a vera_lambda_b is known to be other than 0 somewhere, or cannot be looked at."""
    if vector.device.type == "meta" or vector.numel() == 0:
        return True
    local: Tensor = vector.to_local() if hasattr(vector, "to_local") else vector
    return bool(local.detach().count_nonzero())
