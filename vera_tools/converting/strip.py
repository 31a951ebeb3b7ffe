"""`strip-projections`: take vera_A and vera_B out of a checkpoint, once it is proven that they can be made again."""

from __future__ import annotations

import base64
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from vera_tools.checkpoints.checkpoint import ROOT, WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.manifest import Original
from vera_tools.checkpoints.resolution import Resolved, resolve, stale
from vera_tools.checkpoints.writing import base_record, write_checkpoint
from vera_tools.converting.output import (
    ConversionReport,
    Destination,
    common,
    config_text,
    corrections,
    foreign_metadata,
    refuse_half_a_pair,
    refuse_miscopied,
)
from vera_tools.errors import CheckFailedError, LoadingWarning, NothingToDoError
from vera_tools.platforms import rows
from vera_tools.projections.identification import Identification
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.verifying import acceptance, checks
from vera_tools.verifying.checks import Scan
from vera_tools.verifying.findings import BROKEN, DAMAGE, Check
from vera_tools.verifying.loads import OLD_PEFT, PEFT, Load, Trained, loader_table
from vera_tools.verifying.recorded import refuse_changed, width

_REMEDY = (
    "vera-tools loads it exactly everywhere; embedding makes it exact in PEFT >= 0.21 with default options, "
    "older PEFT needs vera_tools.nn.peft or the LoRA export"
)
#: Where PEFT refuses the embedded pair too.
_REMEDY_FOR_A_SHARED_PAIR = "vera-tools loads it exactly everywhere; PEFT needs the LoRA export"
#: Where the config does not adapt what the file has vectors of.
_REMEDY_FOR_DROPPED_VECTORS = "vera-tools loads it exactly everywhere; `vera-tools verify` says what PEFT leaves out"


@dataclass(frozen=True, kw_only=True, repr=False)
class StripReport(ConversionReport):
    """What was stripped.

    Attributes:
        saved_bytes: Bytes that the weights file lost.
        factor: How many times smaller it is.
        identification: Proof that the pair can be made again, or, with `forced`, how far off the nearest recipe is.
        forced: The pair cannot be made again, and was stripped all the same.
        loads: Which loader loads the stripped checkpoint exactly, on which machine and base.
        remedy: What helps where plain PEFT does not.
        damage: The checks that failed because something else of the adapter is damaged or missing.
    """

    name: ClassVar[str] = "strip-projections"

    saved_bytes: int
    factor: float
    identification: Identification
    forced: bool
    loads: tuple[Load, ...]
    remedy: str
    damage: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """1 where the adapter is damaged, else 0."""
        return 1 if self.damage else 0

    def body(self) -> dict[str, Any]:
        """The strip-projections/v1 document's own part."""
        nearest = self.identification.recipe
        return {
            **super().body(),
            "saved_bytes": self.saved_bytes,
            "factor": self.factor,
            "forced": self.forced,
            "nearest_recipe": nearest.to_dict() if nearest else None,
            "matches": {name: match.to_dict() for name, match in self.identification.matches.items()},
            "loads": [load.to_dict() for load in self.loads],
            "damage": [check.to_dict() for check in self.damage],
        }


