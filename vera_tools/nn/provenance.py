"""How it is known that the pair in a live PEFT model is the one that its adapter was trained with.

A pair in memory proves something where the adapter was made in this process: whatever it is, the vectors were trained
with it. It proves nothing where the vectors came from elsewhere and the pair was drawn for them. PEFT leaves no trace
of which it was, so it is watched from the import of this module on, by what torch offers for that: a hook tells when
PEFT's model gets its projections, and one on that model tells of every `load_state_dict`.

- Nothing was loaded: `live`.
- A checkpoint was loaded by PEFT's own loader: the origin is that of the checkpoint's pair, provided that the pair in
  memory is that one; `assumed` where the checkpoint is seed-only and records nothing, or has a stale manifest.
- A state dict was loaded that held the pair too: `stored`; one without it: `assumed`.
- The adapter was there before this module: `live` while its vectors are still untrained, else `assumed`.

Vectors that are written by hand, element by element, are taken for training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Origin, ProjectionRecord
from vera_tools.errors import CheckFailedError
from vera_tools.files import opening
from vera_tools.nn import live
from vera_tools.nn.live import LiveAdapter
from vera_tools.nn.projection import described, is_recorded, same_bits
from vera_tools.projections.pair import PROJECTIONS

#: Where a tuner keeps its `Source` by adapter; in its __dict__, so that copies of the model take it along.
_SOURCES = "_vera_tools_sources"


@dataclass(frozen=True)
class Source:
    """Where an adapter's vectors came from, and what is known there of their pair.

    Attributes:
        label: What was loaded, for messages.
        record: The pair that goes with the vectors; None where nothing says which.
        why: What is missing, where the record is None.
        reference: A checkpoint on the Hub, to be looked at when it is asked for.
    """

    label: str
    record: ProjectionRecord | None = None
    why: str = ""
    reference: str | None = None


_UNSEEN = Source(
    "an adapter that was there before vera_tools.nn.peft was imported",
    why="nobody saw whether it was made here or loaded: import vera_tools.nn.peft before the adapter is made",
)


def watch(model: nn.Module) -> None:
    """Watch an adapted model from now on; nothing happens where it is watched already, or PEFT's model is not there."""
    tuner = live.tuner_of(model)
    if tuner is not None and _SOURCES not in tuner.__dict__:
        names = live.adapter_names(tuner)
        _begin(tuner, {name: _UNSEEN for name in names if not live.find(tuner, name).untouched})


def loaded(adapter: LiveAdapter, label: str, record: ProjectionRecord) -> None:
    """Remember that an adapter was loaded from a checkpoint, and which pair was put into it."""
    if adapter.tuner is not None:
        watch(adapter.tuner)
        adapter.tuner.__dict__[_SOURCES][adapter.name] = Source(label, record)


def origin_of(adapter: LiveAdapter, pair: tuple[Tensor, Tensor], *, stored: bool) -> tuple[Origin, str]:
    """How an adapter's pair is known, and where it is only assumed, why.

    Args:
        adapter: The adapter.
        pair: Its pair.
        stored: Whether the pair is written into the checkpoint too.

    Raises:
        CheckFailedError: the adapter was loaded from a checkpoint, and this is not the pair that it was trained with.
    """
    late = {} if adapter.untouched else {adapter.name: _UNSEEN}
    sources: dict[str, Source] = getattr(adapter.tuner, "__dict__", {}).get(_SOURCES, late)
    source = sources.get(adapter.name)
    if source is None:
        return "live", ""
    if source.reference is not None:
        source = sources[adapter.name] = _look_at(source.reference)
    if source.record is None:
        whole = stored and source is _UNSEEN and adapter.persistent
        return ("stored", "") if whole else ("assumed", f"{source.label}: {source.why}")
    origin = source.record.origin
    if not is_recorded(pair, source.record):
        if source.record.assumed:
            return "assumed", f"{source.label}: it records another pair, and that one is {origin} itself"
        raise CheckFailedError(
            f"the projections of the adapter {adapter.name!r} are not those that it was trained with",
            where=source.label,
            hint="PEFT drew others when it loaded the checkpoint: put the right ones in, before training on, with "
            "vera_tools.nn.peft.restore_projections(model, checkpoint)",
        )
    return origin, f"{source.label}: that is what it says of its own pair" if source.record.assumed else ""


