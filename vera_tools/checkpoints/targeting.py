"""Which modules a config adapts, and which it saves whole: PEFT's rules, for as many names as a file may hold.

Names without any sign of a regular expression, which nearly all are, are found by looking them up; only the others are
held against each module's name, and `expressions` bounds what that may cost.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from vera_tools.checkpoints import expressions, names
from vera_tools.checkpoints.expressions import Expression

#: What PEFT puts around an entry of layers_pattern, its group's name included.
IN_LAYERS = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ANY_LAYERS = Expression(r".*?\.[^.]*\.(?P<idx>\d+)\.", "layers_to_transform")
_PLAIN = re.compile(r"[\w-]+(?:\.[\w-]+)*")


@dataclass(frozen=True)
class Targeting:
    """What a config says of modules.

    Attributes:
        targets: target_modules, where it is a list; None where it matches anything.
        target: target_modules, where it is a regular expression.
        layers: layers_to_transform, as text; None adapts all.
        patterns: layers_pattern, as the expressions that PEFT makes of it; empty where there is none.
        saved: The modules that are trained and saved whole.
        where: The file that says so.
    """

    targets: frozenset[str] | None
    target: Expression | None
    layers: frozenset[str] | None
    patterns: tuple[Expression, ...]
    saved: tuple[str, ...]
    where: str

    def prepare(self, modules: Collection[str]) -> None:
        """Evaluate what may take long of the regular expressions for these modules, all at once.

        Raises:
            FormatError: they take too long.
        """
        layers = (self.patterns or (_ANY_LAYERS,)) if self.layers is not None else ()
        tried = [*([self.target] if self.target else []), *layers, *self._expressions]
        expressions.prepare(tried, modules)
        expressions.refuse_tries(len(self._paths) * len(modules), where=f"{self.where}: modules_to_save")

    def adapts(self, module: str) -> bool:
        """Whether the module with this dotted name is adapted, by PEFT's rules.

        A name in the list matches as a whole or as a suffix after a dot; a string is a regular expression for the
        whole name; "all-linear" and None match anything here, because only the model itself can say more.

        Raises:
            FormatError: a regular expression takes too long.
        """
        if self.keeps_from_adapting(module):
            return False
        if self.target is not None:
            return expressions.match(self.target, module) is not None
        if self.targets is None:
            return self._is_in_layers(module)
        if module in self.targets:
            return True
        return any(suffix in self.targets for suffix in suffixes(module)) and self._is_in_layers(module)

    def keeps_from_adapting(self, module: str) -> bool:
        """Whether a saved module covers this one, so that PEFT does not adapt it.

        PEFT's ``check_target_module_exists``: an entry of modules_to_save is a regular expression for a part of the
        path, and whatever lies below that part is meant too.

        Raises:
            FormatError: a regular expression takes too long.
        """
        if not self.saved:
            return False
        if "\n" in module:  # which a dot in an expression does not match
            tried = (self._kept_by(name) for name in self.saved)
            return any(expressions.match(expression, module) is not None for expression in tried)
        if not self._names.isdisjoint(module.split(".")) or (self._paths and self._has_path(module)):
            return True
        return any(expressions.match(expression, module) is not None for expression in self._expressions)

    def saves(self, parameter: str) -> bool:
        """Whether a parameter lies in a module that an entry of modules_to_save means (see `names.lies_in_saved`)."""
        return next(self.saving(parameter), None) is not None

    def saving(self, parameter: str) -> Iterator[str]:
        """The entries of modules_to_save that mean a module in which a parameter lies."""
        if len(self.saved) <= 16:
            yield from (name for name in self.saved if names.lies_in_saved(parameter, name))
            return
        dot = parameter.find(".")
        while dot != -1:
            for length in self._lengths:
                if length > dot:
                    break
                if (end := parameter[dot - length : dot]) in self._entries:
                    yield end
            dot = parameter.find(".", dot + 1)

    def means(self, module: str) -> bool:
        """Whether an entry of modules_to_save means this module itself, and not only one around it."""
        if len(self.saved) <= 16:
            return module.endswith(self.saved)
        return any(module[-length or len(module) :] in self._entries for length in self._lengths)

    def nested(self, parameter: str) -> tuple[str, str] | None:
        """Two modules that entries of modules_to_save mean, one in the other and both around a parameter; None without.

        PEFT's ``_set_trainable`` wraps either. What it then saves lacks the inner one as it was trained, and
        ``set_peft_model_state_dict`` raises a KeyError.
        """
        around = (parameter[:dot] for dot, character in enumerate(parameter) if character == ".")
        outer, inner = itertools.islice((*filter(self.means, around), "", ""), 2)
        return (outer, inner) if inner else None

    @functools.cached_property
    def _entries(self) -> frozenset[str]:
        return frozenset(self.saved)

    @functools.cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(sorted(set(map(len, self.saved))))

    @functools.cached_property
    def _names(self) -> frozenset[str]:
        """The entries that are one part of a path."""
        return frozenset(name for name in self.saved if "." not in name and _PLAIN.fullmatch(name))

    @functools.cached_property
    def _paths(self) -> dict[tuple[int, ...], frozenset[tuple[str, ...]]]:
        """The entries that are several, by their lengths: PEFT takes the dots between them for any character."""
        found: dict[tuple[int, ...], set[tuple[str, ...]]] = {}
        for name in self.saved:
            if "." in name and _PLAIN.fullmatch(name):
                parts = tuple(name.split("."))
                found.setdefault(tuple(map(len, parts)), set()).add(parts)
        return {lengths: frozenset(paths) for lengths, paths in found.items()}

    @functools.cached_property
    def _expressions(self) -> tuple[Expression, ...]:
        return tuple(self._kept_by(name) for name in self.saved if not _PLAIN.fullmatch(name))

    def _kept_by(self, name: str) -> Expression:
        return kept_by(name, where=f"{self.where}: modules_to_save")

    def _has_path(self, module: str) -> bool:
        starts = [0, *(n + 1 for n, character in enumerate(module) if character == ".")]
        for lengths, paths in self._paths.items():
            extent = sum(lengths) + len(lengths) - 1
            for start in starts:
                stop = start + extent
                if stop == len(module) or module[stop : stop + 1] == ".":
                    place, parts = start, []
                    for length in lengths:
                        parts.append(module[place : place + length])
                        place += length + 1
                    if tuple(parts) in paths:
                        return True
        return False

    def _is_in_layers(self, module: str) -> bool:
        if self.layers is None:
            return True
        for expression in self.patterns or (_ANY_LAYERS,):
            found = expressions.match(expression, module)
            if found is not None:
                # As text: a name may hold more digits than an int takes.
                return ((found["idx"] or "").lstrip("0") or "0") in self.layers
        return False


def kept_by(name: str, *, where: str) -> Expression:
    """An entry of modules_to_save as the expression that PEFT makes of it."""
    return Expression(names.KEPT_FROM_ADAPTING.format(name), where, written=name)


def needs_no_expression(name: str) -> bool:
    """Whether an entry of modules_to_save is a name, which is always an expression and never a slow one."""
    return _PLAIN.fullmatch(name) is not None


def suffixes(name: str) -> Iterator[str]:
    """What stands behind each dot of a name: "b.c" and "c" of "a.b.c"."""
    dot = name.find(".")
    while dot != -1:
        yield name[dot + 1 :]
        dot = name.find(".", dot + 1)


def idle(targets: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those of `targets`, a list in target_modules, that mean none of the modules, in their order."""
    missing = dict.fromkeys(targets)
    for module in modules:
        if not missing:
            break
        missing.pop(module, None)
        for suffix in suffixes(module):
            missing.pop(suffix, None)
    return list(missing)
