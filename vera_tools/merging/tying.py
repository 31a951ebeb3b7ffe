"""Output layers that share their weight with the input embedding, and what a merge makes of them.

A file holds such a weight once. An adapter that changes one of the two uses therefore needs it twice from then on: the
result stores the output layer's own weight, and its config.json no longer says that the two are tied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.names import INPUT_EMBEDDINGS, OUTPUT_LAYERS, module_of


@dataclass(frozen=True)
class Untying:
    """Whether the result is untied, and the tensor that it then stores a second time: new name to the base's name."""

    needed: bool
    copies: dict[str, str]


def untying(base: BaseModel, changed: Iterable[str]) -> Untying:
    """What changing the tensors `changed` means for a base whose output layer may be tied."""
    names = list(changed)
    inputs = [name for name in names if module_of(name) in INPUT_EMBEDDINGS]
    outputs = [name for name in names if module_of(name) in OUTPUT_LAYERS]
    if base.config.get("tie_word_embeddings") is False or not (inputs or outputs):
        return Untying(False, {})
    if outputs:
        return Untying(True, {})
    if any(module_of(name) in OUTPUT_LAYERS for name in base.tensors):
        return Untying(base.config.get("tie_word_embeddings") is True, {})
    architectures = base.config.get("architectures") or [""]
    if not any(part in str(architectures[0]) for part in ("CausalLM", "LMHead")):
        return Untying(False, {})  # there is no output layer to look after
    return Untying(True, {f"{OUTPUT_LAYERS[0]}.weight": inputs[0]})
