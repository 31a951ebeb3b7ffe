"""`inspect`: what a checkpoint is, from its config and its header alone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint, Layer
from vera_tools.dtypes import BITS, CODES
from vera_tools.files.safetensors import TensorInfo
from vera_tools.projections.pair import PairShape
from vera_tools.report import Document, Report


@dataclass(frozen=True)
class LayerSummary(Document):
    """One adapted layer. `in_features` is None where neither a base nor a manifest says it."""

    module: str
    out_features: int | None
    in_features: int | None
    r: int | None


@dataclass(frozen=True, repr=False)
class InspectReport(Report):
    """What is in a checkpoint.

    Attributes:
        path: The checkpoint.
        config: adapter_config.json with PEFT's defaults filled in.
        unknown_keys: Keys of the config that PEFT's VeRA does not know.
        layers: The adapted layers.
        tensors: Every tensor in the file.
        shape: r, in_max, out_max, or None where nothing says in_max.
        projections_stored: Whether both projections are in the file.
        vector_parameters: Elements of all vera_lambda_b and vera_lambda_d: the paper's count, L * (d_model + r).
        other_parameters: Elements of biases and saved modules.
        projection_dtype: The dtype the projections have, or would have.
        file_bytes: Size of the weights file.
        manifest: Whether there is a manifest.
    """

    name: ClassVar[str] = "inspect"

    path: str
    config: dict[str, Any]
    unknown_keys: tuple[str, ...]
    layers: tuple[LayerSummary, ...]
    tensors: tuple[TensorInfo, ...]
    shape: PairShape | None
    projections_stored: bool
    vector_parameters: int
    other_parameters: int
    projection_dtype: str
    file_bytes: int
    manifest: bool

    @property
    def projection_bytes(self) -> int | None:
        """Bytes of vera_A and vera_B together, stored or not; None where their size is unknown."""
        if self.shape is None:
            return None
        return self.shape.elements * BITS[CODES[self.projection_dtype]] // 8

    @property
    def lora_parameters(self) -> int | None:
        """Parameters of a LoRA of the same rank on the same layers; None where an in_features is unknown."""
        total = 0
        for layer in self.layers:
            if layer.in_features is None or layer.out_features is None or layer.r is None:
                return None
            total += layer.r * (layer.in_features + layer.out_features)
        return total

    @property
    def sizes(self) -> dict[str, int | None]:
        """Bytes of the file as it is, with and without the projections, and of a float32 LoRA of the same rank."""
        pair = self.projection_bytes
        lora = self.lora_parameters
        bare = self.file_bytes - (pair or 0) if self.projections_stored else self.file_bytes
        return {
            "file": self.file_bytes,
            "with_projections": None if pair is None else bare + pair,
            "without_projections": bare,
            "projections": pair,
            "lora_same_rank": None if lora is None else 4 * lora,
        }

    def body(self) -> dict[str, Any]:
        """The inspect/v1 document's own part."""
        return {
            "path": self.path,
            "config": self.config,
            "unknown_keys": list(self.unknown_keys),
            "projections_stored": self.projections_stored,
            "r": self.config["r"],
            "in_max": self.shape.in_max if self.shape else None,
            "out_max": self.shape.out_max if self.shape else None,
            "layers": [layer.to_dict() for layer in self.layers],
            "tensors": [
                {"name": info.name, "dtype": info.dtype, "shape": list(info.shape), "bytes": info.nbytes}
                for info in self.tensors
            ],
            "parameters": {
                "vectors": self.vector_parameters,
                "other": self.other_parameters,
                "trainable": self.vector_parameters + self.other_parameters,
                "projections": self.shape.elements if self.shape else None,
                "lora_same_rank": self.lora_parameters,
            },
            "bytes": self.sizes,
            "manifest": self.manifest,
        }


def inspect(
    checkpoint: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, allow_pickle: bool = False
) -> InspectReport:
    """Look at a checkpoint's config and header; no tensor is read.

    Args:
        checkpoint: A folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        base: Its base model, which tells each layer's in_features.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        CheckFailedError: the base does not fit.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint, allow_pickle=allow_pickle))
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        widths = opened.in_features(model)
        pair = list(opened.projections.values())
        return InspectReport(
            path=opened.label,
            config=opened.config.to_dict(),
            unknown_keys=tuple(sorted(opened.config.extra)),
            layers=tuple(_summary(layer, widths.get(layer.module)) for layer in opened.layers.values()),
            tensors=tuple(opened.weights.tensors.values()),
            shape=opened.pair_shape(model),
            projections_stored=len(pair) == 2,
            vector_parameters=sum(info.size for info in opened.vector_infos.values()),
            other_parameters=sum(info.size for info in opened.other_tensors.values()),
            projection_dtype=pair[0].dtype if pair else opened.recorded.dtype if opened.recorded else "float32",
            file_bytes=opened.weights.size,
            manifest=opened.manifest is not None,
        )


def _summary(layer: Layer, in_features: int | None) -> LayerSummary:
    return LayerSummary(
        layer.module,
        layer.lambda_b.size if layer.lambda_b else None,
        in_features,
        layer.lambda_d.size if layer.lambda_d else None,
    )
