"""The plan of a merge: every tensor of the result, where it lies, what it is made of. No weights are read for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vera_tools._version import __version__
from vera_tools.checkpoints.base import MODEL, MODEL_INDEX, MOST_BYTES_OF_INDEX, NAMED_WEIGHTS, BaseModel
from vera_tools.checkpoints.placement import Placement
from vera_tools.checkpoints.recorded_base import RecordedBase
from vera_tools.errors import UsageError
from vera_tools.files import local
from vera_tools.files.safetensors import TensorFile, encode_header, layout
from vera_tools.merging import tokenizer, vocabulary
from vera_tools.merging.adapters import Adapter
from vera_tools.merging.changes import Change, collect, without_effect
from vera_tools.merging.entries import Entry, Kind, entries
from vera_tools.merging.tying import untying

#: Dtypes that --dtype casts to.
TARGETS = ("float32", "float16", "bfloat16")
#: A byte that is computed costs about as much as so many that are copied.
COMPUTED = 10

# Endings of files that hold weights, or say where weights are; they are not copied beside the merged ones.
_WEIGHTS = (
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".npz",
    ".ot",
    ".mlmodel",
    ".tmp",
)
_NOT_COPIED = ("README.md", "vera_merge.json", ".gitattributes", "adapter_config.json", "vera_manifest.json")


@dataclass(frozen=True)
class Shard:
    """One file of the result: its name, its header, and its tensors in the order of their bytes."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def data_start(self) -> int:
        """Where the tensors begin."""
        return 8 + len(self.header)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.data_start + (self.entries[-1].info.stop if self.entries else 0)

    @property
    def computed(self) -> int:
        """Bytes that are not copied as they stand."""
        return sum(entry.info.nbytes for entry in self.entries if entry.kind != "copied")


@dataclass(frozen=True)
class Options:
    """What a merge may do besides.

    Attributes:
        dtype: Cast every floating-point tensor to it.
        max_shard_size: Lay the tensors out in new files of at most so many bytes; None keeps the base's files.
        resize_vocabulary: Make the base's tables as large as those that the adapters saved.
        tokenizer: "base" or "adapter": whose goes with the result.

    Raises:
        UsageError: an unknown dtype or tokenizer, or a size below 1.
    """

    dtype: str | None = None
    max_shard_size: int | None = None
    resize_vocabulary: bool = False
    tokenizer: str = "base"

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in TARGETS:
            raise UsageError("weights cannot be cast to this", expected=" or ".join(TARGETS), found=self.dtype)
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError("a shard needs room", expected="at least 1 byte", found=str(self.max_shard_size))
        if self.tokenizer not in ("base", "adapter"):
            raise UsageError("whose tokenizer is not known", expected="base or adapter", found=self.tokenizer)


@dataclass(frozen=True)
class Plan:
    """Everything that a merge writes.

    Attributes:
        placement: Where the adapters' modules lie in the base.
        changes: What becomes of the class's parameters.
        adapters: In the order in which they were named.
        shards: The files of the result.
        indices: Index files by their names, as text; none where one file holds everything.
        copied_files: The base's other files, copied as they stand: path in the output to the folder it comes from.
        config: The text of config.json where it changes, else None.
        options: What it was asked for.
        notes: What is to be said of it.
        digest: Identifies base, adapters, options and tool; a merge in several steps must have the same in each.
        recorded: What the manifests of adapters say of the base, each with the adapter's label.
    """

    placement: Placement
    changes: Mapping[str, Change]
    adapters: tuple[Adapter, ...]
    shards: tuple[Shard, ...]
    indices: Mapping[str, str]
    copied_files: dict[str, local.Folder]
    config: str | None
    options: Options
    notes: tuple[str, ...]
    digest: str
    recorded: tuple[tuple[str, RecordedBase], ...] = ()

    @property
    def base(self) -> BaseModel:
        """The open base."""
        return self.placement.base

    @property
    def entries(self) -> Iterable[Entry]:
        """All tensors of the result."""
        return (entry for shard in self.shards for entry in shard.entries)

    def names(self, kind: Kind) -> list[str]:
        """Names of the tensors of one kind, sorted."""
        return sorted(entry.info.name for entry in self.entries if entry.kind == kind)

    def refuse_another_base(self, weight: str, sha256: str) -> None:
        """Refuse a weight of the base of whose digest an adapter's manifest says otherwise.

        Raises:
            CheckFailedError: it does.
        """
        for label, recorded in self.recorded:
            recorded.refuse_another(weight, sha256, adapter=label, base=self.base)


def make(placement: Placement, adapters: Sequence[Adapter], options: Options) -> Plan:
    """Plan the merge of `adapters`.

    Args:
        placement: Where their modules lie in the base.
        adapters: The open adapters.
        options: What else is to be done.

    Raises:
        CheckFailedError, FormatError, UsageError: see `changes.collect`, `tying.untying`, `vocabulary.resized` and
            `tokenizer.choose`.
    """
    base, resize = placement.base, options.resize_vocabulary
    tying = untying(placement, collect(placement, adapters, resize=resize))
    sizes = vocabulary.resized(placement, tying.changes) if resize else None
    config = tying.config or base.config
    if sizes is not None:
        config = vocabulary.with_size(config, *sizes, where=base.label)
    files = entries(placement, tying, options.dtype)
    if options.max_shard_size is None:
        shards = [_keep_layout(base.files[name], name, entries) for name, entries in files.items()]
    else:
        shards = _lay_out(files, base, options.max_shard_size)
    indices = _indices(placement, shards, resharded=options.max_shard_size is not None)
    copied, notes = tokenizer.choose(_copied_files(base), adapters, options.tokenizer)
    found = [(adapter.label, RecordedBase.of(adapter.checkpoint, base)) for adapter in adapters]
    recorded = tuple((label, record) for label, record in found if record is not None)
    unlike = [record.warning(label, base) for label, record in recorded if record.unlike]
    return Plan(
        placement,
        tying.changes,
        tuple(adapters),
        tuple(shards),
        indices,
        copied,
        _config(config, base, dtype=options.dtype, resharded=options.max_shard_size is not None),
        options,
        (*notes, *without_effect(placement, adapters), *unlike),
        _digest(base, adapters, options),
        recorded,
    )


