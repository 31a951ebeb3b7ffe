"""Parameters that modules of the base share, an output layer its embedding's mostly, where adapters save such modules.

A module that is saved whole is a copy for each adapter, so what was one parameter becomes several that are trained
apart. With ``ensure_weight_tying`` all modules that share one are saved, and their copies share it again: PEFT has this
for LoRA. Both are written, so that PEFT, which ties no copies of VeRA's, computes the same with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import CheckFailedError, warn
from vera_tools.nn import embeddings
from vera_tools.nn.adapted import base_parameters
from vera_tools.nn.saved_module import SavedModule


def groups(model: nn.Module) -> list[list[str]]:
    """The base's parameters that stand in it under several names, by the names that they have without adapters."""
    names: dict[int, list[str]] = {}
    for name, parameter in base_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def complete(config: VeraConfig, model: nn.Module, saved: Mapping[str, nn.Module]) -> None:
    """With `VeraConfig.ensure_weight_tying`, let the config save all modules that share a parameter with a saved one.

    Args:
        config: The config, which is changed.
        model: The base.
        saved: The modules that it saves already, by name.

    Warns:
        VeraToolsWarning: in PEFT's words, where they will be trained apart, or where there is nothing to tie.
    """
    tied = groups(model)
    touched = [group for group in tied if any(_lies_in(name, saved) for name in group)]
    if not config.ensure_weight_tying:
        _warn_of_parting(tied, saved)
    elif not tied:
        warn("You have requested `ensure_weight_tying`, but no tied modules were found in the model")
    elif not touched:
        warn("You have requested `ensure_weight_tying`, but no tied modules are added in `modules_to_save`")
    else:
        missing = {name.rpartition(".")[0]: None for group in touched for name in group if not _lies_in(name, saved)}
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *missing]))
        # The bias of BERT's decoder is that of the module around it, which is more than was asked for.
        _warn_of_parting([group for group in tied if group not in touched], {**saved, **missing})


def _warn_of_parting(tied: list[list[str]], saved: Iterable[str]) -> None:
    for group in tied:
        if any(_lies_in(name, saved) for name in group):
            warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                f"`ensure_weight_tying` is not set to True: {' and '.join(group)} are one parameter, and will not be "
                "one any more. This can lead to complications, for example when merging the adapter."
            )


def warn_of_merging(model: nn.Module, adapted: Iterable[str]) -> None:
    """Warn of each of these layers whose weight another module has too."""
    tied = groups(model)
    for name in adapted:
        weight = f"{name}.weight"
        for group in tied:
            if weight in group:
                others = ", ".join(other for other in group if other != weight)
                warn(f"the weight of {name} is tied to {others}: merging an adapter into it will change both")


def tie(adapter_name: str, saved: Iterable[SavedModule]) -> None:
    """Let an adapter's copies of saved modules share what the modules themselves share."""
    first: dict[int, nn.Parameter] = {}
    for wrapper in saved:
        if not wrapper.has(adapter_name):
            continue
        for key, own in wrapper.original_module.named_parameters(remove_duplicate=False):
            where, _, last = key.rpartition(".")
            holder = wrapper.modules_to_save[adapter_name].get_submodule(where)
            setattr(holder, last, first.setdefault(id(own), getattr(holder, last)))


def check(model: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str, label: str) -> None:
    """Refuse tensors that are to be one parameter and hold different values.

    Args:
        model: The base.
        tensors: What is to be loaded, by name.
        prefix: What its names have before the base's.
        label: Where it comes from.

    Raises:
        CheckFailedError: two of them differ; both are named.
    """
    for group in groups(model):
        one, *others = [name for name in group if prefix + name in tensors] or [""]
        for other in others:
            if not torch.equal(tensors[prefix + one], tensors[prefix + other]):
                raise CheckFailedError(
                    "ensure_weight_tying is set, and the values are not the same",
                    where=f"{label}: {one} and {other}",
                    hint="set ensure_weight_tying to false to load them apart",
                )


def note_untied(model: nn.Module) -> None:
    """Say in a model's config that embedding and output layer are no longer one, where merging has parted them.

    Otherwise they would be again, in silence, when the merged model is saved and loaded.
    """
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    layers = [embeddings.layer_of(model, getter) for getter in embeddings.GETTERS]
    weights = [getattr(layer, "weight", None) for layer in layers]
    if all(isinstance(weight, Tensor) for weight in weights) and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
        warn(
            "Input and output embeddings are no longer tied after merging. "
            "Setting `tie_word_embeddings=False` in the model config."
        )


def _lies_in(parameter: str, saved: Iterable[str]) -> bool:
    return any(parameter.startswith(f"{name}.") for name in saved)
