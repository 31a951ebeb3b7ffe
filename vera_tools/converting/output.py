"""What the conversions share: where they write to, what they carry over, and what their reports have in common."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_tools.checkpoints import destination
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import PICKLE_NAME, ROOT, WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME, METADATA_KEY, Manifest, ProjectionRecord
from vera_tools.errors import FormatError, SignatureWarning, UsageError
from vera_tools.files import atomic, local, renaming
from vera_tools.files.safetensors import read_otherwise
from vera_tools.files.store_client import Address
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.report import Report

#: Files that sign or hash a checkpoint: OpenSSF model signing, sigstore bundles, OpenPGP, minisign, checksum lists.
SIGNATURES = ("*.sig", "*.sigstore", "*.sigstore.json", "*.asc", "*.gpg", "*.p7s", "*.minisig", "*sha256*", "*sha512*")
#: Weights and training state: what lies beside an adapter and is no part of it.
_HEAVY = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.npz")


@dataclass(frozen=True)
class Destination:
    """Where a conversion writes to.

    Attributes:
        path: The output folder; the checkpoint's own where it is converted in place.
        in_place: The checkpoint itself is replaced.
        carried_over: Files beside the checkpoint that go into the output as they are.
        left_out: Files beside the checkpoint that do not.
        dry_run: Nothing is written there: the output is made in a folder for temporary files, and removed.
    """

    path: Path | Address
    in_place: bool
    overwrite: bool
    carried_over: tuple[str, ...]
    left_out: tuple[str, ...]
    _checkpoint: Checkpoint = field(repr=False)
    dry_run: bool = False

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        output: str | os.PathLike[str] | None,
        *,
        in_place: bool,
        overwrite: bool,
        base: str | os.PathLike[str] | None = None,
        dry_run: bool = False,
    ) -> Destination:
        """Check the arguments that say where to, before any work is done.

        Raises:
            UsageError: neither or both of `output` and `in_place`; the output cannot be there (`refuse_output`);
                in place on the Hub or in a store, or on a weights file of another name.
            FormatError, CheckFailedError: the manifest cannot be used, and its content would be lost or handed on.
        """
        if (output is None) != in_place:
            raise UsageError("say either where to write (-o) or --in-place", where=checkpoint.label)
        checkpoint.refuse_unusable_manifest()
        own = {CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, PICKLE_NAME, Path(checkpoint.weights.label).name}
        others = [name for name in checkpoint.folder.names() if name not in own]
        signatures = tuple(name for name in others if _is_one_of(name, SIGNATURES))
        path: Path | Address
        if in_place:
            path = _own_folder(checkpoint)
            if signatures:
                message = (
                    f"{path}: what is signed or hashed here changes; these no longer hold: {', '.join(signatures)}"
                )
                warnings.warn(message, SignatureWarning, stacklevel=3)
            return cls(path, True, True, tuple(others), (), checkpoint, dry_run)
        assert output is not None
        here = checkpoint.folder.path if isinstance(checkpoint.folder, local.LocalFolder) else None
        inputs = (here or checkpoint.folder.label, base)
        path = destination.refuse_folder(output, overwrite=overwrite, inputs=inputs)
        others = [name for name in others if not name.startswith(".")]  # git's and the system's
        left_out = tuple(name for name in others if _is_one_of(name, SIGNATURES + _HEAVY))
        carried_over = tuple(name for name in others if name not in left_out)
        for name in (*own.intersection(checkpoint.folder.names()), *carried_over):
            checkpoint.folder.refuse_leaving(name)
        return cls(path, False, overwrite, carried_over, left_out, checkpoint, dry_run)

    @contextlib.contextmanager
    def open(self, base: BaseModel | None = None) -> Iterator[Path]:
        """An empty folder to write into, which becomes the output whole, or not at all.

        Args:
            base: What else was read.

        Raises:
            FormatError: checkpoint or base were changed while they were read.
            UsageError: something has appeared where the output goes.
            VeraToolsError: the file system, or the store, refused.
        """
        read = self._checkpoint.folder

        def check(at: Path | None = None) -> None:
            read.check_unchanged(at)
            if base is not None:
                base.check_unchanged()

        if self.dry_run:
            self._refuse_unwritable()
            place = Path(tempfile.gettempdir()) if isinstance(self.path, Address) else self.path
            with atomic.errors(place), tempfile.TemporaryDirectory(prefix="vera-tools-dry-run-") as temporary:
                yield Path(temporary)
                check()
            return
        if self.in_place:
            assert isinstance(self.path, Path)
            with atomic.replacement(self.path, drop={PICKLE_NAME}, check=check) as folder:
                yield folder
            read.forget()  # what lies there now is ours
            return
        with (
            destination.on_disk(self.path) as path,
            atomic.folder(path, overwrite=self.overwrite) as folder,
        ):
            yield folder
            for name in self.carried_over:
                local.copy(read, name, folder / name)
            check()

    def _refuse_unwritable(self) -> None:
        if isinstance(self.path, Address):
            return  # the store was asked when the arguments were checked
        if self.in_place and not renaming.can_exchange():
            raise atomic.no_exchange(self.path)
        atomic.refuse_forbidden(self.path)


@dataclass(frozen=True, kw_only=True, repr=False)
class ConversionReport(Report):
    """What every conversion reports.

    Attributes:
        path: The checkpoint.
        output: The folder that was written.
        in_place: It took the checkpoint's place.
        projections: Recipe, shapes and digests of the pair.
        origin: How they are known: "stored", "recorded" or "assumed".
        input_bytes: Size of the weights file that was read.
        output_bytes: Size of the weights file that was written.
        manifest_bytes: Size of the manifest that was written.
        carried_over: Files that were taken over as they are.
        left_out: Files that were not.
        notes: What else the caller should know, one sentence each.
        dry_run: Nothing was written: it tells of what would be.
    """

    path: str
    output: str
    in_place: bool
    projections: ProjectionRecord
    origin: str
    input_bytes: int
    output_bytes: int
    manifest_bytes: int
    carried_over: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()
    dry_run: bool = False

    def body(self) -> dict[str, Any]:
        """The part of the document that all conversions have."""
        return {
            "path": self.path,
            "output": self.output,
            "in_place": self.in_place,
            **({"dry_run": True} if self.dry_run else {}),
            **(self.projections.to_dict() | {"origin": self.origin}),  # a report's origin is another question
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "manifest_bytes": self.manifest_bytes,
            "carried_over": list(self.carried_over),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }


def common(checkpoint: Checkpoint, target: Destination, manifest: Manifest, output_bytes: int) -> dict[str, Any]:
    """The fields of a `ConversionReport` that follow from what was written."""
    return {
        "path": checkpoint.label,
        "output": str(target.path),
        "in_place": target.in_place,
        "dry_run": target.dry_run,
        "projections": manifest.projections,
        "input_bytes": checkpoint.weights.size,
        "output_bytes": output_bytes,
        "manifest_bytes": len(manifest.to_json().encode()),
        "carried_over": target.carried_over,
        "left_out": target.left_out,
    }


def config_text(checkpoint: Checkpoint, *, save_projection: bool) -> str:
    """The text of adapter_config.json with this one key set; unchanged where it says so already, as PEFT writes it."""
    unchanged = checkpoint.config.save_projection is save_projection and not checkpoint.reading.is_odd
    if checkpoint.config_text is not None and unchanged:
        return checkpoint.config_text
    return json.dumps({**checkpoint.raw_config, "save_projection": save_projection}, indent=2) + "\n"


def corrections(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What is written otherwise than it was read, because PEFT reads it otherwise or not at all; one sentence each."""
    notes = []
    if odd := checkpoint.keys.odd:
        notes.append(f"{len(odd)} tensors have PEFT's names now, {odd[0].found} is {odd[0].meant}")
    if repeated := checkpoint.keys.repeated:
        notes.append(f"{len(repeated)} tensors stood in the file twice, {repeated[0]} for one")
    if checkpoint.reading.is_odd:
        reading = checkpoint.reading
        why = (*reading.refused, *reading.refused_before_21, *reading.tolerated)[0]
        notes.append(f"adapter_config.json was put right: {why}")
    return tuple(notes)


