"""Whether PEFT takes a checkpoint at all: the checks of its config and of its tensors' names, and what loaders do.

A name that PEFT does not look for is dropped in silence, or with a warning about missing keys, and the model then
computes without that tensor. So what is said here also decides the loader table's rows of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.default_targets import DEFAULT_TARGETS, since
from vera_tools.checkpoints.keys import DEFAULT
from vera_tools.checkpoints.resolution import stale
from vera_tools.verifying.checks import some
from vera_tools.verifying.findings import Check
from vera_tools.verifying.loads import OLD_PEFT, PEFT, VERA_TOOLS

_REMEDY = "`vera-tools convert --from auto` writes what PEFT reads"


def accepted(checkpoint: Checkpoint, base: BaseModel | None = None) -> Iterator[Check]:
    """The checks `config.peft`, `tensors.names` and, where target_modules is null, `config.target_modules`."""
    yield _config(checkpoint)
    if checkpoint.config.target_modules is None:
        yield _targets(base)
    yield _names(checkpoint)


def obstacles(checkpoint: Checkpoint, base: BaseModel | None = None) -> dict[str, str]:
    """What keeps a loader from computing with this adapter, whatever its projections are; by loader.

    Args:
        checkpoint: The adapter.
        base: Its base, where it is at hand, for what a config without target_modules means.

    Raises:
        FormatError: a regular expression takes too long.
    """
    found: dict[str, str] = {}
    reading = checkpoint.reading
    if checkpoint.config.target_modules is None and (found_type := base.model_type if base else None):
        if found_type not in DEFAULT_TARGETS:
            found[OLD_PEFT] = found[PEFT] = f"refuses it: {_no_default(found_type)}"
        elif first := since(found_type):
            found[OLD_PEFT] = (
                f"refuses it before {first}: target_modules is null, and it had no default for {found_type}"
            )
    found |= dropped(checkpoint, base)
    if odd := checkpoint.keys.odd:
        found[OLD_PEFT] = f"does not know {_count(len(odd), 'name')}, {odd[0].found} for one"
        if not checkpoint.keys.taken_by_peft_21():
            found[PEFT] = found[OLD_PEFT]
    if reading.refused:
        found[OLD_PEFT] = found[PEFT] = f"refuses the config: {reading.refused[0]}"
    elif reading.refused_before_21:
        found[OLD_PEFT] = f"refuses the config: {reading.refused_before_21[0]}"
    return found


def dropped(checkpoint: Checkpoint, base: BaseModel | None = None) -> dict[str, str]:
    """Those of the obstacles that writing the checkpoint anew, with PEFT's names and values, does not remove."""
    if outside := checkpoint.unadapted(base):
        why = f"drops the vectors of {_count(len(outside), 'layer')} that the config does not adapt"
        return {OLD_PEFT: why, PEFT: why}
    lost = checkpoint.unfound(base) if base is not None else None
    if lost is None or lost.bare is not None:
        return {}
    why = f"drops the vectors of {_count(len(lost.modules), 'layer')}, which {lost.model_class} does not have"
    return {OLD_PEFT: why, PEFT: why, VERA_TOOLS: f"refuses it: {lost.model_class} does not have {lost.modules[0]}"}


def refused_record(checkpoint: Checkpoint) -> dict[str, str]:
    """The obstacle of vera-tools itself where it does not believe the record of a pair that is not stored."""
    record = None if checkpoint.projections else checkpoint.recorded
    error = None if record is None else stale(record, checkpoint)
    return {} if error is None else {VERA_TOOLS: f"refuses the record: {error.what}"}


def doubts(checkpoint: Checkpoint, base: BaseModel | None = None) -> dict[str, str]:
    """Why nobody can know whether a loader computes with this adapter, where nothing speaks against it; by loader."""
    lost = checkpoint.unfound(base) if base is not None else None
    if lost is not None and lost.bare is not None:
        why = f"computes with it around {lost.bare}, and drops all of it around {lost.model_class}"
        return {OLD_PEFT: why, PEFT: why}
    if checkpoint.config.target_modules is not None or (base is not None and base.model_type is not None):
        return {}
    why = "adapts what it chooses for the base's model type, because target_modules is null, and the base is not named"
    return {OLD_PEFT: why, PEFT: why}


def _targets(base: BaseModel | None) -> Check:
    """What PEFT makes of a config whose target_modules is null."""
    known = base.model_type if base else None
    if known is None:
        message = "target_modules is null: PEFT adapts its default for the model type of the base (name it with --base)"
        return Check("config.target_modules", "warn", message)
    if known not in DEFAULT_TARGETS:
        return Check("config.target_modules", "fail", f"PEFT refuses it: {_no_default(known)}")
    targets = DEFAULT_TARGETS[known]
    chosen = targets if isinstance(targets, str) else some(targets, len(targets))
    message = f"target_modules is null, for which PEFT takes {chosen} on a base of type {known}"
    return Check("config.target_modules", "pass", message)


def _no_default(model_type: str) -> str:
    return f"target_modules is null, and it has no default for a base of type {model_type}"


def _config(checkpoint: Checkpoint) -> Check:
    reading = checkpoint.reading
    if reading.refused:
        return Check("config.peft", "fail", f"PEFT cannot read it: {some(reading.refused)}; {_REMEDY}")
    odd = (*reading.refused_before_21, *reading.tolerated)
    if odd:
        return Check("config.peft", "warn", f"PEFT reads it all the same: {some(odd)}")
    if reading.unknown_before_14:
        message = f"PEFT reads it; before 0.14 it refused keys that it does not know: {some(reading.unknown_before_14)}"
        return Check("config.peft", "pass", message)
    return Check("config.peft", "pass", "PEFT reads it")


def _names(checkpoint: Checkpoint) -> Check:
    odd = checkpoint.keys.odd
    total = len(checkpoint.weights.tensors) + len(checkpoint.keys.repeated)
    if not odd:
        return Check("tensors.names", "pass", f"{total} names, none that PEFT would have written otherwise")
    adapters = sorted({entry.adapter for entry in odd if entry.adapter})
    only_adapter = all(entry.adapter for entry in odd)
    if checkpoint.keys.taken_by_peft_21():
        does = f"PEFT takes them from 0.21 on, as long as the adapter is loaded as {DEFAULT!r}, and before does not"
    elif checkpoint.keys.of_a_layer:
        does = "PEFT looks for the projections under base_model.vera_A and base_model.vera_B, and refuses the file"
    elif only_adapter and not any(entry.saved for entry in odd):
        does = f"PEFT takes them from 0.21 on where it loads the adapter as {adapters[0]!r}, and nowhere else"
    elif only_adapter:
        does = "PEFT looks for the saved modules under other names and fails"
    else:
        does = "PEFT drops them, and then computes without them, or refuses the file where the projections are meant"
    one = f"{odd[0].found} for {odd[0].meant}"
    message = f"{_count(len(odd), 'name')} of {total} are not PEFT's, {one}; {does}; {_REMEDY}"
    return Check("tensors.names", "fail", message)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
