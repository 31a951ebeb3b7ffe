"""The modules of a class of models, as the data stores them: one entry for each class of modules, lists under ``*``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BATCH = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

#: What a module of a plain kind stores; a bias may be missing.
STORED: dict[str, tuple[str, ...]] = {
    "Linear": ("weight", "bias"),
    "Conv1D": ("weight", "bias"),
    "Embedding": ("weight",),
    "LayerNorm": ("weight", "bias"),
    "GroupNorm": ("weight", "bias"),
    "Conv1d": ("weight", "bias"),
    "Conv2d": ("weight", "bias"),
    "Conv3d": ("weight", "bias"),
    "ConvTranspose1d": ("weight", "bias"),
    "ConvTranspose2d": ("weight", "bias"),
    "BatchNorm1d": _BATCH,
    "BatchNorm2d": _BATCH,
}

#: Dimensions of the weight of a plain module.
DIMENSIONS = {
    "Linear": 2,
    "Conv1D": 2,
    "Embedding": 2,
    "LayerNorm": 1,
    "GroupNorm": 1,
    "BatchNorm1d": 1,
    "BatchNorm2d": 1,
    "Conv1d": 3,
    "Conv2d": 4,
    "Conv3d": 5,
    "ConvTranspose1d": 3,
    "ConvTranspose2d": 4,
}

# What a node calls its own kind, where it is a plain module with more inside; and its class, in a tree of one model.
_KIND, _CLASS = "=", "@"
_TENSORS = ("Parameter", "Buffer")
_NUMBER = re.compile(r"(^|(?<=_))\d+$")


class Tree:
    """Modules by name.

    Args:
        root: A kind ("Linear"), a class ("@LlamaMLP"), what is inside by name (``*`` for any number), or a list of
            alternatives.
        structures: What is inside each class.
        places: Modules that stand in the place of those that the root has: by name.
    """

    def __init__(self, root: Any, structures: Mapping[str, Any], places: Mapping[str, Any] | None = None) -> None:
        self._root, self._structures, self._places = root, structures, dict(places or {})
        self.stores = functools.cache(self._stores)
        self.kinds = functools.cache(self._kinds)

    def _stores(self, name: str) -> bool:
        return any(_is_tensor(kind) for kind, _ in self._reached(name))

    def owners(self, parameter: str) -> set[tuple[str, int]]:
        """The kinds of the modules that may hold a parameter of this name, each with its number of dimensions then."""
        return {
            (owner, int(kind.partition(":")[2] or 1)) for kind, owner in self._reached(parameter) if _is_tensor(kind)
        }

    def _kinds(self, name: str) -> tuple[str, ...]:
        """The kinds that a module of this name may have, with its class where it computes otherwise than its kind."""
        return tuple(sorted({kind for kind, _ in self._reached(name) if not _is_tensor(kind)}))

    def walk(self) -> Iterator[tuple[str, str]]:
        """Every module with its kind."""
        roots = [("", self._root), *self._places.items()]
        for place, root in roots:
            for name, kind in self._walked(root, place):
                if not any(name == other or name.startswith(f"{other}.") for other in self._places if other != place):
                    yield name, kind

    def _start(self, name: str) -> tuple[str, Any]:
        """The deepest root that a name lies under, and what of the name is left."""
        places = [place for place in self._places if name == place or name.startswith(f"{place}.")]
        if not places:
            return name, self._root
        deepest = max(places, key=len)
        return name[len(deepest) + 1 :], self._places[deepest]

    def _reached(self, name: str) -> Iterator[tuple[str, str]]:
        """What a name may lead to: kinds of modules and "Parameter", each with the kind of the module around it."""
        rest, root = self._start(name)
        yield from self._descend(root, rest.split(".") if rest else [], "")

    def _descend(self, node: Any, parts: list[str], owner: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, list):
            for option in node:
                yield from self._descend(option, parts, owner)
        elif isinstance(node, str) and not node.startswith("@"):
            if not parts:
                yield node, owner
            elif len(parts) == 1 and parts[0] in STORED.get(plain := node.partition(":")[0], ()):
                yield f"Parameter:{DIMENSIONS[plain] if parts[0] == 'weight' else 1}", node
        else:
            inside = self._structures[node[1:]] if isinstance(node, str) else node
            kind = inside.get(_KIND, "Module")
            if not parts:
                yield kind, owner
                return
            if parts[0] in inside and parts[0] not in (_KIND, _CLASS):
                yield from self._descend(inside[parts[0]], parts[1:], kind)
            any_number = _NUMBER.sub("*", parts[0])
            if any_number in inside and any_number != parts[0]:
                yield from self._descend(inside[any_number], parts[1:], kind)

    def _walked(self, node: Any, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, list):
            for option in node:
                yield from self._walked(option, name)
        elif isinstance(node, str) and not node.startswith("@"):
            if not _is_tensor(node):
                yield name, node
        else:
            inside = self._structures[node[1:]] if isinstance(node, str) else node
            yield name, inside.get(_KIND, "Module")
            for key, child in inside.items():
                if key not in (_KIND, _CLASS):
                    yield from self._walked(child, f"{name}.{key}".lstrip("."))


def numbered(name: str) -> str:
    """A name with ``*`` for its numbers, as a tree has it."""
    return ".".join(_NUMBER.sub("*", part) for part in name.split("."))


def _is_tensor(kind: str) -> bool:
    return kind.partition(":")[0] in _TENSORS
