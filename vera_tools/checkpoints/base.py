"""A base model on disk or on the Hub: names, shapes and dtypes from safetensors headers, weights only on request.

Of several sets of files in a folder, the one counts that transformers would load. What the tensors are to a class of
models, `BaseModel.layout` knows. Of a class that nobody knows, adapters and bases need not agree on the outermost
module's name ("model.layers.0..." against "layers.0..."), because transformers saves a model with or without its head:
`find_renaming` finds the one renaming that fits.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from vera_tools import schema
from vera_tools.architectures.architecture import Architecture
from vera_tools.architectures.layout import Layout
from vera_tools.dtypes import HALVES
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files import local, opening
from vera_tools.files.safetensors import TensorFile, TensorInfo
from vera_tools.files.strict_json import parse_json

#: Bytes of an index: a hundred for each tensor are usual.
MOST_BYTES_OF_INDEX = 256 << 20
INDEX_SUFFIX = ".safetensors.index.json"
#: What transformers looks for, in this order.
MODEL, MODEL_INDEX = "model.safetensors", "model" + INDEX_SUFFIX
CONFIG = "config.json"
#: What config.json calls the file that it names.
NAMED_WEIGHTS = "transformers_weights"
#: What transformers takes where it finds no safetensors under the names above.
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

#: Digests of tensors in files on disk: many checkpoints are verified against one base.
_digests: dict[tuple[local.Stamp, str], str] = {}


@dataclass(frozen=True)
class Renaming:
    """How a module's name in the adapter becomes the base's: one leading part taken off, or put before it."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        """The base's name for the adapter's `name`."""
        return self.add + name.removeprefix(self.strip)


class BaseModel(local.ReadFromFolder):
    """An open base model.

    Attributes:
        label: Its name in messages.
        folder: The folder it lies in.
        files: Open safetensors files, by name.
        tensors: Full tensor name to (file name, entry).
        index: The parsed index file, or None.
        index_name: Its name, or None.
        config: The parsed config.json, or {}.
        known: What was found out of the classes that may load it, by name; None for those of which nothing is known.
    """

    def __init__(
        self,
        folder: local.Folder,
        names: Iterable[str],
        *,
        label: str,
        index: dict[str, Any] | None = None,
        index_name: str | None = None,
    ) -> None:
        self.label, self.folder, self.index, self.index_name = label, folder, index, index_name
        self.known: dict[str, Architecture | None] = {}
        self._layouts: dict[tuple[str, str, str], Layout] = {}
        self.files: dict[str, TensorFile] = {}
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        try:
            for name in names:
                file = self.files[name] = TensorFile(folder.open(name))
                for tensor, info in file.tensors.items():
                    if tensor in self.tensors:
                        raise FormatError(
                            f"stands in {self.tensors[tensor][0]} already", where=f"{file.label}: {tensor}"
                        )
                    self.tensors[tensor] = (name, info)
            if index is not None:
                self._check_index(index)
            self.config = _read_config(folder)
            folder.check_unchanged()  # headers are all that most commands read, and these belong together
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, reference: str | os.PathLike[str]) -> BaseModel:
        """Open a folder with one or more safetensors files (with or without an index), one file, or ``hf://...``.

        Raises:
            FormatError: no safetensors file there, or one of them is malformed.
        """
        folder, name = opening.locate(reference)
        label = opening.spelled(reference)
        names = folder.names()
        chosen = name or _preferred(folder, names, label)
        if chosen is not None and not chosen.endswith(INDEX_SUFFIX):
            return cls(folder, [chosen], label=label)
        if chosen is not None:
            where = folder.path_of(chosen)
            index = _read_index(folder, chosen)
            present = set(names)
            missing = next((file for file in index["weight_map"].values() if file not in present), None)
            if missing is not None:
                raise FormatError("names a file that is not there", where=where, found=schema.shown(missing))
            return cls(folder, sorted(set(index["weight_map"].values())), label=label, index=index, index_name=chosen)
        files = [entry for entry in names if _may_be_base(entry)]
        if not files:
            hint = "a base must be in safetensors format"
            if any(entry in ("adapter_config.json", "adapter_model.safetensors") for entry in names):
                hint = "this is an adapter: name it as CHECKPOINT, and the model that it was trained on as the base"
            raise FormatError("no base model here", where=label, expected="*.safetensors", found="none", hint=hint)
        return cls(folder, files, label=label)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    @property
    def model_type(self) -> str | None:
        """The model type that config.json names, or None."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def quantisation(self) -> str | None:
        """The quantisation method that config.json names, or None."""
        config = self.config.get("quantization_config")
        return None if not isinstance(config, dict) else str(config.get("quant_method", "unnamed"))

    @property
    def is_found(self) -> bool:
        """Whether transformers finds these files by their names when it loads the folder."""
        read = self.index_name or (next(iter(self.files)) if len(self.files) == 1 else None)
        named = self.config.get(NAMED_WEIGHTS)
        return read is not None and read in ([named] if isinstance(named, str) else [MODEL, MODEL_INDEX])

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors."""
        return {name: info.shape for name, (_, info) in self.tensors.items()}

    def sha256(self, name: str) -> str:
        """Digest of one tensor. What was read from a file on disk is remembered for as long as the file stays as it is.

        Raises:
            FormatError: it cannot be read.
        """
        file = self.files[self.tensors[name][0]]
        stamp = file.source.stamp if isinstance(file.source, local.LocalFile) else None
        if stamp is None:
            return file.sha256(name)
        if (stamp, name) not in _digests:
            # Where the file is written to meanwhile, this is of no state of it; nor has any other state this stamp.
            _digests[stamp, name] = file.sha256(name)
        return _digests[stamp, name]

    def layout(self, known: Architecture) -> Layout:
        """The files as a class loads them."""
        key = (known.name, known.origin, known.place)
        if key not in self._layouts:
            self._layouts[key] = Layout(known, self.shapes)
        return self._layouts[key]

    def _check_index(self, index: dict[str, Any]) -> None:
        for tensor, name in index["weight_map"].items():
            if self.tensors.get(tensor, ("", None))[0] != name:
                raise FormatError("the index names a tensor that is not there", where=f"{self.label}: {name}: {tensor}")


def _read_index(folder: local.Folder, name: str) -> dict[str, Any]:
    where = folder.path_of(name)
    index = parse_json(local.read_text(folder, name, limit=MOST_BYTES_OF_INDEX), where=where)
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise FormatError("not an index of safetensors files", where=where, expected="a weight_map")
    # By hand, because there are as many as tensors, and a schema takes its time for each.
    wrong = {tensor: file for tensor, file in index["weight_map"].items() if not isinstance(file, str)}
    first = dict(itertools.islice(wrong.items(), 1))
    schema.validate({**index, "weight_map": first}, "model_index.v1", where=where)
    return index


def _read_config(folder: local.Folder) -> dict[str, Any]:
    if CONFIG not in folder.names():
        return {}
    where = folder.path_of(CONFIG)
    # Some models' configs hold infinity, Mamba 2's time_step_limit for one.
    config = parse_json(local.read_text(folder, CONFIG), where=where, finite=False)
    if not isinstance(config, dict):
        raise FormatError("not a model's config", where=where, expected="a JSON object", found=schema.shown(config))
    schema.validate(config, "model_config.v1", where=where)
    return config


def _preferred(folder: local.Folder, names: Collection[str], label: str) -> str | None:
    """Which of a folder's files transformers loads a model from: a file, an index, or None where it finds neither.

    The order is that of its `_get_resolved_checkpoint_files`: what config.json names, one file, an index.

    Raises:
        FormatError: config.json names a file that is not there, or transformers would load a pickle.
    """
    named = _read_config(folder).get(NAMED_WEIGHTS)
    if isinstance(named, str):
        if named not in names:
            raise FormatError(
                "config.json names a file that is not there", where=f"{label}: {NAMED_WEIGHTS}", found=named
            )
        return named
    if MODEL in names:
        return MODEL
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if MODEL_INDEX in indices:
        return MODEL_INDEX
    pickle = next((name for name in _PICKLES if name in names), None)
    if pickle is not None and any(map(_may_be_base, names)):
        raise FormatError(
            f"transformers loads {pickle} here, and none of the safetensors files",
            where=label,
            expected=f"{MODEL} or {MODEL_INDEX}",
            hint="save the base anew as safetensors; or, if others are meant, name their file or index as the base",
        )
    return indices[0] if len(indices) == 1 else None


def _may_be_base(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith("adapter_model")


def find_renaming(modules: Iterable[str], tensors: Collection[str], *, where: str) -> Renaming:
    """The renaming under which the most of an adapter's modules have a weight among a base's tensors.

    Args:
        modules: The adapted modules' names.
        tensors: The base's tensor names.
        where: The base, for messages.

    Raises:
        CheckFailedError: the modules fit as well in several places.
    """
    weights = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
    modules = list(modules)
    found = sum(module in weights for module in modules)
    if found == len(modules):
        return Renaming()
    best, fits = {Renaming()}, found
    deepest = max(modules, key=lambda module: module.count("."))
    for option in _renamings(deepest, weights):
        found = sum(option(module) in weights for module in modules)
        if found > fits:
            best, fits = {option}, found
        elif found == fits and fits:
            best.add(option)
    if Renaming() in best:
        return Renaming()
    # "model." taken off is the same as "model.language_model." become "language_model.": the shortest says it.
    places = {option(deepest): option for option in sorted(best, key=lambda o: -len(o.strip + o.add))}
    # Of a text and a vision tower, the one whose name the module bears is meant.
    shared = {place: len(set(place.split(".")) & set(deepest.split("."))) for place in places}
    places = {place: option for place, option in places.items() if shared[place] == max(shared.values())}
    if len(places) > 1:
        raise CheckFailedError(
            "the adapter's modules fit in several places of the base",
            where=where,
            found=" and ".join(sorted(places)[:3]),
            hint="name the part of the base that was adapted",
        )
    return next(iter(places.values()))


def _renamings(module: str, weights: set[str]) -> set[Renaming]:
    """The renamings under which one module has a weight."""
    parts = module.split(".")
    found = set()
    for n in range(len(parts)):
        strip, rest = ".".join(parts[:n]) + "." * (n > 0), ".".join(parts[n:])
        # A bare "q_proj" is no evidence; a path with a number in it, such as "layers.0.self_attn.q_proj", is.
        if n == 0 or rest in weights or any(part.isdigit() for part in parts[n:]):
            found |= {Renaming(strip, w.removesuffix(rest)) for w in weights if w == rest or w.endswith(f".{rest}")}
    return found


def rounds_through(dtypes: Iterable[str]) -> str | None:
    """The half dtype that PEFT's casts round the projections through, given the adapted weights' dtypes.

    PEFT casts the shared pair once for each adapted layer, so a single half-precision layer rounds it for all.

    Raises:
        CheckFailedError: both half dtypes occur: no recipe describes what comes out.
    """
    halves = sorted(set(dtypes) & set(HALVES))
    if len(halves) > 1:
        raise CheckFailedError("the adapted weights are of both half dtypes", found=" and ".join(halves))
    return halves[0] if halves else None
