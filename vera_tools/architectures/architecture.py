"""One class of transformers' models under one configuration: names, kinds, ties, and how its files are renamed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vera_tools.architectures.renaming import Step, replay
from vera_tools.architectures.trees import Tree, numbered
from vera_tools.errors import CheckFailedError

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
        fixed: They are one module in memory, whatever the files hold.
    """

    module: str
    target: str
    source: str
    fixed: bool = False

    def source_of(self, parameter: str) -> str | None:
        """The parameter that `parameter` is tied to by this, or None."""
        inside = f"{self.module}." if self.module else ""
        if not parameter.startswith(inside):
            return None
        rest = parameter.removeprefix(inside)
        match = re.match(self.target, rest)
        if match is None or (match.end() < len(rest) and rest[match.end()] != "."):
            return None
        if re.fullmatch(r"[\w.]+", self.source):
            return inside + self.source + rest[match.end() :]
        ours, theirs = self._exchanged
        return inside + theirs + rest.removeprefix(ours)

    def target_of(self, parameter: str) -> str | None:
        """The parameter that is tied to `parameter` by this; None where there is none, or its name does not follow."""
        inside = f"{self.module}." if self.module else ""
        ours, theirs = (self.target, self.source) if self.names else self._exchanged
        if not parameter.startswith(inside + theirs):
            return None
        target = inside + ours + parameter.removeprefix(inside + theirs)
        return target if self.source_of(target) == parameter else None

    @property
    def _exchanged(self) -> tuple[str, str]:
        """Where both are one expression behind different names: what differs."""
        pairs = zip(reversed(self.target), reversed(self.source), strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return self.target[: len(self.target) - same], self.source[: len(self.source) - same]

    @property
    def names(self) -> tuple[str, str] | None:
        """Target and source where both are plain names, else None."""
        inside = f"{self.module}." if self.module else ""
        if re.fullmatch(r"[\w.]+", self.target) is None or re.fullmatch(r"[\w.]+", self.source) is None:
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
        ignored_missing: Regular expressions of parameters that a file may lack.
        ignored_unexpected: Regular expressions of keys that a file may hold to no effect.
        tree: Its modules.
        unknown: Modules that the configuration makes of a class that the data does not have: nothing is known inside.
        parameters: Everything that the model stores, with shapes, where transformers was asked; None where that is not
            known.
        switches: The entries of config.json that decide its ties: "text_config.tie_word_embeddings".
        place: Where in config.json its configuration stands: "text_config" for a language model that is loaded alone
            out of a model that sees, "" for all others.
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
    ignored_missing: tuple[str, ...]
    ignored_unexpected: tuple[str, ...]
    tree: Tree
    _heads: Mapping[str, int]
    unknown: tuple[str, ...] = ()
    parameters: Mapping[str, tuple[int, ...]] | None = None
    switches: tuple[str, ...] = ()
    place: str = ""

    @classmethod
    def unnamed(cls, shapes: Mapping[str, tuple[int, ...]], *, name: str = "") -> Architecture:
        """What a model's files alone say of its class: every tensor is a parameter of the same name, and no more."""
        return cls(
            name=name,
            origin="names alone",
            model_type="",
            base_model_prefix="",
            input_embeddings=None,
            output_embeddings=None,
            steps=(),
            ties=(),
            varying=(),
            ignored_missing=(),
            ignored_unexpected=(),
            tree=Tree({}, {}),
            _heads={},
            parameters=shapes,
        )

    @property
    def is_known(self) -> bool:
        """Whether anything but the files' names says what the class is."""
        return bool(self.model_type)

    @property
    def needs_shapes(self) -> bool:
        """Whether a converter goes by shapes of parameters: they say how a tensor is divided, or lies."""
        operations = [operation for step in self.steps for operation in step.operations]
        return any(one.name == "Split" or (one.name == "Transpose" and one["check_dims"]) for one in operations)

    def may_be_tied(self, parameter: str) -> bool:
        """Whether a parameter is in a list of ties that only the model itself makes, so that the data cannot tell.

        Zamba repeats one block at layers that follow from sizes. `ask_transformers` knows.
        """
        return any(re.match(pattern, parameter) for pattern in self.varying)

    def stores(self, parameter: str) -> bool:
        """Whether a model of this class may have a parameter, or a buffer that is saved, of that name."""
        return self.tree.stores(parameter) if self.parameters is None else parameter in self.parameters

    def is_unknown(self, name: str) -> bool:
        """Whether a module or parameter lies in a part of which the data knows nothing."""
        return any(name == place or name.startswith(f"{place}.") for place in self.unknown)

    def parameter_of(self, key: str) -> str | None:
        """The parameter that a key alone leads to, be it today's name or an older one; None where it leads to none.

        Of a key that a converter takes, it is the first parameter that comes of it. `Layout` sees all keys together.
        """
        found = replay([key], self.steps, prefix=self.base_model_prefix, stores=self.stores).gathered
        return next(iter(found), None)

    def kind(self, module: str) -> str | None:
        """What a module is: "Linear", "Conv1D", "Embedding", "LayerNorm", ..., or "Module" for one with others inside.

        None where the class has no such module, or where it is one or another as the configuration says.
        """
        kinds = {kind.partition(":")[0] for kind in self.tree.kinds(module)}
        return kinds.pop() if len(kinds) == 1 else None

    def computes_otherwise(self, module: str) -> str | None:
        """The class of a linear module that does not compute W x + b with its weight; None where all is as usual."""
        return next((name for kind in self.tree.kinds(module) if (name := kind.partition(":")[2])), None)

    def may_have_module(self, ending: str) -> bool:
        """Whether a module's name may end so, as entries of modules_to_save are matched."""
        ending = numbered(ending)
        return bool(self.unknown) or any(name.endswith(ending) for name, _ in self.tree.walk())

    def is_table(self, parameter: str) -> bool:
        """Whether a parameter is one of the input embedding's or of the output layer's."""
        return parameter.rpartition(".")[0] in {self.input_embeddings, self.output_embeddings} - {None}

    def is_linear_target(self, module: str, *, task_type: str | None = None) -> bool:
        """Whether PEFT's "all-linear" adapts a module: every Linear and Conv1D but the output layer.

        Args:
            module: The module's name.
            task_type: The adapter's; "SEQ_CLS" leaves the classifier out where the class has no output embeddings.
        """
        return self.kind(module) in LINEAR and not self.is_output_layer(module, task_type=task_type)

    def is_output_layer(self, module: str, *, task_type: str | None = None) -> bool:
        """Whether a module is the one that PEFT's "all-linear" leaves out.

        Args:
            module: The module's name.
            task_type: The adapter's; "SEQ_CLS" means the classifier where the class has no output embeddings.
        """
        if self.output_embeddings is not None or task_type != "SEQ_CLS":
            return module == self.output_embeddings
        return module == next((name for name in _CLASSIFIERS if self.tree.kinds(name)), None)

    def tied_to(self, parameter: str) -> str | None:
        """The parameter that this one shares its tensor with and takes it from; None where it has its own."""
        seen = {parameter}
        while True:
            for tie in reversed(self.ties):  # of several, the last one holds
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
            # Two plain names may be those of modules, which are tied with all that is in them.
            plain = tie.names if tie.names is not None and self.stores(tie.names[0]) else None
            targets = plain or [tie.target_of(name) for name in names]
            names.update(dict.fromkeys(name for name in targets if name is not None))
        groups: dict[str, list[str]] = {}
        for name in names:
            source = self.tied_to(name)
            if source is not None and self.stores(name):
                groups.setdefault(source, [source]).append(name)
        return tuple(tuple(dict.fromkeys(group)) for group in groups.values())

    def fixed(self, parameters: Iterable[str]) -> bool:
        """Whether some of these parameters are one with others whatever the files hold: no file tells them apart."""
        return any(tie.fixed and tie.source_of(name) is not None for name in parameters for tie in self.ties)

    def heads(self, part: str) -> int:
        """The number of attention heads in a part of the configuration, which some converters go by.

        Raises:
            CheckFailedError: nothing says where the configuration has it.
        """
        if part not in self._heads:
            raise CheckFailedError(
                "the number of attention heads that a converter goes by is not known",
                where=self.name,
                expected=f"that of {part or 'the model'}",
            )
        return self._heads[part]

    def may_lack(self, parameter: str) -> bool:
        """Whether transformers loads a file without this parameter, and says nothing."""
        return any(re.search(pattern, parameter) for pattern in self.ignored_missing)

    def ignores(self, key: str) -> bool:
        """Whether transformers passes over a key that leads to no parameter, and says nothing."""
        return any(re.search(pattern, key) for pattern in self.ignored_unexpected)
