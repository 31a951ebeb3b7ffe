"""How transformers finds the parameter that a tensor of a file belongs to: its renamings, replayed with `re` alone.

The table of renamings is data (see `data`). What is done with it follows transformers 5.23,
core_model_loading.py: `rename_source_key`, `GroupWeightRename`, `convert_and_load_state_dict_in_model`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Operation:
    """One operation on tensors by its name in transformers, with its arguments."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, argument: str) -> Any:
        """The value of an argument, None where it has none."""
        return dict(self.arguments).get(argument)


@dataclass(frozen=True)
class Step:
    """One renaming, or one converter (a renaming with operations).

    Attributes:
        sources: Regular expressions; in a converter, ``*.`` stands for a number.
        targets: What the match becomes; a converter may have several.
        operations: What a converter does to the tensors.
        guarded: The pairs of sources and targets apply from the first key on that the first source matches.
        offset: Added to the number that the source catches.
        scope: The part of the model whose keys this applies to; None where it applies to all.
        prefix: The class's base_model_prefix.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    guarded: bool = False
    offset: int | None = None
    scope: str | None = None
    prefix: str = ""

    @classmethod
    def from_document(cls, document: dict[str, Any], *, scope: str | None, prefix: str) -> Step:
        """A step of the data."""
        operations = tuple(
            Operation(
                entry["name"],
                tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in entry.items() if key != "name"),
            )
            for entry in document.get("operations", ())
        )
        return cls(
            tuple(document["from"]),
            tuple(document["to"]),
            operations,
            document.get("guarded", False),
            document.get("offset"),
            scope,
            prefix,
        )

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        branches = []
        # The longest first, and to the end of a name, so that "weight" leaves "weight_scale" alone.
        for number, source in sorted(enumerate(self.sources), key=lambda entry: -len(entry[1])):
            pattern = source.replace("*.", r".*\.")
            if re.search(r"[a-zA-Z0-9]$", pattern):
                pattern += r"(?!\w)"
            branches.append(f"(?P<g{number}>{pattern})")
        return re.compile("|".join(branches))

    def apply(self, key: str, active: set[int]) -> tuple[str, int | None]:
        """The key after this step, and the number of the source that it matched, or None.

        Args:
            key: A key of the file, as the steps before have left it.
            active: Identities of the guarded steps whose guard was seen; updated.
        """
        inside = self._inside(key)
        if inside is None:
            return key, None
        outside, rest = inside
        match = self._pattern.search(rest)
        if match is None:
            return key, None
        group = next(name for name, value in match.groupdict().items() if value is not None)
        number = int(group[1:])
        target = self.targets[0]
        if self.guarded:
            if number == 0:
                active.add(id(self))
            elif id(self) not in active:
                return key, None
            target = self.targets[number]
        first = self._pattern.groupindex[group]
        if self.guarded:
            target = re.sub(r"\\(\d+)", lambda found: match.group(first + int(found[1])) or "", target)
        elif r"\1" in target:
            caught = match.group(first + 1)
            target = target.replace(r"\1", caught if self.offset is None else str(int(caught) + self.offset))
        return outside + rest.replace(match.group(0), target, 1), number

    def _inside(self, key: str) -> tuple[str, str] | None:
        """The part of a key that lies outside this step's scope and the rest; None where all of it does."""
        if self.scope is None:
            return "", key
        scope = f"{self.scope}." if self.scope else ""
        prefix = f"{self.prefix}." if self.prefix else ""
        # Files of the bare model, without the head, lack the prefix.
        for outside in (prefix + scope, scope):
            if key.startswith(outside):
                return outside, key.removeprefix(outside)
        return None


@dataclass
class Gathered:
    """What one parameter, or the parameters that one converter makes together, come from.

    Attributes:
        parameter: The parameter, the first of them where a converter makes several.
        step: The converter; None where one tensor is taken as it is.
        keys: The file's keys, by the number of the converter's source.
    """

    parameter: str
    step: Step | None = None
    keys: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Replay:
    """A file's keys, sorted out.

    Attributes:
        gathered: What is loaded, by the first parameter's name.
        unexpected: Keys that lead to no parameter, with what they were renamed to.
        superseded: Keys that lead to a parameter which another key, coming before in order, already gives.
    """

    gathered: dict[str, Gathered]
    unexpected: dict[str, str]
    superseded: tuple[str, ...]


def replay(keys: Iterable[str], steps: Sequence[Step], *, prefix: str, stores: Callable[[str], bool]) -> Replay:
    """Sort out a file's keys as transformers does on loading.

    Args:
        keys: All keys of all files of one model: what becomes of one may depend on others.
        steps: The class's renamings and converters, in order.
        prefix: The class's base_model_prefix.
        stores: Whether the class has a parameter, or a buffer that is saved, of that name.
    """
    renamings = [step for step in steps if not step.operations]
    converters = [step for step in steps if step.operations]
    active: set[int] = set()
    gathered: dict[str, Gathered] = {}
    unexpected: dict[str, str] = {}
    superseded: list[str] = []
    for key in sorted(keys, key=natural_order):
        name, converter, number = key, None, None
        for step in renamings:
            name, _ = step.apply(name, active)
        for step in converters:
            name, number = step.apply(name, active)
            if number is not None:
                converter = step
                break
        name = _with_prefix(name, prefix, stores)
        if not stores(name) and stores(key):
            name, converter, number = _with_prefix(key, prefix, stores), None, None
        if not stores(name):
            unexpected[key] = name
            continue
        entry = gathered.setdefault(name, Gathered(name, converter))
        if entry.step is not converter or (converter is None and entry.keys):
            superseded.append(key)
        else:
            entry.keys.setdefault(number or 0, []).append(key)
    return Replay(gathered, unexpected, tuple(superseded))


def _with_prefix(name: str, prefix: str, stores: Callable[[str], bool]) -> str:
    """The name with the base model's prefix taken off or put before it, where only so it is a parameter's."""
    if name.startswith(prefix):
        shorter = re.sub(f"^{prefix}.", "", name, count=1)
        if stores(shorter):
            return shorter
    longer = f"{prefix}.{name}"
    return longer if stores(longer) else name


def natural_order(key: str) -> list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]]:
    """Sorts keys as transformers does: numbers by size, before names; names by what they end in, too."""
    parts: list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]] = []
    for part in key.split("."):
        text = part.rstrip("0123456789")
        if part.isdigit():
            parts.append((0, int(part)))
        elif text != part:
            parts.append((1, text, int(part[len(text) :])))
        else:
            parts.append((1, part))
    return parts
