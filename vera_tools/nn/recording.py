"""`save` and `record` of `vera_tools.nn.peft`: a manifest made from the pair that a live PEFT model trains with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import Manifest, ProjectionRecord
from vera_tools.checkpoints.writing import replaced_files, write_checkpoint
from vera_tools.dtypes import Array
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, FormatError, UsageError, warn
from vera_tools.nn import live, provenance
from vera_tools.nn.projection import recorded, shape_of, to_tensor
from vera_tools.projections.pair import PROJECTIONS


def save(
    model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default", **peft_options: Any
) -> Manifest | None:
    """Save an adapter as PEFT does, and record the pair that is in memory.

    Args:
        model: A ``PeftModel``, wrapped (in DistributedDataParallel, say) or not.
        folder: Where to; PEFT puts an adapter of another name than "default" into a folder of that name below it.
        adapter_name: Which adapter.
        **peft_options: As ``model.save_pretrained`` takes them. Where processes are spread, `is_main_process` is that
            of rank 0 by default; all call this.

    Returns:
        What was recorded; None in a process that does not write.

    Raises:
        UsageError, CheckFailedError, FormatError: as `record`. PEFT's files are written then.
        Whatever PEFT raises.
    """
    peft_model = unwrapped(model)
    if not hasattr(peft_model, "save_pretrained") or live.tuner_of(peft_model) is None:
        raise UsageError(
            "this is no PEFT model with a VeRA adapter", expected="a peft.PeftModel", found=type(peft_model).__name__
        )
    if distributed.is_available() and distributed.is_initialized():
        peft_options.setdefault("is_main_process", distributed.get_rank() == 0)
    _keep_pair(peft_model, adapter_name)
    type(peft_model).save_pretrained(peft_model, os.fspath(folder), selected_adapters=[adapter_name], **peft_options)
    return record_saved(peft_model, folder, adapter_name) if peft_options.get("is_main_process", True) else None


def record(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> Manifest:
    """Record the pair of a live PEFT model in a checkpoint that was saved from it, in its metadata and a manifest.

    Args:
        model: A model with PEFT's VeRA layers, wrapped or not.
        folder: Where it was saved to, as ``model.save_pretrained`` was told.
        adapter_name: Which adapter.

    Returns:
        What was recorded. Its origin is `live` where the adapter was made in this process (see `nn.provenance`).

    Warns:
        AssumedRecipeWarning: the adapter was loaded, and it is not known whether with this pair.

    Raises:
        UsageError: the model has no such adapter; its pair has no values here, or is spread over processes; or the
            checkpoint is seed-only, and no recipe makes this pair.
        CheckFailedError: the checkpoint is another adapter's, or the pair is not the one that was trained with.
        FormatError: the checkpoint is unreadable, malformed, or not VeRA.
    """
    model = unwrapped(model)
    found = live.find(model, adapter_name)
    path = _folder_of(folder, adapter_name)
    with Checkpoint.open(path) as checkpoint:
        for module, layer in checkpoint.layers.items():
            for info in (layer.lambda_b, layer.lambda_d):
                held = getattr(found.layers.get(module), info.name.rpartition(".")[2], None) if info else None
                if info and held is not None and _differs(held[adapter_name], checkpoint.weights.read(info.name)):
                    raise CheckFailedError(
                        f"the checkpoint holds other vectors than the adapter {adapter_name!r}",
                        where=f"{path}: {info.name}",
                        hint="record it right after it is saved, or use vera_tools.nn.peft.save",
                    )
    return record_saved(model, folder, adapter_name)


def record_saved(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str) -> Manifest:
    """`record` right after a model was saved, when there is no doubt whose vectors they are."""
    adapter = live.find(model, adapter_name)
    path = _folder_of(folder, adapter_name)
    with Checkpoint.open(path) as checkpoint:
        if checkpoint.config_text is None:
            raise FormatError(f"there is no {CONFIG_NAME}", where=path)
        with replaced_files(path, check=checkpoint.check_unchanged) as scratch:
            manifest = write_checkpoint(
                scratch,
                checkpoint.config_text,
                {name: checkpoint.weights.deferred(name) for name in checkpoint.weights.tensors},
                _pair_record(adapter, checkpoint),
                metadata=checkpoint.weights.metadata,
                base=live.base_record(adapter.bases, checkpoint.config),
            )
        checkpoint.folder.forget()  # what lies there now is ours
        return manifest


def check(model: nn.Module, adapter_name: str) -> None:
    """Find out, as far as it can be told before anything is saved, whether an adapter can be recorded.

    Warns, Raises:
        As `record`.
    """
    adapter = live.find(model, adapter_name)
    pair = adapter.tensors()
    shape_of(pair)
    origin, why = provenance.origin_of(adapter, pair, stored=adapter.persistent)
    if why:
        warn(_unproven(f"adapter {adapter_name!r}", origin, why), AssumedRecipeWarning)


def _unproven(where: str, origin: str, why: str) -> str:
    return f"{where}: the projections are recorded as {origin}, which proves nothing. {why}"


def _pair_record(adapter: live.LiveAdapter, checkpoint: Checkpoint) -> ProjectionRecord:
    where = checkpoint.label
    if empty := [layer.module for layer in checkpoint.layers.values() if layer.lambda_b and not layer.lambda_b.size]:
        raise CheckFailedError(
            "the vectors were saved without values",
            where=f"{where}: {empty[0]}",
            hint="gather them first: pass state_dict=accelerator.get_state_dict(model)",
        )
    if not checkpoint.layers:
        raise FormatError("there is no adapted layer", where=where, expected="vera_lambda_b and vera_lambda_d")
    pair = adapter.tensors()
    record = recorded(pair, "live", prng_key=checkpoint.config.projection_prng_key)
    if checkpoint.projections:
        stored = {name: checkpoint.weights.sha256(ROOT + name) for name in checkpoint.projections}
        if stored != record.sha256:
            raise CheckFailedError("the stored projections are not those of the model", where=where)
    elif checkpoint.widest > record.shape.out_max or {
        layer.lambda_d.size for layer in checkpoint.layers.values() if layer.lambda_d
    } != {record.shape.r}:
        raise CheckFailedError(
            "the checkpoint is another adapter's: its vectors do not fit the model's projections",
            where=where,
            expected=f"r {record.shape.r} and at most {record.shape.out_max} outputs",
        )
    if record.recipe is None and not checkpoint.projections:
        raise UsageError(
            "no known recipe makes the projections of this model, so they cannot be regenerated and this checkpoint is "
            "not reproducible",
            where=where,
            hint=f"set model.peft_config[{adapter.name!r}].save_projection = True and save it again with "
            "vera_tools.nn.peft.save",
        )
    origin, why = provenance.origin_of(adapter, pair, stored=bool(checkpoint.projections))
    if why:
        warn(_unproven(where, origin, why), AssumedRecipeWarning)
    return replace(record, origin=origin)


def _keep_pair(peft_model: nn.Module, adapter_name: str) -> None:
    """Let the state dict have the pair where the config says by now that it is saved; PEFT settled that at first."""
    tuner = live.tuner_of(peft_model)
    config = getattr(tuner, "peft_config", {}).get(adapter_name)
    if config is not None and config.save_projection:
        for name in PROJECTIONS:
            getattr(tuner, name)._non_persistent_buffers_set.discard(adapter_name)


def _differs(held: Tensor, saved: Array) -> bool:
    """Whether a live vector is whole and on this machine, and has other values than one in a file."""
    if held.device.type == "meta" or hasattr(held, "full_tensor") or held.numel() != saved.size:
        return False
    return not torch.equal(held.detach().cpu().to(torch.float64), to_tensor(saved).to(torch.float64))


def unwrapped(model: nn.Module) -> Any:
    """The model in what DistributedDataParallel, torch.compile and FSDP put around it."""
    inner: Any = model
    while "peft_config" not in dir(inner):
        parts = (inner._modules.get(name) for name in ("module", "_orig_mod", "_fsdp_wrapped_module"))
        found = next((part for part in parts if part is not None), None)
        if found is None:
            return inner
        inner = found
    return inner


def _folder_of(folder: str | os.PathLike[str], adapter_name: str) -> Path:
    """Where PEFT puts an adapter that is saved to `folder`."""
    below = Path(folder) / adapter_name
    return below if adapter_name != "default" and below.is_dir() else Path(folder)
