"""What transformers knows of each of its classes of models, and no name of a tensor gives away.

Which names its files use and which its modules, which parameters are one tensor, which layers are linear and which are
stored the other way round, where the embeddings are. The data comes from transformers itself
(fixtures/architectures/generate.py), and is replayed here without it. Where a transformers is installed it knows more:
it knows this very configuration. `witness.ask_transformers` asks it, in a process of its own.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vera_tools import schema
from vera_tools.architectures.architecture import Architecture, Tie
from vera_tools.architectures.renaming import Step
from vera_tools.architectures.trees import Tree
from vera_tools.errors import FormatError

__all__ = ["Architecture", "Config", "Tie", "architecture", "class_for", "is_of", "origin", "tables", "untied"]

Config = Mapping[str, Any]


class _Table(Mapping[str, Any]):
    """A table of the data, whose entries are parsed when they are asked for: a command needs few of some thousands."""

    def __init__(self, text: str) -> None:
        self._text, self._parsed = text, dict[str, Any]()

    def _start(self, name: object) -> int:
        """Where the line of an entry begins; -1 where there is none."""
        return self._text.find(f"\n  {json.dumps(name)}: ") if isinstance(name, str) else -1

    def _at(self, start: int) -> tuple[str, Any]:
        """The entry whose line begins there."""
        name, _, value = self._text[start : self._text.index("\n", start + 1)].partition(": ")
        key: str = json.loads(name)
        if key not in self._parsed:
            self._parsed[key] = json.loads(value.removesuffix(","))
        return key, self._parsed[key]

    def __getitem__(self, name: str) -> Any:
        if name in self._parsed:
            return self._parsed[name]
        start = self._start(name)
        if start < 0:
            raise KeyError(name)
        return self._at(start)[1]

    def mentioning(self, word: str) -> Iterator[tuple[str, Any]]:
        """The entries in which a JSON string stands anywhere, with their names."""
        place = self._text.find(json.dumps(word))
        while place >= 0:
            yield self._at(self._text.rindex("\n", 0, place))
            place = self._text.find(json.dumps(word), self._text.index("\n", place))

    def __contains__(self, name: object) -> bool:
        return self._start(name) >= 0

    def __iter__(self) -> Iterator[str]:
        return (json.loads(line.partition(": ")[0]) for line in self._text.split("\n  ")[1:])

    def __len__(self) -> int:
        return self._text.count("\n  ")


@functools.cache
def tables() -> dict[str, Any]:
    """The newest data that ships with the package. Its generator writes every entry of a table on a line of its own."""
    files = [file for file in schema.packaged("fixtures/architectures").iterdir() if file.name.endswith(".json")]
    newest = max(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])
    document = dict[str, Any]()
    for part in newest.read_text("utf-8").split('\n "')[1:]:
        name, _, value = part.partition('": ')
        document[name] = (
            _Table(value) if value.startswith("{\n") else json.loads(value.split("\n")[0].removesuffix(","))
        )
    return document


def _conversions(name: str) -> Any:
    """The steps of the data that go by a name; those of another one, where they are the same."""
    steps = tables()["conversions"].get(name)
    return tables()["conversions"][steps] if isinstance(steps, str) else steps


@functools.cache
def table_modules() -> frozenset[str]:
    """What the classes call their input embedding and their output layer."""
    entries = (tables()["classes"][name] for name in tables()["classes"])
    names = {entry.get(which) for entry in entries for which in ("input_embeddings", "output_embeddings")}
    return frozenset(names - {None})


def origin() -> str:
    """What the data was made from: "transformers 5.23.0"."""
    return f"transformers {tables()['transformers']}"


def class_for(config: Config, auto: str | None = None) -> str | None:
    """The class that transformers loads for a config.json.

    Args:
        config: Parsed config.json.
        auto: How it is loaded: "CausalLM" for AutoModelForCausalLM, "Model" for AutoModel, ... None: by the class that
            the configuration names itself.

    Returns:
        Its name, or None where the configuration names none, or the auto class knows none.
    """
    if auto is None:
        names = config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    return _chosen(auto, _model_type(config, ""))


def _model_type(config: Config, default: str) -> str:
    """The model type of a configuration or a part of one; `default` where it says none, or no text."""
    found = config.get("model_type", default)
    return found if isinstance(found, str) else default


@functools.lru_cache
def _chosen(auto: str, model_type: str) -> str | None:
    """The class that an auto class takes for a model type: the last one where several are given."""
    found = None
    for name, entry in tables()["classes"].mentioning(model_type):
        if any(auto == other and model_type in types for other, types in _autos(entry)):
            found = name
    return found


def _autos(entry: dict[str, Any]) -> Iterable[tuple[str, list[str]]]:
    autos = entry.get("auto", {})
    return autos.items() if isinstance(autos, dict) else [(auto, [entry["model_type"]]) for auto in autos]


def architecture(config: Config, name: str | None = None) -> Architecture | None:
    """What the data says of a class under a configuration.

    Args:
        config: Parsed config.json of the base model.
        name: The class; None is the one that the configuration names.

    Returns:
        None where the data has no such class.
    """
    name = name or class_for(config)
    if name not in tables()["classes"]:
        return None
    place = _place_of(str(name), config)
    part = _at(config, place) or {}
    composed = _compose(str(name), part)
    entry = composed.entry
    prefix = entry["base_model_prefix"]
    return Architecture(
        name=str(name),
        origin=f"data of {origin()}",
        model_type=entry["model_type"],
        base_model_prefix=prefix,
        input_embeddings=entry.get("input_embeddings"),
        output_embeddings=entry.get("output_embeddings"),
        steps=tuple(_steps(composed.submodels, prefix)),
        ties=tuple(composed.ties),
        varying=tuple(composed.varying),
        ignored_missing=tuple(composed.missing),
        ignored_unexpected=tuple(composed.unexpected),
        tree=Tree(composed.modules, tables()["structures"], composed.places),
        _heads={inner: _heads(part, where) for inner, where in entry.get("heads", {}).items()},
        unknown=tuple(composed.unknown),
        switches=tuple(dict.fromkeys(_joined(place, switch) for switch in composed.switches)),
        place=place,
    )


def untied(config: Config, switches: Iterable[str]) -> dict[str, Any]:
    """config.json with every one of these entries false, be it there before or not.

    Args:
        config: Parsed config.json.
        switches: As `Architecture.switches` has them.
    """
    result: dict[str, Any] = copy.deepcopy(dict(config))
    for switch in switches:
        *places, name = switch.split(".")
        part = result
        for place in places:
            part = part.setdefault(place, {})
        part[name] = False
    return result


def is_of(config: Config, name: str) -> bool:
    """Whether a configuration may be of a class of the data: it, or a part of it, has the class's model type."""
    entry = tables()["classes"][name]
    types = {entry["model_type"], *(model_type for _, types in _autos(entry) for model_type in types)}
    return _model_type(config, entry["model_type"]) in types or _place_of(name, config) != ""


