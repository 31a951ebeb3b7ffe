"""Checkpoints to and from a live model: PEFT's format, always with the projections that were trained with."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from vera_tools.checkpoints import card
from vera_tools.checkpoints.base import rounds_through
from vera_tools.checkpoints.checkpoint import MODULES, ROOT, Checkpoint
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import BaseRecord, ProjectionRecord, TensorRecord
from vera_tools.checkpoints.resolution import Assumptions, Resolved, arrays, resolve
from vera_tools.checkpoints.writing import replaced_files, write_checkpoint
from vera_tools.dtypes import FLOATS, HALVES, Array
from vera_tools.errors import CheckFailedError, FormatError, UsageError, VeraToolsWarning, WrongSizeError
from vera_tools.files import atomic
from vera_tools.nn import embeddings, state_dicts, targets, tying
from vera_tools.nn.adapters import Adapters
from vera_tools.nn.base_layers import PLAIN, cast_dtype, features, whole_shape
from vera_tools.nn.projection import dtype_name, to_array, to_tensor
from vera_tools.nn.saved_module import SavedModule
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe


def load(
    model: Adapters,
    reference: str | os.PathLike[str],
    adapter_name: str,
    *,
    config: Any = None,
    key_mapping: Mapping[str, str] | None = None,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    strict: bool = False,
    allow_pickle: bool = False,
) -> state_dicts.LoadResult:
    """Put a checkpoint's adapter on the model. Everything is checked before anything is changed.

    Args:
        model: The model.
        reference: A folder, a file, or ``hf://...``.
        adapter_name: The adapter's name in the model. One that is there gets the checkpoint's values.
        config: A config to take in the place of the checkpoint's own.
        key_mapping: Regular expressions for the tensors' names below ``base_model.``, and what to put in their place;
            the first that is found counts. Default: the model's own for checkpoints of an older layout of its modules.
        is_trainable: Whether its parameters will be trained.
        autocast_adapter_dtype: Hold the vectors in float32 on a half-precision layer, not in the layer's dtype.
        strict: Refuse what is or was only assumed or stated, and stored projections that are not the recorded ones.
        allow_pickle: Read a legacy adapter_model.bin too.

    Returns:
        Nothing missing and nothing unexpected: a checkpoint that does not fit is refused.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: it does not fit the model, or regenerated projections are not the recorded ones.
        UnprovenError: `strict`, and nothing records which recipe made the projections.
        UsageError: it cannot stand beside the adapters that are there, or in the place of the one of that name.
    """
    there = adapter_name in model.peft_config
    with Checkpoint.open(reference, allow_pickle=allow_pickle) as checkpoint:
        _map_names(checkpoint, key_mapping or getattr(model.model, "_checkpoint_conversion_mapping", None) or {})
        given = checkpoint.config if config is None else _given(config, checkpoint)
        if not there:
            model.check_new(adapter_name, given)
        config = targets.complete(given, model.model)
        config.inference_mode = not is_trainable
        modules = targets.find(config, model.model)
        _check_names(checkpoint, model, config, modules)
        _check_shapes(checkpoint, config, modules)
        _check_embeddings(checkpoint, model, modules)
        if there:
            _check_same(model, adapter_name, config, modules)
        resolved, pair = projections(checkpoint, modules, strict=strict)
        tensors = {
            name: to_tensor(checkpoint.weights.read(name))
            for name in checkpoint.weights.tensors
            if name.startswith(MODULES)
        }
    if config.ensure_weight_tying:
        tying.check(model.model, tensors, prefix=MODULES, label=checkpoint.label)
    if there:
        model.hold_pair(adapter_name, model.peft_config[adapter_name], modules, resolved.record, pair)
    else:
        model.attach(
            adapter_name,
            config,
            modules,
            resolved.record,
            pair,
            low_cpu_mem_usage=True,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    state_dicts.put(model, state_dicts.places(model, adapter_name), tensors)
    model.tie(adapter_name)
    return state_dicts.LoadResult([], [])


def _map_names(checkpoint: Checkpoint, mapping: Mapping[str, str]) -> None:
    """Let the checkpoint call its tensors as the model does."""
    names = {}
    for name in checkpoint.weights.tensors:
        prefix = next((part for part in (MODULES, ROOT) if name.startswith(part)), "")
        rest = name.removeprefix(prefix)
        renamed = (re.subn(pattern, replacement, rest) for pattern, replacement in mapping.items())
        names[name] = prefix + next((text for text, found in renamed if found), rest)
    if len(set(names.values())) < len(names):
        raise UsageError("two tensors would have one name", where="key_mapping")
    if any(name != new for name, new in names.items()):
        checkpoint.weights.rename(names)


def _given(config: Any, checkpoint: Checkpoint) -> VeraConfig:
    """A config that was handed in, unless the checkpoint's vectors were trained with other projections."""
    given, own = VeraConfig.of(config), checkpoint.config
    for name in ("r", "projection_prng_key"):
        if getattr(given, name) != getattr(own, name):
            raise UsageError(
                "the checkpoint was trained with another value",
                where=f"config: {name}",
                expected=str(getattr(own, name)),
                found=str(getattr(given, name)),
            )
    return given


