"""What the transformers of this interpreter knows of one class of models, as JSON: a script; the generator uses it too.

Run by path, under any Python that has transformers 5; vera-tools need not be installed there::

    python probe.py LlamaForCausalLM path/to/config.json

The class is built on torch's meta device, so nothing is allocated and no weight is read. The answer is one line on
stdout: a document of the form that `vera_tools.architectures.witness.from_document` reads, in which
every module stands under its own name.

`describe` is what fixtures/architectures/generate.py calls too, once a class; it then generalises what it gets.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))

#: Modules that are told by their kind alone: what they store follows from it, as `trees.STORED` says.
PLAIN = {
    "Linear": {"weight", "bias"},
    "Conv1D": {"weight", "bias"},
    "Embedding": {"weight"},
    "LayerNorm": {"weight", "bias"},
    "GroupNorm": {"weight", "bias"},
    "Conv1d": {"weight", "bias"},
    "Conv2d": {"weight", "bias"},
    "Conv3d": {"weight", "bias"},
    "ConvTranspose1d": {"weight", "bias"},
    "ConvTranspose2d": {"weight", "bias"},
    "BatchNorm1d": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    "BatchNorm2d": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
}

#: What a node calls its own class, and its kind where it is a linear layer or an embedding with more inside.
CLASS, KIND = "@", "="


def main() -> None:
    """Answer for the class and the config.json named in the arguments."""
    # A script's folder leads sys.path; this one's neighbours must not pass for modules that transformers imports.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    # Whatever libraries print goes to stderr, so that stdout holds the answer alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"

    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        sys.exit(f"transformers {transformers.__version__} has no mapping of names; 5.0 or newer is needed")
    name, path = sys.argv[1:]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        sys.exit(f"transformers {transformers.__version__} has no class {name}")
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    place = place_of(written, model_class.config_class.model_type)
    config = model_class.config_class.from_dict(written[place] if place else written)
    model = build(model_class, config)
    document = dict(describe(model), transformers=transformers.__version__)
    document.update(conversions=conversions(model), modules=tree(model), shared=shared(model))
    document.update(legacy=legacy(), heads=heads(model), place=place, switches=switches(model, place))
    document.update(parameters={name: list(value.shape) for name, value in sorted(model.state_dict().items())})
    document["ties"] = [{"keys": [list(pair) for pair in model.all_tied_weights_keys.items()]}]
    print(json.dumps(document, sort_keys=True), file=answer, flush=True)


def build(model_class: Any, config: Any) -> Any:
    """The model on the meta device, with nothing initialised."""
    import torch
    from transformers import initialization

    with torch.device("meta"), initialization.no_init_weights():
        model = model_class(config)
    model.tie_weights(recompute_mapping=False)
    return model


def describe(model: Any) -> dict[str, Any]:
    """Everything but ties, renamings and modules: names, and what loading passes over in silence."""
    return {
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "base_model_prefix": model.base_model_prefix,
        "input_embeddings": _name_of(model, "get_input_embeddings"),
        "output_embeddings": _name_of(model, "get_output_embeddings"),
        "ignored": ignored(model),
    }


def place_of(config: dict[str, Any], model_type: str) -> str:
    """Where in a config.json the configuration of a class of that type stands: "" where it is all of it."""
    if config.get("model_type", model_type) == model_type:
        return ""
    parts = (name for name, part in config.items() if isinstance(part, dict) and part.get("model_type") == model_type)
    return next(parts, "")


def switches(model: Any, place: str) -> list[str]:
    """The entries of config.json that decide what is tied; `place` is where the model's configuration stands in it."""
    found: dict[int, str] = {}

    def walk(config: Any, where: str) -> None:
        found.setdefault(id(config), where)
        for name, part in vars(config).items():
            if hasattr(part, "model_type") and not name.startswith("_"):
                walk(part, f"{where}.{name}".lstrip("."))

    walk(model.config, place)
    ties = [module for module in model.modules() if getattr(module, "_tied_weights_keys", None)]
    places = [found[id(module.config)] for module in ties if id(getattr(module, "config", None)) in found]
    return sorted({f"{where}.tie_word_embeddings".lstrip(".") for where in places})


def shared(model: Any) -> list[list[str]]:
    """Names of one and the same parameter, where no mapping of tied weights says that they are one."""
    told = set(model.all_tied_weights_keys) | set(model.all_tied_weights_keys.values())
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in names.values() if len(group) > 1 and not set(group) <= told)


def ignored(model: Any) -> dict[str, list[str]]:
    """Regular expressions of the keys that may lack, or may be too many, without transformers saying so."""
    buffers = [name for name, _ in model.named_buffers()]
    unexpected = set(model._keys_to_ignore_on_load_unexpected or ())
    # PreTrainedModel._adjust_missing_and_unexpected_keys adds these two.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        unexpected.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        unexpected.add(r"(^|\.)position_ids$")
    return {"missing": sorted(model._keys_to_ignore_on_load_missing or ()), "unexpected": sorted(unexpected)}


