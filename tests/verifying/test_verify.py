"""`verify` on adapters that PEFT really made, whole, damaged, edited, saved again, and mixed with others."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vera_tools
from tests.conftest import CHECKPOINTS, NAMES, base_of, plain, run_cli, run_json, run_terminal
from vera_tools import schema
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.errors import CheckFailedError
from vera_tools.files import safetensors
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

KEPT = "peft-0.21.2-llama-f32-kept"
SEED_ONLY = "peft-0.21.2-llama-f32-seedonly"

EXPECTED = {
    "peft-0.11.1-llama-bf16-kept": ("reproducible", "mt19937-f32-fused-via-bf16"),
    "peft-0.11.1-llama-f32-kept": ("reproducible", "mt19937-f32-fused"),
    "peft-0.20.0-llama-bf16-kept": ("reproducible", "mt19937-f32-fused-via-bf16"),
    "peft-0.20.0-llama-f32-kept": ("reproducible", "mt19937-f32-fused"),
    "peft-0.21.2-bert-seqcls-kept": ("reproducible", "mt19937-f32-fused"),
    "peft-0.21.2-gpt2-conv1d-kept": ("reproducible", "mt19937-f32-fused"),
    "peft-0.21.2-llama-bf16-kept": ("reproducible", "mt19937-f32-fused-via-bf16"),
    "peft-0.21.2-llama-bf16-seedonly": ("unproven", None),
    "peft-0.21.2-llama-f32-kept": ("reproducible", "mt19937-f32-fused"),
    "peft-0.21.2-llama-f32-kept-noavx": ("reproducible", "mt19937-f32-separate"),
    "peft-0.21.2-llama-f32-seedonly": ("unproven", None),
    "peft-0.21.2-llama-f32-seedonly-noavx": ("unproven", None),
}


def edit(folder: Path, change) -> None:
    """Rewrite a checkpoint's tensors: `change` gets a dict of arrays and may alter it."""
    path = folder / "adapter_model.safetensors"
    with safetensors.TensorFile.open(path) as file:
        arrays = {name: file.read(name) for name in file.tensors}
        metadata = file.metadata
    change(arrays)
    safetensors.save(path, arrays, metadata)


