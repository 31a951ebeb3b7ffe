"""Checkpoints to and from a live model: PEFT's format, always with the projections that were trained with."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, distributed, nn

from vera_tools.checkpoints.base import rounds_through
from vera_tools.checkpoints.checkpoint import MODULES, ROOT, Checkpoint
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import BaseRecord, ProjectionRecord, TensorRecord
from vera_tools.checkpoints.resolution import Assumptions, Resolved, arrays, resolve
from vera_tools.checkpoints.writing import replaced_files, write_checkpoint
from vera_tools.dtypes import HALVES, Array
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsWarning
from vera_tools.files import atomic
from vera_tools.nn import embeddings, targets
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.layer import features, whole_shape
from vera_tools.nn.projection import dtype_name, to_array, to_tensor
from vera_tools.nn.saved_module import SavedModule
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe


def load(
    model: Adapters,
    reference: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool = False,
    strict: bool = False,
    allow_pickle: bool = False,
) -> None:
    """Put a checkpoint's adapter on the model. Everything is checked before anything is changed.

    Args:
        model: The model.
        reference: A folder, a file, or ``hf://...``.
        adapter_name: The adapter's name in the model.
        is_trainable: Whether its parameters will be trained.
        strict: Refuse what is or was only assumed or stated, and stored projections that are not the recorded ones.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: it does not fit the model, or regenerated projections are not the recorded ones.
        UnprovenError: `strict`, and nothing records which recipe made the projections.
        UsageError: it cannot stand beside the adapters that are there.
    """
    with Checkpoint.open(reference, allow_pickle=allow_pickle) as checkpoint:
        model.check_new(adapter_name, checkpoint.config)
        config = targets.complete(checkpoint.config, model.model)
        config.inference_mode = not is_trainable
        modules = targets.find(config, model.model)
        _check_names(checkpoint, model, config, modules)
        _check_shapes(checkpoint, config, modules)
        _check_embeddings(checkpoint, model, modules)
        resolved, pair = projections(checkpoint, modules, strict=strict)
        tensors = {
            name: to_tensor(checkpoint.weights.read(name))
            for name in checkpoint.weights.tensors
            if name.startswith(MODULES)
        }
    model.attach(adapter_name, config, modules, resolved.record, pair, low_cpu_mem_usage=True)
    _put(model, adapter_name, tensors)


def projections(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], *, strict: bool
) -> tuple[Resolved, tuple[Array, Array]]:
    """The projections that a checkpoint was trained with, given the live layers that it adapts, and how they are known.

    Raises:
        CheckFailedError: they are too small for the layers, or not the recorded ones.
        UnprovenError: `strict`, and nothing records which recipe made them.
    """
    weights = [targets.weight_of(module) for module in modules.values()]
    sizes = [features(targets.base_layer(module)) for module in modules.values()]
    in_max, out_max = max(size[0] for size in sizes), max(size[1] for size in sizes)
    assumptions = Assumptions(
        in_features=None if checkpoint.projections or checkpoint.recorded else in_max,  # a wider pair than needed fits
        weight_dtypes=frozenset(dtype_name(weight.dtype) for weight in weights),
        strict=strict,
    )
    resolved = resolve(checkpoint, assumptions)
    record, known = resolved.record, checkpoint.recorded
    if record.shape.in_max < in_max or record.shape.out_max < out_max:
        raise CheckFailedError(
            "the projections are too small for the layers of this model",
            where=checkpoint.label,
            expected=f"in_max {in_max} and out_max {out_max} at least",
            found=f"{record.shape.in_max} and {record.shape.out_max}",
        )
    if (
        resolved.origin == "stored"
        and known is not None
        and known.dtype == record.dtype
        and known.sha256 != record.sha256
    ):
        error = CheckFailedError(
            "the stored projections are not the recorded ones",
            where=checkpoint.label,
            hint="another adapter was saved over it, or it is damaged: see `vera-tools verify`",
        )
        if strict:
            raise error
        warnings.warn(str(error), VeraToolsWarning, stacklevel=5)
    return resolved, arrays(checkpoint, resolved)


def save(
    model: Adapters,
    folder: str,
    adapter_name: str,
    *,
    is_main_process: bool | None = None,
    state_dict: Mapping[str, Any] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> None:
    """Write one adapter into a folder, which may hold other files.

    Args:
        model: The model. Under FSDP all processes have to call this, because the vectors are gathered.
        folder: Where to; it is made where there is none.
        adapter_name: Which adapter.
        is_main_process: Whether this process writes. Default: the process of rank 0.
        state_dict: The model's state dict, whose tensors are written in the place of the model's own. The projections
            are buffers, whole in every process, and the model's.
        save_embedding_layers: Write the base's embedding and output layer too (see `nn.embeddings`).

    Raises:
        UsageError: save_projection is off, and no recipe makes these projections; a tensor has no values; or it is not
            in `state_dict`, or has another shape there, or the projections there are not the model's.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    if config.task_type is None and config.auto_mapping is None:
        config.auto_mapping = _auto_mapping(model.model)
    together = distributed.is_available() and distributed.is_initialized()
    if is_main_process is None:
        is_main_process = not together or distributed.get_rank() == 0
    parameters = _named(model, adapter_name)
    for name, tensor in embeddings.saved(model.model, config, save_embedding_layers).items():
        parameters[MODULES + name] = Named(f"model.{name}", tensor)
    try:
        if is_main_process:
            _check_pair(model, adapter_name, state_dict or {})
            values = {name: _values(name, own, state_dict) for name, own in sorted(parameters.items())}
            tensors = {name: to_array(_whole(tensor)) for name, tensor in values.items()}
            record = model.record_of(adapter_name)
            if config.save_projection:
                pair = model.stored_pair(adapter_name, record.dtype)
                tensors |= {ROOT + "vera_A": pair[0], ROOT + "vera_B": pair[1]}
            else:
                _check_seed_only(model, record, where=folder)
            _write(Path(folder), config, tensors, record, _describe_base(model, config, adapter_name))
        elif state_dict is None:  # to gather what FSDP2 has spread takes all processes
            spread = [(name, own) for name, own in sorted(parameters.items()) if hasattr(own.tensor, "full_tensor")]
            for tensor in [_values(name, own, None) for name, own in spread]:
                _whole(tensor)
    finally:
        # Also where the process that writes has failed: the others wait for it, or would for ever.
        if together:
            distributed.barrier()