def _place_of(name: str, config: Config) -> str:
    """Where in config.json the configuration of a class stands: see `Architecture.place`."""
    wanted = tables()["classes"][name]["model_type"]
    if _model_type(config, wanted) == wanted:
        return ""
    parts = (part for part, inner in config.items() if isinstance(inner, Mapping) and _model_type(inner, "") == wanted)
    return next(parts, "")


@dataclass
class _Composed:
    """A class with the parts that its configuration chooses."""

    entry: dict[str, Any]
    modules: Any
    submodels: list[tuple[str, str, str]]
    ties: list[Tie]
    varying: list[str]
    missing: list[str]
    unexpected: list[str]
    places: dict[str, Any] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    switches: list[str] = field(default_factory=list)


def _compose(name: str, config: Config) -> _Composed:
    entry = tables()["classes"][name]
    rules = [rule for rule in entry.get("ties", ()) if _holds(rule.get("when", True), config) and _is_so(rule, config)]
    composed = _Composed(
        entry,
        entry.get("modules", f"@{name}"),
        [(place, kind, model_type) for place, kind, model_type in entry.get("submodels", ())],
        [
            Tie(rule.get("module", ""), target, source)
            for rule in rules
            if not rule.get("varies")
            for target, source in rule["keys"]
        ],
        [
            _any_number(_joined(rule.get("module", ""), name))
            for rule in rules
            if rule.get("varies")
            for pair in rule["keys"]
            for name in pair
        ],
        list(entry.get("missing", ())),
        list(entry.get("unexpected", ())),
        switches=[switch for rule in rules for switch in _switches(rule.get("when", True))],
    )
    for place, part in entry.get("parts", {}).items():
        chosen = _at(config, part["config"]) or {}
        model_type = _model_type(chosen, part["model_type"])
        if model_type == part["model_type"]:
            continue
        other = _chosen(part["auto"], model_type)
        composed.ties = [tie for tie in composed.ties if not _is_inside(tie.module, place)]
        if other is None:
            composed.unknown.append(place)
            composed.places[place] = {}
            composed.submodels = _spliced(composed.submodels, place, [])
        else:
            _put(composed, place, _compose(other, chosen), part["config"])
    return composed


