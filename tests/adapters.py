"""The adapters in fixtures/: their names and parts, and what tests do to copies of them.

Tensors are read and written by the safetensors library, so that what our own reader is given comes from another hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests import FIXTURES
from vera_tools.files import canonical_json
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

CHECKPOINTS = FIXTURES / "checkpoints"

#: Every adapter in fixtures/checkpoints; those with stored projections; those without.
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if not path.name.endswith("-base"))
KEPT_NAMES = [name for name in NAMES if "kept" in name]
SEED_ONLY_NAMES = [name for name in NAMES if "seedonly" in name]

#: Those that most tests take.
KEPT = "peft-0.21.2-llama-f32-kept"
SEED_ONLY = "peft-0.21.2-llama-f32-seedonly"
BERT = "peft-0.21.2-bert-seqcls-kept"
GPT2 = "peft-0.21.2-gpt2-conv1d-kept"

#: The two files that make an adapter; the pickle that older releases of PEFT wrote; what vera-tools puts beside them.
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLE = "adapter_model.bin"
MANIFEST = "vera_manifest.json"

#: The stored projections' names.
PAIR = ("base_model.vera_A", "base_model.vera_B")


def base_of(name: str) -> Path:
    """The base model that an adapter in fixtures/ was trained on."""
    return CHECKPOINTS / f"{name}-base"


def files_of(folder: Path | str, prefix: str = "") -> dict[str, bytes]:
    """Every file below `folder`: its path, after `prefix`, and its content."""
    root = Path(folder)
    return {prefix + path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """An adapter's tensors, by name."""
    return load_file(folder / WEIGHTS)


def edit(
    folder: Path,
    change: Callable[[dict[str, np.ndarray]], object],
    *,
    file: str = WEIGHTS,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a file's tensors again: `change` gets them by name, and may replace, add and remove.

    The file's own metadata stays unless other is given; its layout is the library's.
    """
    with safe_open(folder / file, "np") as opened:
        own = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, own if metadata is None else metadata)


def drop_pair(folder: Path) -> None:
    """Take the stored projections out: what is left is what PEFT writes with save_projection=False."""
    edit(folder, lambda tensors: [tensors.pop(name) for name in PAIR])


def replace_pair(folder: Path, recipe: Recipe) -> None:
    """Store what `recipe` makes in the place of the stored projections."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        (r, in_max), (out_max, _) = (tensors[name].shape for name in PAIR)
        tensors.update(zip(PAIR, generate(recipe, PairShape(r, in_max, out_max)), strict=True))

    edit(folder, change)


def put_pickle(folder: Path) -> Path:
    """Put a pickle, as older releases of PEFT wrote it, in the place of the safetensors file; its path."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in tensors_of(folder).items()}
    torch.save(tensors, folder / PICKLE)
    (folder / WEIGHTS).unlink()
    return folder / PICKLE


def flip(path: Path, position: int) -> None:
    """Change the lowest bit of one byte of a file; a negative position counts from the end."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a JSON file again: `change` gets the document and may alter it."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write an adapter's manifest again, as `edit_json` does, with the digest that it then has, if it has one."""

    def change_and_digest(document: dict[str, Any]) -> None:
        change(document)
        if document.pop("digest", None):
            document["digest"] = canonical_json.sha256(document)

    edit_json(folder / MANIFEST, change_and_digest)


def take_as_live(folder: Path) -> None:
    """Say in an adapter's manifest what the process that trained it would say: the recipe is that of its own pair."""
    edit_manifest(folder, lambda manifest: manifest.update(assumed=False, origin="live"))


def config_of(folder: Path) -> dict[str, Any]:
    """An adapter's config, as the file has it."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def set_config(folder: Path, **keys: object) -> None:
    """Set keys of an adapter's config."""
    edit_json(folder / CONFIG, lambda config: config.update(keys))
