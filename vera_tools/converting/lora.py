"""`to_lora`: a VeRA adapter as the LoRA of rank r that it exactly is, for servers that know LoRA only.

The arithmetic is that of `converting.factors`.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import WEIGHTS_NAME, Checkpoint, Layer
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME, BaseRecord, Manifest, ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, Resolved, resolve, rows
from vera_tools.checkpoints.writing import base_record, describe_weights
from vera_tools.converting import peft_lora, vllm
from vera_tools.converting.factors import Factors, computed_in, lora_config, named_matrices
from vera_tools.converting.output import (
    ConversionReport,
    Destination,
    common,
    corrections,
    foreign_metadata,
    refuse_half_a_pair,
    refuse_miscopied,
)
from vera_tools.dtypes import FLOATS, Array, np_dtype
from vera_tools.errors import AssumedShapeWarning, CheckFailedError, FormatError, UnprovenError, UsageError
from vera_tools.files import safetensors
from vera_tools.files.safetensors import Deferred, TensorInfo
from vera_tools.verifying.recorded import refuse_changed
from vera_tools.verifying.refusals import refuse_another_base, refuse_contradictions, refuse_drift


@dataclass(frozen=True, kw_only=True, repr=False)
class LoraReport(ConversionReport):
    """What was converted to LoRA.

    Attributes:
        r: The LoRA's rank, and its alpha.
        dtype: Of lora_A and lora_B.
        layers: Number of adapted layers.
        factor: How many times larger the LoRA's weights file is.
        vllm: What vLLM makes of it.
        widths_assumed: in_features of the layers were taken from vera_A, for want of a base.
    """

    name: ClassVar[str] = "convert"

    r: int
    dtype: str
    layers: int
    factor: float
    vllm: vllm.Service
    widths_assumed: bool

    def body(self) -> dict[str, Any]:
        """The convert/v1 document's own part."""
        return {
            **super().body(),
            "to": "lora",
            "lora": {
                "r": self.r,
                "alpha": self.r,
                "dtype": self.dtype,
                "layers": self.layers,
                "widths_assumed": self.widths_assumed,
            },
            "factor": self.factor,
            "vllm": {
                "max_lora_rank": self.vllm.max_lora_rank,
                "obstacles": list(self.vllm.obstacles),
                "conditions": list(self.vllm.conditions),
            },
        }


