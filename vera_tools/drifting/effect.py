"""What another pair of projections does to an adapter: per layer from the vectors alone, and to a model's logits.

The norms of the updates and of their difference are `comparing.updates`': no weight-sized matrix is made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vera_tools import blas
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import MODULES, Checkpoint
from vera_tools.comparing.updates import Pair, UpdateComparison
from vera_tools.drifting import logits
from vera_tools.dtypes import Array
from vera_tools.report import Document, Progress


@dataclass(frozen=True)
class LayerChange(Document):
    """How far one layer's weight update moves.

    Attributes:
        module: The layer.
        in_features: Columns of vera_A that it uses.
        out_features: Rows of vera_B that it uses.
        relative_change: Frobenius norm of the change over that of the update; None where the update is zero, as it is
            before training (lambda_b starts at 0).
    """

    module: str
    in_features: int
    out_features: int
    relative_change: float | None


@dataclass(frozen=True)
class Effect:
    """What loading another pair does to an adapter.

    Attributes:
        differing: Share of all projection elements that differ.
        layers: Each layer's change, in the checkpoint's order.
        logits: {"max_abs", "relative", "largest", "argmax_changed", "positions"}, or None.
        logits_why_not: Why the logits were not compared.
    """

    differing: float
    layers: tuple[LayerChange, ...]
    logits: Mapping[str, Any] | None = None
    logits_why_not: str | None = None

    @property
    def worst(self) -> LayerChange | None:
        """The layer that moves most."""
        known = [layer for layer in self.layers if layer.relative_change is not None]
        return max(known, key=lambda layer: layer.relative_change or 0.0, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {
            "differing": self.differing,
            "worst": self.worst.to_dict() if self.worst else None,
            "layers": [layer.to_dict() for layer in self.layers],
            "logits": dict(self.logits) if self.logits else None,
            "logits_why_not": self.logits_why_not,
        }


@blas.one_thread()
def measure(
    checkpoint: Checkpoint,
    trained: Pair,
    loaded: Pair,
    *,
    base: BaseModel | None = None,
    progress: Progress | None = None,
) -> Effect:
    """The effect of computing with `loaded` in place of `trained`; the logits are left out (see `logits_change`).

    Args:
        checkpoint: The adapter.
        trained: vera_A (r, in_max) and vera_B (out_max, r).
        loaded: Another such pair.
        base: Gives each layer's in_features; without it every layer is taken to use all of vera_A.
        progress: Called once a layer.
    """
    unequal = sum(int(np.count_nonzero(old != new)) for old, new in zip(trained, loaded, strict=True))
    widths = checkpoint.in_features(base) if base else {}
    comparison = UpdateComparison(trained, loaded)
    layers = [layer for layer in checkpoint.layers.values() if layer.lambda_b and layer.lambda_d]
    changes = []
    for number, layer in enumerate(layers):
        columns = widths.get(layer.module) or trained[0].shape[1]
        vectors = checkpoint.vectors(layer)
        assert layer.lambda_b is not None
        norms = comparison.layer(columns, vectors, vectors)
        change = norms.difference / norms.a if norms.a else None
        changes.append(LayerChange(layer.module, columns, layer.lambda_b.size, change))
        if progress:
            progress(number + 1, len(layers), layer.module)
    return Effect(unequal / sum(old.size for old in trained), tuple(changes))


def logits_change(
    checkpoint: Checkpoint, base: str, trained: Pair, loaded: Pair, *, timeout: float
) -> tuple[dict[str, Any] | None, str | None]:
    """The change in the model's logits on a fixed input, computed in float32, or why there is none.

    A process of its own loads the base with transformers, where that is installed; see `vera_tools.drifting.logits`.

    Args:
        checkpoint: The adapter.
        base: The base model's folder.
        trained: vera_A and vera_B.
        loaded: Another such pair.
        timeout: Seconds.
    """
    with tempfile.TemporaryDirectory(prefix="vera-tools-") as folder:
        arrays: dict[str, Array] = {}
        for kind, pair in (("trained", trained), ("loaded", loaded)):
            arrays[f"{kind}.vera_A"], arrays[f"{kind}.vera_B"] = (array.astype(np.float32) for array in pair)
        for name in checkpoint.vector_infos:
            arrays[name.removeprefix(MODULES)] = checkpoint.weights.read(name).astype(np.float32)
        for name in checkpoint.other_tensors:
            arrays[f"other.{name.removeprefix(MODULES)}"] = checkpoint.weights.read(name).astype(np.float32)
        np.savez(Path(folder) / "adapter.npz", **arrays)  # type: ignore[arg-type]
        command = [sys.executable, logits.__file__, str(base), str(Path(folder) / "adapter.npz")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return None, f"no answer within {timeout:g} seconds"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return None, errors[-1][:200] if errors else f"exit code {done.returncode}"
    return json.loads(lines[-1]), None
