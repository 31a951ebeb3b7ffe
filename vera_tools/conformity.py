"""Schemas as functions: what says of a document that it passes, in a small part of the time that jsonschema takes.

Where this says no, or a schema has a keyword that it does not know, jsonschema decides, and says what is wrong. So what
has to hold here is one thing: whatever passes, passes there. A test puts made-up documents to both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

#: Whether a value surely passes.
Check = Callable[[Any], bool]

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "integer": (int,),
    "number": (int, float),
}
#: Keywords that say nothing of a document by themselves.
_SILENT = frozenset(("$schema", "$id", "$defs", "$comment", "title", "description", "contentEncoding"))
_MEMBERS = frozenset(("properties", "additionalProperties", "unevaluatedProperties", "required", "propertyNames"))


class UnknownKeywordError(Exception):
    """A schema has what is not known here."""


class Compiler:
    """Makes one function of each rule. `load` gives a schema by its name."""

    def __init__(self, load: Callable[[str], Mapping[str, Any]]) -> None:
        self._load = load
        self._made: dict[tuple[str, str], Check] = {}

    def of(self, name: str) -> Check:
        """What checks a document against the schema called `name`."""
        return self._reference(name, "")

    def _reference(self, name: str, path: str) -> Check:
        known = self._made.get((name, path))
        if known is None:
            self._made[name, path] = lambda value: self._made[name, path](value)  # for a rule that refers to itself
            try:
                known = self._rule(self._at(name, path), name)
            except UnknownKeywordError:
                known = _passes_nothing
            self._made[name, path] = known
        return known

    def _at(self, name: str, path: str) -> Any:
        target: Any = self._load(name)
        for part in filter(None, path.split("/")):
            target = target[part]
        return target

    @staticmethod
    def _place(reference: str, name: str) -> tuple[str, str]:
        document, _, path = reference.partition("#")
        return document.removeprefix("urn:vera-tools:").replace(":", ".") if document else name, path

    def _rule(self, rule: Any, name: str) -> Check:
        if rule is True:
            return lambda _: True
        if not isinstance(rule, dict):
            raise UnknownKeywordError
        checks = []
        if "type" in rule:
            names = rule["type"] if isinstance(rule["type"], list) else [rule["type"]]
            checks.append(_has_type(frozenset(kind for one in names for kind in _TYPES[one])))
        if _MEMBERS & rule.keys():
            checks.append(self._members(rule, name))
        for key, value in rule.items():
            if key not in _SILENT and key not in _MEMBERS and key != "type":
                checks.append(self._keyword(key, value, name))
        return _all(checks)

    def _keyword(self, key: str, value: Any, name: str) -> Check:
        if key == "$ref":
            return self._reference(*self._place(value, name))
        if key == "allOf":
            return _all([self._rule(part, name) for part in value])
        if key == "anyOf":
            return _any([self._rule(part, name) for part in value])
        if key == "items":
            return _items(self._rule(value, name))
        if key in ("enum", "const"):
            return _is_one_of(value if key == "enum" else [value])
        if key == "pattern":
            search = re.compile(value).search
            return lambda text: type(text) is not str or search(text) is not None
        if key in _BOUNDS:
            return _BOUNDS[key](value)
        raise UnknownKeywordError

    def _members(self, rule: Mapping[str, Any], name: str) -> Check:
        known = {key: self._rule(part, name) for key, part in rule.get("properties", {}).items()}
        required = tuple(rule.get("required", ()))
        others = rule.get("additionalProperties", True)
        if "unevaluatedProperties" in rule:
            if rule["unevaluatedProperties"] is not False or {"additionalProperties", "propertyNames"} & rule.keys():
                raise UnknownKeywordError
            return self._closed(known, required, frozenset(self._named(rule, name)))
        other = None if others is True else (lambda _: False) if others is False else self._rule(others, name)
        names = self._rule(rule["propertyNames"], name) if "propertyNames" in rule else None

        def check(value: Any) -> bool:
            if type(value) is not dict:
                return True
            for key in required:
                if key not in value:
                    return False
            for key, member in value.items():
                part = known.get(key, other)
                if part is not None and not part(member):
                    return False
            return names is None or all(map(names, value))

        return check

    def _named(self, rule: Mapping[str, Any], name: str) -> set[str]:
        """The members that a rule names, or the one that it refers to."""
        named = set(rule.get("properties", ()))
        if "$ref" in rule:
            place = self._place(rule["$ref"], name)
            named |= self._named(self._at(*place), place[0])
        return named

    @staticmethod
    def _closed(known: Mapping[str, Check], required: tuple[str, ...], named: frozenset[str]) -> Check:
        def check(value: Any) -> bool:
            if type(value) is not dict:
                return True
            return (
                all(key in value for key in required)
                and value.keys() <= named
                and all(part(value[key]) for key, part in known.items() if key in value)
            )

        return check


def _passes_nothing(_: Any) -> bool:
    """What stands for a rule that is not known here, for good: others may refer to it."""
    return False


def _has_type(kinds: frozenset[type]) -> Check:
    return lambda value: type(value) in kinds


def _all(checks: list[Check]) -> Check:
    if len(checks) == 1:
        return checks[0]
    if len(checks) == 2:
        one, two = checks
        return lambda value: one(value) and two(value)

    def check(value: Any) -> bool:
        for part in checks:  # noqa: SIM110 - a generator takes twice as long
            if not part(value):
                return False
        return True

    return check


def _any(checks: list[Check]) -> Check:
    def check(value: Any) -> bool:
        for part in checks:  # noqa: SIM110 - as above
            if part(value):
                return True
        return False

    return check


def _items(item: Check) -> Check:
    return lambda value: type(value) is not list or all(map(item, value))


def _is_one_of(choices: list[Any]) -> Check:
    """By type too: True is not 1. Lists and objects are left to jsonschema."""
    plain = frozenset((type(choice), choice) for choice in choices if not isinstance(choice, dict | list))
    return lambda value: type(value) in _PLAIN and (type(value), value) in plain


_PLAIN = frozenset((str, int, float, bool, type(None)))


def _number(holds: Callable[[Any, Any], bool]) -> Callable[[Any], Check]:
    return lambda bound: lambda value: type(value) not in (int, float) or holds(value, bound)


def _length(kind: type[str] | type[list[Any]], holds: Callable[[int, int], bool]) -> Callable[[int], Check]:
    return lambda bound: lambda value: not isinstance(value, kind) or holds(len(value), bound)


_BOUNDS: dict[str, Callable[[Any], Check]] = {
    "minimum": _number(lambda value, bound: value >= bound),
    "maximum": _number(lambda value, bound: value <= bound),
    "minItems": _length(list, lambda length, bound: length >= bound),
    "maxItems": _length(list, lambda length, bound: length <= bound),
    "minLength": _length(str, lambda length, bound: length >= bound),
    "maxLength": _length(str, lambda length, bound: length <= bound),
}
