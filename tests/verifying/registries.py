"""Registries for tests: sound adapters, and one of each other fate."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from tests.adapters import CHECKPOINTS, CONFIG, PAIR, WEIGHTS, edit


def mixed(root: Path, adapters: Iterable[tuple[str, str]], *, drift: str, cut: str, other: str | None = None) -> Path:
    """Fill a folder with adapters.

    Args:
        root: The folder.
        adapters: Each one's name, and the fixture that it is a copy of. Where one lies in another, the inner one first.
        drift: The one whose pair no key gives.
        cut: The one whose weights are an empty file.
        other: The name of a LoRA.
    """
    for name, source in adapters:
        shutil.copytree(CHECKPOINTS / source, root / name, dirs_exist_ok=True)
    edit(root / drift, lambda tensors: tensors[PAIR[0]].__setitem__((1, 3), 0.5))
    (root / cut / WEIGHTS).write_bytes(b"")
    if other:
        (root / other).mkdir()
        (root / other / CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
    return root
