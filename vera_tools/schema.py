"""The packaged JSON schemas, and validation whose errors name the path in the document.

What passes is found out by `conformity`. jsonschema is imported for the first document that may not pass.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vera_tools.conformity import Check, Compiler
from vera_tools.errors import FormatError, cut

if TYPE_CHECKING:
    from collections.abc import Iterator
    from importlib.abc import Traversable  # importlib.resources.abc from Python 3.11 on

    from jsonschema import ValidationError
    from jsonschema.protocols import Validator
    from referencing import Registry


def packaged(folder: str) -> Traversable:
    """A data folder that ships with the package ("schemas"): inside the wheel, beside the package in a checkout."""
    inside = resources.files("vera_tools") / folder
    return inside if inside.is_dir() else Path(__file__).parent.parent / folder


@functools.cache
def load(name: str) -> dict[str, Any]:
    """The schema called `name`, e.g. ``"verify.v1"``."""
    document: dict[str, Any] = json.loads((packaged("schemas") / f"{name}.schema.json").read_text("utf-8"))
    return document


def problems(document: object, name: str) -> list[FormatError]:
    """Everything in which `document` breaks the schema called `name`, most telling first."""
    if _check(name)(document):
        return []
    return [_as_error(error) for error in sorted(_leaves(document, name), key=lambda e: [str(p) for p in e.path])]


def shown(value: object) -> str:
    """A parsed value as it stood in the file, cut short: no more of it is written out than is shown."""
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(value):
            text += piece
            if len(text) > 60:
                break
    except (ValueError, RecursionError):
        return "no plain value"
    return cut(text)


def validate(document: object, name: str, *, where: str) -> None:
    """Check `document`, which was read from `where`, against the schema called `name`.

    Raises:
        FormatError: naming the first offending path, what was expected and what was found.
    """
    for error in problems(document, name):
        inside = f"{where}: {error.where}" if error.where else where
        raise FormatError(error.what, where=inside, expected=error.expected, found=error.found)


@functools.cache
def _check(name: str) -> Check:
    return _compiler().of(name)


@functools.cache
def _compiler() -> Compiler:
    return Compiler(load)


@functools.cache
def _validator(name: str) -> Validator:
    import jsonschema
    from jsonschema import validators

    # JSON Schema calls 8.0 an integer; torch.manual_seed and PEFT do not.
    checker = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    )
    extend: Any = validators.extend  # jsonschema's stubs leave it untyped
    validator: Validator = extend(jsonschema.Draft202012Validator, type_checker=checker)(
        load(name), registry=_registry()
    )
    return validator


@functools.cache
def _registry() -> Registry[Any]:
    from referencing import Registry, Resource

    names = [entry.name.removesuffix(".schema.json") for entry in packaged("schemas").iterdir()]
    return Registry().with_resources((load(name)["$id"], Resource.from_contents(load(name))) for name in names)


def _leaves(document: Any, name: str) -> Iterator[ValidationError]:
    for error in _validator(name).iter_errors(document):
        parts = error.context or []
        if (
            error.validator == "anyOf"
        ):  # "null or an object": an object is told what is wrong in it, not that it is no null
            parts = [part for part in parts if part.relative_path or part.validator != "type"]
        yield from parts if parts and error.validator in ("allOf", "anyOf") else [error]


def _as_error(error: ValidationError) -> FormatError:
    path = ".".join(map(str, error.absolute_path))
    description = error.schema.get("description") if isinstance(error.schema, dict) else None
    instance: Any = error.instance
    if error.validator == "required":
        required: Any = error.validator_value
        missing = next(key for key in required if key not in instance)
        return FormatError(f"the key {missing!r} is missing", where=path or None)
    if error.validator in ("additionalProperties", "unevaluatedProperties"):
        # Which ones they are, jsonschema says in its message alone: "... ('a', 'b' were unexpected)".
        names = re.search(r"\((.*) (?:was|were) unexpected\)", error.message, re.DOTALL)
        return FormatError(f"unknown key {names[1]}" if names else "has unknown keys", where=path or None)
    expected = description or f"{error.validator} {json.dumps(error.validator_value)}"
    return FormatError(
        "has a wrong value",
        where=path or None,
        expected=expected,
        found=shown(instance),
    )