def set_config(folder: Path, **keys: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def one(path: Path, **options):
    (report,) = vera_tools.verify(path, **options).checkpoints
    return report


def statuses(report) -> dict[str, str]:
    return {check.id: check.status for check in report.checks}


def failed(report) -> set[str]:
    return {id for id, status in statuses(report).items() if status == "fail"}


class TestRealCheckpoints:
    def test_every_fixture_has_an_expectation(self):
        assert sorted(EXPECTED) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_verdict_recipe_and_base(self, name):
        verdict, recipe = EXPECTED[name]
        code, document = run_json("verify", CHECKPOINTS / name, "--base", base_of(name))
        (entry,) = document["checkpoints"]
        assert entry["verdict"] == verdict
        assert (entry["recipe"] and entry["recipe"]["name"]) == recipe
        assert entry["ok"]
        assert code == {"reproducible": 0, "unproven": 3}[verdict]
        assert {check["status"] for check in entry["checks"] if check["id"].startswith("base.")} == {"pass"}
        assert document["summary"][verdict] == 1

    def test_all_at_once_is_as_severe_as_the_worst(self):
        code, document = run_json("verify", "-R", CHECKPOINTS, "--jobs", 2)
        assert code == 3
        assert document["summary"] == {"reproducible": 9, "drift": 0, "unproven": 3, "invalid": 0, "skipped": 0}
        assert [Path(entry["path"]).name for entry in document["checkpoints"]] == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_recorded_checkpoints_are_reproducible(self, name, checkpoint):
        folder = checkpoint(name)
        if EXPECTED[name][0] == "reproducible":
            vera_tools.record(folder)
        else:
            rounding = "separate" if "noavx" in name else "fused"
            through = "-via-bf16" if "bf16" in name else ""
            vera_tools.record(folder, base=base_of(name), recipe=f"mt19937-f32-{rounding}{through}")
        code, document = run_json("verify", folder)
        assert code == 0
        (entry,) = document["checkpoints"]
        assert entry["scope"] == "projections, vectors and config are covered"
        match = entry["projections"]["vera_A"]
        assert match["sha256"] is not None
        assert match["match"] == ("identical" if entry["projections_stored"] else "absent")

    def test_lone_file_of_ours_is_enough(self, tmp_path):
        with Checkpoint.open(CHECKPOINTS / KEPT) as opened:
            from vera_tools.checkpoints.resolution import resolve

            record = resolve(opened).record
            arrays = {name: opened.weights.read(name) for name in opened.weights.tensors if "vera_lambda" in name}
        safetensors.save(tmp_path / "alone.safetensors", arrays, record.to_metadata())
        report = one(tmp_path / "alone.safetensors")
        assert report.verdict == "reproducible"
        assert not failed(report)

    def test_crlf_config_as_found_in_the_wild(self, checkpoint):
        folder = checkpoint(KEPT)
        path = folder / "adapter_config.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert one(folder).verdict == "reproducible"


class TestDamage:
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_one_changed_bit_in_a_projection_is_drift_with_its_place(self, data, tmp_path):
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CHECKPOINTS / KEPT, folder)
        name, shape = data.draw(st.sampled_from([("vera_A", (16, 64)), ("vera_B", (64, 16))]))
        row, column = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
        bit = data.draw(st.integers(0, 31))

        def flip(arrays):
            arrays[f"base_model.{name}"].view(np.uint32)[row, column] ^= np.uint32(1 << bit)

        edit(folder, flip)
        report = one(folder)
        assert report.verdict == "drift"
        match = dict(zip(("vera_A", "vera_B"), report.projections, strict=True))[name]
        assert match.match == "edited"
        assert match.places == ((row, column),)
        assert report.recipe is not None
        assert report.recipe.name == "mt19937-f32-fused"

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data(), seed_only=st.booleans())
    def test_one_changed_bit_anywhere_is_caught_where_a_manifest_is(self, data, seed_only, tmp_path):
        """In the weights file: length, header, metadata, vectors, projections; and in the config's values."""
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        name = SEED_ONLY if seed_only else KEPT
        shutil.copytree(CHECKPOINTS / name, folder)
        vera_tools.record(folder, base=base_of(name), recipe="mt19937-f32-fused" if seed_only else None)
        assert vera_tools.verify(folder).exit_code == 0
        path = folder / data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
        same = path.suffix == ".json" and _same_json(bytes(content), path.read_bytes())
        path.write_bytes(content)
        assert (vera_tools.verify(folder).exit_code == 0) == same

    def test_flipped_vector_bit_looks_like_corruption(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        name = "base_model.model.model.layers.1.self_attn.v_proj.vera_lambda_b"
        edit(folder, lambda arrays: arrays[name].view(np.uint32).__setitem__(3, 0x12345678))
        report = one(folder)
        assert report.verdict == "reproducible"
        assert failed(report) == {"manifest.tensors"}
        assert name in next(check.message for check in report.checks if check.id == "manifest.tensors")
        assert vera_tools.verify(folder).exit_code == 1

    def test_nan_is_named_with_its_place(self, checkpoint):
        folder = checkpoint(KEPT)
        name = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
        edit(folder, lambda arrays: arrays[name].__setitem__(5, np.nan))
        report = one(folder)
        assert failed(report) == {"tensors.finite"}
        message = next(check.message for check in report.checks if check.id == "tensors.finite")
        assert f"{name}[5]" in message
        assert report.verdict == "reproducible"
        assert vera_tools.verify(folder).exit_code == 1

    def test_nan_in_a_projection_gives_null_figures(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays["base_model.vera_A"].__setitem__((0, 1), np.inf))
        code, document = run_json("verify", folder)
        (entry,) = document["checkpoints"]
        assert code == 1
        assert entry["projections"]["vera_A"]["max_abs"] is None
        assert entry["projections"]["vera_A"]["places"] == [[0, 1]]

    @pytest.mark.parametrize("vector", ["lambda_b", "lambda_d"])
    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_idle_adapter_is_a_warning_only(self, checkpoint, vector, zero):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: [a.fill(zero) for n, a in arrays.items() if n.endswith(f"vera_{vector}")])
        report = one(folder)
        assert statuses(report)[f"tensors.{vector}"] == "warn"
        assert report.ok
        assert vera_tools.verify(folder).exit_code == 0

    @pytest.mark.parametrize("cut", [0, 4, 100, 1000, -1])
    def test_truncated_file_is_invalid(self, checkpoint, cut):
        folder = checkpoint(KEPT)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:cut])
        code, document = run_json("verify", folder)
        assert code == 4
        assert document["checkpoints"][0]["verdict"] == "invalid"


