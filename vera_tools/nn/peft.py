"""For people who stay with PEFT: record adapters where they are trained, and load them with the pair of then.

`save` is ``model.save_pretrained`` with a manifest made from the projections in memory, so that the adapter can be
proven from its first save, also where ``save_projection`` is off. Import this module before the adapter is made:
`vera_tools.nn.provenance` says why. ::

    model = get_peft_model(base, VeraConfig(...))
    ...
    save(model, folder)

PEFT before 0.21 draws the projections again when it loads a checkpoint, even where they are stored, and every PEFT
draws those that are not stored as this machine's torch does, rounded through this base's dtype: Windows and Linux draw
others from one key (docs/projections.md). So load as ever, then restore::

    model = PeftModel.from_pretrained(base, checkpoint)
    print(restore_projections(model, checkpoint))

or both in one line, PEFT's class being handed in because nothing here imports PEFT::

    model = load(PeftModel, base, checkpoint)
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from vera_tools.checkpoints import peft_arguments
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import UsageError
from vera_tools.files import opening
from vera_tools.nn import live, provenance
from vera_tools.nn.io import projections
from vera_tools.nn.projection import dtype_name, holds, to_array, to_tensor
from vera_tools.nn.recording import record, save
from vera_tools.platforms import rows
from vera_tools.platforms.machine import this_platform
from vera_tools.platforms.names import PLATFORMS
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.recorded import refuse_changed
from vera_tools.verifying.refusals import refuse_no_floats

__all__ = ["Change", "PeftClass", "RestoreReport", "load", "record", "restore_projections", "save"]


@dataclass(frozen=True)
class Change:
    """What one projection was before it was restored.

    Attributes:
        shape: Its shape.
        dtype: The dtype the model holds it in now.
        differing: How many of its elements had other values.
        max_abs: Largest absolute difference.
    """

    shape: tuple[int, ...]
    dtype: str
    differing: int
    max_abs: float


@dataclass(frozen=True)
class RestoreReport:
    """What `restore_projections` found and did.

    Attributes:
        adapter_name: The adapter.
        origin: How the right projections are known: "stored" in the checkpoint; "recorded", then regenerated and
            proven; or "assumed".
        recipe: What makes them, or None where no known recipe does.
        projections: What was changed, for "vera_A" and "vera_B".
        layers: Number of layers that use them.
        widened: The adapter's vectors were half-precision and became float32, because PEFT computes in their dtype and
            would have rounded the projections to it.
    """

    adapter_name: str
    origin: Literal["stored", "recorded", "assumed"]
    recipe: Recipe | None
    projections: dict[str, Change]
    layers: int
    widened: bool

    @property
    def changed(self) -> bool:
        """Whether any value of the projections was wrong."""
        return any(change.differing for change in self.projections.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "adapter_name": self.adapter_name,
            "origin": self.origin,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "changed": self.changed,
            "projections": {name: vars(change) for name, change in self.projections.items()},
            "layers": self.layers,
            "widened": self.widened,
        }

    def __str__(self) -> str:
        made_by = self.recipe.name if self.recipe else "no known recipe"
        lines = [f"adapter {self.adapter_name}: projections {self.origin} ({made_by}), used by {self.layers} layers"]
        for name, change in self.projections.items():
            size = int(np.prod(change.shape))
            restored = f"restored {change.differing} of {size} elements, off by at most {change.max_abs:.3g}"
            what = restored if change.differing else "was right already"
            lines.append(f"  {name} {list(change.shape)} {change.dtype}: {what}")
        if self.changed and self.recipe is not None and (why := _drawn_elsewhere(self.recipe)):
            lines.append(f"  {why}")
        if self.widened:
            lines.append("  the vectors became float32, so that PEFT does not compute with rounded projections")
        return "\n".join(lines)


def restore_projections(
    peft_model: nn.Module,
    checkpoint: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    strict: bool = False,
) -> RestoreReport:
    """Put the projections that a checkpoint was trained with into a PEFT model that was loaded from it.

    Stored ones are taken as they are; absent ones are regenerated by the reference under the recorded recipe, and
    checked against the recorded digests. All layers share one pair again afterwards.

    Args:
        peft_model: A ``PeftModel``, or any model with PEFT's VeRA layers (0.11 and later).
        checkpoint: What it was loaded from: a folder, a file, or ``hf://...``.
        adapter_name: The adapter's name in the model.
        strict: Refuse what can only be assumed, and what was assumed or stated when it was recorded.

    Raises:
        UsageError: the model has no VeRA adapter of that name, or it is merged.
        CheckFailedError: the checkpoint's projections do not fit the model, or it is not what its manifest records.
        UnprovenError: `strict`, and nothing records which recipe made the projections.
        FormatError: the checkpoint is unreadable, malformed, or not VeRA.
    """
    adapter = live.find(peft_model, adapter_name)
    layers = list(adapter.layers.values())
    if any(adapter_name in getattr(layer, "merged_adapters", ()) for layer in layers):
        raise UsageError(
            f"the adapter {adapter_name!r} is merged: the base weights hold its projections as they were",
            hint="call unmerge_adapter() first; once the projections are restored it would subtract others",
        )
    with Checkpoint.open(checkpoint) as opened:
        refuse_changed(opened)
        refuse_no_floats(opened)
        resolved, pair = projections(opened, [layer.base_layer for layer in layers], strict=strict)
    vectors: list[Tensor] = [
        getattr(layer, which)[adapter_name] for layer in layers for which in ("vera_lambda_b", "vera_lambda_d")
    ]
    right = {name: to_tensor(values) for name, values in zip(PROJECTIONS, pair, strict=True)}
    dtype, widened = _dtype_for(right, vectors)
    if widened:
        for vector in vectors:
            vector.data = vector.data.to(dtype)
    changes = {}
    for name, values in right.items():
        held = [getattr(layer, name) for layer in layers]
        changes[name] = _change(held[0][adapter_name], values, dtype)
        restored = values.to(device=held[0][adapter_name].device, dtype=dtype)
        for buffers in {id(buffers): buffers for buffers in held}.values():
            buffers[adapter_name] = restored
    provenance.loaded(adapter, os.fspath(checkpoint), resolved.record)
    return RestoreReport(adapter_name, resolved.origin, resolved.record.recipe, changes, len(layers), widened)


class PeftClass(Protocol):
    """``PeftModel`` or one of its subclasses."""

    def from_pretrained(self, model: Any, model_id: Any, adapter_name: str = ..., **kwargs: Any) -> Any:
        """PEFT's loader."""


