"""What transformers knows of each of its classes of models, and no name of a tensor gives away.

Which names its files use and which its modules, which parameters are one tensor, which layers are linear and which are
stored the other way round, where the embeddings are. The data comes from transformers itself
(fixtures/architectures/generate.py), and is replayed here without it. Where a transformers is installed it knows more:
it knows this very configuration. `ask_transformers` asks it, in a process of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vera_tools import schema
from vera_tools.checkpoints.renaming import Step
from vera_tools.checkpoints.trees import Tree

Config = Mapping[str, Any]

#: Kinds of modules that PEFT's VeRA can adapt.
LINEAR = ("Linear", "Conv1D")

# The heads that PEFT's "all-linear" leaves out of a classifier that has no output embeddings.
_CLASSIFIERS = ("classifier", "score")


@dataclass(frozen=True)
class Tie:
    """Parameters that are one tensor with another, in the words of transformers' `_tied_weights_keys`.

    Attributes:
        module: The module that ties them; names start behind it.
        target: The parameter, the module, or a regular expression of these.
        source: What it is tied to.
    """

    module: str
    target: str
    source: str

    def source_of(self, parameter: str) -> str | None:
        """The parameter that `parameter` is tied to by this, or None."""
        inside = f"{self.module}." if self.module else ""
        if not parameter.startswith(inside):
            return None
        match = re.match(self.target, parameter.removeprefix(inside))
        if match is None or (match.end() < len(match.string) and match.string[match.end()] != "."):
            return None
        return inside + self.source + match.string[match.end() :]

    @property
    def names(self) -> tuple[str, str] | None:
        """Target and source where both are plain names, else None."""
        inside = f"{self.module}." if self.module else ""
        if re.fullmatch(r"[\w.]+", self.target) is None:
            return None
        return inside + self.target, inside + self.source


@dataclass(frozen=True)
class Architecture:
    """One class of models, for one configuration.

    Attributes:
        name: The class.
        origin: Who says so: "transformers 5.23.0", and whether it was asked or is the data.
        model_type: Of its configuration.
        base_model_prefix: The attribute that holds the model without its head.
        input_embeddings: Name of the module, where the class has one.
        output_embeddings: Name of the module, where the class has one.
        steps: Renamings and converters between a file's names and the modules', in order.
        ties: Parameters that are one tensor under this configuration.
        varying: Regular expressions of parameters of which the data cannot tell: see `may_be_tied`.
        shared: Parameters that always are: groups of names, in which ``*`` is the same number in each.
        ignored_missing: Regular expressions of parameters that a file may lack.
        ignored_unexpected: Regular expressions of keys that a file may hold to no effect.
    """

    name: str
    origin: str
    model_type: str
    base_model_prefix: str
    input_embeddings: str | None
    output_embeddings: str | None
    steps: tuple[Step, ...]
    ties: tuple[Tie, ...]
    varying: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    ignored_missing: tuple[str, ...]
    ignored_unexpected: tuple[str, ...]
    tree: Tree
    _heads: Mapping[str, int]

    def may_be_tied(self, parameter: str) -> bool:
        """Whether a parameter is in a list of ties that only the model itself makes, so that the data cannot tell.

        Zamba repeats one block at layers that follow from sizes. `ask_transformers` knows.
        """
        return any(re.match(pattern, parameter) for pattern in self.varying)

    def stores(self, parameter: str) -> bool:
        """Whether a model of this class may have a parameter, or a buffer that is saved, of that name."""
        return self.tree.stores(parameter)

    def kind(self, module: str) -> str | None:
        """What a module is: "Linear", "Conv1D", "Embedding", "LayerNorm", ..., or "Module" for one with others inside.

        None where the class has no such module, or where it is one or another as the configuration says.
        """
        kinds = {kind.partition(":")[0] for kind in self.tree.kinds(module)}
        return kinds.pop() if len(kinds) == 1 else None

    def computes_otherwise(self, module: str) -> str | None:
        """The class of a linear module that does not compute W x + b with its weight; None where all is as usual."""
        return next((name for kind in self.tree.kinds(module) if (name := kind.partition(":")[2])), None)

    @functools.cached_property
    def linear_modules(self) -> tuple[str, ...]:
        """All linear modules, ``*`` for any number, as in "model.layers.*.self_attn.q_proj"."""
        return tuple(sorted({name for name, kind in self.tree.walk() if kind.partition(":")[0] in LINEAR}))

    def is_linear_target(self, module: str, *, task_type: str | None = None) -> bool:
        """Whether PEFT's "all-linear" adapts a module: every Linear and Conv1D but the output layer.

        Args:
            module: The module's name.
            task_type: The adapter's; "SEQ_CLS" leaves the classifier out where the class has no output embeddings.
        """
        if self.kind(module) not in LINEAR or module == self.output_embeddings:
            return False
        if self.output_embeddings is None and task_type == "SEQ_CLS":
            head = next((name for name in _CLASSIFIERS if self.tree.kinds(name)), None)
            return module != head
        return True

    def tied_to(self, parameter: str) -> str | None:
        """The parameter that this one shares its tensor with and takes it from; None where it has its own."""
        seen = {parameter}
        while True:
            for tie in self.ties:
                source = tie.source_of(parameter)
                if source is not None and source not in seen:
                    seen.add(source)
                    parameter = source
                    break
            else:
                break
        return parameter if len(seen) > 1 else None

    def tied(self, parameters: Iterable[str] = ()) -> tuple[tuple[str, ...], ...]:
        """Groups of parameters that are one tensor, the one that the others take it from first.

        Args:
            parameters: Names of the model's parameters. Some classes tie by patterns, whose members only a list of
                names gives; for all others the groups are complete without it.
        """
        names = dict.fromkeys(parameters)
        for tie in self.ties:
            names.update(dict.fromkeys(tie.names or ()))
        groups: dict[str, list[str]] = {}
        for name in names:
            source = self.tied_to(name)
            if source is not None and self.stores(name):
                groups.setdefault(source, [source]).append(name)
        for pattern in self.shared:
            for name in names:
                for group in _expanded(pattern, name):
                    groups.setdefault(group[0], list(group))
        return tuple(tuple(dict.fromkeys(group)) for group in groups.values())

    def heads(self, part: str) -> int:
        """The number of attention heads in a part of the configuration, which some converters go by."""
        return self._heads[part]

    def may_lack(self, parameter: str) -> bool:
        """Whether transformers loads a file without this parameter, and says nothing."""
        return any(re.search(pattern, parameter) for pattern in self.ignored_missing)

    def ignores(self, key: str) -> bool:
        """Whether transformers passes over a key that leads to no parameter, and says nothing."""
        return any(re.search(pattern, key) for pattern in self.ignored_unexpected)


def _expanded(pattern: Sequence[str], name: str) -> Iterator[tuple[str, ...]]:
    """The group that `name` is in, where it matches one of a group's names."""
    for member in pattern:
        match = re.fullmatch(re.escape(member).replace(r"\*", r"(\d+)"), name)
        if match:
            numbers = match.groups()
            yield tuple(_filled(other, numbers) for other in pattern)


