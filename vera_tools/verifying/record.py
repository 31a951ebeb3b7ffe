"""`record`: write or renew the manifest of a checkpoint that exists already, touching nothing else."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Manifest
from vera_tools.checkpoints.resolution import Assumptions, Resolved, refuse_other_base, resolve
from vera_tools.checkpoints.writing import describe
from vera_tools.errors import CheckFailedError, FormatError, UsageError, VeraToolsWarning
from vera_tools.files import atomic, local, opening
from vera_tools.report import Report
from vera_tools.verifying import fit
from vera_tools.verifying.checks import scan, some, structure, values
from vera_tools.verifying.findings import Check
from vera_tools.verifying.recorded import width


@dataclass(frozen=True, repr=False)
class RecordReport(Report):
    """What was recorded.

    Attributes:
        path: The checkpoint.
        manifest_path: The file that was written.
        manifest: Its content.
        resolved: Where the recipe comes from.
        renewed: A manifest was there already.
        changed: Its bytes are not what they were.
        warned: What somebody has to know who vouches for this checkpoint: that it is not what was recorded before, and
            which checks it fails.
    """

    name: ClassVar[str] = "record"

    path: str
    manifest_path: str
    manifest: Manifest
    resolved: Resolved
    renewed: bool
    changed: bool
    warned: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """The record/v1 document's own part."""
        record = self.manifest.projections
        return {
            "path": self.path,
            "manifest": self.manifest_path,
            "renewed": self.renewed,
            "changed": self.changed,
            "origin": self.resolved.origin,
            "recipe": record.recipe.to_dict() if record.recipe else None,
            "assumed": record.assumed,
            "r": record.shape.r,
            "in_max": record.shape.in_max,
            "out_max": record.shape.out_max,
            "projections": record.to_dict()["projections"],
            "tensors": len(self.manifest.tensors),
            "base": self.manifest.base.to_dict(),
            **({"warnings": list(self.warned)} if self.warned else {}),
        }


def record(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
) -> RecordReport:
    """Write (or renew) vera_manifest.json beside a checkpoint's adapter_config.json.

    From then on every change can be found. Projections that are stored prove their recipe. Of a seed-only checkpoint
    nothing says which machine drew them: the recipe is stated or assumed, and `verify` says `assumed`.

    A manifest that is there and cannot be used is renewed too where the projections are stored. Where they are not, it
    alone may tell which they were, and it is refused.

    What is not as it was recorded before, and what fails a check, is recorded all the same, with a `VeraToolsWarning`.

    Args:
        checkpoint: A local folder or adapter_model.safetensors file.
        base: The base model. Its adapted weights are recorded with shapes, dtypes and, where it lies on disk, digests.
        in_features: Largest in_features of the adapted layers, for a seed-only checkpoint without a base.
        recipe: Name of the recipe of a seed-only checkpoint with nothing recorded. Default: PEFT's is assumed.
        stored_dtype: The dtype that its digests are over.
        strict: Refuse to assume a recipe, and one that was assumed or stated when it was recorded.

    Raises:
        FormatError: unreadable, malformed, not VeRA, without an adapted layer, or changed meanwhile.
        CheckFailedError: the base does not fit, has another dtype than an earlier, assumed record was made for, or that
            record was changed or is wrong about the projections.
        UnprovenError: seed-only with nothing recorded, and `strict`.
        UsageError: a checkpoint on the Hub or in a store, or a seed-only one for which nothing says in_max.
    """
    if opening.is_remote(checkpoint):
        raise UsageError(
            "a manifest is written beside a local checkpoint",
            where=opening.spelled(checkpoint),
            hint="pull it first" if opening.is_on_hub(checkpoint) else "copy it to a folder first",
        )
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint))
        if not opened.layers:
            raise FormatError(
                "there is no adapted layer", where=opened.weights.label, expected="vera_lambda_b and vera_lambda_d"
            )
        folder = opened.folder
        assert isinstance(folder, local.LocalFolder)
        path = folder.path / MANIFEST_NAME
        if kind := local.not_a_file(path):
            raise FormatError(f"this is {kind}, not a file", where=path, hint="remove it")
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = _as_stated(opened, resolve(opened, assumptions), assumptions)
        refuse_other_base(resolved.record, opened, model)
        if model is not None and assumptions.method is None and resolved.record.assumed:
            _refuse_other_dtype(opened, model)
        _warn_of_another_base(opened, model)
        digest_base = base is not None and not opening.is_remote(base)
        manifest = describe(opened, resolved.record, base=model, digest_base=digest_base)
        data = manifest.to_json().encode()
        warned = list(_doubts(opened, manifest, model))
        with atomic.errors(folder.path), atomic.alone(folder.path):  # nobody exchanges it meanwhile who asks for this
            opened.check_unchanged()
            if model is not None:
                model.check_unchanged()
            before = path.read_bytes() if path.exists() else None
            atomic.write_bytes(path, data)
            folder.forget(MANIFEST_NAME)
            try:
                opened.check_unchanged()  # by who does not ask: a manifest of what is gone does not stay
            except FormatError:
                _put_back(path, before)
                raise
            folder.forget()
    for message in warned:
        warnings.warn(f"{opened.label}: {message}", VeraToolsWarning, stacklevel=2)
    changed = before != data
    return RecordReport(opened.label, str(path), manifest, resolved, before is not None, changed, tuple(warned))


