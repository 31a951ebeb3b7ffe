"""The base's embedding and output layer, which are saved with an adapter where the vocabulary was resized.

They are the base's own, and are not trained; but the base that the adapter will be loaded onto does not have the rows
that were added, nor their values.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any, Literal

from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.names import EMBEDDING_LAYERS
from vera_tools.errors import UsageError, warn
from vera_tools.nn.adapted import base_layer
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.saved_module import SavedModule

#: How a model is asked for them, the embedding first.
GETTERS = ("get_input_embeddings", "get_output_embeddings")


def parameters(model: nn.Module, layers: Collection[str] = ()) -> dict[str, Tensor]:
    """The parameters of the embedding and of the output layer, by their names in the base; empty where it has none.

    A tied head stands there under both names. A layer that an adapter saves whole is left out.

    Args:
        model: The base.
        layers: Layers on which an adapter will be, beside those that have one: the parameters get the names of then.
    """
    found: dict[str, Tensor] = {}
    for getter in GETTERS:
        layer = layer_of(model, getter)
        name = next((name for name, module in model.named_modules() if module is layer), None)
        if name is None or layer is None or isinstance(layer, SavedModule):
            continue
        if isinstance(layer, VeraLinear) or name in layers:
            name, layer = f"{name}.base_layer", base_layer(layer)
        found |= {f"{name}.{key}": tensor for key, tensor in layer.named_parameters()}
    return found


def saved(model: nn.Module, config: VeraConfig, wanted: bool | Literal["auto"]) -> dict[str, Tensor]:
    """Those parameters that are saved with an adapter.

    "auto" is PEFT's rule: all, where the vocabulary was resized; else those of a layer that is adapted.

    Warns:
        VeraToolsWarning: "auto" saves some; or nothing tells how large the base's vocabulary was; or there are none.

    Raises:
        UsageError: an adapter is merged into one of them.
    """
    found = _wanted(model, config, wanted) if wanted else {}
    for layer in (module for module in model.modules() if isinstance(module, VeraLinear) and module.merged):
        if f"{layer.name}.base_layer.weight" in found:
            raise UsageError(
                "is saved with the adapter, and an adapter is merged into it: it would be added again on loading",
                where=layer.name,
                hint="call unmerge_adapter() first",
            )
    return found


def _wanted(model: nn.Module, config: VeraConfig, wanted: Literal[True, "auto"]) -> dict[str, Tensor]:
    found = parameters(model)
    if wanted != "auto":
        if not found:
            warn("save_embedding_layers: the model says of no layer that it is an embedding, so none is saved")
        return found
    why = _resized(model, config)
    if why is None:
        layers = [module.name for module in model.modules() if isinstance(module, VeraLinear)]
        adapts = config.targeting().adapts
        adapted = [name for name in layers if name.rpartition(".")[2] in EMBEDDING_LAYERS and adapts(name)]
        found = {name: tensor for name, tensor in found.items() if any(name.startswith(f"{a}.") for a in adapted)}
        why = f"{' and '.join(adapted)} is adapted" if found else None
    if why is None:
        return {}
    warn(f"Setting `save_embedding_layers` to `True` as {why}")
    return found


def _resized(model: nn.Module, config: VeraConfig) -> str | None:
    """What the vocabulary is and was, where the base's own config has another size."""
    own: Any = getattr(model, "config", None)
    size, base = getattr(own, "vocab_size", None), config.base_model_name_or_path
    if not size or not base or not hasattr(type(own), "from_pretrained"):
        return None
    local = os.path.isdir(base)
    if local and not os.path.exists(os.path.join(base, "config.json")):
        return None
    if not local and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return None
    try:
        before = type(own).from_pretrained(base, revision=config.revision).vocab_size
    except Exception as error:
        warn(
            f"whether the vocabulary was resized could not be found out, because the config of {base} cannot be read "
            f"({error}); if it was, pass save_embedding_layers=True"
        )
        return None
    if before == size:
        return None
    return f"the embedding layer has been resized during finetuning: {size} tokens, and {before} in {base}"


def layer_of(model: nn.Module, getter: str) -> nn.Module | None:
    """The model's embedding or output layer, by one of `GETTERS`; None where it has none."""
    method = getattr(model, getter, None)
    try:
        layer = method() if callable(method) else None
    except NotImplementedError:  # transformers' base class has the method, and some models do not
        return None
    return layer if isinstance(layer, nn.Module) else None
