"""Base models on disk: one file or many, with or without an index, under any outermost name."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.adapters import CHECKPOINTS, KEPT, NAMES, base_of
from tests.checkpoints.bases import INDEX, by_names, make_base, renaming_of, shard
from vera_tools.checkpoints.base import BaseModel, Renaming, rounds_through
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import CheckFailedError, FormatError


def facts(base: BaseModel, name: str = KEPT):
    with Checkpoint.open(CHECKPOINTS / name) as checkpoint:
        return [(x.module, x.weight, x.in_features, x.out_features, x.transposed) for x in checkpoint.linears(base)]


@pytest.mark.parametrize("name", NAMES)
def test_every_peft_checkpoint_fits_the_base_it_was_trained_on(name):
    with BaseModel.open(base_of(name)) as base, Checkpoint.open(CHECKPOINTS / name) as checkpoint:
        linears = checkpoint.linears(base)
        assert [linear.module for linear in linears] == list(checkpoint.layers)
        assert all(linear.out_features == checkpoint.layers[linear.module].lambda_b.size for linear in linears)
        if checkpoint.projections:
            shape = checkpoint.pair_shape()
            widest = max(linear.in_features for linear in linears), max(linear.out_features for linear in linears)
            assert (shape.in_max, shape.out_max) == widest
        assert {linear.transposed for linear in linears} == {"gpt2" in name}


@pytest.mark.parametrize("form", ["folder", "file", "index file", "shards", "shards without index", "link"])
def test_a_base_may_be_one_file_or_many(tmp_path, form):
    source = base_of(KEPT)
    reference = {
        "folder": lambda: source,
        "file": lambda: source / "model.safetensors",
        "index file": lambda: shard(source, tmp_path / "s", index=True) / INDEX,
        "shards": lambda: shard(source, tmp_path / "s", index=True),
        "shards without index": lambda: shard(source, tmp_path / "s", index=False),
        "link": lambda: Path(os.symlink(source, tmp_path / "l") or tmp_path / "l"),
    }[form]()
    with BaseModel.open(source) as base:
        expected = facts(base)
    with BaseModel.open(reference) as base:
        assert facts(base) == expected
        assert base.config["model_type"] == "llama" if form in ("folder", "file", "link") else base.config == {}
        assert len(base.files) == (3 if "s" in form.split() or "shard" in form or "index" in form else 1)


def test_of_two_indices_neither_is_preferred_and_the_files_count(tmp_path):
    folder = shard(base_of(KEPT), tmp_path / "s", index=True)
    (folder / "model.fp16.safetensors.index.json").write_text('{"weight_map": {}}')
    with BaseModel.open(folder) as base:
        assert len(base.files) == 3


def test_an_adapter_that_lies_in_the_same_folder_is_no_part_of_the_base(tmp_path, checkpoint):
    folder = checkpoint(KEPT)
    for path in base_of(KEPT).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with BaseModel.open(folder) as base:
        assert list(base.files) == ["model.safetensors"]


WRONG_INDICES = {
    "no JSON": ("{", "not JSON"),
    "a list": ("[]", "expected a weight_map"),
    "without a map": ('{"metadata": {}}', "expected a weight_map"),
    "a map that is none": ('{"weight_map": ["a"]}', "expected a weight_map"),
    "a file that is not there": ('{"weight_map": {"a": "gone.safetensors"}}', "names a file that is not there"),
    "a file elsewhere": ('{"weight_map": {"a": "../secret.safetensors"}}', "names a file that is not there"),
    "an absolute path": ('{"weight_map": {"a": "/etc/passwd"}}', "names a file that is not there"),
    "a file that is no name": ('{"weight_map": {"a": 5}}', "has a wrong value"),
    "a tensor that is not there": (
        '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}',
        "the index names a tensor that is not there",
    ),
}


@pytest.mark.parametrize(("text", "words"), WRONG_INDICES.values(), ids=WRONG_INDICES)
def test_a_wrong_index_is_an_error_that_names_it(tmp_path, text, words):
    folder = shard(base_of(KEPT), tmp_path / "s", index=False)
    (tmp_path / "secret.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    (folder / INDEX).write_text(text)
    with pytest.raises(FormatError, match=re.escape(words)) as caught:
        BaseModel.open(folder)
    assert caught.value.where.startswith(str(folder))


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    folder = shard(base_of(KEPT), tmp_path / "s", index=False)
    (folder / "other.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(
        FormatError, match=r"other\.safetensors: .*: stands in model-00001-of-00003\.safetensors already"
    ):
        BaseModel.open(folder)


def test_a_folder_without_safetensors_is_told_so(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(FormatError, match=r"no base model here .*; a base must be in safetensors format"):
        BaseModel.open(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [("{", "not JSON"), ("[" * 100_000, "not JSON"), ('{"a": ' + "1" * 5000 + "}", "a number is too large")],
)
def test_a_config_that_is_no_json_is_an_error(tmp_path, config, words):
    with pytest.raises(FormatError, match=rf"config\.json.*: {words}"):
        BaseModel.open(make_base(tmp_path, {"a.weight": (2, 2)}, config=config))


def test_a_config_that_is_no_object_is_an_error(tmp_path):
    base = make_base(tmp_path, {"a.weight": (2, 2)}, config="[1]")
    with pytest.raises(
        FormatError, match=r"config\.json: not a model's config \(expected a JSON object, found \[1\]\)"
    ):
        BaseModel.open(base)


def test_a_config_is_parsed_as_strictly_as_any_file(tmp_path):
    base = make_base(
        tmp_path, {"a.weight": (2, 2)}, config='{"tie_word_embeddings": true, "tie_word_embeddings": false}'
    )
    with pytest.raises(FormatError, match="'tie_word_embeddings'"):
        BaseModel.open(base)


def test_infinity_is_no_reason_to_refuse_a_config(tmp_path):
    """Mamba 2's own says that its time steps have no upper limit."""
    base = make_base(tmp_path, {"a.weight": (2, 2)}, config='{"time_step_limit": [0.0, Infinity]}')
    with BaseModel.open(base) as opened:
        assert opened.config == {"time_step_limit": [0.0, float("inf")]}


