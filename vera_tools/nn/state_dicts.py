"""An adapter's tensors under the names that they have on disk: out of a live model, and into it.

The four public functions bear the names of PEFT's, and take and return what PEFT's do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vera_tools.checkpoints.checkpoint import MODULES, ROOT
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import UsageError, WrongSizeError, warn
from vera_tools.nn import embeddings, tying
from vera_tools.nn.adapters import Adapters, adapters_of
from vera_tools.nn.base_layers import weight_like, whole_shape
from vera_tools.nn.layer import VeraLinear
from vera_tools.nn.targets import Plan
from vera_tools.projections.pair import PROJECTIONS


class LoadResult(NamedTuple):
    """What a state dict lacked, and what it held for which there is no place.

    Attributes:
        missing_keys: Names, as the model's state dict has them.
        unexpected_keys: Names, as they were given.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """An adapter's tensors under the names that a checkpoint gives them, which do not hold the adapter's name.

    Args:
        model: A `VeraModel`, or what DistributedDataParallel, FSDP or torch.compile have put around one.
        state_dict: The model's state dict, whose tensors are returned in the place of the model's own.
        adapter_name: Which adapter.
        unwrap_compiled: Taken as PEFT takes it; a compiled model is always unwrapped.
        save_embedding_layers: With the base's embedding and output layer (see `nn.embeddings`).

    Raises:
        UsageError: no such adapter; or a tensor has no values here, or is not in `state_dict`.
    """
    own = adapters_of(model)
    own.check_known([adapter_name])
    wanted = named(own, adapter_name, save_embedding_layers=save_embedding_layers)
    tensors = dict(gathered(own, wanted, state_dict))
    if own.peft_config[adapter_name].save_projection:
        tensors |= {ROOT + "vera_A": own.vera_A[adapter_name], ROOT + "vera_B": own.vera_B[adapter_name]}
    return tensors


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Give an adapter that is there the values of a state dict, as `get_peft_model_state_dict` returns it.

    Args:
        model: As there.
        peft_model_state_dict: The values. Projections among them become the adapter's own.
        adapter_name: Which adapter.
        ignore_mismatched_sizes: Leave tensors of another shape as they are, with a warning.
        low_cpu_mem_usage: Taken as PEFT takes it; what is on the meta device is always replaced.

    Raises:
        UsageError: no such adapter, or the projections are not there although the config saves them.
        WrongSizeError: a tensor has another shape. Nothing was changed.
    """
    own = adapters_of(model)
    own.check_known([adapter_name])
    given = dict(peft_model_state_dict)
    pair = [given.pop(ROOT + name, None) for name in PROJECTIONS]
    if own.peft_config[adapter_name].save_projection and any(part is None for part in pair):
        raise UsageError("Specified to load vera_A and vera_B from state dictionary however they were not present!")
    expected, targets = named(own, adapter_name), places(own, adapter_name)
    for name in [name for name in given if name in targets]:
        shape = tuple(whole_shape(tensor_at(own, targets[name])))
        if tuple(given[name].shape) != shape:
            text = f"found shape {list(given[name].shape)} in the checkpoint and {list(shape)} in the model"
            if not ignore_mismatched_sizes:
                raise WrongSizeError(f"size mismatch: {text}", where=name.removeprefix(MODULES))
            warn(f"{name}: {text}; it is left as it was")
            del given[name]
            expected.pop(name, None)
    if own.peft_config[adapter_name].ensure_weight_tying:
        tying.check(own.model, given, prefix=MODULES, label="the state dict")
    if pair[0] is not None and pair[1] is not None:
        own.set_pair(adapter_name, (pair[0], pair[1]))
    missing = [key for name, key in expected.items() if name not in given]
    put(own, targets, given)
    own.tie(adapter_name)
    return LoadResult(missing, list(given))


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the base had without adapters, under its own names.

    Raises:
        UsageError: an adapter is merged into it.
    """
    own = adapters_of(model)
    _refuse_merged(own)
    state = own.model.state_dict()
    return {original: state[key] for original, key in _base_keys(own).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> LoadResult:
    """Load a state dict of the base, under the base's own names, below the adapters.

    Raises:
        RuntimeError: `strict`, and names are missing or unknown, as torch has it.
        UsageError: an adapter is merged into it, and unmerging would put back the weights of before.
    """
    own = adapters_of(model)
    _refuse_merged(own)
    keys = _base_keys(own)
    result = LoadResult([k for k in keys if k not in state_dict], [k for k in state_dict if k not in keys])
    problems = [
        f"{what} key(s) in state_dict: {names}"
        for what, names in (("Missing", result.missing_keys), ("Unexpected", result.unexpected_keys))
        if names
    ]
    if strict and problems:
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(problems))
    own.model.load_state_dict({keys[k]: value for k, value in state_dict.items() if k in keys}, strict=False)
    return result


