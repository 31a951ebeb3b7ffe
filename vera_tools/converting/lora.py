"""`to_lora`: a VeRA adapter as the LoRA of rank r that it exactly is, for servers that know LoRA only.

VeRA's update of one layer is ``diag(lambda_b) @ vera_B[:out] @ diag(lambda_d) @ vera_A[:, :in]`` (arXiv 2310.11454,
equation 2). So LoRA with ``B' = lambda_b[:, None] * vera_B[:out]``, ``A' = lambda_d[:, None] * vera_A[:, :in]`` and
``alpha = r``, which makes LoRA's scaling 1, is the same map; only the rounding of these two products is new.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import MODULES, WEIGHTS_NAME, Checkpoint, Layer
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Manifest, ProjectionRecord, TensorRecord
from vera_tools.checkpoints.resolution import Assumptions, Resolved, resolve, rows
from vera_tools.checkpoints.writing import base_record, describe
from vera_tools.converting import peft_lora, vllm
from vera_tools.converting.output import (
    ConversionReport,
    Destination,
    common,
    corrections,
    foreign_metadata,
    refuse_half_a_pair,
)
from vera_tools.dtypes import FLOATS, Array, np_dtype
from vera_tools.errors import AssumedShapeWarning, CheckFailedError, FormatError, UnprovenError, UsageError
from vera_tools.files import safetensors
from vera_tools.files.safetensors import Deferred, TensorFile
from vera_tools.verifying.recorded import refuse_changed

_BLOCK = 1 << 18  # elements of a product made at a time


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
        base: The base model, for each layer's in_features and for a seed-only pair. Only headers are read.
        dtype: Of lora_A and lora_B. Default: float64 where the adapter is, else float32.
        in_features: Largest in_features of the adapted layers, for a seed-only checkpoint without a base.
        recipe: Name of the recipe where none is recorded. Default: PEFT's is assumed, with a warning.
        stored_dtype: The dtype that an assumed pair was kept in.
        strict: Refuse to assume a recipe or a layer's width.
        in_place: Replace the checkpoint itself, in one step.
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: the regenerated pair is not the recorded one, the base does not fit, a value of lora_A or
            lora_B would not be finite, or PEFT does not load LoRA on such layers of such a base.
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
        peft_lora.refuse_unloadable(opened, kind, opened.placement(model).architecture if model is not None else None)
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = resolve(opened, assumptions)
        refuse_changed(opened)
        record = resolved.record
        widths = opened.in_features(model)
        widths_assumed = not widths.keys() >= opened.layers.keys()
        if widths_assumed:
            _warn_of_widths(opened, record, strict=strict)
        tensors = Tensors(opened, resolved, {} if widths_assumed else widths, dtype)
        config = lora_config(opened, r=record.shape.r, kind=kind)
        with target.open(model) as folder:
            manifest = _write(folder, opened, config, tensors.all(), record, model)
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
            notes=(*notes, *peft_lora.doubts(opened, kind), *corrections(opened)),
        )


def lora_config(checkpoint: Checkpoint, *, r: int, kind: str | None = None) -> dict[str, Any]:
    """adapter_config.json of the LoRA adapter: what every PEFT since 0.4 knows, and nothing else.

    Args:
        checkpoint: The VeRA adapter.
        r: Its rank.
        kind: The base's model type, where it is known.
    """
    config = checkpoint.config
    targets = config.target_modules
    if isinstance(targets, str) and peft_lora.names_targets(kind):
        targets = None
    return {
        "alpha_pattern": {},
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "bias": "lora_only" if config.bias == "vera_only" else config.bias,
        "fan_in_fan_out": config.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": config.layers_pattern,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": r,
        "lora_dropout": config.vera_dropout,
        "modules_to_save": config.modules_to_save,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "revision": config.revision,
        # PEFT's defaults by model type are not the same for LoRA and VeRA.
        "target_modules": sorted(checkpoint.layers) if targets is None else targets,
        "task_type": config.task_type,
    }


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
        self.shape = resolved.record.shape
        self.rows = rows(checkpoint, resolved)
        double = "float64" in {resolved.record.dtype, *(info.dtype for info in checkpoint.weights.tensors.values())}
        self.work = np.dtype(np.float64 if double else np.float32)
        self.dtype = dtype or self.work.name

    def all(self) -> dict[str, Deferred]:
        """Every tensor of the LoRA adapter, by PEFT's names."""
        weights = self.checkpoint.weights
        tensors = {name: weights.deferred(name) for name in self.checkpoint.other_tensors}
        for layer in self.checkpoint.layers.values():
            a, b = self.matrices(layer)
            tensors[f"{MODULES}{layer.module}.lora_A.weight"] = a
            tensors[f"{MODULES}{layer.module}.lora_B.weight"] = b
        return tensors

    def matrices(self, layer: Layer) -> tuple[Deferred, Deferred]:
        """lora_A, [r, in_features], and lora_B, [out_features, r], of one layer.

        Raises:
            CheckFailedError: the vectors do not fit the projections; while it is made, a value that is not finite.
            FormatError: a vector is missing.
        """
        lambda_b, lambda_d, width = self._vectors(layer)
        a = self._scaled(layer, lambda_d, "vera_A", width)
        return a, self._scaled(layer, lambda_b, "vera_B", self.shape.r)

    def _vectors(self, layer: Layer) -> tuple[Array, Array, int]:
        where = f"{self.checkpoint.weights.label}: {layer.module}"
        if layer.lambda_b is None or layer.lambda_d is None:
            missing = "vera_lambda_b" if layer.lambda_b is None else "vera_lambda_d"
            raise FormatError(f"{missing} is missing", where=where)
        b, d = (self.checkpoint.weights.read(info.name) for info in (layer.lambda_b, layer.lambda_d))
        shape, width = self.shape, self.widths.get(layer.module, self.shape.in_max)
        if d.shape != (shape.r,) or b.ndim != 1 or b.size > shape.out_max or width > shape.in_max:
            raise CheckFailedError(
                "the vectors do not fit the projections",
                where=where,
                expected=f"r {shape.r}, in_features <= {shape.in_max}, out_features <= {shape.out_max}",
                found=f"r {list(d.shape)}, in_features {width}, out_features {list(b.shape)}",
            )
        return b, d, width

    def _scaled(self, layer: Layer, vector: Array, name: str, columns: int) -> Deferred:
        """``vector[:, None] * matrix[: len(vector), :columns]``, some rows at a time."""
        count = max(1, _BLOCK // columns)
        out = np_dtype(self.dtype)

        def pieces() -> Iterator[Array]:
            for start in range(0, vector.size, count):
                stop = min(start + count, vector.size)
                matrix = self.rows(name, start, stop)[:, :columns].astype(self.work, copy=False)
                scale = vector[start:stop, None].astype(self.work)
                with np.errstate(over="ignore", invalid="ignore"):  # refused in words of our own
                    piece = (scale * matrix).astype(out, copy=False)
                if not np.isfinite(piece).all():
                    raise self._nonfinite(layer, name, scale, matrix)
                yield piece

        return Deferred(self.dtype, (vector.size, columns), pieces)

    def _nonfinite(self, layer: Layer, name: str, scale: Array, matrix: Array) -> CheckFailedError:
        """Which of two factors holds NaN or infinity, or that their product is too large for the dtype."""
        label, letter = self.checkpoint.weights.label, name[-1]
        for factor, tensor in ((matrix, name), (scale, f"{layer.module}: vera_lambda_{'d' if letter == 'A' else 'b'}")):
            if not np.isfinite(factor).all():
                return CheckFailedError("holds NaN or infinity", where=f"{label}: {tensor}")
        return CheckFailedError(
            f"lora_{letter} would hold values too large for {self.dtype}",
            where=f"{label}: {layer.module}",
            hint="choose a wider --dtype",
        )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    tensors: dict[str, Deferred],
    record: ProjectionRecord,
    base: BaseModel | None,
) -> Manifest:
    """Config, weights and manifest. The manifest's tensors are the LoRA's, its projections those it was made from."""
    (folder / CONFIG_NAME).write_bytes(json.dumps(config, indent=2, sort_keys=True).encode())
    safetensors.save(folder / WEIGHTS_NAME, tensors, {**foreign_metadata(checkpoint), **record.to_metadata()})
    with TensorFile.open(folder / WEIGHTS_NAME) as file:
        sha256 = file.digests()
        records = {n: TensorRecord(info.shape, info.dtype, sha256[n]) for n, info in file.tensors.items()}
        manifest = dataclasses.replace(
            describe(checkpoint, record, base=base_record(checkpoint, base)),
            tensors=records,
            config=config,
            metadata=file.metadata,
            original=None,
        )
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