def foreign_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The file's metadata entries that are not ours."""
    return {key: value for key, value in checkpoint.weights.metadata.items() if key != METADATA_KEY}


def refuse_miscopied(manifest: Manifest, sha256: Mapping[str, str], *, where: str) -> None:
    """Refuse an output of other bytes than those that were checked: a disk may give others when it is asked again.

    Args:
        manifest: The output's, made from what was written, with the record of the pair.
        sha256: Digests of the tensors as they were checked, by name; one that is in only one of the two is let be.
        where: The checkpoint that they were read from.

    Raises:
        FormatError: a tensor is another.
    """
    written = {name: record.sha256 for name, record in manifest.tensors.items() if record.sha256 is not None}
    written |= {ROOT + name: digest for name, digest in manifest.projections.sha256.items()}
    for name, found in written.items():
        checked = sha256.get(name, found)
        if found != checked:
            raise read_otherwise(name, where=where, before=checked, now=found)


def refuse_half_a_pair(checkpoint: Checkpoint) -> None:
    """Raise FormatError where only one of vera_A and vera_B is stored."""
    if len(checkpoint.projections) == 1:
        (present,) = checkpoint.projections
        (missing,) = set(PROJECTIONS) - {present}
        raise FormatError(f"{present} is stored and {missing} is not", where=checkpoint.weights.label)


def _own_folder(checkpoint: Checkpoint) -> Path:
    folder = checkpoint.folder
    if not isinstance(folder, local.LocalFolder):
        raise UsageError(
            "only what is on disk is changed in place", where=checkpoint.label, hint="write to a folder (-o)"
        )
    name = Path(checkpoint.weights.label).name
    if name not in (WEIGHTS_NAME, PICKLE_NAME):
        raise UsageError(
            "only a whole checkpoint is converted in place",
            where=checkpoint.label,
            expected=f"a folder with {WEIGHTS_NAME}",
            found=name,
            hint="write to a folder (-o)",
        )
    return folder.path


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in patterns)
