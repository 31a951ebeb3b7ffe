"""Which modules of a live model a config adapts, and the errors that say which do not fit and why."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

from torch import nn

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.names import TASK_HEADS, is_saved
from vera_tools.errors import UsageError, VeraToolsWarning, WrongSizeError, WrongTypeError
from vera_tools.nn import tying
from vera_tools.nn.adapted import AdaptedModule
from vera_tools.nn.base_layers import can_be_adapted, features, is_conv1d, is_linear
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.saved_module import SavedModule
from vera_tools.projections.pair import PairShape

#: What is adapted by default, by the base config's model_type: the choices of PEFT 0.21.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    model_type: names.split()
    for names, model_types in (
        (
            "q_proj v_proj",
            "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi",
        ),
        ("q_proj v_proj", "qwen2 qwen3 stablelm"),
        ("query value", "bert electra layoutlm roberta xlm-roberta"),
        ("query_key_value", "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel"),
        ("c_attn", "gpt2 gpt_bigcode"),
        ("q v", "mt5 t5"),
        ("q v q_proj v_proj", "blip-2"),
        ("c_proj c_attn", "btlm"),
        ("qkv_proj", "codegen"),
        ("in_proj", "deberta"),
        ("query_proj value_proj", "deberta-v2"),
        ("Wqkv", "mpt"),
        ("q_proj k_proj v_proj o_proj", "nemotron_h"),
        ("key value receptance output", "rwkv"),
        ("r_proj k_proj v_proj o_proj key value", "rwkv7"),
    )
    for model_type in model_types.split()
}
DEFAULT_TARGETS["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"


def complete(config: VeraConfig, model: nn.Module) -> VeraConfig:
    """A copy of the config with everything filled in that the model decides.

    Default targets become the model type's, "all-linear" the names of the linear layers, the task's head is added to
    modules_to_save, fan_in_fan_out follows the layers, and the base's name is taken over.

    Raises:
        UsageError: no targets are given, and the model's type has no default, or its default names a layer that is not
            known to be linear.
    """
    config = dataclasses.replace(config, extra=dict(config.extra))
    base = getattr(model, "config", None)
    config.modules_to_save = list(config.saved_modules) or config.modules_to_save
    tying.complete(config, model, saved(config, model))
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
            if not _is_never_called(name, model)
        ]
        # A quantised layer may hold the one that it was made of.
        outer = tuple(f"{name}." for name in found_names)
        config.target_modules = [name for name in found_names if not name.startswith(outer)]
    adapts = config.targeting().adapts
    found = [base_layer(module) for name, module in named_modules(model) if name and adapts(name)]
    transposed = any(is_conv1d(module) for module in found)
    if found and transposed != config.fan_in_fan_out:
        kind = "Conv1D" if transposed else "torch.nn.Linear"
        warnings.warn(  # PEFT's words
            f"fan_in_fan_out is set to {config.fan_in_fan_out} but the target module is `{kind}`. Setting "
            f"fan_in_fan_out to {transposed}.",
            VeraToolsWarning,
            stacklevel=4,
        )
    config.fan_in_fan_out = transposed
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    return config


def find(config: VeraConfig, model: nn.Module) -> dict[str, nn.Module]:
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
        check(name, base_layer(module), model)
    return found


def unmatched(config: VeraConfig, model: nn.Module) -> list[str]:
    """Entries of target_modules and modules_to_save that no module of the model answers to."""
    names = [name for name, _ in named_modules(model)]
    targets = [] if isinstance(config.target_modules, str) else list(config.target_modules or [])
    heads = TASK_HEADS.get(config.task_type or "", ())
    return [
        *(entry for entry in targets if not any(n == entry or n.endswith(f".{entry}") for n in names)),
        *(
            entry
            for entry in config.modules_to_save or []
            if entry not in heads and not any(is_saved(name, entry) for name in names)
        ),
    ]


def saved(config: VeraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the config names in modules_to_save, outermost only, by name.

    Raises:
        UsageError: one is a container, or another adapter is inside; the message names it.
    """
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        if any(is_saved(name, wanted) for wanted in config.modules_to_save or []):
            if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                raise UsageError("modules_to_save cannot be a container", where=name, found=type(module).__name__)
            if any(name.startswith(f"{outer}.") for outer in found):
                continue
            inside = (part for part in module.modules() if part is not module or isinstance(part, VeraLinear))
            if any(isinstance(part, AdaptedModule) for part in inside):
                raise UsageError("a module that another adapter has changed cannot be saved whole", where=name)
            found[name] = module
    return found


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's modules by name, without the insides of what an earlier adapter has put there."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is None or not name.startswith(inside):
            yield name, module
            inside = f"{name}." if isinstance(module, VeraLinear | SavedModule) else None


def base_layer(module: nn.Module) -> nn.Module:
    """The layer under the adapters."""
    return module.base_layer if isinstance(module, VeraLinear) else module


def pair_shape(config: VeraConfig, modules: dict[str, nn.Module]) -> PairShape:
    """The shape of the shared pair: r, and the largest in_features and out_features, each on its own."""
    sizes = [features(base_layer(module)) for module in modules.values()]
    return PairShape(config.r, max(size[0] for size in sizes), max(size[1] for size in sizes))


def check(name: str, module: nn.Module, model: nn.Module) -> None:
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


def check_fits(name: str, module: nn.Module, out_features: int) -> None:
    """Refuse a checkpoint's vector that does not fit the layer.

    Raises:
        WrongSizeError: vera_lambda_b has another length than the layer has rows.
    """
    if features(base_layer(module))[1] != out_features:
        raise WrongSizeError(
            "the layer does not fit vera_lambda_b",
            where=name,
            expected=f"out_features {out_features}",
            found=str(features(base_layer(module))[1]),
            hint="this is another base than the adapter was trained on",
        )


def _is_never_called(name: str, model: nn.Module) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _heads(model: nn.Module, config: VeraConfig) -> list[nn.Module]:
    """The output layer that "all-linear" leaves out: the language model's, or the task's."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if isinstance(output, nn.Module):
        return [output]
    if config.task_type == "SEQ_CLS":
        return [head for name in TASK_HEADS["SEQ_CLS"] if isinstance(head := getattr(model, name, None), nn.Module)]
    return []


def _linear_names(model: nn.Module) -> str:
    names = dict.fromkeys(
        name.rpartition(".")[2] for name, module in named_modules(model) if name and is_linear(module)
    )
    return ", ".join(names) or "no linear layer"