class Named(NamedTuple):
    """A tensor of the model's, and its name in the model's state dict."""

    key: str
    tensor: Tensor


def _named(model: Adapters, adapter_name: str) -> dict[str, Named]:
    """Every tensor of an adapter but the projections, by its name on disk."""
    config = model.peft_config[adapter_name]
    tensors: dict[str, Named] = {}
    for name, layer in model.vera_layers().items():
        if adapter_name in layer.r:
            for which in ("vera_lambda_b", "vera_lambda_d"):
                vector = getattr(layer, which)[adapter_name]
                tensors[f"{MODULES}{name}.{which}"] = Named(f"model.{name}.{which}.{adapter_name}", vector)
    for name, tensor in model.trained_biases(config.bias).items():
        tensors[MODULES + name] = Named(f"model.{name}", tensor)
    for name, module in model.saved_modules().items():
        if adapter_name in module.modules_to_save:
            copy = f"model.{name}.modules_to_save.{adapter_name}"
            for key, tensor in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
                tensors[f"{MODULES}{name}.{key}"] = Named(f"{copy}.{key}", tensor)
    return tensors


def _values(name: str, own: Named, given: Mapping[str, Any] | None) -> Tensor:
    """The values to write for a tensor: the model's, or those of a state dict."""
    tensor: Tensor = own.tensor if given is None else given.get(own.key)  # type: ignore[assignment]
    if tensor is None:
        raise UsageError(
            "is not in state_dict",
            where=own.key,
            hint="pass the whole state dict of this model; without frozen parameters, name the trained adapter in "
            "selected_adapters",
        )
    if tensor.device.type == "meta":
        raise UsageError("is on the meta device: there are no values to save", where=name.removeprefix(MODULES))
    if given is not None and hasattr(tensor, "full_tensor"):
        raise UsageError("is spread over processes", where=f"state_dict: {own.key}", hint="gather it first")
    if tensor.shape != whole_shape(own.tensor):
        raise UsageError(
            "has no values here: another process holds them" if tensor.numel() == 0 else "has another shape",
            where=name.removeprefix(MODULES) if given is None else f"state_dict: {own.key}",
            expected=str(list(whole_shape(own.tensor))),
            found=str(list(tensor.shape)),
            hint="pass state_dict=accelerator.get_state_dict(model), called by all processes",
        )
    return tensor