def _flip(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def _same_json(a: bytes, b: bytes) -> bool:
    """Whether two configs say the same, so that a changed bit between them changes nothing."""
    try:
        first, second = json.loads(a), json.loads(b)
    except ValueError:
        return False
    return first == second and type(first) is type(second)


class TestDrift:
    def test_other_key_in_the_config(self, checkpoint):
        folder = checkpoint(KEPT)
        set_config(folder, projection_prng_key=7)
        edit_pair(folder, Recipe(prng_key=0))
        report = one(folder)
        assert report.verdict == "drift"
        assert report.recipe == Recipe(prng_key=0)
        assert {match.match for match in report.projections} == {"identical"}
        assert all(load.exact is False for load in report.loads if load.loader == "peft>=0.11,<0.21")

    def test_key_modulo_2_to_the_32(self, checkpoint):
        folder = checkpoint(KEPT)
        set_config(folder, projection_prng_key=101 - 2**32)
        report = one(folder)
        assert report.verdict == "reproducible"
        assert statuses(report)["config.key"] == "warn"
        assert any(load.exact for load in report.loads if load.loader == "peft>=0.11,<0.21")

    @pytest.mark.parametrize("changes", [{"prng_key_B": 102}, {"prng_key_B": 101}, {"b_first": True}])
    def test_other_order(self, checkpoint, changes):
        folder = checkpoint(KEPT)
        recipe = Recipe(prng_key=101, **changes)
        edit_pair(folder, recipe)
        report = one(folder)
        assert report.verdict == "drift"
        assert report.recipe == recipe
        assert all(load.exact is False for load in report.loads if load.loader == "peft>=0.11,<0.21")

    def test_unrelated(self, checkpoint):
        folder = checkpoint(KEPT)
        rng = np.random.default_rng(3)
        edit(folder, lambda arrays: arrays["base_model.vera_A"].__setitem__(..., rng.normal(size=(16, 64))))
        edit(folder, lambda arrays: arrays["base_model.vera_B"].__setitem__(..., rng.normal(size=(64, 16))))
        report = one(folder)
        assert report.verdict == "drift"
        assert report.recipe is None
        assert {match.match for match in report.projections} == {"unrelated"}
        assert all(load.exact for load in report.loads if load.loader == "vera-tools")

    def test_drift_may_be_let_pass(self, checkpoint):
        folder = checkpoint(KEPT)
        edit_pair(folder, Recipe(prng_key=101, prng_key_B=102))
        assert run_cli("verify", folder).returncode == 1
        assert run_cli("verify", folder, "--require", "drift").returncode == 0

    def test_both_keys_of_a_split_pair_are_named(self, checkpoint):
        """B's key is 0 where A's is -1."""
        folder = checkpoint(KEPT)
        set_config(folder, projection_prng_key=-1)
        edit_pair(folder, Recipe(prng_key=-1, prng_key_B=0))
        (message,) = (check.message for check in one(folder).checks if check.id == "projections.match")
        assert message == "vera_A and vera_B were made with key -1 and, for vera_B, key 0; the config says key -1"

    def test_half_vera_pair(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays.pop("base_model.vera_B"))
        code, document = run_json("verify", folder)
        assert code == 4
        assert {"id": "config.save_projection", "status": "fail"}.items() <= next(
            check for check in document["checkpoints"][0]["checks"] if check["status"] == "fail"
        ).items()


def edit_pair(folder: Path, recipe: Recipe) -> None:
    def change(arrays):
        shape = PairShape(16, 64, 64)
        arrays["base_model.vera_A"], arrays["base_model.vera_B"] = generate(recipe, shape)

    edit(folder, change)


class TestStructure:
    def test_missing_vector(self, checkpoint):
        folder = checkpoint(KEPT)
        name = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
        edit(folder, lambda arrays: arrays.pop(name))
        report = one(folder)
        assert failed(report) == {"tensors.layers"}

    def test_whole_missing_layer_is_seen_against_the_base(self, checkpoint):
        folder = checkpoint(KEPT)
        prefix = "base_model.model.model.layers.0.self_attn.q_proj."
        edit(folder, lambda arrays: [arrays.pop(n) for n in list(arrays) if n.startswith(prefix)])
        assert failed(one(folder, base=base_of(KEPT))) == {"base.modules"}

    def test_unused_target_module(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: [arrays.pop(n) for n in list(arrays) if ".v_proj." in n])
        assert statuses(one(folder))["tensors.layers"] == "warn"
        assert failed(one(folder, base=base_of(KEPT))) == {"base.modules"}

    def test_target_module_that_the_model_does_not_have(self, checkpoint):
        """PEFT takes lists that serve several architectures."""
        folder = checkpoint(KEPT)
        set_config(folder, target_modules=["q_proj", "v_proj", "query_key_value"])
        assert not failed(one(folder, base=base_of(KEPT)))

    def test_missing_widest_layer(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: [arrays.pop(n) for n in list(arrays) if ".q_proj." in n])
        report = one(folder)
        assert failed(report) == {"tensors.out_max"}
        assert report.verdict == "reproducible"

    @pytest.mark.parametrize(
        "name",
        [
            "base_model.model.model.layers.0.self_attn.k_proj.vera_lambda_b",
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias",
            "base_model.vera_C",
            "something",
        ],
    )
    def test_unexpected_tensor(self, checkpoint, name):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays.__setitem__(name, np.zeros(64, np.float32)))
        assert "tensors.unexpected" in failed(one(folder))

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d", (15,)),
            ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", (8, 8)),
            ("base_model.vera_A", (15, 64)),
            ("base_model.vera_A", (1024,)),
            ("base_model.vera_B", (64, 15)),
        ],
    )
    def test_wrong_shape_is_invalid(self, checkpoint, name, shape):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays.__setitem__(name, np.ones(shape, np.float32)))
        report = one(folder)
        assert report.verdict == "invalid"
        assert "tensors.shapes" in failed(report)

    def test_integer_projections_are_invalid(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays.__setitem__("base_model.vera_A", np.ones((16, 64), np.int32)))
        assert "tensors.dtypes" in failed(one(folder))

    def test_promised_projections_that_are_missing(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: [arrays.pop(f"base_model.{n}") for n in ("vera_A", "vera_B")])
        report = one(folder)
        assert report.verdict == "unproven"
        assert failed(report) == {"config.save_projection"}
        assert vera_tools.verify(folder).exit_code == 1

    def test_ignored_projections(self, checkpoint):
        """PEFT draws the pair again where save_projection is false, even if it is stored."""
        folder = checkpoint(KEPT)
        set_config(folder, save_projection=False)
        report = one(folder)
        assert statuses(report)["config.save_projection"] == "warn"
        rows = [load for load in report.loads if load.loader == "peft>=0.21" and load.rounding == "separate"]
        assert not any(load.exact for load in rows)
        assert all("save_projection is false" in load.why for load in rows)

    def test_wrong_base(self):
        report = one(CHECKPOINTS / KEPT, base=base_of("peft-0.21.2-gpt2-conv1d-kept"))
        assert failed(report) == {"base.modules"}
        assert report.verdict == "reproducible"

    @pytest.mark.parametrize(("key", "value"), [("peft_type", ["VERA"]), ("task_type", "FOO")])
    def test_what_peft_refuses_is_invalid(self, checkpoint, key, value):
        folder = checkpoint(KEPT)
        set_config(folder, **{key: value})
        report = one(folder)
        assert report.verdict == "invalid"
        assert key in report.checks[0].message

    def test_config_of_the_wrong_kind_names_the_key(self, checkpoint):
        folder = checkpoint(KEPT)
        set_config(folder, projection_prng_key=True)
        report = one(folder)
        assert report.verdict == "invalid"
        (check,) = report.checks
        assert check.id == "config.schema"
        assert "projection_prng_key" in check.message
        assert "found true" in check.message

    def test_random_layout_of_the_header_does_not_matter(self, checkpoint):
        """The library writes metadata in random order and pads the header."""
        folder = checkpoint(KEPT)
        path = folder / "adapter_model.safetensors"
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.dumps(dict(reversed(json.loads(data[8 : 8 + length]).items())), indent=1).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
        assert one(folder).verdict == "reproducible"