def to_lora(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    in_features: int | None = None,
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
    in_place: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> LoraReport:
    """Write the checkpoint as a LoRA adapter that PEFT, transformers and LoRA servers load.

    Biases and saved modules are carried over. The manifest written beside it says which pair it was made from.

    Args:
        checkpoint: A folder, a safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        output: The folder to write.
        base: The base model, for each layer's in_features and for a seed-only pair. Only headers are read, and of one
            on disk the weights of which digests are recorded.
        dtype: Of lora_A and lora_B. Default: float64 where the adapter is, else float32.
        in_features: Largest in_features of the adapted layers, for a seed-only checkpoint without a base.
        recipe: Name of the recipe where none is recorded. Default: PEFT's is assumed, with a warning.
        stored_dtype: The dtype that an assumed pair was kept in.
        strict: Refuse to assume a recipe or a layer's width, and a stored pair that is not what its key gives, of which
            a warning tells else.
        in_place: Replace the checkpoint itself, in one step.
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: the regenerated pair is not the recorded one; config and file contradict each other; the base
            does not fit, or is not the one that was recorded; a value of lora_A or lora_B would not be finite; or PEFT
            does not load LoRA on such layers of such a base.
        UnprovenError: something would have to be assumed, and `strict`.
        UsageError: nothing says in_max, or the output cannot be where it was asked for.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError("not a dtype for LoRA", expected=" or ".join(FLOATS), found=dtype)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint, allow_pickle=allow_pickle))
        target = Destination.of(opened, output, in_place=in_place, overwrite=overwrite, base=base)
        refuse_half_a_pair(opened)
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        kind = peft_lora.model_type(opened, model)
        known = opened.placement(model).architecture if model is not None else None
        peft_lora.refuse_unloadable(opened.layers, kind, known, label=opened.label)
        of_bare = peft_lora.unfound(opened, model)
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = resolve(opened, assumptions)
        checked = refuse_changed(opened)
        record = resolved.record
        widths = opened.in_features(model)
        refuse_another_base(opened, model)
        refuse_contradictions(opened, model)
        refuse_drift(opened, resolved, strict=strict)
        widths_assumed = not widths.keys() >= opened.layers.keys()
        if widths_assumed:
            _warn_of_widths(opened, record, strict=strict)
        tensors = Tensors(opened, resolved, {} if widths_assumed else widths, dtype)
        config = lora_config(opened.config, opened.layers, r=record.shape.r, kind=kind)
        with target.open(model) as folder:
            known_base = base_record(opened, model)
            manifest = write_lora(
                folder, config, tensors.all(), record, base=known_base, metadata=foreign_metadata(opened)
            )
            refuse_miscopied(manifest, checked, where=opened.weights.label)
            size = (folder / WEIGHTS_NAME).stat().st_size
        service = vllm.look(manifest.tensors, opened.layers, config, model)
        rank = service.max_lora_rank
        padded = rank is not None and rank != record.shape.r
        notes = [f"rank {record.shape.r} is none of vLLM's, which pads it to {rank}"] if padded else []
        return LoraReport(
            **common(opened, target, manifest, size),
            origin=resolved.origin,
            r=record.shape.r,
            dtype=tensors.dtype,
            layers=len(opened.layers),
            factor=size / opened.weights.size,
            vllm=service,
            widths_assumed=widths_assumed,
            notes=(*notes, *peft_lora.doubts(opened, kind), *of_bare, *corrections(opened)),
        )


class Tensors:
    """The LoRA's tensors, each made when it is written.

    Args:
        checkpoint: The VeRA adapter.
        resolved: Its projections.
        widths: in_features by module; that of vera_A where one is missing.
        dtype: Of lora_A and lora_B; None is float64 where the adapter is, else float32.
    """

    def __init__(self, checkpoint: Checkpoint, resolved: Resolved, widths: dict[str, int], dtype: str | None) -> None:
        self.checkpoint, self.widths = checkpoint, widths
        record, found = resolved.record, {info.dtype for info in checkpoint.weights.tensors.values()}
        work = computed_in({record.dtype, *found})
        self.dtype = dtype or work
        self.factors = Factors(checkpoint.weights.label, record.shape, rows(checkpoint, resolved), work, self.dtype)

    def all(self) -> dict[str, Deferred]:
        """Every tensor of the LoRA adapter, by PEFT's names."""
        tensors = {name: self._saved(info) for name, info in self.checkpoint.other_tensors.items()}
        for layer in self.checkpoint.layers.values():
            tensors |= named_matrices(layer.module, self.matrices(layer))
        return tensors

    def _saved(self, info: TensorInfo) -> Deferred:
        """A bias or a tensor of a saved module, as it stands."""
        found = self.checkpoint.weights.deferred(info.name)
        if info.dtype not in FLOATS:
            return found

        def pieces() -> Iterator[memoryview | Array]:
            for piece in found.pieces():
                if not np.isfinite(np.frombuffer(piece, np_dtype(info.dtype))).all():
                    where = f"{self.checkpoint.weights.label}: {info.name}"
                    raise CheckFailedError("holds NaN or infinity", where=where)
                yield piece

        return Deferred(info.dtype, info.shape, pieces)

    def matrices(self, layer: Layer) -> tuple[Deferred, Deferred]:
        """lora_A, [r, in_features], and lora_B, [out_features, r], of one layer.

        Raises:
            CheckFailedError: the vectors do not fit the projections; while it is made, a value that is not finite.
            FormatError: a vector is missing.
        """
        weights = self.checkpoint.weights
        if layer.lambda_b is None or layer.lambda_d is None:
            missing = "vera_lambda_b" if layer.lambda_b is None else "vera_lambda_d"
            raise FormatError(f"{missing} is missing", where=f"{weights.label}: {layer.module}")
        b, d = (weights.read(info.name) for info in (layer.lambda_b, layer.lambda_d))
        width = self.widths.get(layer.module, self.factors.shape.in_max)
        return self.factors.of(layer.module, b, d, width)


def write_lora(
    folder: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Array | Deferred],
    record: ProjectionRecord,
    *,
    base: BaseRecord,
    metadata: Mapping[str, str] | None = None,
) -> Manifest:
    """Write a LoRA adapter that was made of a pair into an empty folder: config, weights and manifest.

    Args:
        folder: Where to.
        config: Its adapter_config.json, from `lora_config`.
        tensors: Its tensors, by PEFT's names.
        record: The pair, which the manifest describes in the place of its own.
        base: What is known of the base model.
        metadata: Entries for the safetensors metadata beside the record's own, which win.

    Returns:
        The manifest that was written.
    """
    (folder / CONFIG_NAME).write_bytes(json.dumps(config, indent=2, sort_keys=True).encode())
    safetensors.save(folder / WEIGHTS_NAME, tensors, {**(metadata or {}), **record.to_metadata()})
    manifest = describe_weights(folder / WEIGHTS_NAME, config, record, base=base)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json().encode())
    return manifest


def _warn_of_widths(checkpoint: Checkpoint, record: ProjectionRecord, *, strict: bool) -> None:
    width = record.shape.in_max
    if strict:
        raise UnprovenError(
            "nothing says how wide each adapted layer is", where=checkpoint.label, hint="name the base with --base"
        )
    warnings.warn(
        f"{checkpoint.label}: nothing says how wide each adapted layer is; taking in_features {width} for all, which "
        "PEFT refuses to load where it is wrong (name the base with --base)",
        AssumedShapeWarning,
        stacklevel=3,
    )
