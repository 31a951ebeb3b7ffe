"""Proof that a merge's result loads: what the class makes of its tensors, by their names and shapes.

Right values under a name that the class does not take, or takes for another parameter, are a wrong model. So the
planned files are replayed through the class, under the planned config.json, as the base's were: every parameter must
come from the tensor that was planned for it, nothing may be missing or unexpected that was not so in the base, and what
is still one tensor with another must have changed alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from vera_tools.architectures import data, witness
from vera_tools.architectures.architecture import Architecture
from vera_tools.architectures.layout import Layout
from vera_tools.checkpoints.placement import known_under
from vera_tools.errors import CheckFailedError, UnprovenError
from vera_tools.merging.changes import Change
from vera_tools.merging.entries import Entry, Merged, Patched, Replaced
from vera_tools.merging.plan import Plan


@dataclass(frozen=True)
class Loading:
    """What was proven of how the result loads.

    Attributes:
        model_class: The class; "" where none is known.
        known_by: What says what the class takes: data, the installed transformers, or names alone.
        parameters: Parameters that come from the tensors that were planned for them.
        asked: The transformers that built the class without memory and took every tensor; None where none was asked.
        why_not: Why none was asked.
    """

    model_class: str
    known_by: str
    parameters: int
    asked: str | None = None
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "class": self.model_class,
            "known_by": self.known_by,
            "parameters": self.parameters,
            "asked": self.asked,
            "why_not": self.why_not,
        }


def prove(plan: Plan) -> Loading:
    """Prove from headers alone that the class gets every planned tensor for the parameter that it was planned for.

    Raises:
        CheckFailedError: a parameter would be missing, come from another tensor, or share one that changed otherwise.
    """
    before, known = plan.placement.layout, plan.placement.architecture
    after = _layout(plan, known if plan.config is None else known_under(_config(plan), known.name) or known)
    _refuse_new("unexpected", set(after.unexpected) - set(before.unexpected) - _heads(plan), plan)
    names = dict.fromkeys((*before.names, *(name for group in before.tied for name in group), *plan.changes))
    entries = {entry.info.name: entry for entry in plan.entries}
    proven = 0
    for name in names:
        if before.holder(name) is None and name not in plan.changes:
            continue
        holder = after.holder(name)
        if holder is None:
            if name in plan.changes and not known.stores(name):
                continue  # a head that the class lacks, of which a note says what to set
            raise CheckFailedError(
                "the result would lack a parameter", where=f"{plan.base.label}: {name}", hint=_REPORT
            )
        # The same parameter, or one that is one tensor with it and changes alike.
        alike = plan.changes.get(holder) is plan.changes.get(name)
        if not alike or not all(_is_planned(name, piece.key, entries, plan) for piece in after.pieces(holder)):
            raise CheckFailedError(
                "the class would load another tensor than was planned",
                where=f"{plan.base.label}: {name}",
                found=", ".join(piece.key for piece in after.pieces(holder)),
                hint=_REPORT,
            )
        proven += 1
    return Loading(known.name, known.origin, proven)


def ask(plan: Plan, proven: Loading) -> Loading:
    """Have the installed transformers build the class, and ask it whether it takes the result as it is.

    Raises:
        CheckFailedError: a parameter is missing, a tensor unexpected, or of another shape, that was not so in the base.
    """
    known = plan.placement.architecture
    name = known.name or (data.class_for(plan.base.config) or "")
    if not name or not witness.is_there():
        why = "the class is not known" if not name else "no transformers is installed"
        return Loading(proven.model_class, proven.known_by, proven.parameters, why_not=why)
    try:
        asked = witness.ask_transformers(_config(plan), name)
    except UnprovenError as error:
        return Loading(proven.model_class, proven.known_by, proven.parameters, why_not=str(error))
    before, after = Layout(asked, plan.base.shapes), _layout(plan, asked)
    _refuse_new("unexpected", set(after.unexpected) - set(before.unexpected) - _heads(plan), plan)
    _refuse_new("missing", set(after.missing or ()) - set(before.missing or ()), plan)
    shapes = asked.parameters or {}
    for parameter in after.names:
        pieces = after.pieces(parameter)
        if len(pieces) == 1 and pieces[0].is_whole and parameter in shapes:
            found, expected = after.shapes[pieces[0].key], shapes[parameter]
            if found != expected and plan.base.shapes.get(pieces[0].key) != found:
                raise CheckFailedError(
                    f"{asked.origin} loads no tensor of this shape",
                    where=f"{plan.base.label}: {parameter}",
                    expected=str(list(expected)),
                    found=str(list(found)),
                )
    return Loading(proven.model_class, proven.known_by, proven.parameters, asked=asked.origin)


_REPORT = "this is a fault of vera-tools: report it with the base's name, and merge with PEFT until then"


def _config(plan: Plan) -> dict[str, Any]:
    config: dict[str, Any] = plan.base.config if plan.config is None else json.loads(plan.config)
    return config


def _layout(plan: Plan, known: Architecture) -> Layout:
    """The result's tensors as a class loads them."""
    shapes = {entry.info.name: entry.info.shape for entry in plan.entries}
    if not known.is_known:
        return Layout(Architecture.unnamed(shapes, name=known.name), shapes)
    return Layout(known, shapes)


def _heads(plan: Plan) -> set[str]:
    """Added tensors that the class has no parameter for: a note says what to set in config.json."""
    return {
        entry.info.name
        for entry in plan.entries
        if isinstance(entry, Replaced) and entry.origin is None
        if not plan.placement.architecture.stores(entry.info.name)
    }


def _refuse_new(what: str, names: set[str], plan: Plan) -> None:
    if names:
        raise CheckFailedError(
            f"the class would find {len(names)} tensors {what}",
            where=plan.base.label,
            found=", ".join(sorted(names)[:3]),
            hint=_REPORT,
        )


def _is_planned(name: str, key: str, entries: dict[str, Entry], plan: Plan) -> bool:
    """Whether a tensor of the result is what a parameter was planned to be made of."""
    entry, change = entries[key], plan.changes.get(name)
    if not _brings(entry, change):
        return False
    if entry.origin is None:
        return isinstance(change, tuple) or change is not None
    placement = plan.placement
    holder = placement.layout.holder(name)
    return holder is not None and entry.origin.info.name in {piece.key for piece in placement.layout.pieces(holder)}


def _brings(entry: Entry, change: Change | None) -> bool:
    """Whether an entry holds a change, or where there is none, none of the same parameter's."""
    if isinstance(change, tuple):
        return isinstance(entry, Merged) and any(product in entry.products for product in change)
    if change is not None:
        saved = [entry.saved] if isinstance(entry, Replaced) else []
        saved += [replacement for replacement, _ in entry.patches] if isinstance(entry, Patched) else []
        return any(replacement is change for replacement in saved)
    return not isinstance(entry, Replaced)