BERT, GPT2 = "peft-0.21.2-bert-seqcls-kept", "peft-0.21.2-gpt2-conv1d-kept"


class TestSavedModules:
    """Biases and saved modules, which PEFT keeps beside the vectors."""

    def test_a_missing_head_is_seen_against_the_base(self, checkpoint):
        folder = checkpoint(BERT)
        edit(folder, lambda arrays: [arrays.pop(n) for n in list(arrays) if "classifier" in n])
        assert statuses(one(folder))["tensors.saved"] == "warn"
        assert failed(one(folder, base=base_of(BERT))) == {"base.parameters"}

    def test_half_a_head(self, checkpoint):
        folder = checkpoint(BERT)
        edit(folder, lambda arrays: arrays.pop("base_model.model.classifier.bias"))
        report = one(folder, base=base_of(BERT))
        assert failed(report) == {"base.parameters"}
        assert "classifier.bias" in next(c.message for c in report.checks if c.id == "base.parameters")

    def test_a_missing_saved_module(self, checkpoint):
        folder = checkpoint(KEPT)
        set_config(folder, modules_to_save=["lm_head"])
        assert failed(one(folder)) == {"tensors.saved"}
        weight = np.zeros((128, 64), np.float32)
        edit(folder, lambda arrays: arrays.__setitem__("base_model.model.lm_head.weight", weight))
        assert not failed(one(folder, base=base_of(KEPT)))

    def test_a_missing_bias(self, checkpoint):
        folder = checkpoint(GPT2)
        name = "base_model.model.transformer.h.1.mlp.c_fc.base_layer.bias"
        edit(folder, lambda arrays: arrays.pop(name))
        assert failed(one(folder, base=base_of(GPT2))) == {"base.parameters"}

    def test_a_bias_of_another_length(self, checkpoint):
        folder = checkpoint(GPT2)
        name = "base_model.model.transformer.h.1.mlp.c_fc.base_layer.bias"
        edit(folder, lambda arrays: arrays.__setitem__(name, np.zeros(7, np.float32)))
        assert failed(one(folder, base=base_of(GPT2))) == {"base.parameters"}

    def test_a_bias_that_no_layer_has(self, checkpoint):
        folder = checkpoint(GPT2)
        set_config(folder, bias="all")
        edit(folder, lambda arrays: arrays.__setitem__("base_model.model.nonsense.bias", np.zeros(7, np.float32)))
        assert "base.parameters" in failed(one(folder, base=base_of(GPT2)))

    @pytest.mark.parametrize(("rows", "status"), [(128, "pass"), (130, "warn")])
    def test_resized_embeddings(self, checkpoint, rows, status):
        folder = checkpoint(KEPT)
        weight = np.zeros((rows, 64), np.float32)
        edit(folder, lambda arrays: arrays.__setitem__("base_model.model.model.embed_tokens.weight", weight))
        report = one(folder, base=base_of(KEPT))
        assert not failed(report)
        assert statuses(report)["tensors.unexpected"] == "warn"
        assert statuses(report)["base.parameters"] == status

    def test_adapted_output_layer(self, tmp_path):
        """PEFT saves its weight too."""
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        config = peft.VeraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
        with pytest.warns(UserWarning, match="embedding layers"):
            peft.get_peft_model(base, config).save_pretrained(tmp_path)
        assert not failed(one(tmp_path, base=base_of(KEPT)))

    def test_modules_that_are_both_saved_and_targets(self, checkpoint):
        """SEQ_CLS saves the classifier whole, and "all-linear" names its parts as targets."""
        folder = checkpoint(BERT)
        set_config(folder, target_modules=["query", "value", "classifier.dense", "classifier.out_proj"])
        assert not failed(one(folder))
        assert statuses(one(folder))["tensors.layers"] == "pass"

    def test_second_adapter_shares_the_first_ones_wider_pair(self, tmp_path):
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        wide = peft.VeraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        narrow = peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, wide)
        model.add_adapter("second", narrow)
        model.save_pretrained(tmp_path)
        report = one(tmp_path / "second", base=base_of(KEPT))
        assert failed(report) == {"base.pair"}
        assert "saved this adapter beside a first, wider one" in str([check.message for check in report.checks])
        assert not any(load.exact for load in report.loads if load.loader.startswith("peft"))
        fresh = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(fresh, tmp_path / "second")
        vera_tools.strip_projections(tmp_path / "second", tmp_path / "stripped")
        stripped = one(tmp_path / "stripped", base=base_of(KEPT))
        assert stripped.verdict == "reproducible"
        assert {load.exact for load in stripped.loads if load.loader.startswith("peft")} == {False}
        fresh = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        with pytest.warns(UserWarning, match="not (save|load) vera_A"):
            loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "stripped")
        assert tuple(loaded.base_model.vera_A["default"].shape) != report.projections[0].shape


