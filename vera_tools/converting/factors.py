"""What a VeRA adapter is as LoRA, of a checkpoint and of a live model: two factors for each layer, and a config.

VeRA's update of one layer is ``diag(lambda_b) @ vera_B[:out] @ diag(lambda_d) @ vera_A[:, :in]`` (arXiv 2310.11454,
equation 2). So LoRA with ``B' = lambda_b[:, None] * vera_B[:out]``, ``A' = lambda_d[:, None] * vera_A[:, :in]`` and
``alpha = r``, which makes LoRA's scaling 1, is the same map; only the rounding of these two products is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vera_tools.checkpoints.checkpoint import MODULES
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.converting import peft_lora
from vera_tools.dtypes import Array, np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.files.safetensors import Deferred
from vera_tools.projections.pair import PairShape

_BLOCK = 1 << 18  # elements of a product made at a time


def lora_config(config: VeraConfig, layers: Iterable[str], *, r: int, kind: str | None = None) -> dict[str, Any]:
    """adapter_config.json of the LoRA adapter: what every PEFT since 0.4 knows, and nothing else.

    Args:
        config: The VeRA adapter's.
        layers: The modules that it adapts.
        r: Its rank.
        kind: The base's model type, where it is known.
    """
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
        "target_modules": sorted(layers) if targets is None else targets,
        "task_type": config.task_type,
    }


@dataclass(frozen=True)
class Factors:
    """The factors of every layer, each made when it is written.

    Attributes:
        label: What they are made of, for messages.
        shape: r, in_max and out_max of the pair.
        rows: Rows of "vera_A" or "vera_B", by its name, the first and the one behind the last.
        work: The dtype that the products are computed in, as `computed_in` has it.
        dtype: Theirs.
    """

    label: str
    shape: PairShape
    rows: Callable[[str, int, int], Array]
    work: str
    dtype: str

    def of(self, module: str, lambda_b: Array, lambda_d: Array, width: int) -> tuple[Deferred, Deferred]:
        """A layer's lora_A, (r, in_features), and lora_B, (out_features, r).

        Args:
            module: The layer's name in the model.
            lambda_b: (out_features,).
            lambda_d: (r,).
            width: Its in_features.

        Raises:
            CheckFailedError: the vectors do not fit the projections; when a factor is made, one of its values is not
                finite.
        """
        shape = self.shape
        if lambda_d.shape != (shape.r,) or lambda_b.ndim != 1 or lambda_b.size > shape.out_max or width > shape.in_max:
            raise CheckFailedError(
                "the vectors do not fit the projections",
                where=f"{self.label}: {module}",
                expected=f"r {shape.r}, in_features <= {shape.in_max}, out_features <= {shape.out_max}",
                found=f"r {list(lambda_d.shape)}, in_features {width}, out_features {list(lambda_b.shape)}",
            )
        return self._scaled(module, lambda_d, "vera_A", width), self._scaled(module, lambda_b, "vera_B", shape.r)

    def _scaled(self, module: str, vector: Array, name: str, columns: int) -> Deferred:
        """``vector[:, None] * matrix[: len(vector), :columns]``, some rows at a time."""
        count = max(1, _BLOCK // columns)
        work, out = np_dtype(self.work), np_dtype(self.dtype)

        def pieces() -> Iterator[Array]:
            for start in range(0, vector.size, count):
                stop = min(start + count, vector.size)
                matrix = self.rows(name, start, stop)[:, :columns].astype(work, copy=False)
                scale = vector[start:stop, None].astype(work)
                with np.errstate(over="ignore", invalid="ignore"):  # refused in words of our own
                    piece = (scale * matrix).astype(out, copy=False)
                if not np.isfinite(piece).all():
                    raise self._nonfinite(module, name, scale, matrix)
                yield piece

        return Deferred(self.dtype, (vector.size, columns), pieces)

    def _nonfinite(self, module: str, name: str, scale: Array, matrix: Array) -> CheckFailedError:
        """Which of two factors holds NaN or infinity, or that their product is too large for the dtype."""
        letter = name[-1]
        for factor, tensor in ((matrix, name), (scale, f"{module}: vera_lambda_{'d' if letter == 'A' else 'b'}")):
            if not np.isfinite(factor).all():
                return CheckFailedError("holds NaN or infinity", where=f"{self.label}: {tensor}")
        return CheckFailedError(
            f"lora_{letter} would hold values too large for {self.dtype}",
            where=f"{self.label}: {module}",
            hint="choose a wider --dtype (dtype= in Python)",
        )


def computed_in(dtypes: Iterable[str]) -> str:
    """The dtype that the factors of an adapter with tensors of these dtypes are computed in, and written by default."""
    return "float64" if "float64" in dtypes else "float32"


def named_matrices(module: str, matrices: tuple[Deferred, Deferred]) -> dict[str, Deferred]:
    """A layer's lora_A and lora_B by PEFT's names."""
    return {f"{MODULES}{module}.lora_{letter}.weight": matrix for letter, matrix in zip("AB", matrices, strict=True)}