def _begin(tuner: nn.Module, sources: dict[str, Source]) -> None:
    tuner.__dict__[_SOURCES] = sources
    register: Any = tuner._register_load_state_dict_pre_hook  # its public name is younger than torch 2.4
    register(_on_load, with_module=True)


def _on_module(module: nn.Module, name: str, child: object) -> None:
    """A hook on every module that becomes another's: PEFT's `VeraModel` gets its vera_A before any layer is made."""
    if name == "vera_A" and live.is_tuner(module) and _SOURCES not in module.__dict__:
        _begin(module, {})


register_module_module_registration_hook(_on_module)


def _on_load(tuner: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """A hook on PEFT's `VeraModel`, before a state dict is loaded into it or into a module around it."""
    sources: dict[str, Source] = tuner.__dict__[_SOURCES]
    for name in live.adapter_names(tuner):
        vectors = [value for key, value in state_dict.items() if key.endswith(f".vera_lambda_b.{name}")]
        # A new adapter's vectors are 0: FSDP loads these back into a model that it has sharded.
        if any(isinstance(vector, Tensor) and live.has_values(vector) for vector in vectors):
            pair = [state_dict.get(f"{prefix}{projection}.{name}") for projection in PROJECTIONS]
            source = _source(tuner, name, sources.get(name), pair)
            if source is None:
                sources.pop(name, None)
            else:
                sources[name] = source


def _source(tuner: Any, name: str, before: Source | None, pair: list[Any]) -> Source | None:
    reference = _peft_loads()
    if reference is not None:
        if opening.is_on_hub(reference):
            return Source(reference, reference=reference)
        return _look_at(reference)
    if not all(isinstance(tensor, Tensor) for tensor in pair):
        return Source("a state dict", why="its vectors were loaded without the projections that they were trained with")
    now = [tuner.vera_A[name], tuner.vera_B[name]]
    if before is None and all(same_bits(a.cpu(), b.cpu()) for a, b in zip(pair, now, strict=True)):
        return None  # made here, saved and loaded again with the pair itself
    return Source("a state dict", described((pair[0].detach(), pair[1].detach()), "stored"))


def _peft_loads() -> str | None:
    """The checkpoint that PEFT is loading at this moment.

    Its loader hands on the tensors and not their place, so the place is read from the loader's own variables.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "load_adapter" and frame.f_globals.get("__name__") == "peft.peft_model":
            given = frame.f_locals
            options = given.get("hf_hub_download_kwargs") or {}
            path, subfolder = str(os.fspath(given["model_id"])), options.get("subfolder")
            if os.path.isdir(path):
                return os.path.join(path, subfolder) if subfolder else path
            revision = options.get("revision")
            return f"hf://{path}" + (f"@{revision}" if revision else "") + (f"/{subfolder}" if subfolder else "")
        frame = frame.f_back
    return None


def _look_at(reference: str) -> Source:
    """What a checkpoint says of its own pair."""
    try:
        with Checkpoint.open(reference, allow_pickle=True) as checkpoint:
            return Source(reference, *_recorded(checkpoint))
    except Exception as error:  # loading goes on, whatever the matter is with what lies beside the weights
        return Source(reference, why=f"its record cannot be read: {error}")


def _recorded(checkpoint: Checkpoint) -> tuple[ProjectionRecord | None, str]:
    shape = checkpoint.pair_shape()
    if len(checkpoint.projections) == 2 and shape is not None:
        sha256 = {name: checkpoint.weights.sha256(ROOT + name) for name in PROJECTIONS}
        dtype = checkpoint.projections["vera_A"].dtype
        return ProjectionRecord(None, checkpoint.origin_of(sha256), shape, dtype, sha256), ""
    record, manifest = checkpoint.recorded, checkpoint.manifest
    if checkpoint.manifest_error is not None:
        return None, f"its {MANIFEST_NAME} cannot be used: {checkpoint.manifest_error}"
    if record is None:
        return None, "it is seed-only, and nothing records which projections it was trained with"
    if manifest is not None and any(
        name not in manifest.tensors or manifest.tensors[name].sha256 != checkpoint.weights.sha256(name)
        for name in checkpoint.vector_infos
    ):
        return None, f"its {MANIFEST_NAME} is that of other vectors: it was saved again since"
    return replace(record, recipe=None), ""
