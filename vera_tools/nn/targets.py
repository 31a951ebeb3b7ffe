"""What an adapter has of a live model, found out before anything is changed, and the errors that say what does not fit.

Which names a config means is `checkpoints.targeting`'s to say, for files and for models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.default_targets import DEFAULT_TARGETS
from vera_tools.checkpoints.keys import MODULES, VECTORS
from vera_tools.checkpoints.names import TASK_HEADS
from vera_tools.checkpoints.targeting import idle
from vera_tools.errors import UsageError, WrongTypeError, warn
from vera_tools.nn import embeddings, tying
from vera_tools.nn.adapted import AdaptedModule, base_layer, base_parameters, named_modules
from vera_tools.nn.base_layers import can_be_adapted, features, is_conv1d, is_linear, whole_shape
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.saved_module import SavedModule
from vera_tools.projections.pair import PairShape


class Held(NamedTuple):
    """A tensor of an adapter's.

    Attributes:
        key: Its name in the state dict of the model that has it.
        shape: Its shape, whole.
    """

    key: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an adapter has of a model, or will have.

    Attributes:
        config: Its config, with everything filled in that the model decides.
        layers: The layers that it adapts, by name, as they stand in the model: another adapter may be on them.
        saved: The modules that it saves whole, likewise.
    """

    config: VeraConfig
    layers: Mapping[str, nn.Module]
    saved: Mapping[str, nn.Module]

    @property
    def bases(self) -> dict[str, nn.Module]:
        """The layers under the adapters, by name."""
        return {name: base_layer(module) for name, module in self.layers.items()}

    @property
    def shape(self) -> PairShape:
        """The shape of the shared pair: r, and the largest in_features and out_features, each on its own."""
        sizes = [features(layer) for layer in self.bases.values()]
        return PairShape(self.config.r, max(size[0] for size in sizes), max(size[1] for size in sizes))

    def biases(self, model: nn.Module) -> dict[str, Tensor]:
        """The base's biases that it trains, by the names that they have once it is there."""
        which, inside = self.config.bias, tuple(f"{name}." for name in self.saved)
        found: dict[str, Tensor] = {}
        for name, parameter in base_parameters(model) if which != "none" else ():
            module, _, last = name.rpartition(".")
            if last == "bias" and not name.startswith(inside) and (which == "all" or module in self.layers):
                found[f"{module}.base_layer.bias" if module in self.layers else name] = parameter
        return found

    def tensors(self, model: nn.Module, adapter_name: str) -> dict[str, Held]:
        """What it has, but for the projections, by the names on disk."""
        held: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, layer in self.bases.items():
            sizes = (features(layer)[1], self.config.r)
            held |= {f"{name}.{v}": (f"{name}.{v}.{adapter_name}", (n,)) for v, n in zip(VECTORS, sizes, strict=True)}
        held |= {name: (name, tuple(whole_shape(bias))) for name, bias in self.biases(model).items()}
        for name, module in self.saved.items():
            for key, tensor in base_layer(module).state_dict(keep_vars=True).items():
                copy = f"{name}.modules_to_save.{adapter_name}.{key}"
                if isinstance(tensor, Tensor):  # and not an extra state
                    held[f"{name}.{key}"] = copy, tuple(whole_shape(tensor))
        return {MODULES + on_disk: Held(f"model.{key}", shape) for on_disk, (key, shape) in held.items()}


def plan(config: VeraConfig, model: nn.Module) -> Plan:
    """What an adapter of this config has of a model. Neither is changed.

    Raises:
        UsageError: nothing matches, or something that matches cannot be adapted or saved whole; the message names it.
    """
    config = _complete(config, model)
    layers = _find(config, model)
    transposed = any(is_conv1d(base_layer(module)) for module in layers.values())
    if transposed != config.fan_in_fan_out:
        kind = "Conv1D" if transposed else "torch.nn.Linear"
        warn(  # PEFT's words
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. Setting "
            f"fan_in_fan_out to {transposed}."
        )
    config.fan_in_fan_out = transposed
    saved = _saved(config, model)
    # PEFT looks for a part of the path to keep a module from being adapted, and for any ending to save it.
    inside = next((name for name in layers if f"{name}.".startswith(tuple(f"{outer}." for outer in saved))), None)
    if inside is not None:
        raise WrongTypeError(
            "is adapted, and lies in a module that is saved whole",
            where=inside,
            hint="leave it out of target_modules, or name whole parts of a path in modules_to_save",
        )
    return Plan(config, layers, saved)