def conversions(model: Any) -> list[dict[str, Any]]:
    """The renamings and converters that loading applies, in order: one group for each part of the model that has any.

    Those that every model gets ("legacy") are not in it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    groups: list[dict[str, Any]] = []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if not groups or groups[-1]["scope"] != transform.scope_prefix:
            groups.append({"scope": transform.scope_prefix, "steps": []})
        groups[-1]["steps"].append(step(transform))
    return groups


def legacy() -> list[dict[str, Any]]:
    """The renamings that every model gets, after its own."""
    from transformers import conversion_mapping

    found: Any = conversion_mapping.get_checkpoint_conversion_mapping
    return [step(transform) for transform in found("legacy")]


def heads(model: Any) -> dict[str, int]:
    """The number of attention heads of each part of the configuration that some converter goes by."""
    operations = [
        operation
        for group in conversions(model)
        for one in group["steps"]
        for operation in one.get("operations", ())
        if operation["name"] == "PermuteForRope"
    ]
    parts = sorted({operation.get("subconfig_key") or "" for operation in operations})
    return {
        part: getattr(getattr(model.config, part, model.config) if part else model.config, "num_attention_heads", 1)
        for part in parts
    }


def step(transform: Any) -> dict[str, Any]:
    """One renaming or converter as data."""
    found: dict[str, Any] = {"from": list(transform.source_patterns), "to": list(transform.target_patterns)}
    kind = type(transform).__name__
    if kind == "GroupWeightRename":
        found["guarded"] = True
    elif hasattr(transform, "offset"):
        found["offset"] = transform.offset
    elif hasattr(transform, "operations"):
        found["operations"] = [_operation(operation) for operation in transform.operations]
    elif kind not in ("WeightRenaming", "PrefixChange"):
        raise NotImplementedError(f"a renaming of the kind {kind}")
    return found


def _operation(operation: Any) -> dict[str, Any]:
    return {
        "name": type(operation).__name__,
        **{key: value for key, value in sorted(vars(operation).items()) if isinstance(value, int | str | list | tuple)},
    }


def tree(module: Any) -> Any:
    """The modules and what they store: a plain module as its kind, another as its class and what is inside.

    Parameters of more than one dimension say how many: "Parameter:3".

    Modules that store nothing are left out; where nothing at all is stored, the result is None.
    """
    kind = _kind(module)
    children = {name: tree(child) for name, child in module.named_children()}
    children = {name: child for name, child in children.items() if child is not None}
    stored = {name: value.dim() for name, value in module._parameters.items() if value is not None}
    buffers = {
        name
        for name, value in module._buffers.items()
        if value is not None and name not in module._non_persistent_buffers_set
    }
    if kind is not None and not children and stored.keys() | buffers <= PLAIN[kind]:
        # What stands in the place of W x matters for layers that an adapter may sit on, and for nothing else.
        plain = kind not in ("Linear", "Conv1D") or type(module).forward is _classes()[kind].forward
        return kind if plain else f"{kind}:{type(module).__name__}"
    if not children and not stored and not buffers:
        return None
    node = {CLASS: _class_of(module), **children}
    if node[CLASS].startswith("torch.") and "out_proj" in children:
        node["out_proj"] += ":MultiheadAttention"  # reads the weight of its output layer, and never calls that
    node.update({name: "Parameter" if count < 2 else f"Parameter:{count}" for name, count in stored.items()})
    node.update(dict.fromkeys(buffers, "Buffer"))
    if kind is not None:
        node[KIND] = kind
    return node


def _kind(module: Any) -> str | None:
    """The plain kind that a module is an instance of."""
    return next((kind for kind, known in _classes().items() if isinstance(module, known)), None)


@functools.cache
def _classes() -> dict[str, Any]:
    import torch
    from transformers.pytorch_utils import Conv1D

    return {kind: Conv1D if kind == "Conv1D" else getattr(torch.nn, kind) for kind in PLAIN}


def _class_of(module: Any) -> str:
    """The full name of a module's class, or the kind of container that it is, whatever it is called."""
    from torch import nn

    for container in (nn.ModuleList, nn.ParameterList, nn.Sequential, nn.ModuleDict):
        if isinstance(module, container):
            return container.__name__
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _name_of(model: Any, getter: str) -> str | None:
    """The name of the module that a method of the model returns; None where it has no such module."""
    try:
        wanted = getattr(model, getter)()
    except (NotImplementedError, AttributeError, TypeError, StopIteration, IndexError):
        return None
    return next((name for name, module in model.named_modules(remove_duplicate=False) if module is wanted), None)


if __name__ == "__main__":
    main()
