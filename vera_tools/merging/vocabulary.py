"""A vocabulary that was resized before training: the base's tables and config.json made as large as the adapter's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vera_tools.checkpoints.names import INPUT_EMBEDDINGS, OUTPUT_LAYERS, module_of
from vera_tools.checkpoints.placement import Placement, shape_of
from vera_tools.errors import CheckFailedError
from vera_tools.merging.changes import Change, Replacement

# Buffers as long as the vocabulary, beside the output layer: BART's.
_BESIDE = ("final_logits_bias",)


def resized(placement: Placement, changes: Mapping[str, Change]) -> tuple[int, int] | None:
    """The base's number of words and the adapter's; None where no table changes its size.

    Args:
        placement: Where the class's parameters lie in the base.
        changes: What becomes of them, those included that are one tensor with another.

    Raises:
        CheckFailedError: a table that the model resizes too is not in the adapter, or several sizes are.
    """
    base, sizes = placement.base, set[tuple[int, int]]()
    for name, change in changes.items():
        parts = placement.parts(name) if isinstance(change, Replacement) else ()
        if parts and isinstance(change, Replacement) and (old := shape_of(parts)) != change.tensor.shape:
            sizes.add((old[0], change.tensor.shape[0]))
    if not sizes:
        return None
    if len(sizes) > 1:
        found = " and ".join(f"{old} to {new}" for old, new in sorted(sizes))
        raise CheckFailedError("tables are resized from or to several sizes", where=base.label, found=found)
    ((old_size, new_size),) = sizes
    for name in _tables(placement, old_size):
        saved = changes.get(name)
        if not isinstance(saved, Replacement) or new_size not in saved.tensor.shape:
            raise CheckFailedError(
                "the adapter does not hold every table of the resized vocabulary",
                where=f"{base.label}: {name}",
                expected=f"a saved tensor of {new_size} rows",
                found=str(list(shape_of(placement.parts(name)))),
                hint="resize the base as it was resized for the training, with the values of then, and merge into that",
            )
    return old_size, new_size


def with_size(config: Mapping[str, Any], old: int, new: int, *, where: str) -> dict[str, Any]:
    """config.json with the new number of words wherever the old one stands as `vocab_size`.

    Raises:
        CheckFailedError: it stands nowhere.
    """
    result = copy.deepcopy(dict(config))
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    here = [part for part in parts if part.get("vocab_size") == old]
    if config and not here:
        raise CheckFailedError(
            "config.json does not say how many words there are", where=where, expected=f'"vocab_size": {old}'
        )
    for part in here:
        part["vocab_size"] = new
    return result


def _tables(placement: Placement, size: int) -> list[str]:
    """The parameters that have a row, or an element, for each word."""
    known, layout = placement.architecture, placement.layout
    modules = [module for module in (known.input_embeddings, known.output_embeddings) if module]
    names = {f"{module}.{last}" for module in modules for last in ("weight", "bias")}
    if not known.is_known:
        names = {name for name in layout.names if module_of(name) in (*INPUT_EMBEDDINGS, *OUTPUT_LAYERS)}
    names |= {name for group in layout.tied if names & set(group) for name in group}
    names |= {name for name in layout.names if name.rpartition(".")[2] in _BESIDE}
    return sorted(name for name in names if (parts := placement.parts(name)) and size in shape_of(parts))