def strip_projections(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    in_place: bool = False,
    force: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
    dry_run: bool = False,
) -> StripReport:
    """Write the checkpoint without vera_A and vera_B, if a known recipe gives exactly their bits with the config's key.

    Every other tensor stays as it is, and ``save_projection`` becomes false. Recipe, shapes and digests are recorded in
    the manifest and in the file itself; the original header and config too, so that `embed_projections` gives back the
    original file byte for byte.

    Args:
        checkpoint: A folder, a safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        output: The folder to write.
        in_place: Replace the checkpoint itself, in one step.
        force: Strip even where the config's key does not give these bits. Where no recipe gives them they are lost
            then; their digests are recorded. Where another key does, vera-tools alone makes them again.
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.
        dry_run: Do all of it but writing, and refuse what would be refused. What is made lies in a folder for
            temporary files meanwhile.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        NothingToDoError: no projections are stored.
        CheckFailedError: the config's key does not give the stored bits, and `force` is false.
        UsageError: the output exists, or cannot be where it was asked for.
    """
    with Checkpoint.open(checkpoint, allow_pickle=allow_pickle) as opened:
        target = Destination.of(opened, output, in_place=in_place, overwrite=overwrite, dry_run=dry_run)
        refuse_half_a_pair(opened)
        if not opened.projections:
            raise NothingToDoError("no projections are stored", where=opened.label, hint="there is nothing to strip")
        resolved = resolve(opened)
        checked = refuse_changed(opened)
        found = resolved.identification
        assert found is not None  # because the pair is stored
        if not (found.made_by(opened.config.projection_prng_key) or force):
            raise _other_key(opened, found) if found.exact else _refusal(opened, found)
        if not force and (misfit := stale(resolved.record, opened)) is not None:
            raise _no_way_back(opened, misfit)
        tensors = {
            name: opened.weights.deferred(name)
            for name in opened.weights.tensors
            if name not in (ROOT + "vera_A", ROOT + "vera_B")
        }
        scans = checks.scan(opened)
        checked = {name: found.sha256 for name, found in scans.items()} | checked
        damage = _damage(opened, scans)  # before the output appears: afterwards nothing is read any more
        with target.open() as folder:
            manifest = write_checkpoint(
                folder,
                config_text(opened, save_projection=False),
                tensors,
                resolved.record,
                metadata=foreign_metadata(opened),
                base=base_record(opened, None),
                original=_original(opened),
            )
            refuse_miscopied(manifest, checked, where=opened.weights.label)
            size = (folder / WEIGHTS_NAME).stat().st_size
        fits = opened.widest == resolved.record.shape.out_max
        fits = fits and all(check.status == "pass" for check in width(opened))
        dropped = acceptance.dropped(opened)
        loads = _loads(opened, resolved, fits=fits, whole=not damage, obstacles=dropped)
        remedy = _REMEDY_FOR_DROPPED_VECTORS if dropped else _REMEDY if fits else _REMEDY_FOR_A_SHARED_PAIR
        _warn(opened, resolved, loads, remedy, damage)
        return StripReport(
            **common(opened, target, manifest, size),
            origin=resolved.origin,
            notes=corrections(opened),
            saved_bytes=opened.weights.size - size,
            factor=opened.weights.size / size,
            identification=found,
            forced=not found.exact,
            loads=loads,
            remedy=remedy,
            damage=damage,
        )


def describe_distance(found: Identification) -> str:
    """How far a stored pair is from the nearest known recipe, in one line."""
    if found.recipe is None:
        return "no known recipe comes close"
    parts = []
    for name in PROJECTIONS:
        match = found.matches[name]
        if match.match == "identical":
            parts.append(f"{name} identical")
            continue
        parts.append(f"{name} {match.match}, different in {match.extent}")
    return f"nearest is {found.recipe.name} with key {found.recipe.prng_key}: {'; '.join(parts)}"


def _refusal(checkpoint: Checkpoint, found: Identification) -> CheckFailedError:
    return CheckFailedError(
        "no known recipe gives exactly these projections, so stripping would lose them",
        where=checkpoint.label,
        found=describe_distance(found),
        hint="keep them, or pass --force to lose them",
    )


def _other_key(checkpoint: Checkpoint, found: Identification) -> CheckFailedError:
    """A pair that can be made again, and not in PEFT from what the config says: nothing but the record would tell."""
    recipe, key = found.recipe, checkpoint.config.projection_prng_key
    assert recipe is not None  # because it is exact
    put_right = (
        f"put {recipe.prng_key} into projection_prng_key of adapter_config.json first, if it is the trained pair"
    )
    return CheckFailedError(
        "the stored pair is not what the config's key gives, so PEFT would draw another one in its place",
        where=checkpoint.label,
        expected=f"key {key}",
        found=f"made with {checks.drawn_with(recipe)}",
        hint=f"{put_right if recipe.is_peft_order else 'keep it'}, or pass --force: vera-tools alone makes it again",
    )


