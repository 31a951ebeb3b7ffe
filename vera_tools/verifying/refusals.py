"""What is asked of an adapter before something else is made of it: a merged model, a LoRA, a file for llama.cpp.

What is made looks sound whatever it was made of. So what `verify` would say of the adapter is asked first, in the
words of its checks; `recorded.refuse_changed` asks the same about its manifest.
"""

from __future__ import annotations

import warnings

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.recorded_base import RecordedBase
from vera_tools.checkpoints.resolution import Resolved
from vera_tools.errors import CheckFailedError, FormatError, LoadingWarning
from vera_tools.files import local
from vera_tools.projections.key import same_key
from vera_tools.verifying import checks, fit

# Checks that say whether PEFT computes with all that the file holds, and misses nothing that the config says it holds.
_CONTRADICTIONS = ("tensors.saved", "tensors.unexpected", "base.modules", "base.parameters")


def refuse_contradictions(checkpoint: Checkpoint, base: BaseModel | None = None) -> None:
    """Refuse an adapter that PEFT would load as something else than what its file holds.

    Args:
        checkpoint: The adapter.
        base: Its base, where it is at hand: it tells which vectors are missing.

    Raises:
        CheckFailedError: a check failed; the message is its own.
        FormatError: as for `refuse_no_floats`.
    """
    refuse_no_floats(checkpoint)
    found = list(checks.structure(checkpoint, base))
    if base is not None:
        found += fit.against_base(checkpoint, base, digests=False)
    for check in found:
        if check.status == "fail" and check.id in _CONTRADICTIONS:
            command = "verify --base" if check.id.startswith("base.") else "verify"
            raise CheckFailedError(
                check.message,
                where=checkpoint.label,
                hint=f"this is {check.id} of `vera-tools {command}`: the config and the file contradict each other",
            )


def refuse_no_floats(checkpoint: Checkpoint) -> None:
    """Refuse projections and vectors of a dtype that VeRA does not compute in, which `verify` calls invalid.

    PEFT casts integers to its own dtype without a word: what was cut off when they were made stays cut off.

    Raises:
        FormatError: there are such; the message is the check's.
    """
    check = checks.dtypes(checkpoint)
    if check.status == "fail":
        raise FormatError(
            check.message,
            where=checkpoint.label,
            hint="`vera-tools verify` calls it invalid: save it again in float32, bfloat16 or float16",
        )


def refuse_another_base(checkpoint: Checkpoint, base: BaseModel | None) -> None:
    """Refuse a base whose weights are not those that the adapter's manifest has digests of.

    Only a base on disk is hashed. Other shapes or dtypes than the recorded ones, as in a copy of the base in half
    precision, are told in a warning.

    Raises:
        CheckFailedError: a weight has another digest.
    """
    recorded = None if base is None else RecordedBase.of(checkpoint, base)
    if base is None or recorded is None:
        return
    if recorded.unlike:
        warnings.warn(recorded.warning(checkpoint.label, base), LoadingWarning, stacklevel=3)
    for name in recorded.sha256 if isinstance(base.folder, local.LocalFolder) else ():
        recorded.refuse_another(name, base.sha256(name), adapter=checkpoint.label, base=base)


def refuse_drift(checkpoint: Checkpoint, resolved: Resolved, *, strict: bool) -> None:
    """Warn of a pair, stored or recorded, that is not what the config's key gives; refuse it where `strict`.

    It is what was trained, unless it was damaged, so it is what is used.

    Raises:
        CheckFailedError: it is not, and `strict`.
    """
    said = _drift(checkpoint, resolved)
    if said is None:
        return
    if strict:
        raise CheckFailedError(
            f"the pair is not what the config's key gives: {said}",
            where=checkpoint.label,
            hint="without --strict it is used as it is; `vera-tools verify` says more of it",
        )
    warnings.warn(
        f"{checkpoint.label}: {said}; the pair is used as it is, which is right if it is the trained one",
        LoadingWarning,
        stacklevel=3,
    )


def _drift(checkpoint: Checkpoint, resolved: Resolved) -> str | None:
    """What makes the pair another one than the config's key gives, in the checks' words; None where it is that."""
    key, found, recipe = checkpoint.config.projection_prng_key, resolved.identification, resolved.record.recipe
    if found is not None:
        return None if found.made_by(key) else checks.match(found, key, resolved.record.origin).message
    return None if recipe is None or same_key(recipe.prng_key, key) else checks.key(checkpoint).message