def _doubts(checkpoint: Checkpoint, manifest: Manifest, base: BaseModel | None) -> Iterator[str]:
    """What a manifest would vouch for from now on that may be damaged."""
    earlier = checkpoint.manifest
    if checkpoint.manifest_error is not None:
        yield "the manifest that was there cannot be used, so that nothing tells what changed since it was written"
    elif earlier is not None:
        names = earlier.tensors.keys() | manifest.tensors.keys()
        others = sorted(name for name in names if earlier.tensors.get(name) != manifest.tensors.get(name))
        keys = earlier.config.keys() | manifest.config.keys()
        others_in_config = sorted(key for key in keys if earlier.config.get(key) != manifest.config.get(key))
        found = [f"{len(others)} of {len(names)} tensors ({some(others)})"] if others else []
        found += [f"{some(others_in_config)} in {CONFIG_NAME}"] if others_in_config else []
        if found:
            yield f"not what was recorded before: {' and '.join(found)}; the manifest vouches for this from now on"
    # A second look at every tensor, which also finds what a failing disk read otherwise when it was hashed.
    found_now = [*_structure(checkpoint), *values(checkpoint, scan(checkpoint)), *width(checkpoint, base)]
    if failed := [f"{check.id} ({check.message})" for check in found_now if check.status == "fail"]:
        yield f"it fails {' and '.join(failed)}: it is recorded as it is"


def _structure(checkpoint: Checkpoint) -> list[Check]:
    try:
        return list(structure(checkpoint))
    except FormatError:  # an expression of the config takes too long; `verify` says so
        return []


def _as_stated(checkpoint: Checkpoint, resolved: Resolved, stated: Assumptions) -> Resolved:
    """What was resolved, with a recipe that was assumed so far and is stated now.

    Raises:
        UsageError: what is stated contradicts what is proven or recorded; or the weights file itself says otherwise.
    """
    record, method = resolved.record, stated.method
    if stated.stored_dtype not in ("float32", record.dtype):
        raise _contradicted(checkpoint, f"projections in {record.dtype}", stated.stored_dtype)
    if method is None:
        return resolved
    found = resolved.identification
    if found is not None and all(recipe.method != method for recipe in found.all_recipes):
        made = found.recipe.name if found.exact and found.recipe else "no known recipe"
        raise _contradicted(checkpoint, f"{made}, which gives exactly what is stored", method.name)
    if record.origin != "assumed":
        return resolved
    if checkpoint.embedded is not None:  # which is in the weights file, that is not written to
        raise UsageError(
            "the weights file says itself that its recipe was assumed, and only the manifest is written here",
            where=checkpoint.label,
            hint="leave the recipe options out",
        )
    return replace(resolved, record=replace(record, origin="stated"))


def _refuse_other_dtype(checkpoint: Checkpoint, base: BaseModel) -> None:
    """Refuse a base on which PEFT would draw another pair than was assumed: a record of both contradicts itself.

    Raises:
        CheckFailedError: it is one.
    """
    for check in fit.dtype(checkpoint, base):
        if check.status == "fail":
            hint = "where this is another base, name the one that it was trained on"
            raise CheckFailedError(check.message, where=checkpoint.label, hint=hint)


def _warn_of_another_base(checkpoint: Checkpoint, base: BaseModel | None) -> None:
    """Say where the config names another base by now than the manifest, whose record of the weights is kept."""
    then = checkpoint.manifest.base if checkpoint.manifest else None
    now = checkpoint.config.base_model_name_or_path
    if base is not None or then is None or not then.weights or not (then.name and now) or then.name == now:
        return
    warnings.warn(
        f"{checkpoint.label}: adapter_config.json names {now} as the base, the manifest {then.name}: what is recorded "
        "of that one is kept (name the base with --base to record it anew)",
        VeraToolsWarning,
        stacklevel=3,
    )


def _contradicted(checkpoint: Checkpoint, proven: str, stated: str) -> UsageError:
    return UsageError(
        "what is stated contradicts what is known",
        where=checkpoint.label,
        expected=proven,
        found=stated,
        hint="leave the options out that state it",
    )


def _put_back(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink(missing_ok=True)
    else:
        atomic.write_bytes(path, before)
