"""vera_manifest.json: what a checkpoint consists of, so that it can be proven later. This module does no I/O.

A manifest lies beside adapter_config.json. It holds the recipe and the digests of vera_A and vera_B (stored or not),
the shape, dtype and sha256 of every tensor, the config, and what was adapted. The recipe and the two digests also stand
in the safetensors metadata of files that vera-tools writes (`ProjectionRecord`), so that a single file is enough.

The document holds a digest of itself, over its canonical text (`files.canonical_json`): much of what it says of the
base and of the original files can be compared with nothing else.
"""

from __future__ import annotations

import base64
import functools
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from vera_tools import schema
from vera_tools._version import TOOL
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files import canonical_json
from vera_tools.files.canonical_json import Plain
from vera_tools.files.strict_json import parse_json
from vera_tools.memo import Memo
from vera_tools.projections.pair import PROJECTIONS, PairShape
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Document

MANIFEST_NAME = "vera_manifest.json"
#: The member that holds the digest of all others.
DIGEST = "digest"
METADATA_KEY = "vera_tools"
#: Bytes of a manifest beside its records of tensors.
MOST_BYTES = 4 << 20
_SHA256 = re.compile("[0-9a-f]{64}")

#: How it is known that this recipe made the trained pair: taken from the pair in its file, or in the memory of the
#: process that trained it; stated by whoever recorded it; or assumed, because PEFT usually draws so.
Origin = Literal["stored", "live", "stated", "assumed"]

#: From the most to the least that is known.
ORIGINS: tuple[Origin, ...] = ("stored", "live", "stated", "assumed")
#: Those that rest on somebody's word or on a guess, and not on the pair itself.
ASSUMED: frozenset[Origin] = frozenset({"stated", "assumed"})


def most_bytes(header: int) -> int:
    """Bytes of the largest manifest that is read beside a safetensors file whose header has so many.

    It has a record for each tensor of the file, and for as many of the base, each a few times as long as the header's.
    """
    return MOST_BYTES + 12 * header