def load(
    peft_class: PeftClass,
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    strict: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint with PEFT and restore its projections.

    Args:
        peft_class: ``peft.PeftModel`` or a subclass.
        model: The base model.
        checkpoint: The checkpoint's folder, or ``hf://owner/name[@revision][/subfolder]``.
        adapter_name: The adapter's name.
        strict: Refuse what can only be assumed, and what was assumed or stated when it was recorded.
        revision: A branch, tag or commit, where `checkpoint` is on the Hub and names none.
        subfolder: A folder below `checkpoint`.
        **kwargs: As ``peft_class.from_pretrained`` takes them.

    Returns:
        The PEFT model, with the projections that it was trained with.

    Raises:
        UsageError: the class makes the base model itself, as PEFT's Auto classes do.
        As `restore_projections`, and whatever PEFT raises.
    """
    if "model_id" not in inspect.signature(peft_class.from_pretrained).parameters:
        raise UsageError(
            "this class does not put an adapter on a base model that it is given",
            expected="peft.PeftModel or a subclass",
            found=getattr(peft_class, "__name__", repr(peft_class)),
            hint="load with it as ever, then call restore_projections(model, checkpoint)",
        )
    checkpoint = peft_arguments.located(checkpoint, revision=revision, subfolder=subfolder)
    with warnings.catch_warnings():
        # PEFT warns that regenerated projections may be wrong; in a moment they will not be.
        warnings.filterwarnings("ignore", message="Specified to not (load|save) vera_A and vera_B")
        kwargs |= _as_peft_takes_it(checkpoint)
        peft_model = peft_class.from_pretrained(model, adapter_name=adapter_name, **kwargs)
    restore_projections(peft_model, checkpoint, adapter_name, strict=strict)
    return peft_model


def _as_peft_takes_it(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """The arguments by which PEFT finds a checkpoint."""
    if path := opening.local_path(checkpoint):
        return {"model_id": os.fspath(path)}
    if opening.in_store(checkpoint):
        raise UsageError(
            "PEFT reads from no store", where=opening.spelled(checkpoint), hint="copy it to a folder first"
        )
    from vera_tools.files.hub_reference import Reference

    reference = Reference.parse(opening.spelled(checkpoint))
    return {
        "model_id": reference.repo,
        "revision": reference.revision,
        "subfolder": reference.subfolder or None,
    }


def _drawn_elsewhere(recipe: Recipe) -> str | None:
    """Why PEFT cannot draw this recipe here, where the platform is the reason."""
    here = this_platform()
    known = rows.drawn_by(here, torch.__version__)
    if here is None or known is None or recipe.rounding in (None, known.rounding):
        return None
    this = f"{PLATFORMS[here]} with torch {torch.__version__}"
    return f"PEFT draws such projections on {', '.join(rows.places(recipe.rounding))}, and others here: {this}"


def _dtype_for(right: Mapping[str, Tensor], vectors: list[Tensor]) -> tuple[torch.dtype, bool]:
    """The dtype to hold the projections in, which is the vectors' own unless that would round them."""
    dtype = vectors[0].dtype
    if all(holds(dtype, values) for values in right.values()):
        return dtype, False
    return torch.promote_types(dtype, torch.float32), True


def _change(before: Tensor, values: Tensor, dtype: torch.dtype) -> Change:
    if before.device.type == "meta" or before.shape != values.shape:
        return Change(tuple(values.shape), dtype_name(dtype), values.numel(), float("inf"))
    difference = to_array(before.double()) - to_array(values.double())
    return Change(
        tuple(values.shape), dtype_name(dtype), int(np.count_nonzero(difference)), float(np.abs(difference).max())
    )