def _switches(rule: Any) -> list[str]:
    """The entries of the configuration that a rule of ties looks at."""
    if isinstance(rule, bool):
        return []
    if "first" in rule:
        return [str(name) for name in rule["first"]]
    return [str(name) for pairs in rule.values() for name, _ in pairs]


def _put(composed: _Composed, place: str, inner: _Composed, part: str) -> None:
    """Put a class in the place of the one that a part is of by default."""
    composed.places[place] = inner.modules
    composed.places.update({_joined(place, deeper): modules for deeper, modules in inner.places.items()})
    composed.submodels = _spliced(composed.submodels, place, inner.submodels)
    composed.ties += [Tie(_joined(place, tie.module), tie.target, tie.source) for tie in inner.ties]
    composed.varying += [re.escape(f"{place}.") + pattern for pattern in inner.varying]
    composed.missing += inner.missing
    composed.unexpected += inner.unexpected
    composed.unknown += [_joined(place, deeper) for deeper in inner.unknown]
    composed.switches += [_joined(part, switch) for switch in inner.switches]


def _spliced(
    outer: list[tuple[str, str, str]], place: str, inner: list[tuple[str, str, str]]
) -> list[tuple[str, str, str]]:
    """The models inside, with those of one part in the place of the ones that it has by default."""
    position = next((n for n, (path, *_) in enumerate(outer) if _is_inside(path, place)), len(outer))
    kept = [model for model in outer if not _is_inside(model[0], place)]
    placed = [(_joined(place, path), kind, model_type) for path, kind, model_type in inner]
    return kept[:position] + placed + kept[position:]


def _joined(place: str, path: str) -> str:
    return f"{place}.{path}".strip(".")


def _is_inside(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def _steps(submodels: Iterable[tuple[str, str, str]], prefix: str) -> Iterator[Step]:
    """The renamings of a class, as transformers' `get_model_conversion_mapping` collects them."""
    table = tables()["conversions"]
    seen: dict[str, list[str]] = {}
    for place, name, model_type in submodels:

        def claimed(identifier: str, place: str = place) -> bool:
            return any(outer == "" or place.startswith(f"{outer}.") for outer in seen.get(identifier, ()))

        if claimed(name):
            continue
        by_name = name in table
        if not by_name and (claimed(model_type) or model_type not in table):
            continue
        scope = place.removeprefix(prefix).removeprefix(".") if place else None
        for document in _conversions(name if by_name else model_type):
            yield Step.from_document(document, scope=scope, prefix=prefix if place else "")
        seen.setdefault(name, []).append(place)
        if not by_name:
            seen.setdefault(model_type, []).append(place)
    for document in _conversions("legacy"):
        yield Step.from_document(document, scope=None, prefix="")


def _holds(rule: Any, config: Config) -> bool:
    """Whether a configuration ties, by a rule that the generator found (its ties.py, `evaluate`)."""
    if isinstance(rule, bool):
        return rule
    if "first" in rule:
        values = (_value(config, name) for name in rule["first"])
        return bool(next((value for value in values if value is not None), rule["default"]))
    ((kind, pairs),) = rule.items()
    found = [default if (value := _value(config, name)) is None else bool(value) for name, default in pairs]
    return any(found) if kind == "any" else all(found)


def _is_so(rule: dict[str, Any], config: Config) -> bool:
    """Whether the switches are set for which the generator saw a rule: each with its value then, and its default."""
    return all(
        (default if (found := _value(config, name)) is None else found) == value
        for name, (value, default) in rule.get("if", {}).items()
    )


def _any_number(pattern: str) -> str:
    r"""A pattern of tied weights, for whatever numbers: ``layers.(?!2\.)\d+.shared`` as ``layers.\d+.shared``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", r"\\d+", re.sub(r"\(\?![^)]*\)", "", pattern))


def _heads(config: Config, where: dict[str, Any]) -> int:
    part = _at(config, where["at"]) or {}
    found: Any = next((part[name] for name in where["names"] if part.get(name) is not None), where["default"])
    if not isinstance(found, int) or not 0 < found < 2**31:
        raise FormatError(
            "has a wrong value",
            where=f"config.json: {where['names'][0]}",
            expected="a number of attention heads",
            found=schema.shown(found),
        )
    return found


def _value(config: Config, name: str) -> Any:
    place, _, last = name.rpartition(".")
    return (_at(config, place) or {}).get(last)


def _at(config: Any, place: str) -> Any:
    for name in filter(None, place.split(".")):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