class TestManifest:
    def test_relabelled_dtypes_and_shapes_are_seen(self, checkpoint):
        """The bytes are the same, the numbers are not."""
        folder = checkpoint(BERT)
        vera_tools.record(folder)
        path = folder / "adapter_model.safetensors"
        original = path.read_bytes()
        path.write_bytes(original.replace(b'"shape":[2,48]', b'"shape":[48,2]'))
        assert failed(one(folder)) == {"manifest.tensors"}
        folder = checkpoint("peft-0.11.1-llama-bf16-kept")
        vera_tools.record(folder)
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"BF16","shape":[16],', b'"F16","shape":[16], '))
        assert "manifest.tensors" in failed(one(folder))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"name": "mt19937-f32-fused"', '"name": "mt19937-f32-separate"'),
            ('"prng_key": 101', '"prng_key": 99'),
        ],
    )
    def test_recipe_that_did_not_make_the_stored_pair(self, checkpoint, old, new):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        path = folder / MANIFEST_NAME
        text = path.read_text().replace(old, new, 1)
        path.write_text(text.replace('"rounding": "fused"', '"rounding": "separate"') if "separate" in new else text)
        assert "manifest.recipe" in failed(one(folder))

    def test_digest_of_a_stored_projection_stands_there_twice(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        path = folder / MANIFEST_NAME
        manifest = json.loads(path.read_text())
        manifest["tensors"]["base_model.vera_A"]["sha256"] = "0" * 64
        path.write_text(json.dumps(manifest))
        assert failed(one(folder)) == {"manifest.tensors"}

    def test_one_changed_vector_of_two_is_no_training(self, tmp_path):
        tensors = {
            "base_model.model.q_proj.vera_lambda_b": np.ones(8, np.float32),
            "base_model.model.q_proj.vera_lambda_d": np.ones(4, np.float32),
        }
        tensors["base_model.vera_A"], tensors["base_model.vera_B"] = generate(Recipe(prng_key=0), PairShape(4, 8, 8))
        safetensors.save(tmp_path / "adapter_model.safetensors", tensors, {})
        VeraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
        vera_tools.record(tmp_path)
        edit(tmp_path, lambda arrays: arrays["base_model.model.q_proj.vera_lambda_b"].__setitem__(3, 2))
        assert failed(one(tmp_path)) == {"manifest.tensors"}

    def test_saved_again_unchanged_by_peft(self, checkpoint):
        """PEFT fills in the base's name; nothing that the adapter computes with has changed."""
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        set_config(folder, base_model_name_or_path="somewhere/base", inference_mode=False, revision="main")
        report = one(folder)
        assert not failed(report)
        assert statuses(report)["manifest.config"] == "warn"

    def test_saved_again_after_training_on_is_stale(self, checkpoint):
        """Real PEFT loads, changes the vectors, and saves into the same folder."""
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        script = f"""
import torch, warnings
from transformers import AutoModelForCausalLM
from peft import PeftModel
base = AutoModelForCausalLM.from_pretrained({str(base_of(KEPT))!r})
model = PeftModel.from_pretrained(base, {str(folder)!r}, is_trainable=True)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
ids = torch.arange(8)[None]
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained({str(folder)!r})
"""
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True)
        report = one(folder)
        assert failed(report) == {"manifest.stale"}
        assert report.verdict == "reproducible"
        assert "record" in next(check.message for check in report.checks if check.id == "manifest.stale")
        assert vera_tools.record(folder).changed
        assert not failed(one(folder))
        assert vera_tools.verify(folder).exit_code == 0

    def test_tampered_digest(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
        path = folder / MANIFEST_NAME
        manifest = json.loads(path.read_text())
        digest = manifest["projections"]["vera_B"]["sha256"]
        path.write_text(path.read_text().replace(digest, digest[::-1]))
        report = one(folder)
        assert report.verdict == "drift"
        assert "projections.match" in failed(report)

    def test_a_recorded_pair_beyond_the_limit_is_not_drawn(self, checkpoint, monkeypatch):
        monkeypatch.setattr("vera_tools.checkpoints.resolution.MOST_BYTES", 1 << 20)
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
        assert one(folder).verdict == "reproducible"
        path = folder / MANIFEST_NAME
        manifest = json.loads(path.read_text())
        manifest["in_max"] = manifest["projections"]["vera_A"]["shape"][1] = 1 << 18
        path.write_text(json.dumps(manifest))
        report = vera_tools.verify(folder)
        assert report.checkpoints[0].verdict == "unproven"
        assert report.exit_code == 1
        (check,) = (check for check in report.checkpoints[0].checks if check.id == "projections.match")
        assert check.status == "fail"
        assert "not regenerated: no adapter has projections of this size" in check.message
        assert "found 16781312 bytes" in check.message
        for command in (vera_tools.embed_projections, vera_tools.to_lora):
            with pytest.raises(CheckFailedError, match="no adapter has projections of this size"):
                command(folder, folder.with_name("out"))
        schema.validate(report.to_dict(), "verify.v1", where="report")

    def test_recorded_under_the_wrong_recipe_loads_exactly_where_it_says(self, checkpoint):
        name = "peft-0.21.2-llama-f32-seedonly-noavx"
        folder = checkpoint(name)
        vera_tools.record(folder, base=base_of(name), recipe="mt19937-f32-separate")
        report = one(folder)
        exact = {(load.loader, load.rounding, load.base_dtype) for load in report.loads if load.exact}
        assert ("peft>=0.21", "separate", "float32") in exact
        assert ("peft>=0.21", "fused", "float32") not in exact
        assert ("vera-tools", "fused", "bfloat16") in exact

    def test_broken_manifest_is_a_failed_check(self, checkpoint):
        folder = checkpoint(KEPT)
        (folder / MANIFEST_NAME).write_text("{}")
        report = one(folder)
        assert failed(report) == {"manifest.schema"}
        assert report.verdict == "reproducible"

    def test_every_bit_of_the_metadata(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        path = folder / "adapter_model.safetensors"
        original = path.read_bytes()
        start, stop = original.index(b'{"format"'), original.index(b'"pt"}') + 5
        for position in range(start, stop):
            for bit in range(8):
                path.write_bytes(_flip(original, position, bit))
                assert vera_tools.verify(folder).exit_code, (position, bit)

    def test_changed_config_key_is_named(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        set_config(folder, vera_dropout=0.5)
        report = one(folder)
        assert failed(report) == {"manifest.config"}
        assert "vera_dropout 0.0 became 0.5" in next(c.message for c in report.checks if c.id == "manifest.config")

    def test_assumed_recipe_stays_a_warning(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        with pytest.warns(vera_tools.errors.AssumedRecipeWarning, match="assuming mt19937-f32-fused"):
            vera_tools.record(folder, base=base_of(SEED_ONLY))
        report = one(folder)
        assert report.verdict == "reproducible"
        assert statuses(report)["manifest.assumed"] == "warn"


class TestRegistry:
    @pytest.fixture
    def registry(self, tmp_path):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "a" / "vera")
        for kind in ("LORA", "PVERA"):
            folder = tmp_path / "b" / kind.lower()
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 8}))
        hidden = tmp_path / ".cache"
        hidden.mkdir()
        (hidden / "adapter_config.json").write_text("{}")
        return tmp_path

    def test_other_adapters_are_skipped_by_name(self, registry):
        code, document = run_json("verify", "-R", registry)
        assert code == 0
        assert document["summary"]["skipped"] == 2
        assert sorted(entry["kind"] for entry in document["skipped"]) == ["LORA", "PVERA"]
        assert "skipped, not VeRA: 1 LORA, 1 PVERA" in run_cli("verify", "-R", registry).stdout

    def test_named_other_adapter_is_refused_by_name(self, registry):
        result = run_cli("verify", registry / "b" / "lora")
        assert result.returncode == 4
        assert "this is an adapter of kind LORA, not VeRA" in " ".join(result.stdout.split())

    def test_empty_registry(self, tmp_path):
        code, document = run_json("verify", "-R", tmp_path)
        assert code == 4
        assert document["schema"] == "vera-tools/error/v1"

    def test_most_severe_code_wins(self, registry):
        broken = registry / "c"
        broken.mkdir()
        (broken / "adapter_config.json").write_text("{")
        code, document = run_json("verify", "-R", registry)
        assert code == 4
        assert document["summary"]["invalid"] == 1

    def test_shared_pairs_are_computed_once(self, tmp_path, monkeypatch):
        for n in range(5):
            shutil.copytree(CHECKPOINTS / KEPT, tmp_path / f"kept-{n}")
            folder = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / f"seed-{n}")
            vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
        from vera_tools.verifying import verify as verifying

        calls = {"identify": 0, "digests": 0}

        def counting(name, function):
            def call(*args, **kwargs):
                calls[name] += 1
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(verifying, "identify_pair", counting("identify", verifying.identify_pair))
        monkeypatch.setattr(verifying, "digests", counting("digests", verifying.digests))
        report = vera_tools.verify(tmp_path, recursive=True, jobs=3)
        assert report.summary["reproducible"] == 10
        assert calls == {"identify": 1, "digests": 1}

    def test_junit(self, registry, tmp_path):
        damaged = registry / "d"
        shutil.copytree(CHECKPOINTS / KEPT, damaged)
        edit_pair(damaged, Recipe(prng_key=101, prng_key_B=102))
        out = tmp_path / "report.xml"
        assert run_cli("verify", "-R", registry, "--junit", out).returncode == 1
        root = ElementTree.parse(out).getroot()
        suites = {suite.get("name"): suite for suite in root}
        assert suites[str(damaged)].get("failures") == "1"
        assert suites[str(registry / "a" / "vera")].get("failures") == "0"
        assert int(root.get("tests")) == sum(len(suite) for suite in root)


