"""`verify` on tensors that are missing, too many or of the wrong kind, and on what PEFT saves beside the vectors."""

from __future__ import annotations

import json
import shlex
import shutil
import struct
from xml.etree import ElementTree

import numpy as np
import pytest

import vera_tools
from tests.adapters import BERT, CHECKPOINTS, GPT2, KEPT, base_of, drop_pair, edit, set_config, tensors_of
from tests.command import run_cli
from tests.verifying.reports import failed, message_of, one, statuses

pytestmark = pytest.mark.capability


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

    def test_projections_of_two_dtypes(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(
            folder, lambda arrays: arrays.update({"base_model.vera_A": arrays["base_model.vera_A"].astype(np.float16)})
        )
        report = one(folder)
        assert "tensors.dtypes" in failed(report)
        assert vera_tools.verify(folder).exit_code != 0

    @pytest.mark.parametrize("vector", ["lambda_b", "lambda_d"])
    def test_vectors_that_are_all_zero_are_told(self, checkpoint, vector):
        folder = checkpoint(KEPT)
        edit(folder, lambda arrays: [array.fill(0) for name, array in arrays.items() if name.endswith(vector)])
        assert statuses(one(folder))[f"tensors.{vector}"] == "warn"
        last = max(name for name in tensors_of(folder) if name.endswith(vector))
        edit(folder, lambda arrays: arrays[last].__setitem__(-1, 1))
        assert statuses(one(folder))[f"tensors.{vector}"] == "pass"

    def test_a_check_that_failed_is_a_failure_in_junit_and_one_that_was_skipped_is_not(self, checkpoint):
        folder = checkpoint(KEPT)
        drop_pair(folder)
        report = vera_tools.verify(folder)
        cases = {case.get("name"): [part.tag for part in case] for case in ElementTree.fromstring(report.to_junit())[0]}
        for check in report.checkpoints[0].checks:
            if check.id in cases and check.status in ("fail", "skip"):
                assert cases[check.id] == ["failure" if check.status == "fail" else "skipped"]
        assert {"failure", "skipped"} <= {tag for tags in cases.values() for tag in tags}

    def test_promised_projections_that_are_missing(self, checkpoint):
        folder = checkpoint(KEPT)
        drop_pair(folder)
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
        report = one(CHECKPOINTS / KEPT, base=base_of(GPT2))
        assert failed(report) == {"base.modules"}
        assert report.verdict == "reproducible"

    def test_a_base_of_which_its_class_does_not_take_all(self, tmp_path):
        base = shutil.copytree(base_of(KEPT), tmp_path / "base")
        edit(
            base,
            lambda arrays: arrays.update({"more.weight": arrays.pop("model.norm.weight")}),
            file="model.safetensors",
        )
        report = one(CHECKPOINTS / KEPT, base=base)
        assert statuses(report)["base.class"] == "warn"
        assert "does not take more.weight: this may be a base of another class" in message_of(report, "base.class")
        assert statuses(one(CHECKPOINTS / KEPT, base=base_of(KEPT)))["base.class"] == "pass"

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
        assert "classifier.bias" in message_of(report, "base.parameters")

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

    @pytest.mark.parametrize("module", ["tok_embeddings", "output_layer", "embed_in", "lm_head"])
    def test_saved_embeddings_of_any_name(self, checkpoint, module):
        folder = checkpoint(KEPT)
        weight = np.zeros((130, 64), np.float32)
        edit(folder, lambda arrays: arrays.__setitem__(f"base_model.model.model.{module}.weight", weight))
        report = one(folder)
        assert not failed(report)
        assert statuses(report)["tensors.unexpected"] == "warn"

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

    @pytest.mark.filterwarnings("ignore:.*trained where torch draws as on:vera_tools.errors.LoadingWarning")
    def test_second_adapter_shares_the_first_ones_wider_pair(self, tmp_path, monkeypatch):
        peft = pytest.importorskip("peft")
        from transformers import AutoModelForCausalLM

        from vera_tools.nn.peft import save

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
        assert "save the adapter again, alone in its model" in report.next_step.words
        monkeypatch.chdir(tmp_path)
        assert run_cli(*shlex.split(report.next_step.command)[1:]).returncode == 0
        fresh = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        peft.PeftModel.from_pretrained(fresh, "second-lora")
        vera_tools.strip_projections(tmp_path / "second", tmp_path / "stripped")
        stripped = one(tmp_path / "stripped", base=base_of(KEPT))
        assert stripped.verdict == "reproducible"
        assert {load.exact for load in stripped.loads if load.loader.startswith("peft")} == {False}
        save(model, tmp_path / "live", adapter_name="second")
        assert failed(one(tmp_path / "live" / "second")) == {"base.pair"}  # its manifest has the layers' shapes
        fresh = AutoModelForCausalLM.from_pretrained(base_of(KEPT))
        with pytest.warns(UserWarning, match="not (save|load) vera_A"):
            loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "stripped")
        assert tuple(loaded.base_model.vera_A["default"].shape) != report.projections[0].shape
