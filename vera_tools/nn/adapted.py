"""What the modules that carry adapters have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.nn.rows import Rows


class AdaptedModule(nn.Module):
    """A module of the base, with adapters in its place.

    Attributes:
        name: The module's name in the model, for messages.
        active_adapters: The model's active adapters; those of them that are not here do nothing here.
        merged_adapters: The adapters whose updates are in the base weight at the moment.
        disable_adapters: Compute the base's own module alone.
        rows: Set while a batch runs whose rows use different adapters.
    """

    #: What PEFT's status reports call such a module.
    module_type: ClassVar[str]
    #: Where the base's own module is.
    base_name: ClassVar[str]
    #: What holds something for each adapter, by its name: parameters, and the rest.
    adapter_layer_names: ClassVar[tuple[str, ...]]
    other_param_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.rows: Rows | None = None

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter is here."""
        return adapter_name in getattr(self, self.adapter_layer_names[0])

    @property
    def available_adapters(self) -> list[str]:
        """The adapters that are here, sorted."""
        return sorted(getattr(self, self.adapter_layer_names[0]))

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter here; none where it is not here."""
        for held in (getattr(self, which) for which in self.adapter_layer_names):
            if name in held:
                yield from [held[name]] if isinstance(held, nn.ParameterDict) else held[name].parameters()

    def add_adapter(
        self, name: str, config: VeraConfig, device: torch.device | None = None, autocast_adapter_dtype: bool = True
    ) -> None:
        """Make what a new adapter has here.

        Args:
            name: The adapter.
            config: Its config.
            device: Where it is made. Default: where the base's own module is.
            autocast_adapter_dtype: Hold what is new in float32 in a half-precision module.
        """
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove what an adapter has here."""
        for held in (getattr(self, which) for which in self.adapter_layer_names):
            if adapter_name in held:
                del held[adapter_name]
        self.active_adapters = [active for active in self.active_adapters if active != adapter_name]

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active here, and trainable unless `inference_mode`; all others are frozen.

        The model's method of this name does it everywhere.
        """
        self.active_adapters = _listed(adapter_names)
        self.set_requires_grad(self.available_adapters, False)
        self.set_requires_grad(self.active_adapters, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Make adapters' parameters here trainable, or freeze them."""
        for name in _listed(adapter_names):
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Compute the adapters, or the base's own module alone. What is trainable stays so."""
        self.disable_adapters = not enabled


def base_layer(module: nn.Module) -> nn.Module:
    """The base's own module, under the adapters where some are on it."""
    return module.get_submodule(module.base_name) if isinstance(module, AdaptedModule) else module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name, without the insides of what an adapter has put there."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            yield name, module
            inside = f"{name}." if isinstance(module, AdaptedModule) else None


def base_parameters(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters by the names that they have without adapters, each under all of its names."""
    module = base_layer(module)
    yield from ((prefix + key, own) for key, own in module._parameters.items() if own is not None)
    for key, child in module._modules.items():
        if child is not None:
            yield from base_parameters(child, f"{prefix}{key}.")


def _listed(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
