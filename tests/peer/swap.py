"""`VeraModel` in the place of PEFT's models: PEFT's names lead to it wherever a test uses VeRA.

What a `PeftModel` is to its `VeraModel`, `Peer` is to ours: a module around it, so that modules and parameters have the
names that PEFT's tests ask for. It has nothing of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

import vera_tools.nn
from vera_tools.nn import VeraConfig, VeraLinear, VeraModel
from vera_tools.nn.projection import ProjectionDict
from vera_tools.nn.saved_module import SavedModule


class Peer(nn.Module):
    """A `VeraModel` where PEFT has it: ``model.base_model``."""

    def __init__(self, model: VeraModel) -> None:
        super().__init__()
        self.base_model = model
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def _is_ours(config: Any) -> bool:
    return isinstance(config, VeraConfig)


def _ours(model: Any) -> Any:
    """The `VeraModel` in what a test passes on, or None."""
    return next((module for module in model.modules() if isinstance(module, VeraModel)), None)


def _get_peft_model(theirs: Any) -> Any:
    def get_peft_model(
        model: nn.Module, peft_config: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if not _is_ours(peft_config):
            return theirs(model, peft_config, adapter_name, *args, **kwargs)
        return Peer(vera_tools.nn.get_peft_model(model, peft_config, adapter_name, *args, **kwargs))

    return get_peft_model


def _either(theirs: Any, ours: type) -> Any:
    """A class of PEFT's of which ours are instances too."""

    class Either(type(theirs)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (theirs, ours))

    return Either(theirs.__name__, (theirs,), {"__module__": theirs.__module__})


def _peft_model() -> Any:
    either = _either(peft.PeftModel, Peer)

    def from_pretrained(cls: Any, model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(kwargs.get("config")) or _kind(model_id, kwargs.get("subfolder")) == "VERA":
            return Peer(VeraModel.from_pretrained(model, model_id, *args, **kwargs))
        return cls.__mro__[1].from_pretrained(model, model_id, *args, **kwargs)

    def new(cls: Any, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_ours(peft_config):
            return Peer(VeraModel(model, peft_config, *args, **kwargs))
        return cls.__mro__[1](model, peft_config, *args, **kwargs)

    either.from_pretrained = classmethod(from_pretrained)
    either.__new__ = new
    return either


def _kind(folder: Any, subfolder: str | None) -> str | None:
    path = Path(folder, subfolder or "", "adapter_config.json")
    return json.loads(path.read_text("utf-8"))["peft_type"] if path.exists() else None


def _function(name: str, theirs: Any) -> Any:
    def function(model: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = theirs if _ours(model) is None else getattr(vera_tools.nn, name)
        return chosen(model, *args, **kwargs)

    return function


def swap() -> None:
    """Swap them in every module of PEFT's that tests import them from; PEFT's own modules keep what they have."""
    BaseTunerLayer.register(VeraLinear)
    BaseTuner.register(VeraModel)
    # PEFT's own names for what is public here.
    VeraLinear._all_available_adapter_names = lambda self: self.available_adapters
    SavedModule._adapters = property(lambda self: set(self.modules_to_save))
    swapped: dict[str, Any] = {
        "VeraConfig": VeraConfig,
        "PeftModel": _peft_model(),
        "get_peft_model": _get_peft_model(peft.get_peft_model),
        "ModulesToSaveWrapper": _either(peft.utils.ModulesToSaveWrapper, SavedModule),
        "AuxiliaryTrainingWrapper": _either(peft.utils.AuxiliaryTrainingWrapper, SavedModule),
        "BufferDict": _either(peft.tuners._buffer_dict.BufferDict, ProjectionDict),
    }
    for name in (
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "get_base_model_state_dict",
        "set_base_model_state_dict",
        "get_layer_status",
        "get_model_status",
    ):
        swapped[name] = _function(name, getattr(peft, name))
    for module in ("peft", "peft.utils", "peft.utils.other", "peft.helpers", "peft.tuners._buffer_dict"):
        for name, value in swapped.items():
            if hasattr(sys.modules[module], name):
                setattr(sys.modules[module], name, value)
