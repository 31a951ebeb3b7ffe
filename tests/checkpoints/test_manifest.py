"""The manifest and the record in a file's metadata: written, read back, and refused where they are wrong."""

from __future__ import annotations

import copy
import json
import re

import pytest

from vera_tools import schema
from vera_tools._version import TOOL
from vera_tools.checkpoints.manifest import METADATA_KEY, BaseRecord, Manifest, Original, ProjectionRecord, TensorRecord
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.projections.pair import PairShape
from vera_tools.projections.recipe import Recipe, candidates

DIGESTS = {"vera_A": "a" * 64, "vera_B": "b" * 64}
RECORD = ProjectionRecord(Recipe(prng_key=7), "stored", PairShape(4, 6, 5), "float32", DIGESTS)


def make(**changes) -> Manifest:
    fields = {
        "projections": RECORD,
        "tensors": {"z": TensorRecord((2, 3), "bfloat16", "c" * 64), "a": TensorRecord((), "int64", "d" * 64)},
        "config": {"peft_type": "VERA", "é": [None, 2**63]},
        "metadata": {"format": "pt"},
        "base": BaseRecord("org/base", "main", {"w": TensorRecord((6, 5), "float32", None)}),
        "torch": "2.13.0",
        "platform": "Linux-x86_64",
        "original": Original("e30=", "{\r\n}", "e" * 64),
    }
    return Manifest(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": None, "original": None, "base": BaseRecord()},
        {"projections": ProjectionRecord(None, "live", PairShape(1, 1, 1), "float64", DIGESTS)},
        {
            "projections": ProjectionRecord(
                Recipe(prng_key=-1, prng_key_B=3), "stated", PairShape(1, 9, 1), "bfloat16", DIGESTS
            )
        },
        {"tensors": {}, "config": {}, "metadata": {}},
        {"tool": {"name": "vera-tools", "version": "9.9"}},
    ],
)
def test_a_manifest_is_read_back_as_it_was_written(changes):
    manifest = make(**changes)
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text
    schema.validate(json.loads(text), "manifest.v1", where="test")


def test_the_text_is_what_the_interface_promises():
    document = json.loads(make().to_json())
    assert document["schema"] == "vera-tools/manifest/v1"
    assert document["tool"] == TOOL
    assert (document["r"], document["in_max"], document["out_max"], document["assumed"]) == (4, 6, 5, False)
    assert document["recipe"]["name"] == "mt19937-f32-fused"
    assert document["projections"]["vera_B"] == {"shape": [5, 4], "dtype": "float32", "sha256": "b" * 64}
    assert list(document["tensors"]) == ["a", "z"]
    assert document["base"] == {
        "name": "org/base",
        "revision": "main",
        "weights": {"w": {"shape": [6, 5], "dtype": "float32", "sha256": None}},
    }
    assert "é" in make().to_json()
    assert make().to_json().endswith("}\n")


def test_the_same_manifest_is_the_same_text_in_whatever_order_it_was_made():
    backwards = dict(reversed(make().tensors.items()))
    assert make(tensors=backwards).to_json() == make().to_json()


@pytest.mark.parametrize(
    "recipe", [None, *candidates(9), Recipe(prng_key=1, prng_key_B=2), Recipe(prng_key=1, b_first=True)]
)
def test_a_record_is_read_back_from_metadata(recipe):
    record = ProjectionRecord(recipe, "assumed" if recipe is None else "stored", PairShape(2, 3, 4), "float16", DIGESTS)
    metadata = record.to_metadata()
    assert metadata["format"] == "pt"
    assert ProjectionRecord.from_metadata(metadata, where="file") == record
    assert record.to_metadata() == metadata


def test_a_file_of_another_program_records_nothing():
    assert ProjectionRecord.from_metadata({"format": "pt"}, where="file") is None


def edit(path: str, value: object):
    """Set (or with ... remove) the value at a dotted path."""

    def change(document):
        *parents, key = path.split("/")
        for parent in parents:
            document = document[parent]
        if value is ...:
            del document[key]
        else:
            document[key] = value

    return change


