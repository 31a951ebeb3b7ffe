"""What state the adapters of a model are in, layer by layer and as a whole: PEFT's status reports, with its fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import nn

from vera_tools.errors import UsageError
from vera_tools.nn.adapted import AdaptedModule
from vera_tools.nn.adapters import adapters_of
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.saved_module import SavedModule

Value = TypeVar("Value")
#: Stands for a value where there is not one but several.
IRREGULAR: Literal["irregular"] = "irregular"


@dataclass(frozen=True)
class LayerStatus:
    """The state of one adapted layer, or of one module that is saved whole.

    Attributes:
        name: Its name in the `VeraModel`.
        module_type: "vera.Linear" or "ModulesToSaveWrapper", PEFT's words.
        enabled: Whether adapters are computed.
        active_adapters: The model's active adapters, whether this layer has them or not; those of them that a saved
            module has.
        merged_adapters: Those whose updates are in the base weight at the moment.
        requires_grad: Whether an adapter's parameters here are trainable, by adapter name.
        available_adapters: The adapters that this layer has, sorted.
        devices: Where an adapter's parameters and projections are, by adapter name; several while projections wait to
            be moved to a layer's own device.
        quantization_backend: How the base layer's weight is quantised, by PEFT's name; None where it is not.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass(frozen=True)
class ModelStatus:
    """The state of a model's adapters. A field is "irregular" where its layers do not agree.

    Attributes:
        base_model_type: The wrapped model's class.
        adapter_model_type: "VeraModel".
        peft_types: "VERA" for each adapter.
        trainable_params, total_params: As `VeraModel.get_nb_trainable_parameters`.
        num_adapter_layers: Number of adapted layers and of modules that are saved whole.
        enabled: Whether adapters are computed.
        active_adapters: The active adapters.
        merged_adapters: Those that are merged into every layer they adapt, sorted.
        requires_grad: Whether an adapter's parameters are trainable, by adapter name.
        available_adapters: All adapters, sorted.
        devices: Where an adapter's parameters and projections are, by adapter name.
        quantization_backend: How the adapted layers are quantised; None where they are not.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Literal["irregular"]
    active_adapters: list[str] | Literal["irregular"]
    merged_adapters: list[str] | Literal["irregular"]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Literal["irregular"] | None


def get_layer_status(model: nn.Module) -> list[LayerStatus]:
    """The state of every adapted layer, then of every module that is saved whole.

    Args:
        model: A `VeraModel`, or what DistributedDataParallel, FSDP or torch.compile have put around one.

    Raises:
        UsageError: (a ValueError) there are none.
    """
    own = adapters_of(model)
    modules = own.adapted()
    if not modules:
        raise UsageError("No adapter layers found in the model", hint="unload() took them off")
    return [_status(f"model.{name}", module) for name, module in modules.items()]


def get_model_status(model: nn.Module) -> ModelStatus:
    """The state of the model's adapters; as `get_layer_status`."""
    own = adapters_of(model)
    layers = get_layer_status(own)
    names = sorted(own.peft_config)
    trainable, every = own.get_nb_trainable_parameters()
    merged = {name for layer in layers for name in layer.merged_adapters}
    adapted = [layer for layer in layers if layer.module_type != SavedModule.module_type]
    whole = all(merged & {*layer.available_adapters} <= {*layer.merged_adapters} for layer in adapted)
    return ModelStatus(
        base_model_type=type(own.model).__name__,
        adapter_model_type=type(own).__name__,
        peft_types={name: config.peft_type for name, config in own.peft_config.items()},
        trainable_params=trainable,
        total_params=every,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_active(layers),
        merged_adapters=sorted(merged) if whole else IRREGULAR,
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in names
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _status(name: str, module: AdaptedModule) -> LayerStatus:
    parameters = {adapter: list(module.adapter_parameters(adapter)) for adapter in module.available_adapters}
    held = [getattr(module, which) for which in module.other_param_names]
    return LayerStatus(
        name=name,
        module_type=module.module_type,
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters),
        requires_grad={name: _common(p.requires_grad for p in own) for name, own in parameters.items() if own},
        available_adapters=module.available_adapters,
        devices={
            name: sorted({tensor.device.type for tensor in [*own, *(pair[name] for pair in held)]})
            for name, own in parameters.items()
        },
        quantization_backend=module.quantization_backend if isinstance(module, VeraLinear) else None,
    )


def _active(layers: list[LayerStatus]) -> list[str] | Literal["irregular"]:
    """What is active in all adapted layers, where each saved module has its part of it active."""
    saved = [layer for layer in layers if layer.module_type == SavedModule.module_type]
    found = _common(layer.active_adapters for layer in layers if layer not in saved)
    if found == IRREGULAR:
        return IRREGULAR
    for layer in saved:
        if layer.active_adapters != [name for name in found if name in layer.available_adapters]:
            return IRREGULAR
    return found


def _common(values: Iterable[Value]) -> Value | Literal["irregular"]:
    first, *others = values
    return first if all(other == first for other in others) else IRREGULAR
