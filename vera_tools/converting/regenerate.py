"""`regenerate`: vera_A and vera_B from the key, without torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vera_tools.checkpoints import destination
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint
from vera_tools.checkpoints.manifest import Origin, ProjectionRecord, TensorRecord
from vera_tools.checkpoints.resolution import Assumptions, refuse_size, resolve
from vera_tools.dtypes import np_dtype
from vera_tools.errors import AssumedRecipeWarning, UsageError, VeraToolsError
from vera_tools.files import atomic, safetensors
from vera_tools.projections.pair import PROJECTIONS, PairShape
from vera_tools.projections.prng import blocks, digests
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Report


@dataclass(frozen=True, repr=False)
class RegenerateReport(Report):
    """What was regenerated.

    Attributes:
        record: Recipe, shapes, stored dtype and digests.
        origin: Where the recipe comes from: "given" by the caller, "stored" (identified from stored projections),
            "recorded" in a manifest or in metadata, or "assumed".
        output: The file that was written, or None.
    """

    name: ClassVar[str] = "regenerate"

    record: ProjectionRecord
    origin: Literal["given", "stored", "recorded", "assumed"]
    output: str | None

    def body(self) -> dict[str, Any]:
        """The regenerate/v1 document's own part."""
        record = self.record
        assert record.recipe is not None
        pair = {
            name: TensorRecord(record.shape.of(name), record.dtype, record.sha256[name]).to_dict()
            for name in PROJECTIONS
        }
        return {
            "recipe": record.recipe.to_dict(),
            "assumed": record.assumed and self.origin != "given",
            "origin": self.origin,
            **pair,
            "output": self.output,
        }


def regenerate(
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    key: int | None = None,
    r: int | None = None,
    in_features: int | None = None,
    out_features: int | None = None,
    base: str | os.PathLike[str] | None = None,
    recipe: str | None = None,
    stored_dtype: str | None = None,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    strict: bool = False,
) -> RegenerateReport:
    """Draw vera_A (r, in_max) and vera_B (out_max, r), for a checkpoint or for a key and a shape.

    Args:
        checkpoint: Whose projections; or None, with key, r, in_features and out_features.
        key: projection_prng_key.
        r: Rank.
        in_features: Largest in_features of the adapted layers.
        out_features: Largest out_features of the adapted layers.
        base: The checkpoint's base model, for in_max and for the dtype that PEFT rounds through.
        recipe: A recipe's name. Default: what is stored or recorded; otherwise PEFT's.
        stored_dtype: Dtype of the result. Default: the checkpoint's, or float32.
        output: A safetensors file to write, with PEFT's tensor names. Nothing is held in memory.
        overwrite: Replace an existing file.
        strict: Refuse to assume a recipe for a seed-only checkpoint with nothing recorded.

    Raises:
        UsageError: both or neither of checkpoint and key, nothing says in_max, or no adapter has a pair of this size.
        VeraToolsError: the disk has no room for `output`.
        CheckFailedError: a recorded digest is not met, or the base does not fit.
        UnprovenError: nothing recorded, and `strict`.
        FormatError: the checkpoint cannot be read.
    """
    if output is not None:
        destination.refuse_output(output, overwrite=overwrite, is_file=True)
    record, origin = (
        _of_key(key, r, in_features, out_features, recipe, stored_dtype, output)
        if checkpoint is None
        else _of_checkpoint(checkpoint, (key, r, out_features), in_features, base, recipe, stored_dtype, strict)
    )
    if output is not None:
        _refuse_size(record.shape, record.dtype, output)
        with atomic.file(Path(output), overwrite=overwrite) as path:
            _write(path, record)
    return RegenerateReport(record, origin, None if output is None else os.fspath(output))


def _write(path: Path, record: ProjectionRecord) -> None:
    """Write the pair as it is drawn, block by block and in the order of the draw."""
    recipe = record.recipe
    assert recipe is not None
    names = reversed(PROJECTIONS) if recipe.b_first else PROJECTIONS
    tensors = {ROOT + name: (record.dtype, record.shape.of(name)) for name in names}
    header = safetensors.encode_header(safetensors.layout(tensors, order=list(tensors)), record.to_metadata())
    drawn = blocks([recipe], record.shape, stored_dtype=record.dtype)
    safetensors.write(path, header, (block.values[recipe] for block in drawn))


def _refuse_size(shape: PairShape, dtype: str, output: str | os.PathLike[str] | None) -> None:
    """Refuse what would be drawn for hours, or would not fit on the disk, before it is begun."""
    refuse_size(shape, dtype)
    if output is None:
        return
    with atomic.errors(Path(output)):
        there = next(parent for parent in Path(output).absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free
    size = shape.elements * np_dtype(dtype).itemsize
    if size > free:
        raise VeraToolsError(
            "not enough room on the disk", where=output, expected=f"{size} bytes", found=f"{free} free"
        )


def _of_key(
    key: int | None,
    r: int | None,
    in_features: int | None,
    out_features: int | None,
    name: str | None,
    stored_dtype: str | None,
    output: str | os.PathLike[str] | None,
) -> tuple[ProjectionRecord, Literal["given"]]:
    if key is None or r is None or in_features is None or out_features is None:
        raise UsageError("name a checkpoint, or all of --key, --rank, --in-features and --out-features")
    recipe = Recipe.parse(name, prng_key=key) if name else Recipe(prng_key=key)
    shape, dtype = PairShape(r, in_features, out_features), stored_dtype or "float32"
    _refuse_size(shape, dtype, output)
    return _draw(recipe, shape, dtype, "stated"), "given"


def _of_checkpoint(
    checkpoint: str | os.PathLike[str],
    excess: tuple[int | None, ...],
    in_features: int | None,
    base: str | os.PathLike[str] | None,
    name: str | None,
    stored_dtype: str | None,
    strict: bool,
) -> tuple[ProjectionRecord, Literal["given", "stored", "recorded", "assumed"]]:
    if any(value is not None for value in excess):
        raise UsageError("a checkpoint has its own key, rank and out_features: leave them out")
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint))
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        stored = len(opened.projections) == 2
        assumptions = Assumptions.stated(
            model,
            in_features=in_features,
            recipe=None if stored else name,
            stored_dtype=stored_dtype or "float32",
            strict=strict,
        )
        resolved = resolve(opened, assumptions)
        record = resolved.record
        if name and stored:
            recipe = Recipe.parse(name, prng_key=opened.config.projection_prng_key)
            return _draw(recipe, record.shape, stored_dtype or record.dtype, "stated"), "given"
        if record.recipe is None:
            recipe = Recipe(prng_key=opened.config.projection_prng_key)
            warnings.warn(
                f"{opened.label}: no known recipe makes the stored projections; regenerating by {recipe.name}, "
                "which gives others",
                AssumedRecipeWarning,
                stacklevel=3,
            )
            return _draw(recipe, record.shape, stored_dtype or record.dtype, "assumed"), "assumed"
        if stored_dtype and stored_dtype != record.dtype:
            record = _draw(record.recipe, record.shape, stored_dtype, record.origin)
        origin = "given" if name and resolved.origin == "assumed" else resolved.origin
        return record, origin


def _draw(recipe: Recipe, shape: PairShape, stored_dtype: str, origin: Origin) -> ProjectionRecord:
    sha256 = digests(recipe, shape, stored_dtype=stored_dtype)
    return ProjectionRecord(recipe, origin, shape, stored_dtype, sha256)