def _check_same(model: Adapters, adapter_name: str, config: VeraConfig, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a checkpoint that is no other state of the adapter that is there."""
    there = model.peft_config[adapter_name]
    own = {name for name, layer in model.vera_layers().items() if adapter_name in layer.r}
    saved = {name for name, module in model.saved_modules().items() if adapter_name in module.modules_to_save}
    same = own == modules.keys() and saved == targets.saved(config, model.model).keys()
    keys = ("r", "bias", "projection_prng_key")
    if not same or any(getattr(there, key) != getattr(config, key) for key in keys):
        raise UsageError(
            f"the adapter {adapter_name!r} that is there is another one: it differs in rank, key, bias or modules",
            hint="delete_adapter it first, or load under another name",
        )
    if any(adapter_name in layer.merged_adapters for layer in model.vera_layers().values()):
        raise UsageError(f"the adapter {adapter_name!r} is merged", hint="call unmerge_adapter() first")


def projections(
    checkpoint: Checkpoint, modules: Mapping[str, nn.Module], *, strict: bool
) -> tuple[Resolved, tuple[Array, Array]]:
    """The projections that a checkpoint was trained with, given the live layers that it adapts, and how they are known.

    Raises:
        CheckFailedError: they are too small for the layers, or not the recorded ones.
        UnprovenError: `strict`, and nothing records which recipe made them.
    """
    layers = [targets.base_layer(module) for module in modules.values()]
    sizes = [features(layer) for layer in layers]
    in_max, out_max = max(size[0] for size in sizes), max(size[1] for size in sizes)
    dtypes = frozenset(dtype_name(cast_dtype(layer)) for layer in layers)
    assumptions = Assumptions(
        in_features=None if checkpoint.projections or checkpoint.recorded else in_max,  # a wider pair than needed fits
        weight_dtypes=dtypes,
        strict=strict,
    )
    resolved = resolve(checkpoint, assumptions)
    if resolved.origin == "assumed" and (narrow := sorted(dtypes - set(FLOATS))):
        raise CheckFailedError(
            "PEFT rounds the projections through the dtype of these layers, and no recipe describes that",
            where=checkpoint.label,
            found=", ".join(narrow),
            hint="save the adapter with its projections: save_projection=True",
        )
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
    config = config_to_save(model, adapter_name)
    together = distributed.is_available() and distributed.is_initialized()
    if is_main_process is None:
        is_main_process = not together or distributed.get_rank() == 0
    parameters = state_dicts.named(model, adapter_name, save_embedding_layers=save_embedding_layers)
    try:
        if is_main_process:
            _check_pair(model, adapter_name, state_dict or {})
            values = {name: state_dicts.values(name, own, state_dict) for name, own in sorted(parameters.items())}
            tensors = {name: to_array(state_dicts.whole(tensor)) for name, tensor in values.items()}
            record = model.record_of(adapter_name)
            if config.save_projection:
                pair = model.stored_pair(adapter_name, record.dtype)
                tensors |= {ROOT + "vera_A": pair[0], ROOT + "vera_B": pair[1]}
            else:
                _check_seed_only(model, record, where=folder)
            base = describe_base(model, config, adapter_name)
            _write(Path(folder), model, config, tensors, record, base)
        elif state_dict is None:  # to gather what FSDP2 has spread takes all processes
            spread = [(name, own) for name, own in sorted(parameters.items()) if hasattr(own.tensor, "full_tensor")]
            for tensor in [state_dicts.values(name, own, None) for name, own in spread]:
                state_dicts.whole(tensor)
    finally:
        # Also where the process that writes has failed: the others wait for it, or would for ever.
        if together:
            distributed.barrier()


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
            raise WrongSizeError(
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
    dtypes = {dtype_name(cast_dtype(layer.base_layer)) for layer in model.vera_layers().values()}
    through = rounds_through(dtypes) if len(dtypes & set(HALVES)) < 2 else None
    peers = Recipe(prng_key=record.recipe.prng_key, rounded_through=through)
    if record.recipe != peers or not dtypes <= set(FLOATS):
        warnings.warn(
            f"{where}: vera-tools will regenerate exactly these projections ({record.recipe.name}) from the manifest, "
            "but PEFT would draw others on this base; set save_projection to True for PEFT",
            VeraToolsWarning,
            stacklevel=4,
        )


def config_to_save(model: Adapters, adapter_name: str) -> VeraConfig:
    """An adapter's config as it is written.

    Where no task says which class the base is of, it names that class: PEFT's AutoPeftModel makes the base by it.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    if config.task_type is None and config.auto_mapping is None:
        own = class_of(model.model)
        config.auto_mapping = {"base_model_class": own.__name__, "parent_library": own.__module__}
    return config


def class_of(base: nn.Module) -> type:
    """The base's class, without the one that fully_shard puts in front of it."""
    return next(cls for cls in type(base).__mro__ if not cls.__module__.startswith("torch.distributed."))


def describe_base(model: Adapters, config: VeraConfig, adapter_name: str) -> BaseRecord:
    """What a manifest says of the base: its name, and the weights under the adapter."""
    weights = {
        f"{name}.weight": TensorRecord(tuple(whole_shape(layer.weight)), dtype_name(layer.weight.dtype), None)
        for name, layer in model.vera_layers().items()
        if adapter_name in layer.r and layer.kind is PLAIN  # a quantised weight has other shapes and values
    }
    return BaseRecord(config.base_model_name_or_path, config.revision, weights)


def _write(
    folder: Path,
    model: Adapters,
    config: VeraConfig,
    tensors: dict[str, Array],
    record: ProjectionRecord,
    base: BaseRecord,
) -> None:
    if not folder.exists():
        with atomic.folder(folder) as temporary:
            write_checkpoint(temporary, config, tensors, record, base=base)
            write_card(temporary, model, config)
        return
    with replaced_files(folder) as scratch:
        write_checkpoint(scratch, config, tensors, record, base=base)
    write_card(folder, model, config)


def write_card(folder: Path, model: Adapters, config: VeraConfig) -> None:
    """Write README.md, or add what it lacks; one that cannot be read is left as it is, with a warning."""
    path = folder / card.CARD_NAME
    try:
        existing = path.read_bytes().decode("utf-8") if path.exists() else None
        base_name = getattr(getattr(model.model, "config", None), "_name_or_path", None)
        text = card.beside_adapter(existing, config, base_name)
    except (OSError, UnicodeDecodeError, FormatError) as error:
        warnings.warn(f"{path} is left as it is: {error}", VeraToolsWarning, stacklevel=5)
        return
    if text != existing:
        atomic.write_bytes(path, text.encode())
