"""The checkpoint against its manifest, and against the record in its own file's metadata.

Where the manifest does not hold, this tells a checkpoint that was saved again after training on (stale) from one that
was damaged.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint
from vera_tools.checkpoints.manifest import Manifest, ProjectionRecord
from vera_tools.checkpoints.names import is_embedding
from vera_tools.dtypes import FLOATS
from vera_tools.errors import CheckFailedError, VeraToolsWarning
from vera_tools.projections.identification import Identification
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.verifying.checks import Scan, scan, some
from vera_tools.verifying.findings import Check

# What PEFT fills in or changes when it saves an adapter again. None of it changes what the adapter computes.
_FILLED_IN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_RENEW = "renew the manifest with `record` if this was meant"


def against_manifest(checkpoint: Checkpoint, scans: dict[str, Scan]) -> Iterator[Check]:
    """The checkpoint against its manifest, and against its file's own record."""
    if checkpoint.embedded_error:
        yield Check("metadata.schema", "fail", str(checkpoint.embedded_error))
    elif checkpoint.embedded:
        yield _projection_digests("metadata.projections", checkpoint.embedded, checkpoint, scans)
    manifest = checkpoint.manifest
    if checkpoint.embedded and checkpoint.embedded.assumed and not (manifest and manifest.projections.assumed):
        yield Check("metadata.assumed", "warn", _assumption(checkpoint.embedded))
    if manifest is None:
        yield from _unusable(checkpoint)
        return
    yield Check("manifest.schema", "pass", f"written by {manifest.tool['name']} {manifest.tool['version']}")
    if manifest.covered:
        yield Check("manifest.digest", "pass", "it says what it said when it was written")
    else:
        message = "it has no digest of itself: what it says of the base and of the original files may have been changed"
        yield Check("manifest.digest", "skip", f"{message}; renew it with `record`")
    if manifest.projections.assumed:
        yield Check("manifest.assumed", "warn", _assumption(manifest.projections))
    yield _projection_digests("manifest.projections", manifest.projections, checkpoint, scans)
    if checkpoint.embedded and checkpoint.embedded != manifest.projections:
        message = "the file's own metadata records another recipe, shape or digest than the manifest"
        yield Check("metadata.manifest", "fail", message)
    tensors = _tensors(manifest, checkpoint, scans)
    yield tensors
    yield _config(manifest, checkpoint, stale=tensors.id == "manifest.stale")
    yield _metadata(manifest, checkpoint)


def refuse_changed(checkpoint: Checkpoint) -> dict[str, str]:
    """Refuse to make something of a checkpoint that is not what its manifest records: nothing would say so afterwards.

    One that was trained on since is taken, with a warning.

    Returns:
        The digest of each tensor that was looked at, by name; empty where nothing is recorded.

    Raises:
        FormatError: the manifest cannot be read.
        CheckFailedError: it was changed itself; or a tensor, the config or the metadata is another, and that does not
            look like training.
    """
    checkpoint.refuse_unusable_manifest()
    if checkpoint.manifest is None and checkpoint.embedded is None:
        return {}
    scans = scan(checkpoint)
    found = against_manifest(checkpoint, scans)
    failed = [check for check in found if check.status == "fail"]
    for check in failed:
        if check.id == "manifest.stale":
            warnings.warn(f"{checkpoint.label}: {check.message}", VeraToolsWarning, stacklevel=3)
    worse = [check.message.removesuffix(f"; {_RENEW}") for check in failed if check.id != "manifest.stale"]
    if worse:
        raise CheckFailedError(
            f"not what is recorded of it: {'; '.join(worse)}",
            where=checkpoint.label,
            hint="take a sound copy, or renew the manifest with `vera-tools record`",
        )
    return {name: found.sha256 for name, found in scans.items()}


def width(checkpoint: Checkpoint, base: BaseModel | None = None) -> Iterator[Check]:
    """in_max against the adapted weights' recorded shapes; nothing where those do not tell it.

    The vectors say nothing of it: a layer's vera_lambda_b is as long as its output.

    Args:
        checkpoint: The checkpoint.
        base: The base that is about to be recorded.

    Raises:
        CheckFailedError: this base does not fit.
    """
    pair, widths = checkpoint.pair_shape(), checkpoint.in_features(base)
    recorded = checkpoint.manifest.base.weights.values() if checkpoint.manifest and base is None else ()
    if pair is None or not widths or any(record.dtype not in FLOATS for record in recorded):
        return  # version 0.1.0 recorded quantised weights too, whose shapes may be packed
    widest = max(widths.values())
    if widest > pair.in_max or (widest < pair.in_max and len(widths) == len(checkpoint.layers)):
        message = (
            f"the recorded base gives in_max {widest}, the projections have in_max {pair.in_max}: another base, or "
            "PEFT saved this adapter beside a first, wider one, whose pair it then shares"
        )
        yield Check("base.pair", "fail", message)
    elif widest == pair.in_max:
        yield Check("base.pair", "pass", f"in_max {widest} follows from the recorded base")


def _unusable(checkpoint: Checkpoint) -> Iterator[Check]:
    error = checkpoint.manifest_error
    if isinstance(error, CheckFailedError):
        yield Check("manifest.schema", "pass", "it can be read")
        yield Check("manifest.digest", "fail", str(error))
    elif error is not None:
        yield Check("manifest.schema", "fail", str(error))
    else:
        yield Check("manifest.schema", "skip", "no manifest: vectors and config are not covered (see `record`)")