def _complete(config: VeraConfig, model: nn.Module) -> VeraConfig:
    """A copy of the config with everything filled in that the model decides.

    Default targets become the model type's, "all-linear" the names of the linear layers, the task's head is added to
    modules_to_save, and the base's name is taken over.

    Raises:
        UsageError: no targets are given, and the model's type has no default, or its default names a layer that is not
            known to be linear.
    """
    config = dataclasses.replace(config, extra=dict(config.extra))
    base = getattr(model, "config", None)
    config.modules_to_save = list(config.saved_modules) or config.modules_to_save
    tying.complete(config, model, _saved(config, model))
    if config.target_modules is None:
        model_type = base.get("model_type") if isinstance(base, dict) else getattr(base, "model_type", None)
        config.target_modules = DEFAULT_TARGETS.get(model_type or "")
        if config.target_modules is None:
            raise UsageError(
                f"target_modules is not set, and there is no default for the model type {model_type!r}",
                hint=f"the model has {_linear_names(model)}",
            )
        by_default = config.targeting().adapts
        for name, module in named_modules(model):
            if name and by_default(name) and can_be_adapted(module) and not is_linear(base_layer(module)):
                raise UsageError(
                    "nothing says whether this layer is linear",
                    where=name,
                    found=type(module).__name__,
                    hint="if it is, name it in target_modules",
                )
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = "all-linear"
        heads_left_out, adapts = _heads(model, config), config.targeting().adapts
        found_names = [
            name
            for name, module in named_modules(model)
            if name and is_linear(base_layer(module)) and module not in heads_left_out and adapts(name)
            if not _is_never_called(name, model) and not isinstance(module, SavedModule)
        ]
        # A quantised layer may hold the one that it was made of.
        outer = tuple(f"{name}." for name in found_names)
        config.target_modules = [name for name in found_names if not name.startswith(outer)]
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return config


def _find(config: VeraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a completed config adapts, by name, in the model's order.

    Raises:
        UsageError: nothing matches, or something that matches cannot be adapted; the message names it.
    """
    adapts = config.targeting().adapts
    found = {name: module for name, module in named_modules(model) if name and adapts(name)}
    if not found:
        layers = ""
        if config.layers_to_transform is not None:
            layers = f" in layers_to_transform={config.layers_to_transform}, layers_pattern={config.layers_pattern}"
        raise UsageError(
            f"target_modules {config.target_modules} matched nothing{layers}; the model has {_linear_names(model)}"
        )
    for name, module in found.items():
        _check(name, base_layer(module), model)
    for outer, module in named_modules(model):
        if isinstance(module, SavedModule):
            names = [f"{outer}.{name}" if name else outer for name, _ in module.original_module.named_modules()]
            if inside := next((name for name in names if adapts(name)), None):
                what = f"lies in {outer}, which another adapter saves whole"
                raise WrongTypeError(what, where=inside, hint="leave it out of target_modules")
    return found


def unmatched(config: VeraConfig, model: nn.Module) -> list[str]:
    """Entries of target_modules and modules_to_save that no module of the model answers to."""
    names, saving = [name for name, _ in named_modules(model)], config.targeting().saving
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    found = {*TASK_HEADS.get(config.task_type or "", ()), *(entry for name in names for entry in saving(f"{name}."))}
    return idle(targets, names) + [entry for entry in config.modules_to_save or [] if entry not in found]


def _saved(config: VeraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the config saves whole, by name.

    Raises:
        UsageError: one is a container, lies in another one, or another adapter is inside; the message names it.
    """
    found: dict[str, nn.Module] = {}
    means = config.targeting().means
    for name, module in named_modules(model):
        if not means(name):
            continue
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
            raise UsageError("modules_to_save cannot be a container", where=name, found=type(module).__name__)
        parts = (part for part in module.modules() if part is not module or isinstance(part, VeraLinear))
        if any(isinstance(part, AdaptedModule) for part in parts):
            raise UsageError("a module that another adapter has changed cannot be saved whole", where=name)
        inside = (f"{name}.{part}" for part, _ in base_layer(module).named_modules() if part)
        if (inner := next(filter(means, inside), None)) is not None:
            raise UsageError(
                f"modules_to_save means {name} and this module inside it: PEFT could not load what is saved of both",
                where=inner,
                hint="name one of them, by as much of its path as tells it from the other",
            )
        found[name] = module
    return found


def _check(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse a module that cannot be adapted.

    Raises:
        UsageError: it does not map in_features to out_features, passes no gradient back, has no shape yet, or its
            forward is never called.
    """
    if isinstance(getattr(module, "weight", None), nn.parameter.UninitializedParameter):
        raise UsageError(
            "the layer has no shape yet", where=name, found=type(module).__name__, hint="run the model once before"
        )
    if type(module).__module__.startswith("torch.ao."):
        raise UsageError(
            "torch's own quantised layers pass no gradient back",
            where=name,
            found=type(module).__name__,
            hint="quantise the base with bitsandbytes, torchao or HQQ",
        )
    if not can_be_adapted(module):
        raise WrongTypeError(
            "only linear layers can be adapted: torch.nn.Linear, transformers' Conv1D, quantised ones, and what has "
            "in_features and out_features as they do",
            where=name,
            found=type(module).__name__,
            hint="name the linear layers inside it" if any(True for _ in module.children()) else None,
        )
    if _is_never_called(name, model):
        raise UsageError(
            "torch.nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would do nothing",
            where=name,
        )


def _is_never_called(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _heads(model: nn.Module, config: VeraConfig) -> list[nn.Module]:
    """The output layer that "all-linear" leaves out: the language model's, or the task's."""
    output = embeddings.layer_of(model, "get_output_embeddings")
    if output is not None:
        return [output]
    if config.task_type == "SEQ_CLS":
        return [head for name in TASK_HEADS["SEQ_CLS"] if isinstance(head := getattr(model, name, None), nn.Module)]
    return []


def _linear_names(model: nn.Module) -> str:
    names = dict.fromkeys(
        name.rpartition(".")[2] for name, module in named_modules(model) if name and is_linear(module)
    )
    return ", ".join(names) or "no linear layer"
