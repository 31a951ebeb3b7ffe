"""Documents that a packaged schema passes, and those that it nearly passes, for Hypothesis."""

from __future__ import annotations

import functools
import re
from typing import Any

from hypothesis import strategies as st

from vera_tools import schema

Strategy = st.SearchStrategy[Any]

#: Whatever JSON may hold, in small amounts.
VALUES: Strategy = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def documents(name: str) -> Strategy:
    """Documents that the schema called `name` passes, with few exceptions."""
    return _of(schema.load(name), schema.load(name))


def nearly(name: str) -> Strategy:
    """The same with one value anywhere in them changed, taken out, or one added."""
    return st.builds(_changed, documents(name), st.integers(0, 2**32), VALUES, st.sampled_from(("put", "drop", "add")))


def _of(rule: Any, root: dict[str, Any]) -> Strategy:
    if rule is True:
        return VALUES
    if "$ref" in rule and not {"properties", "type"} & rule.keys():
        return _referred(rule["$ref"], root)
    if "allOf" in rule:
        return _of(
            functools.reduce(_both, (_target(p["$ref"], root)[0] if "$ref" in p else p for p in rule["allOf"])), root
        )
    if "const" in rule:
        return st.just(rule["const"])
    if "enum" in rule:
        return st.sampled_from(rule["enum"])
    for several in ("anyOf", "oneOf"):
        if several in rule and not {"properties", "type"} & rule.keys():
            return st.one_of([_of(part, root) for part in rule[several]])
    types = rule.get("type", "object" if "properties" in rule else None)
    if types is None:
        return VALUES
    return st.one_of([_of_type(kind, rule, root) for kind in ([types] if isinstance(types, str) else types)])


def _of_type(kind: str, rule: dict[str, Any], root: dict[str, Any]) -> Strategy:
    low, high = rule.get("minimum"), rule.get("maximum")
    simple: dict[str, Strategy] = {
        "null": st.none(),
        "boolean": st.booleans(),
        "integer": st.integers(low, high) | st.sampled_from([n for n in (1, 2, 8) if high is None or n <= high]),
        "number": st.floats(low, high, allow_nan=False, allow_infinity=False),
        "string": st.from_regex(rule["pattern"].replace("$", r"\Z"), alphabet=st.characters(codec="utf-8"))
        if "pattern" in rule
        else st.text(max_size=8),
    }
    if kind in simple:
        return simple[kind]
    if kind == "array":
        return st.lists(_of(rule.get("items", True), root), min_size=rule.get("minItems", 0), max_size=3)
    parts = {key: _of(part, home) for key, (part, home) in _properties(rule, root).items()}
    required = _required(rule, root)
    whole = st.fixed_dictionaries(
        {key: part for key, part in parts.items() if key in required},
        optional={key: part for key, part in parts.items() if key not in required},
    )
    more = rule.get("additionalProperties", False)
    if more is False or parts:
        return whole
    keys = _of(rule["propertyNames"], root) if "propertyNames" in rule else st.text(max_size=8)
    return st.dictionaries(keys, _of(more, root), max_size=3)


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two rules that must hold together."""
    first, second = (rule.get("properties", {}) for rule in (one, other))
    together = {key: {**first.get(key, {}), **second.get(key, {})} for key in (*first, *second)}
    return {**one, **other, "properties": together}


def _properties(rule: dict[str, Any], root: dict[str, Any]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each member's rule, and the schema that its references start from."""
    outer = _properties(*_target(rule["$ref"], root)) if "$ref" in rule else {}
    return {**outer, **{key: (part, root) for key, part in rule.get("properties", {}).items()}}


def _required(rule: dict[str, Any], root: dict[str, Any]) -> set[str]:
    outer = _required(*_target(rule["$ref"], root)) if "$ref" in rule else set()
    return outer | set(rule.get("required", ()))


def _referred(reference: str, root: dict[str, Any]) -> Strategy:
    rule, home = _target(reference, root)
    return st.deferred(lambda: _of(rule, home))


def _target(reference: str, root: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    name, _, path = reference.partition("#")
    if match := re.fullmatch(r"urn:vera-tools:([\w-]+):(v\d+)", name):
        root = schema.load(f"{match[1]}.{match[2]}")
    rule = root
    for part in filter(None, path.split("/")):
        rule = rule[part]
    return rule, root


def _changed(document: Any, seed: int, value: Any, how: str) -> Any:
    whole = [document]
    holder: Any = whole
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[seed % len(keys)]
        seed //= len(keys)
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or seed % 4 == 0:
            break
        holder = inner
    if how == "put" or holder is whole:
        holder[key] = value
    elif how == "drop":
        del holder[key]
    elif isinstance(holder, dict):
        holder["more"] = value
    else:
        holder.append(value)
    return whole[0]
