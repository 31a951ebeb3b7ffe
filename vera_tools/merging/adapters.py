"""An adapter that is merged: its checkpoint, its projections, and the weight it is merged with."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np

from vera_tools.checkpoints.checkpoint import PICKLE_NAME, Checkpoint, Layer
from vera_tools.checkpoints.resolution import Resolved, arrays
from vera_tools.dtypes import HALVES, Array
from vera_tools.errors import FormatError, UsageError
from vera_tools.files.safetensors import TensorInfo
from vera_tools.merging.rounding import check_finite


class Adapter:
    """One adapter among those that are merged.

    Attributes:
        checkpoint: The open checkpoint.
        resolved: Which projections it has, and how that is known.
        weight: What its change of every weight is multiplied by.
        allow_nonfinite: Take NaN and infinity as they come.

    Raises:
        UsageError: the weight is not finite.
    """

    def __init__(self, checkpoint: Checkpoint, resolved: Resolved, *, weight: float, allow_nonfinite: bool) -> None:
        if not math.isfinite(weight):
            raise UsageError("an adapter's weight must be finite", where=checkpoint.label, found=str(weight))
        self.checkpoint, self.resolved, self.weight = checkpoint, resolved, weight
        self.allow_nonfinite = allow_nonfinite

    @property
    def label(self) -> str:
        """What the user called it."""
        return self.checkpoint.label

    @cached_property
    def sha256(self) -> str:
        """Digest of its safetensors file; of a pickle, digest of the safetensors file that its tensors would make."""
        return self.checkpoint.weights.file_sha256()

    @property
    def pickled(self) -> bool:
        """Whether its weights were read from a legacy adapter_model.bin."""
        return self.checkpoint.weights.label.endswith(PICKLE_NAME)

    @cached_property
    def pair(self) -> tuple[Array, Array]:
        """vera_A (r, in_max) and vera_B (out_max, r); half types widened to float32.

        Raises:
            CheckFailedError: NaN or infinity.
        """
        wide = [
            array.astype(np.float32) if array.dtype.name in HALVES else array
            for array in arrays(self.checkpoint, self.resolved)
        ]
        for name, array in zip(("vera_A", "vera_B"), wide, strict=True):
            self._check(array, name)
        return wide[0], wide[1]

    @cached_property
    def columns(self) -> Array:
        """vera_A transposed, (in_max, r)."""
        return np.ascontiguousarray(self.pair[0].T)

    def load(self) -> None:
        """Read or draw the projections now, check them, and keep them.

        Raises:
            CheckFailedError: NaN or infinity.
        """
        _ = self.columns

    def vectors(self, layer: Layer, *, in_features: int) -> tuple[TensorInfo, TensorInfo]:
        """One layer's lambda_b and lambda_d, once it is checked that they and the projections fit it.

        Raises:
            FormatError: a vector is missing, or of another length than the rank; or the projections are too small.
            CheckFailedError: NaN or infinity.
        """
        where = f"{self.checkpoint.weights.label}: {layer.module}"
        shape, found = self.resolved.record.shape, list[TensorInfo]()
        for name, info in (("vera_lambda_b", layer.lambda_b), ("vera_lambda_d", layer.lambda_d)):
            if info is None:
                raise FormatError(f"{name} is missing", where=where, hint="the checkpoint is incomplete")
            if len(info.shape) != 1:
                raise FormatError(
                    "not a vector", where=f"{where}.{name}", expected="1 dimension", found=str(list(info.shape))
                )
            self._check(self.checkpoint.weights.read(info.name), info.name)
            found.append(info)
        lambda_b, lambda_d = found
        if lambda_d.size != shape.r:
            raise FormatError(
                "vera_lambda_d does not have the rank's length",
                where=where,
                expected=str(shape.r),
                found=str(lambda_d.size),
            )
        if in_features > shape.in_max or lambda_b.size > shape.out_max:
            raise FormatError(
                "the projections are too small for this layer",
                where=where,
                expected=f"at least {in_features} columns of vera_A and {lambda_b.size} rows of vera_B",
                found=f"{shape.in_max} and {shape.out_max}",
            )
        return lambda_b, lambda_d

    def to_dict(self) -> dict[str, Any]:
        """The adapter as it stands in the merge record."""
        record = self.resolved.record
        return {
            "path": self.label,
            "weight": self.weight,
            "sha256": self.sha256,
            "origin": self.resolved.origin,
            "recipe": record.recipe.to_dict() if record.recipe else None,
            "assumed": record.assumed,
            "projections": record.to_dict()["projections"],
            "r": record.shape.r,
            "in_max": record.shape.in_max,
            "out_max": record.shape.out_max,
            "base_model_name_or_path": self.checkpoint.config.base_model_name_or_path,
            "revision": self.checkpoint.config.revision,
        }

    def _check(self, values: Array, name: str) -> None:
        if not self.allow_nonfinite:
            check_finite(values, where=f"{self.checkpoint.weights.label}: {name}", what="the adapter holds")
