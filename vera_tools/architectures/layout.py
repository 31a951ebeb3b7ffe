"""One model's files seen through its class: which tensor is which parameter, and what is one with another.

`Layout` joins the class's `Architecture` with the names and shapes that safetensors headers give. Nothing is read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

from vera_tools.architectures import pieces as placing
from vera_tools.architectures.architecture import LINEAR, Architecture
from vera_tools.architectures.pieces import Piece, Shape
from vera_tools.architectures.renaming import Replay, replay
from vera_tools.errors import CheckFailedError


@dataclass(frozen=True)
class Layout:
    """The tensors of all files of one model, by what transformers makes of them.

    Attributes:
        architecture: The class that loads them, under the model's configuration.
        shapes: Of all tensors, by their names in the files.
        parameters: Shapes of parameters of the model as far as they are known otherwise. Few converters ask for them.
    """

    architecture: Architecture
    shapes: Mapping[str, Shape]
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    _made: dict[str, dict[str, tuple[Piece, ...]]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @functools.cached_property
    def _replay(self) -> Replay:
        known = self.architecture
        return replay(self.shapes, known.steps, prefix=known.base_model_prefix, stores=known.stores)

    @functools.cached_property
    def _origins(self) -> dict[str, str]:
        """The entry of the replay that gives each parameter."""
        return {name: entry for entry, gathered in self._replay.gathered.items() for name in placing.names(gathered)}

    @functools.cached_property
    def _of_key(self) -> dict[str, str]:
        return {
            key: entry
            for entry, gathered in self._replay.gathered.items()
            for keys in gathered.keys.values()
            for key in keys
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the files give, in the order in which they are loaded."""
        return tuple(self._origins)

    @functools.cached_property
    def unexpected(self) -> tuple[str, ...]:
        """Keys that lead to no parameter, but for those that transformers passes over in silence."""
        known = self.architecture
        found = self._replay.unexpected.items()
        return tuple(key for key, name in found if not known.ignores(name) and not known.is_unknown(name))

    @functools.cached_property
    def missing(self) -> tuple[str, ...] | None:
        """Parameters that no file gives, nor one that they are tied with; None where all parameters are not known.

        They are where transformers was asked.
        """
        known = self.architecture
        if known.parameters is None:
            return None
        return tuple(
            name for name in sorted(known.parameters) if self.holder(name) is None and not known.may_lack(name)
        )

    @property
    def superseded(self) -> tuple[str, ...]:
        """Keys whose parameter another key gives already."""
        return self._replay.superseded

    def gives(self, parameter: str) -> bool:
        """Whether the files hold this parameter."""
        return parameter in self._origins

    def holder(self, parameter: str) -> str | None:
        """The parameter under which the files hold this one's tensor: itself, or one that it is tied with.

        None where they hold none of them.
        """
        if self.gives(parameter):
            return parameter
        source = self.architecture.tied_to(parameter) or parameter
        if self.gives(source):
            return source
        if source in self._first_tied:
            return self._first_tied[source]
        group = next((group for group in self.architecture.tied((parameter,)) if parameter in group), ())
        return next((name for name in group if self.gives(name)), None)

    @functools.cached_property
    def _first_tied(self) -> dict[str, str]:
        """By what they are tied to, the first of the files' parameters that are."""
        found: dict[str, str] = {}
        for name in self.names:
            if source := self.architecture.tied_to(name):
                found.setdefault(source, name)
        return found

    def kind(self, module: str) -> str | None:
        """What a module is, as `Architecture.kind` says it, where needed with the help of its weight in the files."""
        known = self.architecture
        weight = f"{module}.weight"
        found = known.kind(module)
        if found is not None or not self.gives(weight):
            return found
        whole = [piece for piece in self.pieces(weight) if piece.is_whole]
        if len(whole) != 1:
            return None
        dimensions = len(self.shapes[whole[0].key])
        fitting = {kind.partition(":")[0] for kind, count in known.tree.owners(weight) if count == dimensions}
        return fitting.pop() if len(fitting) == 1 else None

    def is_linear_target(self, module: str, *, task_type: str | None = None) -> bool:
        """Whether PEFT's "all-linear" adapts a module, as `Architecture.is_linear_target` says it."""
        left_out = self.architecture.is_output_layer(module, task_type=task_type)
        return self.kind(module) in LINEAR and not left_out

    @functools.cached_property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of parameters that the configuration makes one tensor, the source first.

        Where the files hold two of a group with other values, transformers does not tie them: that, only values tell.
        """
        return self.architecture.tied(self.names)

    def pieces(self, parameter: str) -> tuple[Piece, ...]:
        """Where a parameter's rows lie.

        Raises:
            CheckFailedError: the files do not give it, or not all of it, or a shape is needed that is not known.
        """
        entry = self._origins.get(parameter)
        if entry is None:
            raise CheckFailedError(
                "the files hold no tensor for this parameter",
                where=parameter,
                expected=f"a tensor of {self.architecture.name}",
            )
        return self._pieces(entry)[parameter]

    def pieces_of(self, key: str) -> tuple[Piece, ...]:
        """Which rows of which parameters lie in a tensor of the files; none where it leads to no parameter."""
        entry = self._of_key.get(key)
        if entry is None:
            return ()
        return tuple(piece for parts in self._pieces(entry).values() for piece in parts if piece.key == key)

    def key_for(self, parameter: str) -> str | None:
        """The name under which a parameter that the files lack can be added so that it is loaded as itself.

        The parameter's own name nearly always is; where a renaming would lead that elsewhere, the older one is found.
        """
        options = [parameter, *(self._older(parameter))]
        for option in options:
            if option in self.shapes:
                continue
            known = self.architecture
            trial = replay([*self.shapes, option], known.steps, prefix=known.base_model_prefix, stores=known.stores)
            entry = trial.gathered.get(parameter)
            if entry is not None and entry.step is None and entry.keys.get(0) == [option]:
                return option
        return None

    def _older(self, parameter: str) -> list[str]:
        """Names like those that the files use for this parameter's neighbours."""
        prefix = f"{self.architecture.base_model_prefix}."
        return [parameter.removeprefix(prefix), prefix + parameter]

    def _pieces(self, entry: str) -> dict[str, tuple[Piece, ...]]:
        if entry not in self._made:
            self._made[entry] = placing.pieces(
                self._replay.gathered[entry],
                self.shapes,
                heads=self.architecture.heads,
                parameters=self._known_shapes,
            )
        return self._made[entry]

    @functools.cached_property
    def _known_shapes(self) -> Mapping[str, Shape]:
        """Shapes of the model's parameters; made once, because there is an entry for each of them."""
        return {**(self.architecture.parameters or {}), **self.parameters}
