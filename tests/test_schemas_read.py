"""Whatever passes a schema, or nearly does, is read or refused by name: Hypothesis over every file that is read."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.schemas import documents, nearly
from vera_tools import schema
from vera_tools.architectures import data
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import Manifest, ProjectionRecord
from vera_tools.conformity import Compiler
from vera_tools.drifting import comparison
from vera_tools.errors import VeraToolsError
from vera_tools.verifying.log import Log
from vera_tools.verifying.runs import Run


def log(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log").write_text(text + "\n")
        Log(Path(folder) / "log", Run("0" * 64))


def report(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "report").write_text(text)
        comparison.load(Path(folder) / "report")


def base(name: str):
    def read(text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_text(text)
            (Path(folder) / "model-1.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
            with BaseModel.open(folder) as model:
                data.architecture(model.config)

    return read


def metadata(text: str) -> None:
    ProjectionRecord.from_metadata({"vera_tools": text}, where="memory")


#: Each schema of a file that is read, and what reads it.
READERS = {
    "adapter_config.v1": VeraConfig.from_json,
    "manifest.v1": Manifest.from_json,
    "projections.v1": metadata,
    "verify-line.v1": log,
    "verify-run.v1": log,
    "drift.v1": report,
    "model_config.v1": base("config.json"),
    "model_index.v1": base("model.safetensors.index.json"),
}
_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("made", [documents, nearly], ids=["valid", "nearly valid"])
def test_whatever_a_schema_passes_is_read_or_refused_by_name(made, name):
    passed = []

    @_SETTINGS
    @given(made(name))
    def read(document):
        passed.append(not schema.problems(document, name))
        # What is found to pass without jsonschema passes there too.
        assert not schema._check(name)(document) or not list(schema._leaves(document, name))
        with contextlib.suppress(VeraToolsError):
            READERS[name](json.dumps(document))

    read()
    if made is documents:
        assert sum(passed) >= len(passed) // 4  # or else the generator makes other documents than the schema's


@pytest.mark.parametrize("name", READERS)
def test_what_is_read_is_checked_without_jsonschema(name):
    """All keywords of these schemas are known, so that what passes is not put to jsonschema."""
    schema._compiler()._reference(name, "")


WRONG = {
    "true is no 1": ({"type": "integer"}, True),
    "8.0 is no integer": ({"type": "integer"}, 8.0),
    "true is no number": ({"type": "number"}, True),
    "null is no string": ({"type": "string"}, None),
    "another constant": ({"const": 1}, True),
    "another type of a constant": ({"const": 1}, 1.0),
    "none of these": ({"enum": ["a", None]}, "b"),
    "a key missing": ({"required": ["a"]}, {"b": 1}),
    "an unknown key": ({"properties": {"a": True}, "additionalProperties": False}, {"a": 1, "b": 1}),
    "another key's value": ({"additionalProperties": {"type": "string"}}, {"a": 1}),
    "a key's name": ({"propertyNames": {"pattern": "^a"}}, {"b": 1}),
    "an item": ({"items": {"minimum": 0}}, [0, -1]),
    "too few": ({"minItems": 2}, [0]),
    "too many": ({"maxItems": 1}, [0, 0]),
    "too short": ({"minLength": 2}, "a"),
    "too large": ({"maximum": 1}, 2),
    "no match": ({"pattern": "^a$"}, "b"),
    "one of all": ({"allOf": [{"type": "object"}, {"required": ["a"]}]}, {}),
    "none of any": ({"anyOf": [{"type": "null"}, {"required": ["a"]}]}, {}),
    "through a reference": ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "null"}}}, 1),
    "left over": (
        {"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"a": True}}}, "unevaluatedProperties": False},
        {"a": 1, "b": 1},
    ),
    "a keyword that is not known": ({"multipleOf": 2}, 4),
}


@pytest.mark.parametrize(("rule", "value"), WRONG.values(), ids=WRONG)
def test_what_does_not_surely_pass(rule, value):
    assert not Compiler(lambda _: rule).of("x")(value)


def test_what_refers_to_a_rule_that_is_not_known_does_not_surely_pass_either():
    """Whichever of the two is asked for first."""
    rules = {"known": {"items": {"$ref": "urn:vera-tools:other"}}, "other": {"multipleOf": 2}}
    for names in (("other", "known"), ("known", "other", "known")):
        compiler = Compiler(rules.__getitem__)
        assert not any(compiler.of(name)([4] if name == "known" else 4) for name in names)


RIGHT = [
    ({"type": ["integer", "null"], "minimum": 0}, [0, 5, None]),
    ({"minimum": 0, "minItems": 1, "pattern": "a"}, [{}, True, None]),  # each says something of its own type alone
    ({"enum": ["a", None, 1, True]}, ["a", None, 1, True]),
    ({"$defs": {"x": {"items": {"$ref": "#/$defs/x"}, "type": "array"}}, "$ref": "#/$defs/x"}, [[], [[[]], []]]),
]


@pytest.mark.parametrize(("rule", "values"), RIGHT)
def test_what_surely_passes(rule, values):
    assert all(map(Compiler(lambda _: rule).of("x"), values))
