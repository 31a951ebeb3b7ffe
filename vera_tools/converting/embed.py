"""`embed-projections`: put vera_A and vera_B into a seed-only checkpoint; the inverse of `strip-projections`."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vera_tools import schema
from vera_tools.checkpoints import peft_values
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import BaseRecord, Manifest, Original, ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, arrays, resolve
from vera_tools.checkpoints.writing import base_record, write_checkpoint, write_manifest
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
from vera_tools.dtypes import Array
from vera_tools.errors import FormatError, NothingToDoError
from vera_tools.files import safetensors
from vera_tools.files.safetensors import Deferred
from vera_tools.verifying.recorded import refuse_changed

Tensors = Mapping[str, "Array | Deferred"]


@dataclass(frozen=True, kw_only=True, repr=False)
class EmbedReport(ConversionReport):
    """What was embedded.

    Attributes:
        byte_exact: The weights file is, byte for byte, the one that was stripped; None where no original is recorded.
        config_exact: The same for adapter_config.json.
    """

    name: ClassVar[str] = "embed-projections"

    byte_exact: bool | None
    config_exact: bool | None

    def body(self) -> dict[str, Any]:
        """The embed-projections/v1 document's own part."""
        return {**super().body(), "byte_exact": self.byte_exact, "config_exact": self.config_exact}


def embed_projections(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
    in_place: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> EmbedReport:
    """Write the checkpoint with vera_A and vera_B in it.

    What is recorded decides how they are made, and its digests are checked. Where `strip_projections` recorded the
    original files and the vectors are unchanged, those files come back byte for byte.

    Args:
        checkpoint: A folder, a safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        output: The folder to write.
        base: The base model, for in_max and its dtype, where nothing is recorded. Only headers are read.
        in_features: Largest in_features of the adapted layers, where nothing is recorded and no base is at hand.
        recipe: Name of the recipe where none is recorded. Default: PEFT's is assumed, with a warning.
        stored_dtype: The dtype to store the pair in, where none is recorded.
        strict: Refuse to assume a recipe, and one that was assumed or stated when it was recorded.
        in_place: Replace the checkpoint itself, in one step.
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        FormatError: unreadable, malformed, or not VeRA.
        NothingToDoError: the projections are stored already.
        CheckFailedError: the regenerated pair is not the recorded one, or the base does not fit.
        UnprovenError: nothing is recorded, and `strict`.
        UsageError: nothing says in_max, or the output cannot be where it was asked for.
    """
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(checkpoint, allow_pickle=allow_pickle))
        target = Destination.of(opened, output, in_place=in_place, overwrite=overwrite, base=base)
        refuse_half_a_pair(opened)
        if opened.projections:
            raise NothingToDoError("the projections are stored already", where=opened.label)
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = resolve(opened, assumptions)
        checked = refuse_changed(opened)
        vera_A, vera_B = arrays(opened, resolved)
        tensors: Tensors = {
            ROOT + "vera_A": vera_A,
            ROOT + "vera_B": vera_B,
            **{name: opened.weights.deferred(name) for name in opened.weights.tensors},
        }
        restoration = _Restoration.of(opened, tensors)
        with target.open(model) as folder:
            manifest = restoration.write(folder, opened, tensors, resolved.record, base_record(opened, model))
            refuse_miscopied(manifest, checked, where=opened.weights.label)
            size = (folder / WEIGHTS_NAME).stat().st_size
        return EmbedReport(
            **common(opened, target, manifest, size),
            origin=resolved.origin,
            byte_exact=restoration.weights,
            config_exact=restoration.config,
            notes=(*restoration.notes, *corrections(opened)),
        )


@dataclass(frozen=True)
class _Restoration:
    """What comes back exactly as it was before stripping; None where nothing is recorded of it."""

    original: Original | None = None
    weights: bool | None = None
    config: bool | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, tensors: Tensors) -> _Restoration:
        original = checkpoint.manifest.original if checkpoint.manifest else None
        if original is None:
            return cls()
        weights = _file_sha256(original, tensors) == original.sha256
        where = "the manifest: original.config"
        before = peft_values.read(original.config, where=where)
        if not isinstance(before.document, dict):
            found = schema.shown(before.document)
            raise FormatError("not an adapter config", where=where, expected="a JSON object", found=found)
        config = not before.is_odd and {**before.document, "save_projection": False} == checkpoint.raw_config
        notes = []
        if not weights:
            notes.append("the tensors changed after stripping, so the original file does not come back byte for byte")
        if not config:
            notes.append("adapter_config.json changed after stripping, so its new content is kept")
        return cls(original, weights, config, tuple(notes))

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        tensors: Tensors,
        record: ProjectionRecord,
        base: BaseRecord,
    ) -> Manifest:
        text = config_text(checkpoint, save_projection=True)
        if self.config and self.original:
            text = self.original.config
        if not self.weights or not self.original:
            return write_checkpoint(folder, text, tensors, record, metadata=foreign_metadata(checkpoint), base=base)
        (folder / CONFIG_NAME).write_bytes(text.encode())
        header = _header(self.original)
        names = _names_in_order(header, tensors) or []
        safetensors.write(folder / WEIGHTS_NAME, header, safetensors.pieces(tensors[name] for name in names))
        return write_manifest(folder, record, base=base)


def _header(original: Original) -> bytes:
    try:
        return base64.b64decode(original.header, validate=True)
    except ValueError as error:
        raise FormatError("not base64", where="the manifest: original.header") from error


def _names_in_order(header: bytes, tensors: Tensors) -> list[str] | None:
    """The header's tensors in the order of their bytes, or None where they are not the ones at hand."""
    _, infos = safetensors.parse_header(header, where="the manifest: original.header")
    found = {
        name: (tensor.dtype if isinstance(tensor, Deferred) else tensor.dtype.name, tensor.shape)
        for name, tensor in tensors.items()
    }
    expected = {name: (info.dtype, info.shape) for name, info in infos.items()}
    return list(infos) if found == expected else None


def _file_sha256(original: Original, tensors: Tensors) -> str | None:
    """Digest of the original header with the tensors at hand behind it."""
    header = _header(original)
    names = _names_in_order(header, tensors)
    if names is None:
        return None
    digest = hashlib.sha256(struct.pack("<Q", len(header)) + header)
    for piece in safetensors.pieces(tensors[name] for name in names):
        digest.update(safetensors.as_bytes(piece))
    return digest.hexdigest()
