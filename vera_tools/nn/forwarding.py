"""A forward that says what the wrapped model takes, and one in which each row of a batch has its own adapter."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from vera_tools.errors import UsageError
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.rows import NO_ADAPTER, Rows


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


@contextlib.contextmanager
def by_row(model: Adapters, names: Sequence[str] | None, *, copies: int = 1) -> Iterator[None]:
    """Compute each row with the adapter that is named for it, inside the ``with``; None changes nothing.

    Args:
        model: The model, in evaluation mode.
        names: One adapter's name for each row, or `NO_ADAPTER`.
        copies: How often generation repeats each row.

    Raises:
        UsageError: (a ValueError) no such adapter, or it cannot be done now; in PEFT's words where PEFT refuses too.
    """
    if names is None:
        yield
        return
    if model.training:
        raise UsageError("Cannot pass `adapter_names` when the model is in training mode.")
    model.check_known(names if isinstance(names, str) else [name for name in {*names} if name != NO_ADAPTER])
    if any(layer.merged for layer in model.vera_layers().values()):
        raise UsageError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if any(config.bias != "none" for config in model.peft_config.values()):
        raise UsageError("adapter_names cannot choose biases by row", hint="use adapters with bias='none'")
    rows = Rows(names, copies=copies)
    modules = model.adapted().values()
    handle = model.model.register_forward_pre_hook(rows.see_inputs, with_kwargs=True)
    for module in modules:
        module.rows = rows
    try:
        yield
    finally:
        handle.remove()
        for module in modules:
            module.rows = None