class TestWithoutTorch:
    def test_torch_is_never_imported(self, checkpoint):
        folder = checkpoint(KEPT)
        script = f"""
import sys
from vera_tools.cli import main
try:
    main(["verify", {str(folder)!r}, "--base", {str(base_of(KEPT))!r}, "-q"])
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = sorted({{"torch", "transformers", "peft", "huggingface_hub"}} & set(sys.modules))
assert not heavy, heavy
"""
        subprocess.run([sys.executable, "-c", script], check=True)

    def test_works_where_torch_cannot_be_imported(self, tmp_path):
        (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
        result = run_cli("verify", CHECKPOINTS / KEPT, env={"PYTHONPATH": str(tmp_path)})
        assert result.returncode == 0, result.stderr

    def test_pickle_is_not_read_by_default(self, checkpoint):
        torch = pytest.importorskip("torch")
        folder = checkpoint(KEPT)
        with Checkpoint.open(folder) as opened:
            state = {name: torch.from_numpy(opened.weights.read(name)) for name in opened.weights.tensors}
        torch.save(state, folder / "adapter_model.bin")
        os.remove(folder / "adapter_model.safetensors")
        code, document = run_json("verify", folder)
        assert code == 4
        assert "--allow-pickle" in document["checkpoints"][0]["checks"][0]["message"]
        assert one(folder, allow_pickle=True).verdict == "reproducible"

    def test_hostile_pickle_is_refused(self, checkpoint, tmp_path):
        torch = pytest.importorskip("torch")
        folder = checkpoint(KEPT)
        os.remove(folder / "adapter_model.safetensors")

        class Bomb:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        torch.save({"base_model.vera_A": Bomb()}, folder / "adapter_model.bin")
        report = one(folder, allow_pickle=True)
        assert report.verdict == "invalid"
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [KEPT, SEED_ONLY])
@pytest.mark.parametrize("options", [(), ("-v",)])
def test_human_text_on_a_terminal_of_80_columns(name, options, monkeypatch):
    monkeypatch.chdir(CHECKPOINTS)
    code, shown = run_terminal("verify", name, "--base", f"{name}-base", *options, env={"NO_COLOR": "1"})
    assert code == {KEPT: 0, SEED_ONLY: 3}[name]
    lines = plain(shown).splitlines()
    assert lines[0] == f"{name}: {'REPRODUCIBLE' if name == KEPT else 'UNPROVEN'}"
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b[3" not in shown
    _, coloured = run_terminal("verify", name, "--base", f"{name}-base", *options)
    assert "\x1b[1;3" in coloured


def test_pipes_get_one_fact_a_line():
    result = run_cli("verify", CHECKPOINTS / KEPT)
    assert "  scope     vectors not covered: no manifest\n" in result.stdout
    assert "\x1b" not in result.stdout


def test_progress_is_shown_on_a_terminal_only():
    _, shown = run_terminal("verify", "-R", CHECKPOINTS)
    assert "verifying" in shown or "━" in shown
    assert run_cli("verify", "-R", CHECKPOINTS).stderr == ""
