"""A VeRA adapter in a live PEFT model: its layers, the pair that they share, and what is known of the base.

Nothing here imports PEFT: its layers are known by their attributes, its model by its class's name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.manifest import BaseRecord, TensorRecord
from vera_tools.dtypes import Array
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.nn.base_layers import PLAIN, kind_of
from vera_tools.nn.projection import dtype_name, same_bits, to_array
from vera_tools.projections.identification import identify
from vera_tools.projections.pair import PROJECTIONS, PairShape
from vera_tools.projections.recipe import Recipe

#: What PEFT calls the module that makes the projections and holds the adapted model.
_TUNER = "peft.tuners.vera.model"
#: Modules that libraries put around others without a place in the names of a checkpoint.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})

_identified: dict[tuple[str, str, int], Recipe | None] = {}


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
    def untouched(self) -> bool:
        """Whether no vector was trained or loaded yet: the adapter does nothing, so any pair is the right one."""
        return not any(has_values(layer.vera_lambda_b[self.name]) for layer in self.layers.values())

    def base_record(self, name: str | None, revision: str | None) -> BaseRecord:
        """Name and revision, with shapes and dtypes of the adapted weights that are whole and not quantised."""
        weights = {}
        for module, layer in self.layers.items():
            weight = getattr(layer.get_base_layer(), "weight", None)
            sizes = {layer.in_features, layer.out_features}
            held_as_it_is = kind_of(layer.get_base_layer()) is PLAIN
            if held_as_it_is and isinstance(weight, Tensor) and weight.dim() == 2 and {*weight.shape} == sizes:
                weights[f"{module}.weight"] = TensorRecord(tuple(weight.shape), dtype_name(weight.dtype), None)
        return BaseRecord(name, revision, weights)


def find(model: nn.Module, adapter_name: str) -> LiveAdapter:
    """The adapter of a name in a model, wrapped or not, that PEFT has adapted.

    Raises:
        UsageError: there is none.
    """
    tuner = tuner_of(model)
    root = model if tuner is None else tuner.model
    layers = {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): module
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
    parts = (getattr(module, name, None) for name in ("vera_lambda_b", "vera_lambda_d", *PROJECTIONS))
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


def digests(pair: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> dict[str, str] | None:
    """sha256 of both by name, in another dtype if one is given; None where that would change a value."""
    found = {}
    for name, tensor in zip(PROJECTIONS, pair, strict=True):
        cast = tensor if dtype is None else tensor.to(dtype)
        if not same_bits(cast.to(tensor.dtype), tensor):
            return None
        found[name] = hashlib.sha256(to_array(cast).reshape(-1).view("u1").data).hexdigest()
    return found


def shape_of(pair: tuple[Tensor, Tensor]) -> PairShape:
    """r, in_max and out_max.

    Raises:
        CheckFailedError: the two do not fit each other.
    """
    A, B = pair
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.dtype != B.dtype:
        raise CheckFailedError(
            "vera_A and vera_B do not fit each other",
            expected="(r, in_max) and (out_max, r) of one dtype",
            found=f"{list(A.shape)} {dtype_name(A.dtype)} and {list(B.shape)} {dtype_name(B.dtype)}",
        )
    return PairShape(A.shape[0], A.shape[1], B.shape[0])


def recipe_of(pair: tuple[Tensor, Tensor], sha256: dict[str, str], *, prng_key: int) -> Recipe | None:
    """What makes a pair of these digests, or None where no known recipe does."""
    # Asked at every checkpoint of a run, where the pair stays what it was.
    asked = (sha256["vera_A"], sha256["vera_B"], prng_key)
    if asked not in _identified:
        arrays: list[Array] = [to_array(tensor) for tensor in pair]
        found = identify(arrays[0], arrays[1], prng_key=prng_key)
        _identified[asked] = found.recipe if found.exact else None
    return _identified[asked]
