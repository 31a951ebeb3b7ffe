"""modules_to_save: a module that is trained and saved whole, one copy for each adapter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.nn.adapted import AdaptedModule
from vera_tools.nn.rows import Rows


class SavedModule(AdaptedModule):
    """A module of the base, and a trainable copy of it for each adapter that names it in modules_to_save.

    Attributes:
        original_module: The base's own, frozen.
        modules_to_save: The copies, by adapter name.
        active_adapters: Those of the model's active adapters that have a copy here; the last one's is used.
    """

    module_type = "ModulesToSaveWrapper"
    base_name = "original_module"
    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module: nn.Module, *, name: str = "") -> None:
        super().__init__(name=name)
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()

    def add_adapter(
        self, name: str, config: VeraConfig, device: torch.device | None = None, autocast_adapter_dtype: bool = True
    ) -> None:
        """Make a copy for an adapter, where the module is and in its dtype."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active here, those of them that have a copy."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_adapter([name for name in names if self.has(name)], inference_mode)

    @property
    def active_module(self) -> nn.Module:
        """What is computed with at the moment."""
        if not self.disable_adapters:
            for name in reversed(self.active_adapters):
                if self.has(name):
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself."""
        if self.rows is None or self.disable_adapters:
            return self.active_module(*args, **kwargs)
        return self._forward_rows(self.rows, *args, **kwargs)

    def _forward_rows(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows_of: dict[nn.Module, list[int]] = {}
        for row, name in enumerate(rows.for_input(x, where=self.name)):
            module = self.modules_to_save[name] if self.has(name) else self.original_module
            rows_of.setdefault(module, []).append(row)
        outputs = [module(x[rows.index(own, x.device)], *args, **kwargs) for module, own in rows_of.items()]
        order = rows.index([row for own in rows_of.values() for row in own], x.device)
        return torch.cat(outputs)[order.argsort()]

    def __getattr__(self, name: str) -> Any:
        # Models look at their own parts (`self.score.weight.dtype`); those find the part that is in use.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "modules_to_save" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.active_module, name)