def _check_pair(model: Adapters, adapter_name: str, given: Mapping[str, Any]) -> None:
    """Refuse a state dict of a time when the model had another pair: its vectors were trained with that one."""
    for name, held in (("vera_A", model.vera_A), ("vera_B", model.vera_B)):
        values = given.get(f"{name}.{adapter_name}")
        if values is not None and not torch.equal(values.cpu().double(), held[adapter_name].cpu().double()):
            raise UsageError(
                "the projections are not the model's",
                where=f"state_dict: {name}.{adapter_name}",
                hint="load it into the model first",
            )


def _put(model: Adapters, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Give an attached adapter its values, by their names on disk."""
    for name, layer in model.vera_layers().items():
        for which in ("vera_lambda_b", "vera_lambda_d"):
            if (values := tensors.pop(f"{MODULES}{name}.{which}", None)) is not None:
                weight = layer.weight
                device = values.device if weight.device.type == "meta" else weight.device
                dtype = torch.promote_types(torch.promote_types(weight.dtype, values.dtype), torch.float32)
                vectors = getattr(layer, which)
                old = vectors[adapter_name]
                vectors[adapter_name] = nn.Parameter(values.to(device, dtype), requires_grad=old.requires_grad)
    for name, module in model.saved_modules().items():
        if adapter_name in module.modules_to_save:
            copy = module.modules_to_save[adapter_name]
            prefix = f"{MODULES}{name}."
            state = {key: tensors.pop(prefix + key) for key in copy.state_dict()}
            on_meta = any(parameter.device.type == "meta" for parameter in copy.parameters())
            copy.load_state_dict(state, assign=on_meta)
    with torch.no_grad():
        for name, bias in model.trained_biases(model.peft_config[adapter_name].bias).items():
            bias.copy_(tensors.pop(MODULES + name))
        for name, weight in embeddings.parameters(model.model).items():
            if (values := tensors.pop(MODULES + name, None)) is not None:
                if weight.device.type == "meta":  # which would take a copy without a word, and hold nothing
                    where, _, key = name.rpartition(".")
                    setattr(model.model.get_submodule(where), key, nn.Parameter(values, requires_grad=False))
                else:
                    weight.copy_(values)


def _check_names(checkpoint: Checkpoint, model: Adapters, config: VeraConfig, modules: Mapping[str, nn.Module]) -> None:
    expected = {f"{MODULES}{name}.{which}" for name in modules for which in ("vera_lambda_b", "vera_lambda_d")}
    saved = targets.saved(config, model.model)
    for name, module in saved.items():
        original = module.original_module if isinstance(module, SavedModule) else module
        expected |= {f"{MODULES}{name}.{key}" for key in original.state_dict()}
    inside = tuple(f"{name}." for name in saved)
    for name, module in targets.named_modules(model.model):
        if getattr(targets.base_layer(module), "bias", None) is None or name.startswith(inside) or name in saved:
            continue
        if name in modules and config.bias != "none":
            expected.add(f"{MODULES}{name}.base_layer.bias")
        elif config.bias == "all":
            expected.add(f"{MODULES}{name}.bias" if name else f"{MODULES}bias")
    # With bias="all" PEFT saves the biases of saved modules a second time, under the names they have in memory.
    again = tuple(f"{MODULES}{name}.{part}." for name in saved for part in ("modules_to_save", "original_module"))
    pair = tuple(ROOT + name for name in PROJECTIONS)
    found = {name for name in checkpoint.weights.tensors if name not in pair and not name.startswith(again)}
    found -= _embeddings(checkpoint, model, modules).keys() - expected
    problems = [
        f"{len(names)} tensors {what} ({', '.join(name.removeprefix(MODULES) for name in sorted(names)[:3])}"
        + (", ...)" if len(names) > 3 else ")")
        for what, names in (
            ("are missing from the checkpoint", expected - found),
            ("have no place in the model", found - expected),
        )
        if names
    ]
    if problems:
        raise CheckFailedError(
            "the checkpoint does not fit the model: " + "; ".join(problems),
            where=checkpoint.label,
            hint="it was made for another model class, or its config is not its own",
        )


def _embeddings(checkpoint: Checkpoint, model: Adapters, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The base's embedding layers that the checkpoint brings, by their names on disk; before anything is adapted."""
    found = {}
    for name, tensor in embeddings.parameters(model.model).items():
        layer, _, key = name.rpartition(".")
        full = f"{MODULES}{layer}.base_layer.{key}" if layer in modules else MODULES + name
        if full in checkpoint.weights.tensors:
            found[full] = tensor
    return found


def _check_embeddings(checkpoint: Checkpoint, model: Adapters, modules: Mapping[str, nn.Module]) -> None:
    for name, tensor in _embeddings(checkpoint, model, modules).items():
        shape = checkpoint.weights.tensors[name].shape
        if shape != tuple(whole_shape(tensor)):
            raise CheckFailedError(
                "the vocabulary is not as large as the one that the adapter was trained with",
                where=f"{checkpoint.label}: {name}",
                expected=str(list(shape)),
                found=str(list(whole_shape(tensor))),
                hint=f"call model.resize_token_embeddings({shape[0]}) first",
            )


def _check_shapes(checkpoint: Checkpoint, config: VeraConfig, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        layer = checkpoint.layers[name]
        assert layer.lambda_b is not None
        assert layer.lambda_d is not None
        targets.check_fits(name, module, layer.lambda_b.size)
        if layer.lambda_d.size != config.r:
            raise CheckFailedError(
                "vera_lambda_d contradicts the config's r",
                where=f"{checkpoint.label}: {name}",
                expected=str(config.r),
                found=str(layer.lambda_d.size),
            )


def _check_seed_only(model: Adapters, record: ProjectionRecord, *, where: str) -> None:
    if record.recipe is None:
        raise UsageError(
            "no known recipe makes these projections, so they would be lost",
            where=where,
            hint="set save_projection to True",
        )
    dtypes = {dtype_name(layer.weight.dtype) for layer in model.vera_layers().values()}
    through = rounds_through(dtypes) if len(dtypes & set(HALVES)) < 2 else None
    if record.recipe != Recipe(prng_key=record.recipe.prng_key, rounded_through=through):
        warnings.warn(
            f"{where}: vera-tools will regenerate exactly these projections ({record.recipe.name}) from the manifest, "
            "but PEFT would draw others on this base; set save_projection to True for PEFT",
            VeraToolsWarning,
            stacklevel=4,
        )


def _auto_mapping(base: nn.Module) -> dict[str, str]:
    """The base's class, by which PEFT's AutoPeftModel makes the base where no task says which class."""
    # fully_shard puts a class of its own in front of the model's.
    own = next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed."))
    return {"base_model_class": own.__name__, "parent_library": own.__module__}


def _describe_base(model: Adapters, config: VeraConfig, adapter_name: str) -> BaseRecord:
    weights = {
        f"{name}.weight": TensorRecord(tuple(whole_shape(layer.weight)), dtype_name(layer.weight.dtype), None)
        for name, layer in model.vera_layers().items()
        if adapter_name in layer.r
    }
    return BaseRecord(config.base_model_name_or_path, config.revision, weights)


def _write(
    folder: Path, config: VeraConfig, tensors: dict[str, Array], record: ProjectionRecord, base: BaseRecord
) -> None:
    if not folder.exists():
        with atomic.folder(folder) as temporary:
            write_checkpoint(temporary, config, tensors, record, base=base)
        return
    with replaced_files(folder) as scratch:
        write_checkpoint(scratch, config, tensors, record, base=base)


def _whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP2 may have spread over processes."""
    gather: Any = getattr(tensor, "full_tensor", None)
    whole: Tensor = gather() if gather is not None else tensor
    return whole.detach()