WRONG = {
    "another version": (edit("schema", "vera-tools/manifest/v2"), "schema"),
    "without schema": (edit("schema", ...), "the key 'schema' is missing"),
    "a digest too short": (edit("digest", "c" * 63), "digest: has a wrong value (expected 64 hexadecimal digits"),
    "a digest in upper case": (edit("digest", "C" * 64), "digest: has a wrong value (expected 64 hexadecimal digits"),
    "a digest null": (edit("digest", None), "digest: has a wrong value"),
    "an unknown key": (edit("signature", "x"), "signature"),
    "without tensors": (edit("tensors", ...), "the key 'tensors' is missing"),
    "tensors a list": (edit("tensors", []), "tensors"),
    "a tensor null": (edit("tensors/z", None), "tensors.z"),
    "a tensor's digest short": (edit("tensors/z/sha256", "cc"), "tensors.z: sha256"),
    "a tensor's digest upper case": (edit("tensors/z/sha256", "C" * 64), "tensors.z: sha256"),
    "a tensor's digest with a newline": (edit("tensors/z/sha256", "c" * 64 + "\n"), "tensors.z"),
    "a tensor's shape negative": (edit("tensors/z/shape", [-1]), "tensors.z: shape.0"),
    "a tensor's shape true": (edit("tensors/z/shape", [True]), "tensors.z: shape.0"),
    "a tensor's shape text": (edit("tensors/z/shape", "23"), "tensors.z: shape"),
    "a tensor's dtype number": (edit("tensors/z/dtype", 3), "tensors.z: dtype"),
    "a tensor with more": (edit("tensors/z/offset", 3), "tensors.z"),
    "a tensor without dtype": (edit("tensors/z/dtype", ...), "tensors.z: the key 'dtype' is missing"),
    "a weight's shape text": (edit("base/weights/w/shape", ["6"]), "base.weights.w: shape.0"),
    "weights a list": (edit("base/weights", []), "base.weights"),
    "base null": (edit("base", None), "base"),
    "base with more": (edit("base/path", "/x"), "base"),
    "r zero": (edit("r", 0), "r"),
    "r true": (edit("r", True), "r"),
    "r contradicts the shapes": (edit("r", 8), "projections.vera_A.shape"),
    "in_max contradicts the shape": (edit("in_max", 7), "projections.vera_A.shape"),
    "out_max contradicts the shape": (edit("out_max", 7), "projections.vera_B.shape"),
    "in_max beyond reason": (edit("in_max", 2**40), "expected an integer in [1, 2**24]"),
    "only vera_A": (edit("projections/vera_B", ...), "projections"),
    "a projection without a digest": (edit("projections/vera_A/sha256", None), "projections.vera_A.sha256"),
    "projections of two dtypes": (edit("projections/vera_A/dtype", "float16"), "different dtypes"),
    "projections of integers": (edit("projections/vera_A/dtype", "int8"), "projections.vera_A.dtype"),
    "assumed null": (edit("assumed", None), "assumed"),
    "an origin nobody knows": (edit("origin", "guessed"), "origin: has a wrong value (expected stored, live, stated"),
    "an origin that contradicts assumed": (edit("origin", "assumed"), "origin: contradicts assumed"),
    "assumed without its origin": (edit("assumed", True), "origin: contradicts assumed"),
    "recipe a name": (edit("recipe", "mt19937-f32-fused"), "recipe"),
    "a recipe that contradicts itself": (edit("recipe/rounding", "separate"), "recipe"),
    "a recipe nobody knows": (
        edit("recipe/name", "philox-f32"),
        "recipe.name: has a wrong value (expected a recipe's name",
    ),
    "a recipe with a key out of range": (edit("recipe/prng_key", 2**64), "recipe.prng_key"),
    "config a list": (edit("config", []), "config"),
    "metadata with a number": (edit("metadata/step", 4), "metadata.step"),
    "an original header that is no base64": (
        edit("original/header", "!!"),
        "original.header: has a wrong value (expected base64",
    ),
    "original half": (edit("original/header", ...), "the key 'header' is missing"),
    "platform null": (edit("platform", None), "platform"),
    "tool a text": (edit("tool", "vera-tools"), "tool"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_a_manifest_that_is_none_is_refused_by_path(change, words):
    document = copy.deepcopy(json.loads(make().to_json()))
    change(document)
    with pytest.raises(FormatError, match=re.escape(words)) as caught:
        Manifest.from_json(json.dumps(document), where="ckpt/vera_manifest.json")
    assert caught.value.where.startswith("ckpt/vera_manifest.json")
    assert "\n" not in str(caught.value).rstrip()


@pytest.mark.parametrize(("assumed", "origin"), [(True, "assumed"), (False, "stored")])
def test_what_version_0_1_0_wrote_without_an_origin_is_read(assumed, origin):
    document = json.loads(make().to_json())
    del document["origin"], document["digest"]
    document["assumed"] = assumed
    assert Manifest.from_json(json.dumps(document)).projections.origin == origin
    schema.validate(document, "manifest.v1", where="test")
    record = json.loads(RECORD.to_metadata()[METADATA_KEY])
    del record["origin"]
    record["assumed"] = assumed
    found = ProjectionRecord.from_metadata({METADATA_KEY: json.dumps(record)}, where="file")
    assert found is not None
    assert found.origin == origin


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "3", '"manifest"', '{"schema": NaN}', '{"a": 1, "a": 2}', "[" * 10**5]
)
def test_what_is_no_document_is_refused(text):
    with pytest.raises(FormatError, match=r"vera_manifest\.json"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit("r", 0), "r"),
        (edit("in_max", 9), "projections.vera_A.shape"),
        (edit("recipe", 4), "recipe"),
        (edit("assumed", ...), "assumed"),
    ],
)
def test_a_record_that_is_none_is_refused_by_path(change, words):
    document = json.loads(RECORD.to_metadata()[METADATA_KEY])
    change(document)
    with pytest.raises(FormatError, match=rf"file: metadata {METADATA_KEY}.*{words}"):
        ProjectionRecord.from_metadata({METADATA_KEY: json.dumps(document)}, where="file")