@dataclass(frozen=True, slots=True)
class TensorRecord(Document):
    """Shape, dtype and sha256 (little-endian, row-major bytes) of one tensor; no sha256 where it was not at hand."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {"shape": list(self.shape), "dtype": self.dtype, "sha256": self.sha256}  # one for every tensor

    @classmethod
    def from_dict(cls, data: Any, *, where: str) -> TensorRecord:
        """The inverse of `to_dict`.

        Raises:
            FormatError: not a record by schemas/tensor.v1.schema.json.
        """
        # By hand, because a manifest has one for every tensor and jsonschema takes 0.1 ms for each; where this is in
        # doubt, the schema says what is wrong.
        try:
            shape, dtype, sha256 = data["shape"], data["dtype"], data["sha256"]
            good = len(data) == 3 and type(dtype) is str and (sha256 is None or _SHA256.fullmatch(sha256) is not None)
            good = good and type(shape) is list
            for size in shape:
                good = good and type(size) is int and size >= 0
        except (KeyError, TypeError):
            good = False
        if not good:
            schema.validate(data, "tensor.v1", where=where)
            raise FormatError("not a tensor's record", where=where)
        return cls(tuple(shape), dtype, sha256)


@dataclass(frozen=True)
class ProjectionRecord:
    """The projections that a checkpoint was trained with.

    Attributes:
        recipe: What makes them, or None where no known recipe does.
        origin: How it is known that these were trained with. It stays with the pair in whatever is made from it.
        shape: r, in_max, out_max.
        dtype: The dtype the digests are over.
        sha256: Digest of vera_A and of vera_B, by name.
    """

    recipe: Recipe | None
    origin: Origin
    shape: PairShape
    dtype: str
    sha256: dict[str, str]

    @property
    def assumed(self) -> bool:
        """Whether the recipe rests on somebody's word, or on a guess, and not on the pair itself."""
        return self.origin in ASSUMED

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest's top level and in the safetensors metadata."""
        return {
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "assumed": self.assumed,
            "origin": self.origin,
            **vars(self.shape),  # r, in_max and out_max
            "projections": {
                name: TensorRecord(self.shape.of(name), self.dtype, self.sha256[name]).to_dict() for name in PROJECTIONS
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str) -> ProjectionRecord:
        """The inverse of `to_dict`, for data that a schema has passed.

        Raises:
            FormatError: parts of it contradict each other.
        """
        shape = PairShape(data["r"], data["in_max"], data["out_max"])
        pair = {
            name: TensorRecord.from_dict(data["projections"][name], where=f"{where}: projections.{name}")
            for name in PROJECTIONS
        }
        for name, record in pair.items():
            if record.shape != shape.of(name):
                raise FormatError(
                    "contradicts r, in_max and out_max",
                    where=f"{where}: projections.{name}.shape",
                    expected=str(list(shape.of(name))),
                    found=str(list(record.shape)),
                )
        if pair["vera_A"].dtype != pair["vera_B"].dtype:
            raise FormatError("vera_A and vera_B have different dtypes", where=f"{where}: projections")
        recipe = None if data["recipe"] is None else Recipe.from_dict(data["recipe"], where=f"{where}: recipe")
        digests = {name: record.sha256 or "" for name, record in pair.items()}
        # Version 0.1.0 wrote no origin.
        origin: Origin = data.get("origin", "assumed" if data["assumed"] else "stored")
        found = cls(recipe, origin, shape, pair["vera_A"].dtype, digests)
        if found.assumed != data["assumed"]:
            raise FormatError(
                "contradicts assumed",
                where=f"{where}: origin",
                expected="stated or assumed" if data["assumed"] else "stored or live",
                found=origin,
            )
        return found

    def to_metadata(self) -> dict[str, str]:
        """The safetensors metadata of a file that vera-tools writes."""
        return {
            "format": "pt",
            METADATA_KEY: json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], *, where: str) -> ProjectionRecord | None:
        """What a file's metadata records, or None where vera-tools did not write it.

        Raises:
            FormatError: an entry of ours that does not hold what it should.
        """
        if METADATA_KEY not in metadata:
            return None
        text, where = metadata[METADATA_KEY], f"{where}: metadata {METADATA_KEY}"

        def parse() -> ProjectionRecord:
            data = parse_json(text, where=where)
            schema.validate(data, "projections.v1", where=where)
            return cls.from_dict(data, where=where)

        return _in_metadata(text, parse, weight=len(text)) if len(text) <= _SHORT else parse()


#: Characters of the records in metadata that are remembered, each and all together: in a registry most are the same.
_SHORT, _REMEMBERED = 1 << 12, 1 << 19
_in_metadata = Memo(_REMEMBERED)


@dataclass(frozen=True)
class BaseRecord:
    """The base model as far as it is known: name, revision and the adapted weights."""

    name: str | None = None
    revision: str | None = None
    weights: dict[str, TensorRecord] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        weights = {name: record.to_dict() for name, record in sorted(self.weights.items())}
        return {"name": self.name, "revision": self.revision, "weights": weights}


