"""Checkpoints to and from a live model: PEFT's format, always with the projections that were trained with."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from vera_tools.nn import targets
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.layer import features
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


def save(model: Adapters, folder: str, adapter_name: str, *, is_main_process: bool | None = None) -> None:
    """Write one adapter into a folder, which may hold other files.

    Args:
        model: The model. Under FSDP all processes have to call this, because the vectors are gathered.
        folder: Where to; it is made where there is none.
        adapter_name: Which adapter.
        is_main_process: Whether this process writes. Default: the process of rank 0.

    Raises:
        UsageError: save_projection is off, and no recipe makes these projections; or a tensor has no values.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    if config.task_type is None and config.auto_mapping is None:
        config.auto_mapping = _auto_mapping(model.model)
    named = sorted(_named(model, adapter_name).items())
    for name, tensor in named:
        if tensor.device.type == "meta":
            raise UsageError("is on the meta device: there are no values to save", where=name.removeprefix(MODULES))
    tensors = {name: to_array(_whole(tensor)) for name, tensor in named}
    together = distributed.is_available() and distributed.is_initialized()
    if is_main_process is None:
        is_main_process = not together or distributed.get_rank() == 0
    if is_main_process:
        record = model.record_of(adapter_name)
        if config.save_projection:
            pair = model.stored_pair(adapter_name, record.dtype)
            tensors |= {ROOT + "vera_A": pair[0], ROOT + "vera_B": pair[1]}
        else:
            _check_seed_only(model, record, where=folder)
        _write(Path(folder), config, tensors, record, _describe_base(model, config, adapter_name))
    if together:
        distributed.barrier()


def _named(model: Adapters, adapter_name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter but the projections, by its name on disk."""
    config = model.peft_config[adapter_name]
    tensors: dict[str, Tensor] = {}
    for name, layer in model.vera_layers().items():
        if adapter_name in layer.r:
            tensors[f"{MODULES}{name}.vera_lambda_b"] = layer.vera_lambda_b[adapter_name]
            tensors[f"{MODULES}{name}.vera_lambda_d"] = layer.vera_lambda_d[adapter_name]
    for name, tensor in model.trained_biases(config.bias).items():
        tensors[MODULES + name] = tensor
    for name, module in model.saved_modules().items():
        if adapter_name in module.modules_to_save:
            state = module.modules_to_save[adapter_name].state_dict()
            tensors |= {f"{MODULES}{name}.{key}": tensor for key, tensor in state.items()}
    return tensors


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
        f"{name}.weight": TensorRecord(tuple(layer.weight.shape), dtype_name(layer.weight.dtype), None)
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
