"""`verify` where bits were changed, and where the projections are another key's or nobody's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit, replace_pair, set_config, take_as_live
from tests.command import run_cli, run_json
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.projections.recipe import Recipe


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
        if seed_only:
            take_as_live(folder)
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
        assert name in message_of(report, "manifest.tensors")
        assert vera_tools.verify(folder).exit_code == 1

    def test_nan_is_named_with_its_place(self, checkpoint):
        folder = checkpoint(KEPT)
        name = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
        edit(folder, lambda arrays: arrays[name].__setitem__(5, np.nan))
        report = one(folder)
        assert failed(report) == {"tensors.finite"}
        message = message_of(report, "tensors.finite")
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
        replace_pair(folder, Recipe(prng_key=0))
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
        replace_pair(folder, recipe)
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
        replace_pair(folder, Recipe(prng_key=101, prng_key_B=102))
        assert run_cli("verify", folder).returncode == 1
        assert run_cli("verify", folder, "--require", "drift").returncode == 0

    def test_both_keys_of_a_split_pair_are_named(self, checkpoint):
        """B's key is 0 where A's is -1."""
        folder = checkpoint(KEPT)
        set_config(folder, projection_prng_key=-1)
        replace_pair(folder, Recipe(prng_key=-1, prng_key_B=0))
        assert message_of(one(folder), "projections.match") == (
            "vera_A and vera_B were made with key -1 and, for vera_B, key 0; the config says key -1"
        )

    def test_half_vera_pair(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: arrays.pop("base_model.vera_B"))
        code, document = run_json("verify", folder)
        assert code == 4
        assert {"id": "config.save_projection", "status": "fail"}.items() <= next(
            check for check in document["checkpoints"][0]["checks"] if check["status"] == "fail"
        ).items()