def _no_way_back(checkpoint: Checkpoint, misfit: CheckFailedError) -> CheckFailedError:
    """Vectors that a record of the pair would not be believed of, once the pair itself is gone."""
    return CheckFailedError(
        "the vectors do not fit the projections, so what is stripped could not be put back",
        where=checkpoint.label,
        expected=misfit.expected,
        found=misfit.found,
        hint="take a sound copy, or pass --force to strip it all the same",
    )


def _original(checkpoint: Checkpoint) -> Original | None:
    """What embedding needs to give the file back; a pickle cannot be given back, and names that are not PEFT's are not.

    A config that PEFT would have written otherwise comes back put right.
    """
    if checkpoint.keys.odd or not checkpoint.weights.label.endswith(".safetensors"):
        return None
    return Original(
        header=base64.b64encode(checkpoint.weights.header).decode(),
        config=checkpoint.config.to_json()
        if checkpoint.config_text is None
        else config_text(checkpoint, save_projection=checkpoint.config.save_projection),
        sha256=checkpoint.weights.file_sha256(),
    )


def _damage(checkpoint: Checkpoint, scans: dict[str, Scan]) -> tuple[Check, ...]:
    """What of the adapter, its projections apart, is damaged or missing: taking them out makes no whole of it."""
    found = [*checks.structure(checkpoint), *checks.values(checkpoint, scans)]
    return tuple(check for check in found if check.status == "fail" and check.id in DAMAGE | BROKEN)


def _loads(
    checkpoint: Checkpoint, resolved: Resolved, *, fits: bool, whole: bool, obstacles: Mapping[str, str]
) -> tuple[Load, ...]:
    assert resolved.identification is not None
    return loader_table(
        Trained(
            stored=False,
            save_projection=False,
            prng_key=checkpoint.config.projection_prng_key,
            recipes=resolved.identification.all_recipes,
            dtype=resolved.record.dtype,
            fits=fits,
            whole=whole,
            assumed=resolved.identification.exact and resolved.record.assumed,
            obstacles=obstacles,
            doubts=acceptance.doubts(checkpoint),
            unknown_before_14=checkpoint.reading.unknown_before_14,
        )
    )


def exact_in_peft(loads: tuple[Load, ...]) -> dict[tuple[str, str], bool]:
    """(rounding, base dtype) -> whether plain PEFT, of any version and with default options, loads exactly there."""
    rows = [load for load in loads if load.loader in (OLD_PEFT, PEFT) and not load.options]
    places = dict.fromkeys((load.rounding, load.base_dtype) for load in rows)
    return {p: all(load.exact is True for load in rows if (load.rounding, load.base_dtype) == p) for p in places}


def _listed(names: tuple[str, ...]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _warn(
    checkpoint: Checkpoint, resolved: Resolved, loads: tuple[Load, ...], remedy: str, damage: tuple[Check, ...]
) -> None:
    exact, found = exact_in_peft(loads), resolved.identification
    assert found is not None
    if damage:
        message = f"the adapter is damaged or incomplete: {damage[0].id}: {damage[0].message}"
    elif found.exact and resolved.record.assumed:
        message = f"the recipe was {resolved.record.origin}, so nobody knows where the stripped adapter is exact"
    elif not found.exact or found.recipe is None:
        message = f"the trained projections are lost: {describe_distance(found)}"
    elif not any(exact.values()):
        why = next(load.why for load in loads if load.loader == PEFT)
        message = f"plain PEFT loads the stripped adapter exactly nowhere: it {why}; {remedy}"
    elif not exact["fused", "float32"]:
        made = " and ".join(
            [f"where torch draws as on {_listed(rows.places(found.recipe.rounding))}"]
            * (found.recipe.rounding == "separate")
            + [f"on a {found.recipe.rounded_through} base"] * (found.recipe.rounded_through is not None)
        )
        message = f"trained {made}, the stripped adapter will drift in plain PEFT on any other; {remedy}"
    else:
        return
    warnings.warn(f"{checkpoint.label}: {message}", LoadingWarning, stacklevel=3)