MODULES = ["model.layers.0.q_proj", "model.layers.1.q_proj"]


@pytest.mark.parametrize(
    ("prefix_here", "renaming"),
    [
        ("model.", Renaming()),
        ("", Renaming(strip="model.")),
        ("language_model.model.", Renaming(add="language_model.")),
    ],
)
def test_the_outermost_name_may_differ(tmp_path, prefix_here, renaming):
    shapes = {f"{prefix_here}layers.{i}.{kind}.weight": (4, 6) for i in range(3) for kind in ("q_proj", "k_proj")}
    with BaseModel.open(make_base(tmp_path, shapes)) as base:
        assert renaming_of(base, MODULES) == renaming
        linear = by_names(base, renaming_of(base, MODULES)).linear(MODULES[1], out_features=4)
        assert linear.weight == f"{prefix_here}layers.1.q_proj.weight"
        assert (linear.in_features, linear.out_features) == (6, 4)


def test_a_name_that_fits_as_it_is_wins(tmp_path):
    shapes = {f"{prefix}layers.0.q_proj.weight": (4, 4) for prefix in ("", "model.", "vision.model.")}
    with BaseModel.open(make_base(tmp_path, shapes)) as base:
        assert renaming_of(base, ["model.layers.0.q_proj"]) == Renaming()


def test_the_renaming_under_which_most_fits_wins(tmp_path):
    shapes = {
        "vision.layers.0.q_proj.weight": (4, 4),
        "text.layers.0.q_proj.weight": (4, 4),
        "text.layers.1.q_proj.weight": (4, 4),
    }
    with BaseModel.open(make_base(tmp_path, shapes)) as base:
        assert renaming_of(base, ["layers.0.q_proj", "layers.1.q_proj"]) == Renaming(add="text.")


def test_nothing_fits_nothing(tmp_path):
    with BaseModel.open(make_base(tmp_path, {"a.weight": (4, 4)})) as base:
        assert renaming_of(base, ["b.c"]) == Renaming()
        assert renaming_of(base, []) == Renaming()