def portion(shards: Sequence[Shard], part: tuple[int, int] | None) -> tuple[Shard, ...]:
    """The files that the I-th of N processes writes; all of them where `part` is None.

    The costliest files are dealt out first, each to the process with the least to do so far.
    """
    if part is None:
        return tuple(shards)
    index, count = part
    loads = [0] * count
    mine: list[Shard] = []
    costs = {shard.name: shard.size + (COMPUTED - 1) * shard.computed for shard in shards}
    for shard in sorted(shards, key=lambda shard: (-costs[shard.name], shard.name)):
        target = loads.index(min(loads))
        loads[target] += costs[shard.name]
        if target == index - 1:
            mine.append(shard)
    return tuple(sorted(mine, key=lambda shard: shard.name))


def _placed(name: str, entries: Sequence[Entry], metadata: Mapping[str, str]) -> Shard:
    infos = layout(
        {entry.info.name: (entry.info.dtype, entry.info.shape) for entry in entries},
        order=[entry.info.name for entry in entries],
    )
    placed = tuple(replace(entry, info=infos[entry.info.name]) for entry in entries)
    return Shard(name, encode_header(infos, metadata), placed)


def _keep_layout(file: TensorFile, name: str, entries: Sequence[Entry]) -> Shard:
    shard = _placed(name, entries, file.metadata)
    if {entry.info.name: entry.info for entry in shard.entries} == file.tensors:
        return Shard(name, file.header, shard.entries)  # the very bytes, however they were spaced and ordered
    return shard


def _lay_out(files: Mapping[str, Sequence[Entry]], base: BaseModel, limit: int) -> list[Shard]:
    groups: list[list[Entry]] = [[]]
    room = limit
    for entry in (entry for held in files.values() for entry in held):
        if groups[-1] and entry.info.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(entry)
        room -= entry.info.nbytes
    metadata = next(iter(base.files.values())).metadata
    names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [MODEL]
    return [_placed(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _indices(placement: Placement, shards: Sequence[Shard], *, resharded: bool) -> dict[str, str]:
    """Index files by their names: the base's own as it is where nothing that it says has changed.

    transformers looks for weights by a few names. Where the base's are others, be it shards without an index, the
    result has one by which they are found.
    """
    base, names = placement.base, list[str]()
    if resharded:
        names += [MODEL_INDEX] if len(shards) > 1 else []
    else:
        names += [base.index_name] if base.index_name is not None else []
        if placement.architecture.is_known and base.config and not base.is_found:
            names.append(MODEL_INDEX)
    return {name: _index(base, shards, name) for name in names}


def _index(base: BaseModel, shards: Sequence[Shard], name: str) -> str:
    weight_map = {entry.info.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.info.nbytes for shard in shards for entry in shard.entries)
    old = base.index or {}
    metadata = {**old.get("metadata", {}), "total_size": total}
    unchanged = old.get("weight_map") == weight_map and total == sum(info.nbytes for _, info in base.tensors.values())
    if unchanged and name == base.index_name:
        return local.read_text(base.folder, name, limit=MOST_BYTES_OF_INDEX)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(entry.info.size for shard in shards for entry in shard.entries)
    document = {**old, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


def _copied_files(base: BaseModel) -> dict[str, local.Folder]:
    names = base.folder.names()
    if "config.json" not in names:
        return {}  # a lone file among others, which need not belong to it
    copied = {name: base.folder for name in names if not name.endswith(_WEIGHTS) and name not in _NOT_COPIED}
    copied |= tokenizer.own_files(base.folder)
    # What the result takes over must be the base's own. Its weights, which must be weights, may lie anywhere.
    for name in names:
        if not name.endswith(_WEIGHTS):
            base.folder.refuse_leaving(name)
    for path, folder in copied.items():
        folder.refuse_leaving(path.rpartition("/")[2])
    return copied


def _config(config: dict[str, Any], base: BaseModel, *, dtype: str | None, resharded: bool) -> str | None:
    """config.json with the new dtype and without what is no longer so; None where it stays as it is."""
    config = dict(config)
    if resharded or not base.is_found:
        config.pop(NAMED_WEIGHTS, None)
    if dtype is not None:
        _set_dtype(config, dtype)
    if not base.config or config == base.config:
        return None
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """In transformers it is called "dtype", and was called "torch_dtype"; parts of a model have their own."""
    if "dtype" not in config and "torch_dtype" not in config:
        config["torch_dtype"] = dtype
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            config[key] = dict(value)
            _set_dtype(config[key], dtype)


def _digest(base: BaseModel, adapters: Sequence[Adapter], options: Options) -> str:
    files = {
        name: [file.size, file.source.version, hashlib.sha256(file.header).hexdigest()]
        for name, file in base.files.items()
    }
    document = {
        "version": __version__,
        "base": files,
        "config": base.config,
        "adapters": [
            [adapter.sha256, adapter.weight, adapter.resolved.record.sha256, adapter.checkpoint.raw_config]
            for adapter in adapters
        ],
        "options": asdict(options),
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
