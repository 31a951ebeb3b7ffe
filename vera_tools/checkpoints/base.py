"""A base model on disk or on the Hub: names, shapes and dtypes from safetensors headers, weights only on request.

Adapters and bases do not always agree on the outermost module's name ("model.layers.0..." against "layers.0..."),
because transformers saves a model with or without its head. `BaseModel.locate` finds the one renaming that fits.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from vera_tools import schema
from vera_tools.checkpoints.names import INPUT_EMBEDDINGS, OUTPUT_LAYERS, module_of
from vera_tools.dtypes import FLOATS, HALVES
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files import local, opening
from vera_tools.files.safetensors import TensorFile, TensorInfo
from vera_tools.files.strict_json import parse_json

INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True)
class Renaming:
    """How a module's name in the adapter becomes the base's: one leading part taken off, or put before it."""

    strip: str = ""
    add: str = ""

    def __call__(self, name: str) -> str:
        """The base's name for the adapter's `name`."""
        return self.add + name.removeprefix(self.strip)


@dataclass(frozen=True)
class Linear:
    """One adapted linear weight of the base.

    Attributes:
        module: The module's name in the adapter.
        weight: The full name of its weight in the base; the input embedding's for an output layer that is tied to it.
        info: The weight's entry in its file.
        in_features: Columns of the linear map.
        out_features: Rows of the linear map.
        transposed: The weight is stored as (in, out), as GPT-2's Conv1D does.
    """

    module: str
    weight: str
    info: TensorInfo
    in_features: int
    out_features: int
    transposed: bool


class BaseModel(local.Closing):
    """An open base model.

    Attributes:
        label: Its name in messages.
        folder: The folder it lies in.
        files: Open safetensors files, by name.
        tensors: Full tensor name to (file name, entry).
        index: The parsed index file, or None.
        config: The parsed config.json, or {}.
    """

    def __init__(self, folder: local.Folder, names: Iterable[str], *, label: str, index: dict[str, Any] | None) -> None:
        self.label, self.folder, self.index = label, folder, index
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
            self.config = self._read_config()
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
        label = os.fspath(reference)
        if name is not None and not name.endswith(INDEX_SUFFIX):
            return cls(folder, [name], label=label, index=None)
        names = folder.names()
        indices = [name] if name else [entry for entry in names if entry.endswith(INDEX_SUFFIX)]
        if len(indices) == 1:
            where = folder.path_of(indices[0])
            index = parse_json(local.read_text(folder, indices[0], limit=256 << 20), where=where)
            if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
                raise FormatError("not an index of safetensors files", where=where, expected="a weight_map")
            missing = [file for file in index["weight_map"].values() if file not in names]
            if missing:
                raise FormatError("names a file that is not there", where=where, found=str(missing[0]))
            return cls(folder, sorted(set(index["weight_map"].values())), label=label, index=index)
        files = [entry for entry in names if entry.endswith(".safetensors") and not entry.startswith("adapter_model")]
        if not files:
            hint = "a base must be in safetensors format"
            raise FormatError("no base model here", where=label, expected="*.safetensors", found="none", hint=hint)
        return cls(folder, files, label=label, index=None)

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    @property
    def quantisation(self) -> str | None:
        """The quantisation method that config.json names, or None."""
        config = self.config.get("quantization_config")
        return None if not isinstance(config, dict) else str(config.get("quant_method", "unnamed"))

    def locate(self, modules: Iterable[str]) -> Renaming:
        """The renaming under which the most of the adapter's modules have a weight here.

        A model that fits as it is, is taken as it is. Otherwise the leading part of a module's name may be another
        here: none ("layers.0" for "model.layers.0"), one more, or one in place of another
        ("language_model.model.layers.0" for "model.language_model.layers.0").

        Raises:
            CheckFailedError: the modules fit as well in several places.
        """
        return find_renaming(modules, self.tensors, where=self.label)

    def linear(self, module: str, *, out_features: int, transposed: bool, renaming: Renaming) -> Linear:
        """The weight of an adapted module.

        Args:
            module: The module's name in the adapter.
            out_features: Length of its vera_lambda_b.
            transposed: The adapter config's fan_in_fan_out; decides for square weights only.
            renaming: From `locate`.

        Raises:
            CheckFailedError: the base has no such module, it is quantised or not a matrix, or it does not fit.
        """
        name = renaming(module) + ".weight"
        tied_to = self._tied_to(name, out_features) if name not in self.tensors else None
        if tied_to is not None:
            name, transposed = tied_to, False
        elif name not in self.tensors:
            near = sorted(n for n in self.tensors if n.endswith(f".{module.rsplit('.', 1)[-1]}.weight"))
            raise CheckFailedError(
                "the base has no such module",
                where=f"{self.label}: {module}",
                expected=f"a tensor {name}",
                found=f"{near[0]} and {len(near) - 1} more of that name" if near else "nothing of that name",
                hint="transformers 5 renames the modules of some models on loading, ViT's for one: then files and "
                "modules differ",
            )
        info = self.tensors[name][1]
        where = f"{self.label}: {name}"
        if info.dtype not in FLOATS or self.quantisation:
            raise CheckFailedError(
                "the base is quantised, so its header does not give in_features",
                where=where,
                found=f"{self.quantisation or info.dtype} {list(info.shape)}",
                hint="name the unquantised base, whose shapes are the same",
            )
        if len(info.shape) != 2:
            raise CheckFailedError(
                "not a linear weight", where=where, expected="2 dimensions", found=str(list(info.shape))
            )
        if info.shape[0] != info.shape[1]:
            transposed = info.shape[1] == out_features
        rows, columns = info.shape[::-1] if transposed else info.shape
        if rows != out_features:
            raise CheckFailedError(
                "the weight does not fit vera_lambda_b",
                where=where,
                expected=f"out_features {out_features}",
                found=str(list(info.shape)),
                hint="this is another base than the adapter was trained on",
            )
        return Linear(module, name, info, columns, rows, transposed)

    def _tied_to(self, name: str, out_features: int) -> str | None:
        """The input embedding that an output layer without a weight of its own shares its weight with."""
        if module_of(name) not in OUTPUT_LAYERS or self.config.get("tie_word_embeddings") is False:
            return None
        options = [
            tensor
            for tensor, (_, info) in self.tensors.items()
            if module_of(tensor) in INPUT_EMBEDDINGS and len(info.shape) == 2 and info.shape[0] == out_features
        ]
        return options[0] if len(options) == 1 else None

    def _check_index(self, index: dict[str, Any]) -> None:
        for tensor, name in index["weight_map"].items():
            if self.tensors.get(tensor, ("", None))[0] != name:
                raise FormatError("the index names a tensor that is not there", where=f"{self.label}: {name}: {tensor}")

    def _read_config(self) -> dict[str, Any]:
        if "config.json" not in self.folder.names():
            return {}
        where = self.folder.path_of("config.json")
        # Some models' configs hold infinity, Mamba 2's time_step_limit for one.
        config = parse_json(local.read_text(self.folder, "config.json"), where=where, finite=False)
        if not isinstance(config, dict):
            raise FormatError("not a model's config", where=where, expected="a JSON object", found=schema.shown(config))
        return config


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
