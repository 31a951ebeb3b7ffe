"""`verify` against the manifest: what it proves, what contradicts it, and when it is out of date."""

from __future__ import annotations

import numpy as np
import pytest

import vera_tools
from tests.adapters import BERT, KEPT, MANIFEST, SEED_ONLY, base_of, edit, edit_manifest, set_config, take_as_live
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools import schema
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import CheckFailedError
from vera_tools.files import safetensors
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe


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
        "changes", [{"name": "mt19937-f32-separate", "rounding": "separate"}, {"prng_key": 99}], ids=["rounding", "key"]
    )
    def test_recipe_that_did_not_make_the_stored_pair(self, checkpoint, changes):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        edit_manifest(folder, lambda manifest: manifest["recipe"].update(changes))
        assert "manifest.recipe" in failed(one(folder))

    def test_digest_of_a_stored_projection_stands_there_twice(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        edit_manifest(folder, lambda manifest: manifest["tensors"]["base_model.vera_A"].update(sha256="0" * 64))
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

    def test_tampered_digest(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
        edit_manifest(folder, lambda manifest: manifest["projections"]["vera_B"].update(sha256="0" * 64))
        report = one(folder)
        assert report.verdict == "drift"
        assert "projections.match" in failed(report)

    def test_a_recorded_pair_beyond_the_limit_is_not_drawn(self, checkpoint, monkeypatch):
        monkeypatch.setattr("vera_tools.checkpoints.resolution.MOST_CLAIMED", 1 << 20)
        monkeypatch.setattr("vera_tools.checkpoints.resolution.CLAIMED_TIMES", 1)
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
        assert one(folder).verdict == "assumed"

        def widen(manifest):
            manifest["in_max"] = manifest["projections"]["vera_A"]["shape"][1] = 1 << 18

        edit_manifest(folder, widen)
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

    def test_a_recorded_pair_loads_exactly_where_its_recipe_says(self, checkpoint):
        name = "peft-0.21.2-llama-f32-seedonly-noavx"
        folder = checkpoint(name)
        vera_tools.record(folder, base=base_of(name), recipe="mt19937-f32-separate")
        take_as_live(folder)
        report = one(folder)
        exact = {(load.loader, load.rounding, load.base_dtype) for load in report.loads if load.exact}
        assert ("peft>=0.21", "separate", "float32") in exact
        assert ("peft>=0.21", "fused", "float32") not in exact
        assert ("vera-tools", "fused", "bfloat16") in exact

    def test_broken_manifest_is_a_failed_check(self, checkpoint):
        folder = checkpoint(KEPT)
        (folder / MANIFEST).write_text("{}")
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
                changed = bytearray(original)
                changed[position] ^= 1 << bit
                path.write_bytes(changed)
                assert vera_tools.verify(folder).exit_code, (position, bit)

    def test_changed_config_key_is_named(self, checkpoint):
        folder = checkpoint(KEPT)
        vera_tools.record(folder)
        set_config(folder, vera_dropout=0.5)
        report = one(folder)
        assert failed(report) == {"manifest.config"}
        assert "vera_dropout 0.0 became 0.5" in message_of(report, "manifest.config")

    def test_assumed_recipe_is_a_verdict_and_a_warning(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        with pytest.warns(vera_tools.errors.AssumedRecipeWarning, match="assuming mt19937-f32-fused"):
            vera_tools.record(folder, base=base_of(SEED_ONLY))
        report = one(folder)
        assert report.verdict == "assumed"
        assert statuses(report)["manifest.assumed"] == "warn"


@pytest.mark.parametrize(
    ("metadata", "status"),
    [
        ({"format": "pt", "more": "1"}, "warn"),
        ({}, "warn"),
        ({"format": "np"}, "fail"),
        ({"other": "pt"}, "fail"),
        ({"format": "pt"}, "pass"),
    ],
)
def test_metadata_that_another_program_saved_otherwise(checkpoint, metadata, status):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: None, metadata={"format": "pt"})
    vera_tools.record(folder)
    edit(folder, lambda tensors: None, metadata=metadata)
    assert statuses(one(folder))["manifest.metadata"] == status
    assert vera_tools.verify(folder).exit_code == (1 if status == "fail" else 0)
