"""vera_A and vera_B as the torch of this process draws them, in PEFT's order of steps."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch


def draw(
    key: int, r: int, in_max: int, out_max: int, *, dtype: str = "float32", through: str | None = None
) -> dict[str, torch.Tensor]:
    """Draw with `dtype` as torch's default dtype, then cast to `through` as PEFT casts to the base weights' dtype."""
    generator = torch.Generator("cpu").manual_seed(key)
    pair = {}
    for name, shape in (("vera_A", (r, in_max)), ("vera_B", (out_max, r))):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        tensor = torch.empty(shape, dtype=getattr(torch, dtype)).uniform_(-bound, bound, generator=generator)
        pair[name] = tensor if through is None else tensor.to(getattr(torch, through))
    return pair


def digests(request: dict[str, Any]) -> dict[str, str]:
    """sha256 of the two tensors, cast to ``stored``, over their little-endian row-major bytes."""
    stored = getattr(torch, request.pop("stored", "float32"))
    pair = {name: tensor.to(stored).contiguous() for name, tensor in draw(**request).items()}
    return {name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in pair.items()}


def rounding() -> str:
    """How this process's kernels round."""
    return "separate" if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX") else "fused"


def half_sampling(dtype: str) -> str | None:
    """How this torch samples `dtype`."""
    if dtype not in ("bfloat16", "float16"):
        return None
    major, minor = map(int, torch.__version__.split(".")[:2])
    return "opmath" if (major, minor) >= (2, 12) else "scalar"