@pytest.mark.parametrize(
    ("shape", "out_features", "fan_in_fan_out", "expected"),
    [
        ((6, 4), 6, False, (4, 6, False)),
        ((6, 4), 4, True, (6, 4, True)),
        ((6, 4), 6, True, (4, 6, False)),  # the shape is proof, whatever the config says
        ((6, 4), 4, False, (6, 4, True)),
        ((5, 5), 5, True, (5, 5, True)),  # where the shape says nothing, the config decides
        ((5, 5), 5, False, (5, 5, False)),
    ],
)
def test_how_a_weight_lies_follows_from_its_shape(tmp_path, shape, out_features, fan_in_fan_out, expected):
    with BaseModel.open(make_base(tmp_path, {"h.0.attn.weight": shape})) as base:
        linear = by_names(base, Renaming(), fan_in_fan_out=fan_in_fan_out).linear("h.0.attn", out_features=out_features)
        assert (linear.in_features, linear.out_features, linear.transposed) == expected


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((7, 7), "the weight does not fit vera_lambda_b (expected out_features 6, found [7, 7])"),
        ((7, 8), "this is another base than the adapter was trained on"),
        ((6,), "not a linear weight (expected 2 dimensions, found [6])"),
        ((6, 4, 1), "not a linear weight"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path, shape, words):
    with BaseModel.open(make_base(tmp_path, {"a.weight": shape})) as base:
        with pytest.raises(CheckFailedError, match=re.escape(words)) as caught:
            by_names(base).linear("a", out_features=6)
        assert caught.value.where == f"{tmp_path}: a.weight"


def test_a_missing_module_is_named_with_what_is_near(tmp_path):
    shapes = {f"model.layers.{i}.q_proj.weight": (4, 4) for i in range(3)}
    with BaseModel.open(make_base(tmp_path, shapes)) as base:
        with pytest.raises(CheckFailedError, match=r"found model\.layers\.0\.q_proj\.weight and 2 more of that name"):
            by_names(base).linear("model.layers.9.q_proj", out_features=4)
        with pytest.raises(CheckFailedError, match=r"expected a tensor x\.weight, found nothing of that name"):
            by_names(base).linear("x", out_features=4)


@pytest.mark.parametrize(
    ("dtype", "config", "found"),
    [
        ("uint8", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ("float32", {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ("float32", {"quantization_config": {"load_in_4bit": True}}, "unnamed"),
        ("int8", None, r"int8 \[4, 6\]"),
        ("float8_e4m3fn", {}, "float8_e4m3fn"),
    ],
)
def test_a_quantised_weight_is_refused_because_its_header_says_nothing(tmp_path, dtype, config, found):
    words = rf"the base is quantised.*found {found}.*name the unquantised base"
    folder = make_base(tmp_path, {"a.weight": (4, 6)}, dtype=dtype, config=config)
    with BaseModel.open(folder) as base, pytest.raises(CheckFailedError, match=words):
        by_names(base).linear("a", out_features=4)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], None),
        (["float64", "float32"], None),
        (["bfloat16", "float32"], "bfloat16"),
        (["float32", "float32", "float16"], "float16"),
        (["int8", "uint8"], None),
        ([], None),
    ],
)
def test_one_half_precision_layer_rounds_for_all(dtypes, expected):
    assert rounds_through(dtypes) == expected
    assert rounds_through(iter(dtypes)) == expected


def test_two_half_dtypes_are_no_recipe():
    with pytest.raises(CheckFailedError, match="both half dtypes"):
        rounds_through(["bfloat16", "float16"])


def test_a_failing_open_closes_every_file(tmp_path):
    folder = shard(base_of(KEPT), tmp_path / "s", index=False)
    (folder / "z.safetensors").write_bytes(b"no")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for text in (None, '{"weight_map": {"a": "model-00001-of-00003.safetensors"}}'):
        if text:
            (folder / INDEX).write_text(text)
        with pytest.raises(FormatError):
            BaseModel.open(folder)
    (folder / INDEX).unlink()
    (folder / "z.safetensors").unlink()
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError):
        BaseModel.open(folder)
    after = os.listdir("/proc/self/fd") if before else []
    assert len(after) == len(before)