def recipe(checkpoint: Checkpoint, identified: Identification) -> Iterator[Check]:
    """The recorded recipe against what a stored pair was found to be."""
    record = checkpoint.recorded
    if record is None or (record.recipe is None and not identified.exact):
        return
    named = record.recipe.name if record.recipe else "no recipe"
    if record.recipe in identified.all_recipes:
        yield Check("manifest.recipe", "pass", f"the stored pair is what {named} gives")
    else:
        found = identified.recipe.name if identified.exact and identified.recipe else "no known recipe"
        message = f"{named} is recorded, the stored pair is what {found} gives; {_RENEW}"
        yield Check("manifest.recipe", "fail" if record.recipe else "warn", message)


def _assumption(record: ProjectionRecord) -> str:
    return f"the recipe was {record.origin} when it was recorded, not taken from the trained pair"


def _projection_digests(check: str, record: ProjectionRecord, checkpoint: Checkpoint, scans: dict[str, Scan]) -> Check:
    stored = {name: scans[ROOT + name].sha256 for name in PROJECTIONS if ROOT + name in scans}
    wrong = [
        name
        for name, digest in stored.items()
        if digest != record.sha256[name]
        or checkpoint.projections[name].shape != record.shape.of(name)
        or checkpoint.projections[name].dtype != record.dtype
    ]
    if wrong:
        message = f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what was recorded: changed since"
        return Check(check, "fail", message)
    if not stored:
        return Check(check, "pass", "recipe and digests of the projections are recorded")
    return Check(check, "pass", "the stored projections have the recorded digests")


def _kind(vector: str) -> str:
    return vector.rpartition(".")[2]


def _tensors(manifest: Manifest, checkpoint: Checkpoint, scans: dict[str, Scan]) -> Check:
    infos, records = checkpoint.weights.tensors, manifest.tensors
    gone, new = sorted(records.keys() - infos.keys()), sorted(infos.keys() - records.keys())
    changed = []
    for name, record in records.items():
        info = infos.get(name)
        if info is not None and (
            record.sha256 != scans[name].sha256 or record.shape != info.shape or record.dtype != info.dtype
        ):
            changed.append(name)
    changed.sort()
    if not (gone or new or changed):
        return Check(
            "manifest.tensors", "pass", f"all {len(infos)} tensors have the recorded shapes, dtypes and digests"
        )
    vectors = list(checkpoint.vector_infos)
    moved = [
        name
        for name in vectors
        if name in changed
        and (infos[name].shape, infos[name].dtype) == (manifest.tensors[name].shape, manifest.tensors[name].dtype)
    ]
    pair_holds = not any(ROOT + name in (*changed, *gone) for name in PROJECTIONS)
    others_explained = all(is_embedding(name) for name in (*gone, *new))
    # Training moves every vector, or where one kind is frozen, all of the other; damage hits a place. One vector can be
    # either.
    kinds = {_kind(name) for name in moved}
    if len(moved) > 1 and moved == [v for v in vectors if _kind(v) in kinds] and pair_holds and others_explained:
        message = (
            f"all {' and '.join(sorted(kinds))} are not the recorded ones, while the projections are: saved again "
            "after training on? If so, renew the manifest with `record`"
        )
        return Check("manifest.stale", "fail", message)
    parts = [f"{len(names)} {what} ({some(names)})" for what, names in _kinds(gone, new, changed) if names]
    return Check(
        "manifest.tensors",
        "fail",
        f"of {len(manifest.tensors)} tensors {', '.join(parts)}: damaged, unless only these were trained on; {_RENEW}",
    )


def _kinds(gone: list[str], new: list[str], changed: list[str]) -> tuple[tuple[str, list[str]], ...]:
    return (("changed", changed), ("are missing", gone), ("were not recorded", new))


def _config(manifest: Manifest, checkpoint: Checkpoint, *, stale: bool) -> Check:
    then, now = _comparable(manifest.config), _comparable(checkpoint.raw_config)
    keys = sorted(
        key for key in then.keys() | now.keys() if then.get(key) != now.get(key) or (key in then) != (key in now)
    )
    if not keys:
        return Check("manifest.config", "pass", "adapter_config.json says what was recorded")
    changes = some([f"{key} {then.get(key, 'absent')!r} became {now.get(key, 'absent')!r}" for key in keys])
    # A value that was filled in cannot come from a changed bit, a value that became another can.
    harmless = all(key in _FILLED_IN and (then.get(key) is None or isinstance(then[key], bool)) for key in keys)
    if stale or harmless:
        return Check("manifest.config", "warn", f"{changes}: saved again; renew the manifest with `record`")
    return Check("manifest.config", "fail", f"{changes}; {_RENEW}")


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    # PEFT keeps these as sets, so their order changes from one saving to the next.
    return {
        key: sorted(map(str, value))
        if key in ("target_modules", "modules_to_save") and isinstance(value, list)
        else value
        for key, value in config.items()
    }


def _metadata(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    then, now = manifest.metadata, checkpoint.weights.metadata
    changed = sorted(key for key in then.keys() & now.keys() if then[key] != now[key])
    if changed:
        return Check("manifest.metadata", "fail", f"the file's metadata changed: {some(changed)}")
    gone, new = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
    if gone and new:
        return Check("manifest.metadata", "fail", f"the file's metadata has {some(new)} in place of {some(gone)}")
    if gone or new:  # PEFT saving into the same folder drops what it does not know
        what = f"lost {some(gone)}" if gone else f"gained {some(new)}"
        return Check("manifest.metadata", "warn", f"the file's metadata {what}: another program saved it")
    return Check("manifest.metadata", "pass", "the file's metadata is the recorded one")
