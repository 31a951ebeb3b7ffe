"""A forward that says what the wrapped model takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class with_signature_of_base:  # noqa: N801 (a decorator)
    """A forward whose signature is asked of the instance: trainers choose a batch's columns by it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: nn.Module | None, owner: type) -> Any:
        return self.function if instance is None else _Forward(self.function, instance)


class _Forward:
    """An instance's forward, which says what its base takes."""

    def __init__(self, function: Callable[..., Any], model: nn.Module) -> None:
        self.function, self.model = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.model, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A bound method has the attributes of its function; torch.export looks at its code.
        if name == "function":
            raise AttributeError(name)
        return getattr(self.function, name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.model.model.forward)  # type: ignore[union-attr]
        own = inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None)
        taken = list(signature.parameters.values())
        at = len(taken) - (bool(taken) and taken[-1].kind is inspect.Parameter.VAR_KEYWORD)
        return signature.replace(parameters=[*taken[:at], own, *taken[at:]])