@dataclass(frozen=True)
class Original(Document):
    """The files that a checkpoint was stripped from, so that embedding gives them back byte for byte.

    Attributes:
        header: The safetensors header's bytes, as base64.
        config: The text of adapter_config.json.
        sha256: Digest of the whole safetensors file.
    """

    header: str
    config: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One checkpoint's manifest.

    Attributes:
        projections: Recipe, shapes and digests of the pair.
        tensors: Every tensor in the file, by its full name.
        config: The parsed adapter_config.json.
        metadata: The safetensors metadata.
        base: What is known of the base model.
        torch: Version of the torch that was installed when it was written, or None.
        platform: Operating system and machine it was written on.
        tool: Name and version of the program that wrote it.
        original: Set by `strip-projections` only.
        covered: Whether it holds a digest of itself. Version 0.1.0 wrote none.
    """

    projections: ProjectionRecord
    tensors: dict[str, TensorRecord]
    config: dict[str, Any]
    metadata: dict[str, str]
    base: BaseRecord
    torch: str | None
    platform: str
    tool: dict[str, str] = field(default_factory=lambda: dict(TOOL))
    original: Original | None = None
    covered: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The document, its digest included, whether or not it was read from one that has none."""
        document = {
            "schema": "vera-tools/manifest/v1",
            "tool": self.tool,
            "torch": self.torch,
            "platform": self.platform,
            **self.projections.to_dict(),
            "tensors": {name: record.to_dict() for name, record in sorted(self.tensors.items())},
            "config": self.config,
            "metadata": self.metadata,
            "base": self.base.to_dict(),
            "original": self.original.to_dict() if self.original else None,
        }
        return {**document, DIGEST: canonical_json.sha256(document)}

    def to_json(self) -> str:
        """The file's text. The same manifest always gives the same bytes."""
        return self._text

    @functools.cached_property
    def _text(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str = MANIFEST_NAME) -> Manifest:
        """Parse the file's text.

        Raises:
            FormatError: not a manifest; the message names the path in the document.
            CheckFailedError: it is one, and was changed since its digest was taken.
        """
        data = parse_json(text, where=where)
        schema.validate(_without_records(data), "manifest.v1", where=where)
        base = data["base"]
        found = cls(
            projections=ProjectionRecord.from_dict(data, where=where),
            tensors=_records(data["tensors"], where=f"{where}: tensors"),
            config=data["config"],
            metadata=data["metadata"],
            base=BaseRecord(base["name"], base["revision"], _records(base["weights"], where=f"{where}: base.weights")),
            torch=data["torch"],
            platform=data["platform"],
            tool=data["tool"],
            original=Original(**data["original"]) if data["original"] else None,
            covered=DIGEST in data,
        )
        if found.covered:
            _check_digest(data, where=where)
        return found


def _check_digest(document: dict[str, Any], *, where: str) -> None:
    # By the schema, nothing else than the config can hold a float.
    covered = {n: value if n == "config" else Plain(value) for n, value in document.items() if n != DIGEST}
    try:
        found = canonical_json.sha256(covered)
    except RecursionError as error:
        raise FormatError("nested too deeply for a manifest", where=where) from error
    if found != document[DIGEST]:
        raise CheckFailedError(
            "the manifest was changed after it was written",
            where=f"{where}: {DIGEST}",
            expected=f"sha256 {document[DIGEST]}",
            found=found,
            hint="copy it again from where it was written, or delete it and record the checkpoint anew",
        )


def _records(data: dict[str, Any], *, where: str) -> dict[str, TensorRecord]:
    return {name: TensorRecord.from_dict(record, where=f"{where}.{name}") for name, record in data.items()}


def _is_base64(text: Any) -> bool:
    try:
        return isinstance(text, str) and base64.b64decode(text, validate=True) is not None
    except ValueError:
        return False


def _without_records(data: Any) -> Any:
    """The document without what may be long: `TensorRecord.from_dict` checks the entries of its two tables."""
    if not isinstance(data, dict):
        return data
    short = dict(data)
    if isinstance(short.get("tensors"), dict):
        short["tensors"] = {}
    if isinstance(metadata := short.get("metadata"), dict):  # whoever made the file may have put anything into it
        wrong = {key: value for key, value in metadata.items() if not isinstance(value, str)}
        short["metadata"] = dict(itertools.islice(wrong.items(), 1))
    original = short.get("original")
    if isinstance(original, dict) and _is_base64(original.get("header")):  # in a moment, where an expression takes GBs
        short["original"] = {**original, "header": ""}
    if isinstance(short.get("base"), dict) and isinstance(short["base"].get("weights"), dict):
        short["base"] = {**short["base"], "weights": {}}
    return short
