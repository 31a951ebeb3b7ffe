"""Bases and adapters made for the merge tests: small, random, of any shape and dtype, in safetensors' own writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from vera_tools.dtypes import np_dtype
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

Shapes = dict[str, tuple[int, int]]

LAYERS: Shapes = {f"model.layers.{n}.self_attn.{p}_proj": (48, 32) for n in range(3) for p in "qv"}


def make_base(
    folder: Path,
    shapes: Shapes = LAYERS,
    *,
    dtype: str = "bfloat16",
    files: int = 1,
    transposed: bool = False,
    config: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Path:
    """A base with these linear weights (out, in), a norm and a counter; `files` above 1 makes shards with an index."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        stored = shape[::-1] if transposed else shape
        tensors[f"{name}.weight"] = (rng.standard_normal(stored) * 0.05).astype(np_dtype(dtype))
    tensors["model.norm.weight"] = rng.standard_normal(32).astype(np_dtype(dtype))
    tensors["model.steps"] = np.array([3], np.int64)
    tensors |= extra or {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": dtype, **(config or {})}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "modeling_custom.py").write_text("# code\n")
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    parts = [names[n::files] for n in range(files)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))
    return folder


def make_adapter(
    folder: Path,
    shapes: Shapes = LAYERS,
    *,
    r: int = 8,
    key: int = 7,
    seed: int = 1,
    scale: float = 1.0,
    prefix: str = "base_model.model.",
    config: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    save_projection: bool = True,
) -> Path:
    """An adapter as PEFT writes it, with vectors that are not their initial values."""
    rng = np.random.default_rng(seed)
    pair = PairShape(r, max(s[1] for s in shapes.values()), max(s[0] for s in shapes.values()))
    vera_A, vera_B = generate(Recipe(prng_key=key), pair)
    tensors = {}
    for name, (out_features, _) in shapes.items():
        tensors[f"{prefix}{name}.vera_lambda_b"] = (rng.standard_normal(out_features) * scale).astype(np.float32)
        tensors[f"{prefix}{name}.vera_lambda_d"] = (rng.standard_normal(r) * 0.1).astype(np.float32)
    if save_projection:
        tensors |= {"base_model.vera_A": vera_A, "base_model.vera_B": vera_B}
    tensors |= extra or {}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    document = {"peft_type": "VERA", "r": r, "projection_prng_key": key, "save_projection": save_projection}
    document |= {"target_modules": sorted({name.split(".")[-1] for name in shapes}), **(config or {})}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a model folder, read by safetensors."""
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def exact_delta(adapter: Path, module: str) -> np.ndarray:
    """(out, in): lambda_b * B @ (lambda_d * A) in float64, for an adapter with stored projections."""
    tensors = {
        name: value.astype(np.float64) for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    lambda_b = tensors[f"base_model.model.{module}.vera_lambda_b"]
    lambda_d = tensors[f"base_model.model.{module}.vera_lambda_d"]
    vera_B = tensors["base_model.vera_B"][: lambda_b.size]
    return (lambda_b[:, None] * vera_B) @ (lambda_d[:, None] * tensors["base_model.vera_A"])


def rounded_once(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 to `dtype`, to nearest even, by integers alone for bfloat16: another way than the code under test."""
    if dtype != "bfloat16":
        return values.astype(np_dtype(dtype))
    _, exponent = np.frexp(values)  # 2**(exponent - 1) <= |value| < 2**exponent
    shift = np.maximum(exponent - 8, -133)  # 8 significant bits, fewer below 2**-126
    return np.ldexp(np.rint(np.ldexp(values, -shift)), shift).astype(np.float32).astype(np_dtype(dtype))
