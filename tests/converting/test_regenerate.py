"""`regenerate` against real torch, and against what real PEFT stored."""

from __future__ import annotations

import hashlib
import shutil

import numpy as np
import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, base_of, edit
from tests.command import run_cli, run_json
from tests.memory import traced_peak
from vera_tools.errors import AssumedRecipeWarning, UnprovenError, UsageError, VeraToolsError
from vera_tools.files import safetensors


def test_stored_checkpoint_gives_back_its_own_bits(tmp_path):
    out = tmp_path / "pair.safetensors"
    code, document = run_json("regenerate", "--checkpoint", CHECKPOINTS / KEPT, "-o", out)
    assert code == 0
    assert document["origin"] == "stored"
    with (
        safetensors.TensorFile.open(out) as ours,
        safetensors.TensorFile.open(CHECKPOINTS / KEPT / "adapter_model.safetensors") as stored,
    ):
        for name in PAIR:
            assert np.array_equal(ours.read(name), stored.read(name))
            assert hashlib.sha256(ours.read(name).tobytes()).hexdigest() == document[name[11:]]["sha256"]
    assert run_cli("regenerate", "--checkpoint", CHECKPOINTS / KEPT, "-o", out).returncode == 2
    assert run_cli("regenerate", "--checkpoint", CHECKPOINTS / KEPT, "-o", out, "--overwrite").returncode == 0


def test_assumption_is_said_once_and_can_be_refused():
    name = "peft-0.21.2-llama-bf16-seedonly"
    arguments = ("regenerate", "--checkpoint", CHECKPOINTS / name, "--base", base_of(name))
    result = run_cli(*arguments, "--json")
    assert result.returncode == 0
    assert result.stderr.count("assuming mt19937-f32-fused-via-bf16") == 1
    code, document = run_json(*arguments)
    assert (code, document["assumed"], document["recipe"]["rounded_through"]) == (0, True, "bfloat16")
    code, document = run_json(*arguments, "--strict")
    assert (code, document["error"]["type"]) == (3, "UnprovenError")


def test_strict_in_the_library():
    with pytest.raises(UnprovenError, match="nothing records"):
        vera_tools.regenerate(CHECKPOINTS / SEED_ONLY, base=base_of(SEED_ONLY), strict=True)


def test_seed_only_needs_in_max():
    with pytest.raises(UsageError, match="the layer width is unknown"):
        vera_tools.regenerate(CHECKPOINTS / SEED_ONLY)
    with pytest.warns(AssumedRecipeWarning, match="half-precision base"):
        by_hand = vera_tools.regenerate(CHECKPOINTS / SEED_ONLY, in_features=96)
    with pytest.warns(AssumedRecipeWarning):
        by_base = vera_tools.regenerate(CHECKPOINTS / SEED_ONLY, base=base_of(SEED_ONLY))
    assert by_hand.record == by_base.record


def test_unrelated_stored_pair_is_not_passed_off(checkpoint):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: [tensors[name].fill(1) for name in PAIR])
    with pytest.warns(AssumedRecipeWarning, match="no known recipe makes the stored projections"):
        report = vera_tools.regenerate(folder)
    assert report.record.assumed
    assert report.origin == "assumed"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--key", 1, "--rank", 2, "--in-features", 3),
        ("--checkpoint", CHECKPOINTS / KEPT, "--key", 1),
        ("--key", 2**64, "--rank", 2, "--in-features", 3, "--out-features", 4),
        ("--key", 1, "--rank", 2, "--in-features", 3, "--out-features", 4, "--half-sampling", "scalar"),
    ],
)
def test_wrong_usage(arguments):
    code, document = run_json("regenerate", *arguments)
    assert code == 2
    assert document["error"]["exit_code"] == 2


@pytest.mark.parametrize("drawn", ["float32", "float64", "bfloat16", "float16"])
def test_stored_dtype(drawn):
    report = vera_tools.regenerate(
        key=9, r=4, in_features=8, out_features=8, recipe=_name(drawn), stored_dtype="bfloat16"
    )
    assert report.record.dtype == "bfloat16"
    assert report.to_dict()["vera_B"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("recipe", ["mt19937-f32-fused", "mt19937-f32-fused-bfirst"])
def test_the_file_is_written_as_it_is_drawn(tmp_path, recipe):
    sizes = {"key": 3, "r": 256, "in_features": 8192, "out_features": 8192, "recipe": recipe}
    peak, report = traced_peak(lambda: vera_tools.regenerate(**sizes, output=tmp_path / "pair.safetensors"))
    assert peak < 6e6  # the pair is 16.8 MB
    with safetensors.TensorFile.open(tmp_path / "pair.safetensors") as file:
        assert {name: file.sha256(f"base_model.{name}") for name in ("vera_A", "vera_B")} == report.record.sha256


@pytest.mark.parametrize("output", [None, "pair.safetensors"])
def test_no_pair_is_begun_that_no_adapter_has(tmp_path, output):
    arguments = ("--key", 1, "--rank", 9000000, "--in-features", 9000000, "--out-features", 9000000)
    code, document = run_json("regenerate", *arguments, *(("-o", tmp_path / output) if output else ()))
    assert code == 2
    assert "648000000000000 bytes" in document["error"]["found"]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_known_before_the_draw(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    monkeypatch.setattr("vera_tools.converting.regenerate.digests", None)
    with pytest.raises(VeraToolsError, match=r"not enough room on the disk \(expected 64 bytes, found 5 free\)"):
        vera_tools.regenerate(key=1, r=2, in_features=4, out_features=4, output=tmp_path / "pair.safetensors")
    monkeypatch.undo()
    vera_tools.regenerate(key=1, r=2, in_features=4, out_features=4, output=tmp_path / "new" / "pair.safetensors")
    assert (tmp_path / "new" / "pair.safetensors").is_file()


def _name(drawn: str) -> str:
    return {
        "float32": "mt19937-f32-fused",
        "float64": "mt19937-f64-separate",
        "bfloat16": "mt19937-bf16-scalar-fused",
        "float16": "mt19937-f16-opmath-fused",
    }[drawn]
