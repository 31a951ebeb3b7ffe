"""Base models made for tests: of any names, shapes and dtype, in one file or in many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from vera_tools.architectures.architecture import Architecture
from vera_tools.checkpoints.base import BaseModel, Renaming, find_renaming
from vera_tools.checkpoints.placement import Placement
from vera_tools.dtypes import np_dtype

INDEX = "model.safetensors.index.json"


def make_base(
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    *,
    dtype: str = "float32",
    config: str | dict[str, Any] | None = None,
) -> Path:
    """A base of zeros in one file; its config as text or as what it says."""
    folder.mkdir(exist_ok=True)
    tensors = {name: np.zeros(shape, np_dtype(dtype)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def renaming_of(base: BaseModel, modules: list[str]) -> Renaming:
    """How these modules' names become the base's."""
    return find_renaming(modules, base.tensors, where=base.label)


def by_names(base: BaseModel, renaming: Renaming | None = None, *, fan_in_fan_out: bool = False) -> Placement:
    """What names mean in a base of whose class nothing is known."""
    known = Architecture.unnamed(base.shapes)
    return Placement(base, base.layout(known), renaming or Renaming(), fan_in_fan_out)


def shard(source: Path, target: Path, *, index: bool) -> Path:
    """The same base in three files, as transformers writes a large one."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    weight_map = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, target / file, {"format": "pt"})
    if index:
        (target / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return target
