"""Every checkpoint that vera-tools writes ends here: config, tensors and a manifest made from what was written."""

from __future__ import annotations

import contextlib
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vera_tools import installed
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME, VeraConfig
from vera_tools.checkpoints.manifest import (
    MANIFEST_NAME,
    BaseRecord,
    Manifest,
    Original,
    ProjectionRecord,
    TensorRecord,
)
from vera_tools.dtypes import Array
from vera_tools.files import atomic, local, safetensors
from vera_tools.files.safetensors import Deferred, TensorFile


def write_checkpoint(
    folder: Path,
    config: VeraConfig | str,
    tensors: Mapping[str, Array | Deferred],
    record: ProjectionRecord,
    *,
    metadata: Mapping[str, str] | None = None,
    base: BaseModel | BaseRecord | None = None,
    original: Original | None = None,
) -> Manifest:
    """Write adapter_config.json, adapter_model.safetensors and vera_manifest.json into an existing, empty folder.

    Use it inside `atomic.folder`, which makes the whole appear at once.

    Args:
        folder: Where to.
        config: The config, or the exact text of adapter_config.json.
        tensors: Every tensor, by its full name, the projections included where they are to be stored.
        record: Recipe, shapes and digests of the projections. Its digests are over the dtype the pair is stored in.
        metadata: Entries for the safetensors metadata beside the record's own, which win.
        base: Named in the manifest, with its adapted weights' shapes and dtypes; or what `base_record` knows of it.
        original: What the checkpoint was stripped from.

    Returns:
        The manifest that was written.
    """
    text = config if isinstance(config, str) else config.to_json()
    (folder / CONFIG_NAME).write_bytes(text.encode())
    safetensors.save(folder / WEIGHTS_NAME, tensors, {**(metadata or {}), **record.to_metadata()})
    return write_manifest(folder, record, base=base, original=original)


def write_manifest(
    folder: Path,
    record: ProjectionRecord,
    *,
    base: BaseModel | BaseRecord | None = None,
    original: Original | None = None,
) -> Manifest:
    """Write vera_manifest.json for the checkpoint that lies in `folder`, from the bytes that lie there."""
    with Checkpoint.open(folder) as checkpoint:
        manifest = describe(checkpoint, record, base=base, original=original)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_json().encode())
    return manifest


@contextlib.contextmanager
def replaced_files(folder: Path, *, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Hand out an empty folder; on leaving without an error its checkpoint takes the place of that in `folder`.

    A trainer's folder holds more than the adapter, so the files are replaced one by one, each in one step, while every
    process that asks for it is kept out.

    Args:
        folder: The folder of a checkpoint.
        check: Called before the first file is replaced. Where it raises, none is.

    Raises:
        FormatError: another process replaced or wrote to one of the files before the last was in its place.
        VeraToolsError: the file system refused.
    """
    with atomic.errors(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder) as at:
        yield Path(at)
        with atomic.alone(folder):
            check()
            ours = local.LocalFolder(folder)
            for name in (WEIGHTS_NAME, CONFIG_NAME, MANIFEST_NAME):
                with atomic.file(folder / name) as temporary:
                    shutil.copyfile(Path(at) / name, temporary)
                ours.open(name).close()
            ours.check_unchanged()


def describe(
    checkpoint: Checkpoint,
    record: ProjectionRecord,
    *,
    base: BaseModel | BaseRecord | None = None,
    digest_base: bool = False,
    original: Original | None = None,
) -> Manifest:
    """The manifest of an open checkpoint whose projections are known.

    Args:
        checkpoint: The checkpoint; every tensor in it is hashed.
        record: Its projections, from `projections.resolve`.
        base: Its base model; what an earlier manifest says of the base is kept where None.
        digest_base: Hash the adapted weights of the base too.
        original: What the checkpoint was stripped from; an earlier manifest's is kept where None.

    Raises:
        CheckFailedError: the base does not fit.
    """
    sha256 = checkpoint.weights.digests() | {ROOT + name: digest for name, digest in record.sha256.items()}
    tensors = {
        name: TensorRecord(info.shape, info.dtype, sha256[name]) for name, info in checkpoint.weights.tensors.items()
    }
    earlier = checkpoint.manifest
    return _made_here(
        projections=record,
        tensors=tensors,
        config=checkpoint.raw_config,
        metadata=checkpoint.weights.metadata,
        base=base if isinstance(base, BaseRecord) else _describe_base(checkpoint, base, digest_base=digest_base),
        original=original or (earlier.original if earlier else None),
    )


def describe_weights(path: Path, config: dict[str, Any], record: ProjectionRecord, *, base: BaseRecord) -> Manifest:
    """The manifest of a weights file whose tensors are not VeRA's, and were made of a pair.

    Args:
        path: The safetensors file; every tensor in it is hashed.
        config: The adapter_config.json beside it.
        record: The pair.
        base: What is known of the base model.
    """
    with TensorFile.open(path) as file:
        sha256 = file.digests()
        tensors = {name: TensorRecord(info.shape, info.dtype, sha256[name]) for name, info in file.tensors.items()}
        return _made_here(projections=record, tensors=tensors, config=config, metadata=file.metadata, base=base)


def base_record(checkpoint: Checkpoint, base: BaseModel | None) -> BaseRecord:
    """What is known of the base of a checkpoint that another one is made from.

    Digests that its manifest has are kept: they are of the base that it was recorded with, and a base that is named to
    tell shapes does not change which that is.

    Raises:
        CheckFailedError: the base does not fit.
    """
    found = _describe_base(checkpoint, base, digest_base=False)
    earlier = checkpoint.manifest.base.weights if checkpoint.manifest else {}

    def kept(name: str, record: TensorRecord) -> TensorRecord:
        before = earlier.get(name)
        return before if before and (before.shape, before.dtype) == (record.shape, record.dtype) else record

    return replace(found, weights={name: kept(name, record) for name, record in found.weights.items()})


def _made_here(**fields: Any) -> Manifest:
    """A manifest that names this machine and its torch."""
    return Manifest(**fields, torch=installed.version("torch"), platform=f"{platform.system()}-{platform.machine()}")


def _describe_base(checkpoint: Checkpoint, base: BaseModel | None, *, digest_base: bool) -> BaseRecord:
    config = checkpoint.config
    if base is None:
        earlier = checkpoint.manifest.base if checkpoint.manifest else BaseRecord()
        return BaseRecord(
            config.base_model_name_or_path or earlier.name,
            config.revision or earlier.revision,
            earlier.weights,
        )
    weights = {}
    for info in (part.info for linear in checkpoint.linears(base) for part in linear.parts):
        file = base.files[base.tensors[info.name][0]]
        if info.name not in weights:
            digest = file.sha256(info.name) if digest_base else None
            weights[info.name] = TensorRecord(info.shape, info.dtype, digest)
    return BaseRecord(config.base_model_name_or_path or None, config.revision, weights)