def leaves(value, path=()):
    """The path of everything in a document that holds nothing else."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [found for key, item in items for found in leaves(item, (*path, key))]
    return inner or [path]


#: Another value of each kind that the schema does not refuse.
OTHER = {str: lambda text: text + "x", int: lambda number: number + 1, bool: lambda flag: not flag}


def test_no_value_of_the_document_changes_unseen():
    document = json.loads(make(config={"vera_dropout": 0.1, "r": 8, "a": []}).to_json())
    seen = 0
    for *parents, last in leaves(document):
        changed = copy.deepcopy(document)
        place = changed
        for key in parents:
            place = place[key]
        value = place[last]
        place[last] = OTHER.get(type(value), lambda value: [value] if value is None else 0.25)(value)
        assert changed != document
        with pytest.raises((CheckFailedError, FormatError)) as caught:
            Manifest.from_json(json.dumps(changed))
        seen += isinstance(caught.value, CheckFailedError)
    assert seen > 10  # the schema refuses the rest


@pytest.mark.parametrize(
    ("before", "after"),
    [(8, 8.0), (2**64, 2**64 + 1), (0.1, 0.1 + 2**-56), (True, 1), (None, "null"), ([1, 2], [2, 1]), ("é", "e\u0301")],
    ids=repr,
)
def test_values_that_look_alike_are_told_apart(before, after):
    document = json.loads(make(config={"value": before}).to_json())
    document["config"]["value"] = after
    with pytest.raises(CheckFailedError, match=r"vera_manifest\.json: digest: the manifest was changed after it was"):
        Manifest.from_json(json.dumps(document))


def test_a_manifest_that_is_nested_too_deeply_is_refused():
    text = make(config={"deep": "here"}).to_json().replace('"here"', "[" * 700 + "]" * 700)
    with pytest.raises(FormatError, match=r"vera_manifest\.json: .*nested too deeply"):
        Manifest.from_json(text)


def test_another_layout_is_the_same_manifest():
    manifest = make(config={"é": [None, 2**63, 1e-5, 1e22, "\n\x7f"]})
    document = json.loads(manifest.to_json())
    backwards = {key: document[key] for key in reversed(document)}
    for text in (
        json.dumps(document),
        json.dumps(backwards, indent=7),
        json.dumps(document, separators=(",", ":"), ensure_ascii=False),
        manifest.to_json().replace("\n", "\r\n"),
        manifest.to_json().replace("1e-05", "0.000010").replace("1e+22", "10000000000000000000000.0"),
    ):
        assert Manifest.from_json(text) == manifest


def test_an_older_manifest_has_no_digest_and_gets_one_when_it_is_written_again():
    document = json.loads(make().to_json())
    digest = document.pop("digest")
    old = Manifest.from_json(json.dumps(document))
    assert (old.covered, make().covered) == (False, True)
    assert old != make()
    assert json.loads(old.to_json()) == {**document, "digest": digest}


def test_a_manifest_of_many_tensors_is_read_quickly_and_whole():
    tensors = {
        f"base_model.model.layers.{i}.vera_lambda_b": TensorRecord((i,), "float32", f"{i:064x}") for i in range(2000)
    }
    assert Manifest.from_json(make(tensors=tensors).to_json()).tensors == tensors
