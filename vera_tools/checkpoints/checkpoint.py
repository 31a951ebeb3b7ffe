"""A VeRA adapter on disk: adapter_config.json, adapter_model.safetensors, and a manifest where there is one.

Opening reads the config and the header only. Tensors carry PEFT's names: ``base_model.vera_A``, ``base_model.vera_B``,
and per adapted layer ``base_model.model.<module>.vera_lambda_b`` (out_features,) and ``.vera_lambda_d`` (r,).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vera_tools.checkpoints import contents, keys, peft_values
from vera_tools.checkpoints.base import BaseModel, find_renaming, rounds_through
from vera_tools.checkpoints.config import CONFIG_NAME, MOST_BYTES, VeraConfig
from vera_tools.checkpoints.contents import Contents
from vera_tools.checkpoints.contents import Layer as Layer
from vera_tools.checkpoints.default_targets import DEFAULT_TARGETS
from vera_tools.checkpoints.keys import MODULES as MODULES
from vera_tools.checkpoints.keys import ROOT as ROOT
from vera_tools.checkpoints.manifest import MANIFEST_NAME, ORIGINS, Manifest, Origin, ProjectionRecord, most_bytes
from vera_tools.checkpoints.names import copied_from
from vera_tools.checkpoints.placement import Linear, Placement, Unfound, place, unfound
from vera_tools.checkpoints.presence import PICKLE_NAME as PICKLE_NAME
from vera_tools.checkpoints.presence import WEIGHTS_NAME as WEIGHTS_NAME
from vera_tools.checkpoints.presence import refuse_mislabelled
from vera_tools.checkpoints.targeting import Targeting
from vera_tools.dtypes import FLOATS, Array
from vera_tools.errors import CheckFailedError, FormatError, NotVeraError
from vera_tools.files import local, opening
from vera_tools.files.safetensors import TensorFile, TensorInfo
from vera_tools.memo import Memo
from vera_tools.projections.pair import PROJECTIONS, PairShape

#: Characters of the configs whose texts are remembered.
_SHORT_CONFIG = 1 << 16


@dataclass(frozen=True)
class Config:
    """adapter_config.json: its text, how PEFT reads it, and what it says."""

    text: str
    reading: peft_values.Reading
    parsed: VeraConfig


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies.

    Attributes:
        label: What the user called it.
        folder: The folder.
        file: The file in it that was named, or None.
        names: Those of a checkpoint's files that are there.
    """

    label: str
    folder: local.Folder
    file: str | None
    names: tuple[str, ...]

    @classmethod
    def of(cls, reference: str | os.PathLike[str]) -> Place:
        """What a CHECKPOINT argument stands for.

        Raises:
            FormatError: something else is there, or it may not be looked at.
            UsageError: nothing is there, the name is empty, or its scheme is unknown.
            RemoteError: the Hub or a store does not have it, refuses, or cannot be reached.
        """
        folder, file = opening.locate(reference)
        names = local.present(folder, (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, MANIFEST_NAME))
        return cls(opening.spelled(reference), folder, file, tuple(names))

    def read_config(self, memo: Memo | None = None) -> Config | None:
        """The config, which tells other adapters before anything is said about their weights; None where none is there.

        Args:
            memo: Remembers what texts say, for callers that change no config.

        Raises:
            NotVeraError: an adapter of another kind.
            FormatError: unreadable or malformed, or of another kind than the files beside it.
        """
        if CONFIG_NAME not in self.names:
            return None
        text, where = local.read_text(self.folder, CONFIG_NAME, limit=MOST_BYTES), self.folder.path_of(CONFIG_NAME)

        def parse() -> Config:
            reading = peft_values.read(text, where=where)
            return Config(text, reading, VeraConfig.from_dict(reading.document, where=where))

        try:
            if memo is None or len(text) > _SHORT_CONFIG:
                return parse()
            return memo(("config", text), parse, weight=1 + len(text) // 1024)
        except NotVeraError as error:
            refuse_mislabelled(self.folder, self.names, error.kind, where=where)
            raise


class Checkpoint(local.ReadFromFolder):
    """An open checkpoint.

    Attributes:
        label: What the user called it.
        folder: The folder it lies in.
        config: The parsed config.
        config_text: The text of adapter_config.json, or None where only a safetensors file is there.
        reading: How PEFT reads that text.
        weights: The open safetensors file, its tensors under the names that PEFT gives them.
        embedded: What the file's own metadata records, or None.
        embedded_error: Why that record cannot be used, or None.
        keys: Which of them have other names in the file.
        manifest: The manifest beside it, or None.
        manifest_error: Why the manifest that is there cannot be used, or None.
    """

    def __init__(self, place: Place, config: Config | None, *, allow_pickle: bool = False) -> None:
        self.label, self.folder = place.label, place.folder
        self.config_text = config.text if config else None
        self.reading = config.reading if config else peft_values.Reading({})
        self.weights = _open_weights(place, allow_pickle=allow_pickle)
        try:
            usual = contents.of_usual(self.weights)
            if usual is None:
                self._refuse_other_kinds(place)
            self.embedded_error: FormatError | None = None
            try:
                self.embedded = ProjectionRecord.from_metadata(self.weights.metadata, where=self.weights.label)
            except FormatError as error:
                self.embedded, self.embedded_error = None, error
            self.config = config.parsed if config else self._config_from_metadata(place)
            self.keys = keys.Keys()
            if usual is None:
                self.keys = keys.put_right(self.weights, auto_mapping=self.config.auto_mapping)
            self._contents = usual or Contents.of(self.weights.tensors)
            if config is None:
                self.config.save_projection = bool(self.projections)
        except BaseException:
            self.close()
            raise
        self._placement: Placement | None = None
        self.manifest: Manifest | None = None
        self.manifest_error: FormatError | CheckFailedError | None = None
        if MANIFEST_NAME in place.names:
            try:
                limit = most_bytes(len(self.weights.header))
                text = local.read_text(self.folder, MANIFEST_NAME, limit=limit)
                self.manifest = Manifest.from_json(text, where=self.folder.path_of(MANIFEST_NAME))
            except (FormatError, CheckFailedError) as error:
                self.manifest_error = error

    @classmethod
    def open(cls, reference: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
        """Open a folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.

        Args:
            reference: What to open.
            allow_pickle: Read a legacy adapter_model.bin too, by torch with weights_only.

        Raises:
            NotVeraError: an adapter of another kind.
            FormatError: unreadable or malformed.
            UsageError: nothing is there, the name is empty, or its scheme is unknown.
        """
        place = Place.of(reference)
        return cls(place, place.read_config(), allow_pickle=allow_pickle)

    def close(self) -> None:
        """Close the weights."""
        self.weights.close()

    def refuse_unusable_manifest(self) -> None:
        """Refuse to go on where a manifest is there and says nothing that can be relied on.

        Raises:
            FormatError: it cannot be read.
            CheckFailedError: it was changed after it was written.
        """
        if self.manifest_error is not None:
            raise self.manifest_error

    @property
    def raw_config(self) -> dict[str, Any]:
        """adapter_config.json with the values that PEFT takes its values for, nothing filled in."""
        return self.config.to_dict() if self.config_text is None else dict(self.reading.document)

    @cached_property
    def projections(self) -> dict[str, TensorInfo]:
        """The stored projections, by their short names "vera_A" and "vera_B"."""
        return dict(self._contents.projections)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """The adapted modules, by name, in the file's order."""
        return dict(self._contents.layers)

    @property
    def vector_infos(self) -> dict[str, TensorInfo]:
        """The layers' vectors, by their names in the file."""
        return {i.name: i for layer in self._contents.layers.values() for i in (layer.lambda_b, layer.lambda_d) if i}

    @cached_property
    def other_tensors(self) -> dict[str, TensorInfo]:
        """Whatever is neither a projection nor a VeRA vector: biases, saved modules, and what does not belong."""
        return dict(self._contents.others)

    def unadapted(self, base: BaseModel | None = None) -> tuple[str, ...]:
        """The modules that have vectors here although the config does not adapt them; PEFT drops those.

        Args:
            base: The base, where it is at hand: see `targeting_on`.

        Raises:
            FormatError: a regular expression takes too long.
        """
        targeting = self.targeting_on(base) or self.targeting
        targeting.prepare(self.layers)
        return tuple(module for module in self.layers if not targeting.adapts(module))

    @cached_property
    def targeting(self) -> Targeting:
        """What the config says of modules."""
        return self.config.targeting()

    def targeting_on(self, base: BaseModel | None) -> Targeting | None:
        """What the config says of modules of a base, whose model type has PEFT's default where target_modules is null.

        None where that default is not known: no base is at hand, it does not say its type, or PEFT has none for it.
        """
        if self.config.target_modules is not None:
            return self.targeting
        targets = DEFAULT_TARGETS.get((base.model_type if base else None) or "")
        return None if targets is None else replace(self.config, target_modules=targets).targeting()

    def is_copy(self, name: str) -> bool:
        """Whether PEFT wrote this tensor beside the saved one that it loads instead (see `names.copied_from`)."""
        return any(original in self.weights.tensors for original in copied_from(name))

    @property
    def is_odd(self) -> bool:
        """Whether PEFT would have written its config or its tensors' names otherwise; what is written is put right."""
        return self.reading.is_odd or bool(self.keys.odd)

    @property
    def widest(self) -> int:
        """Elements of the longest vera_lambda_b: the out_max that this adapter's own layers give; 0 without layers."""
        return max((layer.lambda_b.size for layer in self.layers.values() if layer.lambda_b), default=0)

    @property
    def recorded(self) -> ProjectionRecord | None:
        """Recipe, shapes and digests of the projections: from the manifest, else from the file's own metadata.

        Where both tell of the same pair, what is less certain of the two origins holds.
        """
        if self.manifest is None:
            return self.embedded
        record, own = self.manifest.projections, self.embedded
        if own and own.sha256 == record.sha256:
            return replace(record, origin=max(record.origin, own.origin, key=ORIGINS.index))
        return record

    def origin_of(self, sha256: Mapping[str, str]) -> Origin:
        """How a stored pair of these digests is known: as the record of it says, else from the file."""
        record = self.recorded
        return record.origin if record is not None and record.sha256 == sha256 else "stored"

    def vectors(self, layer: Layer) -> tuple[Array, Array] | None:
        """lambda_b (out_features,) and lambda_d (r,) of a layer; None where the file lacks one of them.

        Raises:
            CheckFailedError: they are no vectors.
        """
        if layer.lambda_b is None or layer.lambda_d is None:
            return None
        for info in (layer.lambda_b, layer.lambda_d):
            if len(info.shape) != 1 or info.dtype not in FLOATS:
                raise CheckFailedError(
                    "not a vector of a dtype that VeRA computes in",
                    where=f"{self.weights.label}: {info.name}",
                    expected="one dimension",
                    found=f"{info.dtype} {list(info.shape)}",
                )
        return self.weights.read(layer.lambda_b.name), self.weights.read(layer.lambda_d.name)

    def placement(self, base: BaseModel) -> Placement:
        """What this adapter's names mean in a base.

        Raises:
            CheckFailedError: the modules fit as well in several places of the base.
        """
        if self._placement is None or self._placement.base is not base:
            saved = [name.removeprefix(MODULES).replace(".base_layer.", ".") for name in self.other_tensors]
            self._placement = place(base, [self.config], self.layers, saved)
        return self._placement

    def unfound(self, base: BaseModel) -> Unfound | None:
        """Adapted modules that PEFT does not find by their names (see `placement.unfound`)."""
        return unfound(base, self.config, self.layers)

    def linears(self, base: BaseModel) -> list[Linear]:
        """The base's weight for every adapted module, in the file's order.

        Raises:
            CheckFailedError: a module that the base lacks, or whose shape does not fit.
        """
        placement = self.placement(base)
        return [
            placement.linear(layer.module, out_features=layer.lambda_b.size)
            for layer in self.layers.values()
            if layer.lambda_b is not None
        ]

    def in_features(self, base: BaseModel | None = None) -> dict[str, int]:
        """in_features by adapted module, as far as the base, or a manifest made with the base at hand, tells them.

        Raises:
            CheckFailedError: the base does not fit.
        """
        if base is not None:
            return {linear.module: linear.in_features for linear in self.linears(base)}
        weights = self.manifest.base.weights if self.manifest else {}
        if not weights or not self.layers:
            return {}
        try:
            renaming = find_renaming(self.layers, weights, where=self.label)
        except CheckFailedError:
            return {}
        widths = {}
        for module, layer in self.layers.items():
            record = weights.get(renaming(module) + ".weight")
            if record and len(record.shape) == 2 and layer.lambda_b and layer.lambda_b.size in record.shape:
                rows, columns = record.shape
                widths[module] = columns if rows == layer.lambda_b.size else rows
        return widths

    def pair_shape(self, base: BaseModel | None = None) -> PairShape | None:
        """r, in_max and out_max: from the stored projections, a record, or the base; None where nothing says in_max.

        Raises:
            FormatError: the stored projections are not matrices that fit each other.
            CheckFailedError: the base does not fit, or nothing is adapted.
        """
        if len(self.projections) == 2:
            a, b = (self.projections[name].shape for name in PROJECTIONS)
            if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
                raise FormatError(
                    "vera_A and vera_B do not fit each other",
                    where=self.weights.label,
                    expected="(r, in_max) and (out_max, r)",
                    found=f"{list(a)} and {list(b)}",
                )
            return PairShape(a[0], a[1], b[0])
        if self.recorded:
            return self.recorded.shape
        if base:
            linears = self.linears(base)
            if not linears:
                raise CheckFailedError("nothing is adapted", where=self.label, expected="a vera_lambda_b")
            return PairShape(
                self.config.r,
                max(linear.in_features for linear in linears),
                max(linear.out_features for linear in linears),
            )
        return None

    def _refuse_other_kinds(self, place: Place) -> None:
        if found := contents.foreign(self.weights.tensors):
            name, kind = found
            what, where = f"this holds {kind} tensors, not VeRA's", f"{self.weights.label}: {name}"
            if self.config_text is not None:
                raise FormatError(what, where=where, hint=f"{CONFIG_NAME} is a VeRA adapter's: copy both files again")
            refuse_mislabelled(self.folder, place.names, kind, where=self.weights.label)
            raise NotVeraError(what, kind=kind, where=where)

    def _config_from_metadata(self, place: Place) -> VeraConfig:
        if place.file is None or self.embedded is None or self.embedded.recipe is None:
            hint = "only files written by vera-tools say in their metadata what they are"
            if place.file is None:  # an adapter that lost its config, which PEFT does not load
                hint = "a file that vera-tools wrote says itself what it is, where it is named and not its folder"
            missing = FormatError(f"there is no {CONFIG_NAME}", where=self.folder.label, hint=hint)
            raise self.embedded_error or missing
        return VeraConfig(r=self.embedded.shape.r, projection_prng_key=self.embedded.recipe.prng_key)


def assumed_rounding(checkpoint: Checkpoint, base: BaseModel | None) -> str | None:
    """The dtype that PEFT would round a regenerated pair through on this base; None for float32 or no base.

    Raises:
        CheckFailedError: the base does not fit.
    """
    return None if base is None else rounds_through(linear.info.dtype for linear in checkpoint.linears(base))


def _open_weights(place: Place, *, allow_pickle: bool) -> TensorFile:
    folder, names = place.folder, place.names
    if place.file and place.file not in (CONFIG_NAME, MANIFEST_NAME, PICKLE_NAME):
        return TensorFile(folder.open(place.file))
    if WEIGHTS_NAME in names:
        return TensorFile(folder.open(WEIGHTS_NAME))
    if PICKLE_NAME in names:
        if allow_pickle:
            from vera_tools.files.pickle import read_pickle

            return TensorFile(read_pickle(folder, PICKLE_NAME))
        raise FormatError(
            "pickles can run code, so vera-tools does not read them",
            where=folder.path_of(PICKLE_NAME),
            expected=WEIGHTS_NAME,
            hint="pass --allow-pickle to read it through torch's weights_only loader, or save it again with a PEFT "
            "that writes safetensors",
        )
    if CONFIG_NAME in names:
        raise FormatError("the weights are missing", where=folder.label, expected=WEIGHTS_NAME)
    hint = "`vera-tools verify -R` finds the checkpoints below a folder"
    if any(name == "config.json" or name.startswith("model") for name in folder.names()):
        hint = "this looks like a base model: name the adapter, and the base with --base"
    raise FormatError("not a checkpoint", where=folder.label, expected=f"{CONFIG_NAME} and {WEIGHTS_NAME}", hint=hint)