def named(
    model: Adapters, adapter_name: str, *, save_embedding_layers: bool | Literal["auto"] = False
) -> dict[str, str]:
    """Every tensor of an adapter but the projections: its key in the model's state dict, by its name on disk."""
    plan = model.plan_of(adapter_name)
    found = {name: held.key for name, held in plan.tensors(model.model, adapter_name).items()}
    return found | _of_base(embeddings.saved(model.model, plan.config, save_embedding_layers))


def places(model: Adapters, adapter_name: str) -> dict[str, str]:
    """What a checkpoint of the adapter may hold, likewise: the base's embedding, output layer and biases too."""
    everything = Plan(VeraConfig(bias="all"), model.vera_layers(), model.saved_modules())
    base = embeddings.parameters(model.model) | everything.biases(model.model)
    return _of_base(base) | named(model, adapter_name)


def _of_base(names: Iterable[str]) -> dict[str, str]:
    return {MODULES + name: f"model.{name}" for name in names}


def tensor_at(model: nn.Module, key: str) -> Tensor:
    """A parameter or buffer by its key in the model's state dict."""
    where, _, last = key.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(where), last)
    return tensor


def gathered(
    model: Adapters, keys: Mapping[str, str], given: Mapping[str, Any] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The values to write for keys by name on disk: the model's, or a state dict's; whole, one after another.

    Raises:
        UsageError: a tensor has no values here, or is not in `given`; nothing was gathered.
    """
    for name, tensor in [(name, _values(model, name, key, given)) for name, key in keys.items()]:
        yield name, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()  # FSDP2 spreads it


def _values(model: Adapters, name: str, key: str, given: Mapping[str, Any] | None) -> Tensor:
    own = tensor_at(model, key)
    tensor: Tensor = own if given is None else given.get(key)  # type: ignore[assignment]
    if tensor is None:
        raise UsageError(
            "is not in state_dict",
            where=key,
            hint="pass the whole state dict of this model; without frozen parameters, name the trained adapter in "
            "selected_adapters",
        )
    if tensor.device.type == "meta":
        raise UsageError("is on the meta device: there are no values to save", where=name.removeprefix(MODULES))
    if given is not None and hasattr(tensor, "full_tensor"):
        raise UsageError("is spread over processes", where=f"state_dict: {key}", hint="gather it first")
    if tensor.shape != whole_shape(own):
        raise UsageError(
            "has no values here: another process holds them" if tensor.numel() == 0 else "has another shape",
            where=name.removeprefix(MODULES) if given is None else f"state_dict: {key}",
            expected=str(list(whole_shape(own))),
            found=str(list(tensor.shape)),
            hint="pass state_dict=accelerator.get_state_dict(model), called by all processes",
        )
    return tensor


@torch.no_grad()
def put(model: Adapters, targets: Mapping[str, str], tensors: dict[str, Tensor]) -> None:
    """Give tensors their values, by their names on disk, and take those off `tensors`; `targets` has their keys.

    What holds values is written in place, so that an optimizer goes on training it. What is on the meta device is
    replaced: it would take a copy without a word, and hold nothing.
    """
    for name, key in targets.items():
        given = tensors.pop(name, None)
        if given is None:
            continue
        tensor = tensor_at(model, key)
        if tensor.device.type != "meta":
            tensor.copy_(given)
            continue
        dtype = given.dtype
        where, _, last = key.rpartition(".")
        module, owner = model.get_submodule(where), model.get_submodule(where.rpartition(".")[0])
        if isinstance(owner, VeraLinear):  # a vector; in half precision it is only where that was asked for
            half, like = tensor.dtype in (torch.bfloat16, torch.float16), weight_like(owner.base_layer)
            dtype = tensor.dtype if half else torch.promote_types(tensor.dtype, given.dtype)
            given = given.to(given.device if like.device.type == "meta" else like.device)
        if last in module._buffers:
            module._buffers[last] = given.to(dtype)
        else:
            setattr(module, last, nn.Parameter(given.to(dtype), requires_grad=tensor.requires_grad))


def _refuse_merged(model: Adapters) -> None:
    if any(layer.merged for layer in model.vera_layers().values()):
        raise UsageError("the base's weights hold an adapter, which is merged", hint="call unmerge_adapter() first")


def _base_keys(model: Adapters) -> dict[str, str]:
    """Where the base's tensors are now, by the names that they have without adapters."""
    modules = model.adapted()
    inside = {f"{name}.{module.base_name}.": f"{name}." for name, module in modules.items()}
    adapted = tuple(f"{name}.{part}." for name, module in modules.items() for part in module.adapter_layer_names)
    found = {}
    for key in model.model.state_dict():
        if not key.startswith(adapted):
            where = next((part for part in inside if key.startswith(part)), "")
            found[inside.get(where, "") + key.removeprefix(where)] = key
    return found
