"""Parameters that are one tensor with others, and what a merge makes of them.

A file holds such a tensor once. An adapter that changes one of its uses needs it several times from then on: every use
is written as a tensor of its own, under the name that the class loads it by, and config.json no longer ties them.
transformers ties no two tensors that are both in the file with other values, so that classes which cannot be untied by
their configuration (T5 and its kin) load right too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vera_tools.architectures import data
from vera_tools.architectures.architecture import Architecture
from vera_tools.architectures.layout import Layout
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.names import INPUT_EMBEDDINGS, OUTPUT_LAYERS, module_of
from vera_tools.checkpoints.placement import Placement, known_under, own_class
from vera_tools.errors import CheckFailedError
from vera_tools.merging.arithmetic import BLOCK
from vera_tools.merging.changes import Change, Replacement

#: Model types whose outputs are scaled where tie_word_embeddings is true, so that it must stay.
SCALED = ("switch_transformers",)


@dataclass(frozen=True)
class Untying:
    """What becomes of tied parameters.

    Attributes:
        changes: The changes, by parameter; what changes a tensor in place changes all that are one with it.
        added: Tensors that the result holds beside the base's: by their new names, the parameter of the class that
            they are ("" where only another class has it), and the base's tensor whose values they start from.
        config: config.json without ties; None where it stays as it is.
    """

    changes: dict[str, Change]
    added: dict[str, tuple[str, str]] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def untying(placement: Placement, changes: Mapping[str, Change]) -> Untying:
    """What changing parameters means for those that are one tensor with them.

    Raises:
        CheckFailedError: they cannot be told apart on loading, or nothing says what is tied.
    """
    known, base, layout = placement.architecture, placement.base, placement.layout
    if not known.is_known or not base.config:
        by_names = _untying_by_names(placement, changes)
        if not known.is_known:
            return by_names
    result, copies = dict(changes), dict[str, str]()
    groups = [_Group.of(layout, group, base) for group in layout.tied if any(name in result for name in group)]
    for group in (*groups, *_by_patterns(placement, changes, groups)):
        touched = [name for name in group.members if name in result]
        if touched:
            _share_in_place(group, touched, result, base)
        if not touched or len({id(result.get(name)) for name in group.members}) == 1:
            continue
        if known.fixed(group.members):
            raise CheckFailedError(
                "the class holds one tensor under several names, and the adapter changes one of them",
                where=f"{base.label}: {touched[0]}",
                found=" and ".join(group.members),
                hint="no file can say that: load the adapter with PEFT",
            )
        # An empty entry: its own tensor is there already.
        copies |= {name: "" if layout.gives(name) else group.holder for name in group.members}
    added = {
        _new_name(layout, name, base): (name, _tensor_of(layout, old, base)) for name, old in copies.items() if old
    }
    if not copies:
        return Untying(result)
    config = _untied_config(base, known)
    for other in (known, own_class(base)) if config is not None else ():
        if other is not None:
            for new, (name, tensor) in _vanished(base, other, config or {}).items():
                added.setdefault(new, (name if other is known else "", tensor))
    return Untying(result, added, config)


def _share_in_place(group: _Group, touched: list[str], result: dict[str, Change], base: BaseModel) -> None:
    """What is saved from one tensor in memory is the same under all its names, and the file has it under any of them.

    Raises:
        CheckFailedError: the adapter holds it with several values, or a product is added to it.
    """
    saved = [change for name in touched if isinstance(change := result[name], Replacement) and not change.alone]
    if not saved:
        return
    digests = {change.adapter.checkpoint.weights.sha256(change.tensor.name) for change in saved}
    if len(digests) > 1 or any(isinstance(result[name], tuple) for name in touched):
        raise CheckFailedError(
            "the adapter holds several values of what is one tensor in the base",
            where=f"{base.label}: {group.holder}",
            found=" and ".join(touched),
            hint="untie the base before it is adapted",
        )
    for name in group.members:
        found = result.get(name)
        if found is None or (isinstance(found, Replacement) and not found.alone):
            result[name] = saved[0]


@dataclass(frozen=True)
class _Group:
    """Parameters that are one tensor in memory, and the one that the files hold it under."""

    members: tuple[str, ...]
    holder: str

    @classmethod
    def of(cls, layout: Layout, names: tuple[str, ...], base: BaseModel) -> _Group:
        given = [name for name in names if layout.gives(name)]
        if not given:
            return cls((), "")
        # Both are there with other values: transformers does not tie them.
        apart = {name for name in given[1:] if not _are_equal(layout, given[0], name, base)}
        return cls(tuple(name for name in names if name not in apart), given[0])


def _by_patterns(placement: Placement, changes: Mapping[str, Change], groups: list[_Group]) -> list[_Group]:
    """Groups of changed parameters that only their own names bring to light: ties by patterns."""
    known = {name for group in groups for name in group.members}
    found = []
    for name in changes:
        if name in known or placement.layout.gives(name):
            continue
        holder = placement.holder(name)
        if holder is not None:
            names = next((group for group in placement.architecture.tied((name, holder)) if name in group), ())
            members = tuple(dict.fromkeys((*names, holder, name)))
            found.append(_Group(members, holder))
            known |= set(members)
    return found


def _tensor_of(layout: Layout, parameter: str, base: BaseModel) -> str:
    """The tensor that a parameter is.

    Raises:
        CheckFailedError: it is a part of one, or several.
    """
    pieces = layout.pieces(parameter)
    if len(pieces) == 1 and pieces[0].is_whole:
        return pieces[0].key
    raise CheckFailedError(
        "a tied parameter is no tensor of its own", where=f"{base.label}: {parameter}", hint="merge with PEFT"
    )


def _new_name(layout: Layout, parameter: str, base: BaseModel) -> str:
    name = layout.key_for(parameter)
    if name is None:
        raise CheckFailedError(
            "no name in a file leads to this parameter alone",
            where=f"{base.label}: {parameter}",
            hint="load the adapter with PEFT",
        )
    return name


def _are_equal(layout: Layout, one: str, other: str, base: BaseModel) -> bool:
    """Whether the files hold two parameters with the same values."""
    (first,), (second,) = layout.pieces(one), layout.pieces(other)
    (a, x), (b, y) = base.tensors[first.key], base.tensors[second.key]
    if x.shape != y.shape or first.transposed != second.transposed:
        return False
    for start in range(0, x.size, BLOCK):
        stop = min(start + BLOCK, x.size)
        ours, theirs = base.files[a].read_elements(x, start, stop), base.files[b].read_elements(y, start, stop)
        if not np.array_equal(ours.astype(np.float64), theirs.astype(np.float64)):
            return False
    return True


def _untied_config(base: BaseModel, known: Architecture) -> dict[str, Any] | None:
    if not known.switches or known.model_type in SCALED or not base.config:
        return None
    return data.untied(base.config, known.switches)


def _vanished(base: BaseModel, known: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Parameters that a class takes from others under the base's config.json, and reads from the file under `config`.

    By the name that they need in the file: their own, and the tensor that holds them now.
    """
    layout, free = base.layout(known), known_under(config, known.name)
    found = {}
    for group in layout.tied:
        tied = _Group.of(layout, group, base)
        for name in tied.members:
            if not layout.gives(name) and (free is None or free.tied_to(name) is None):
                found[_new_name(layout, name, base)] = (name, _tensor_of(layout, tied.holder, base))
    return found


def _untying_by_names(placement: Placement, changes: Mapping[str, Change]) -> Untying:
    """What files and config.json alone prove, of a class that is not known or whose config.json is not there."""
    base, names = placement.base, (*INPUT_EMBEDDINGS, *OUTPUT_LAYERS)
    touched = [name for name in changes if module_of(name) in names]
    if not touched or base.config.get("tie_word_embeddings") is False:
        return Untying(dict(changes))
    both = [any(module_of(tensor) in kind for tensor in base.tensors) for kind in (INPUT_EMBEDDINGS, OUTPUT_LAYERS)]
    if not all(both):
        known = placement.architecture
        name = known.name or "a class that config.json does not name"
        hint = "install the transformers that has the class beside vera-tools, or merge with PEFT"
        raise CheckFailedError(
            f"{f'nothing is known of {name}' if base.config else 'no config.json is there'}, so nothing says what is "
            "one tensor with this",
            where=f"{base.label}: {touched[0]}",
            expected="a class of transformers, or a base that holds both its embedding and its output layer",
            hint=hint if base.config else "copy the base's config.json beside its weights",
        )
    return Untying(dict(changes), config={**base.config, "tie_word_embeddings": False} if base.config else None)