def _filled(pattern: str, numbers: Sequence[str]) -> str:
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


@functools.cache
def data() -> dict[str, Any]:
    """The newest data that ships with the package."""
    files = [file for file in schema.packaged("fixtures/architectures").iterdir() if file.name.endswith(".json")]
    newest = max(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])
    document: dict[str, Any] = json.loads(newest.read_text("utf-8"))
    return document


def _conversions(name: str) -> Any:
    """The steps of the data that go by a name; those of another one, where they are the same."""
    steps = data()["conversions"].get(name)
    return data()["conversions"][steps] if isinstance(steps, str) else steps


def origin() -> str:
    """What the data was made from: "transformers 5.23.0"."""
    return f"transformers {data()['transformers']}"


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
        return str(names[0]) if isinstance(names, list) and names else None
    return _chosen().get((auto, str(config.get("model_type"))))


@functools.cache
def _chosen() -> dict[tuple[str, str], str]:
    return {
        (auto, model_type): name
        for name, entry in data()["classes"].items()
        for auto, types in _autos(entry)
        for model_type in types
    }


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
    if name not in data()["classes"]:
        return None
    composed = _compose(str(name), config)
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
        shared=tuple(tuple(group) for group in entry.get("shared", ())),
        ignored_missing=tuple(entry.get("missing", ())),
        ignored_unexpected=tuple(entry.get("unexpected", ())),
        tree=Tree(composed.modules, data()["structures"], composed.places),
        _heads={part: _heads(config, where) for part, where in entry.get("heads", {}).items()},
    )


@dataclass
class _Composed:
    """A class with the parts that its configuration chooses."""

    entry: dict[str, Any]
    modules: Any
    submodels: list[tuple[str, str, str]]
    ties: list[Tie]
    varying: list[str]
    places: dict[str, Any]


def _compose(name: str, config: Config) -> _Composed:
    entry = data()["classes"][name]
    rules = [rule for rule in entry.get("ties", ()) if _holds(rule.get("when", True), config) and _is_so(rule, config)]
    composed = _Composed(
        entry,
        entry.get("modules", f"@{name}"),
        [(place, kind, model_type) for place, kind, model_type in entry.get("submodels", ())],
        [
            Tie(rule.get("module", ""), target, source)
            for rule in rules
            if not rule.get("varies")
            for target, source in rule["keys"].items()
        ],
        [
            _any_number(_joined(rule.get("module", ""), name))
            for rule in rules
            if rule.get("varies")
            for name in (*rule["keys"], *rule["keys"].values())
        ],
        {},
    )
    for place, part in entry.get("parts", {}).items():
        chosen = _at(config, part["config"]) or {}
        model_type = chosen.get("model_type", part["model_type"])
        other = _chosen().get((part["auto"], model_type))
        if model_type == part["model_type"] or other is None:
            continue
        inner = _compose(other, chosen)
        composed.places[place] = inner.modules
        composed.places.update({f"{place}.{deeper}": modules for deeper, modules in inner.places.items()})
        composed.submodels = _spliced(composed.submodels, place, inner.submodels)
        composed.ties = [tie for tie in composed.ties if not _is_inside(tie.module, place)]
        composed.ties += [Tie(_joined(place, tie.module), tie.target, tie.source) for tie in inner.ties]
        composed.varying += [re.escape(f"{place}.") + pattern for pattern in inner.varying]
    return composed


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
    table = data()["conversions"]
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
    """A pattern of tied weights, for whatever numbers: ``layers.(?!2\\.)\\d+.shared`` as ``layers.\\d+.shared``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", r"\\d+", re.sub(r"\(\?![^)]*\)", "", pattern))


def _heads(config: Config, where: dict[str, Any]) -> int:
    part = _at(config, where["at"]) or {}
    return int(next((part[name] for name in where["names"] if part.get(name) is not None), where["default"]))


def _value(config: Config, name: str) -> Any:
    place, _, last = name.rpartition(".")
    return (_at(config, place) or {}).get(last)


def _at(config: Any, place: str) -> Any:
    for name in filter(None, place.split(".")):
        config = config.get(name) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else None
