"""One tiny model on disk, under each of the names that transformers loads it from.

- ``saved``: as `save_pretrained` writes it, which is under the names that files on the Hub have.
- ``own``: under the names that the model's parameters have in memory.
- ``older``: as files on the Hub have it that were not written by this transformers: without the prefix of the base
  model, a layer norm's parameters as gamma and beta, and every tied parameter as a tensor of its own.

A form that is the same as one before it is left out, and so is one that transformers itself does not load whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load(model_class: Any, folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """The model in float32 as transformers loads it, and the keys that it says do not fit, by what is wrong."""
    import torch

    model, info = model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return model.eval(), {kind: keys for kind, keys in wrong.items() if keys}


def bases(model: Any, folder: Path) -> Iterator[tuple[str, Path]]:
    """Write every form of a model below `folder`; their names and where they are. The first is always ``saved``."""
    saved, own = folder / "saved", folder / "own"
    model.save_pretrained(saved)
    yield "saved", saved
    before = [_tensors(saved)]
    model.save_pretrained(own, save_original_format=False)
    if _tensors(own).keys() != before[0].keys():
        before.append(_tensors(own))
        yield "own", own
    older = _older(model, before[0])
    if all(older.keys() != other.keys() for other in before):
        yield "older", _written(older, saved, folder / "older")


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def _older(model: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """The tensors of ``saved`` under names that older files have."""
    state = model.state_dict()
    tied = {
        name: state[name].clone()
        for target, source in model.all_tied_weights_keys.items()
        for name in (target, source)
        if name in state and name not in stored and (target in stored or source in stored)
    }
    prefix = f"{model.base_model_prefix}."
    bare = {key.removeprefix(prefix): value for key, value in {**stored, **tied}.items()}
    if len(bare) != len(stored) + len(tied) or bare.keys() & {"weight", "bias"}:
        bare = {**stored, **tied}
    return {_gamma(key): value for key, value in bare.items()}


def _gamma(key: str) -> str:
    for new, old in ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")):
        if key.endswith(new):
            return key.removesuffix(new) + old
    return key


def _written(tensors: dict[str, Any], beside: Path, folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    for file in beside.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder
