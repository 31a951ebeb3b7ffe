"""Adapters on disk: what is read, what is refused, and under which name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.adapters import (
    BERT,
    CHECKPOINTS,
    CONFIG,
    GPT2,
    KEPT,
    NAMES,
    PICKLE,
    SEED_ONLY,
    WEIGHTS,
    base_of,
    config_of,
    edit,
    put_pickle,
)
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint, assumed_rounding
from vera_tools.checkpoints.manifest import MANIFEST_NAME, METADATA_KEY
from vera_tools.checkpoints.presence import find
from vera_tools.errors import CheckFailedError, FormatError, NotVeraError
from vera_tools.projections.pair import PairShape


@pytest.mark.parametrize("name", NAMES)
def test_a_peft_checkpoint_is_what_its_config_says(name):
    with Checkpoint.open(CHECKPOINTS / name) as checkpoint:
        config = config_of(CHECKPOINTS / name)
        assert checkpoint.raw_config == config
        assert checkpoint.label == str(CHECKPOINTS / name)
        assert (len(checkpoint.projections) == 2) == config["save_projection"]
        assert all(layer.lambda_b and layer.lambda_d for layer in checkpoint.layers.values())
        assert all(layer.lambda_d.shape == (config["r"],) for layer in checkpoint.layers.values())
        assert all(checkpoint.config.targets(module) for module in checkpoint.layers)
        parts = 2 * len(checkpoint.layers) + len(checkpoint.projections) + len(checkpoint.other_tensors)
        assert parts == len(checkpoint.weights.tensors)
        assert bool(checkpoint.other_tensors) == ("gpt2" in name or "bert" in name)
        assert checkpoint.recorded is None
        assert checkpoint.manifest is None


def test_saved_heads_and_biases_are_neither_layers_nor_unknown():
    with Checkpoint.open(CHECKPOINTS / BERT) as checkpoint:
        assert set(checkpoint.other_tensors) == {
            "base_model.model.classifier.bias",
            "base_model.model.classifier.weight",
        }
    with Checkpoint.open(CHECKPOINTS / GPT2) as checkpoint:
        assert {name.rsplit(".", 2)[-2] for name in checkpoint.other_tensors} == {"base_layer"}


def test_a_file_or_its_folder_name_the_same_checkpoint():
    with Checkpoint.open(CHECKPOINTS / KEPT) as folder, Checkpoint.open(CHECKPOINTS / KEPT / WEIGHTS) as file:
        assert file.config == folder.config
        assert file.weights.tensors == folder.weights.tensors
    with Checkpoint.open(CHECKPOINTS / KEPT / CONFIG) as config:
        assert len(config.layers) > 0


def test_another_file_beside_the_config_may_be_named(checkpoint):
    folder = checkpoint(KEPT)
    (folder / WEIGHTS).rename(folder / "step-100.safetensors")
    with pytest.raises(FormatError, match=f"the weights are missing.*{WEIGHTS}"):
        Checkpoint.open(folder)
    with Checkpoint.open(folder / "step-100.safetensors") as opened:
        assert opened.weights.label.endswith("step-100.safetensors")


def test_opening_closes_what_it_opened_when_it_fails(checkpoint):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: tensors.update({"base_model.model.x.lora_A.weight": np.zeros(1, np.float32)}))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(FormatError):
            Checkpoint.open(folder)
    after = len(os.listdir("/proc/self/fd")) if before else 0
    assert after == before


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("base_model.model.h.0.attn.lora_A.weight", "LORA"),
        ("base_model.model.h.0.attn.lora_B.weight", "LORA"),
        ("base_model.model.h.0.attn.pvera_lambda_b", "PVERA"),
        ("base_model.pvera_A", "PVERA"),
        ("base_model.model.h.0.attn.randlora_lambda", "RANDLORA"),
        ("base_model.randlora_A", "RANDLORA"),
        ("base_model.model.h.0.attn.vblora_logits_A", "VBLORA"),
        ("base_model.model.h.0.attn.lokr_w1", "LOKR"),
        ("base_model.model.h.0.attn.hada_w1_a", "LOHA"),
        ("base_model.model.h.0.attn.oft_r", "OFT"),
        ("base_model.model.h.0.attn.ia3_l", "IA3"),
    ],
)
def test_a_look_alike_is_refused_by_what_its_tensors_are(checkpoint, tensor, kind):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: [tensors.clear(), tensors.update({tensor: np.zeros(1, np.float32)})])
    with pytest.raises(FormatError, match=f"this holds {kind} tensors, not VeRA's") as caught:
        Checkpoint.open(folder)
    assert type(caught.value) is FormatError  # its config says VeRA: it is a broken one, and not one to be skipped
    assert caught.value.where == f"{folder / WEIGHTS}: {tensor}"
    (folder / CONFIG).unlink()
    with pytest.raises(NotVeraError, match=f"this holds {kind} tensors, not VeRA's") as other:
        Checkpoint.open(folder)
    assert other.value.kind == kind


def test_another_kind_is_refused_whatever_its_weights_are(checkpoint):
    folder = checkpoint(KEPT)
    (folder / WEIGHTS).write_bytes(b"nonsense")
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(NotVeraError, match="this is an adapter of kind LORA"):
        Checkpoint.open(folder)


def test_a_byte_order_mark_and_crlf_are_kept_in_the_text(checkpoint):
    folder = checkpoint(KEPT)
    text = "\ufeff" + (folder / CONFIG).read_text().replace("\n", "\r\n")
    (folder / CONFIG).write_bytes(text.encode())
    with Checkpoint.open(folder) as opened:
        assert opened.config_text == text
        assert opened.raw_config == json.loads(text[1:])


@pytest.mark.parametrize("contents", [[], ["README.md"], ["adapter_model.safetensors.tmp"]])
def test_what_is_no_checkpoint_is_told_so(tmp_path, contents):
    for name in contents:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FormatError) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert caught.value.exit_code == 4


def test_weights_without_a_config_are_refused_unless_they_say_what_they_are(checkpoint):
    folder = checkpoint(KEPT)
    (folder / CONFIG).unlink()
    with pytest.raises(FormatError, match=r"there is no adapter_config\.json"):
        Checkpoint.open(folder)


class TestPickle:
    @pytest.fixture
    def folder(self, checkpoint):
        folder = checkpoint(KEPT)
        put_pickle(folder)
        return folder

    def test_it_is_not_read_by_default(self, folder):
        with pytest.raises(FormatError, match=r"adapter_model\.bin: pickles can run code, .*--allow-pickle"):
            Checkpoint.open(folder)

    def test_it_is_read_where_that_is_allowed(self, folder):
        with Checkpoint.open(folder, allow_pickle=True) as opened, Checkpoint.open(CHECKPOINTS / KEPT) as original:
            assert set(opened.weights.tensors) == set(original.weights.tensors)
            for name in original.weights.tensors:
                assert opened.weights.read(name).tobytes() == original.weights.read(name).tobytes()

    def test_code_in_it_is_not_run(self, folder, tmp_path):
        import pickle

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "owned"),)

        (folder / PICKLE).write_bytes(pickle.dumps({"base_model.vera_A": Payload()}))
        with pytest.raises(FormatError):
            Checkpoint.open(folder, allow_pickle=True)
        assert not (tmp_path / "owned").exists()

    def test_safetensors_beside_it_win(self, folder):
        (folder / WEIGHTS).write_bytes((CHECKPOINTS / KEPT / WEIGHTS).read_bytes())
        (folder / PICKLE).write_bytes(b"not even a pickle")
        Checkpoint.open(folder, allow_pickle=True).close()


def test_the_pairs_shape_is_read_off_the_stored_pair_or_follows_from_the_base():
    with Checkpoint.open(CHECKPOINTS / KEPT) as kept:
        assert kept.pair_shape() == PairShape(16, 64, 64)
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as seed_only, BaseModel.open(base_of(SEED_ONLY)) as base:
        assert seed_only.pair_shape() is None
        assert seed_only.pair_shape(base) == PairShape(16, 96, 64)


@pytest.mark.parametrize("shapes", [((16,), (64, 16)), ((16, 64), (64, 8)), ((0, 64), (64, 0)), ((16, 0), (64, 16))])
def test_a_pair_that_does_not_fit_itself_is_an_error(checkpoint, shapes):
    folder = checkpoint(KEPT)
    pair = {f"base_model.{n}": np.zeros(s, np.float32) for n, s in zip(("vera_A", "vera_B"), shapes, strict=True)}
    edit(folder, lambda tensors: tensors.update(pair))
    with (
        Checkpoint.open(folder) as opened,
        pytest.raises(FormatError, match=r"expected \(r, in_max\) and \(out_max, r\)"),
    ):
        opened.pair_shape()


def test_without_a_layer_nothing_follows_from_the_base(checkpoint):
    folder = checkpoint(SEED_ONLY)
    edit(folder, lambda tensors: (tensors.clear(), tensors.update({"other": np.zeros(1, np.float32)})))
    with Checkpoint.open(folder) as opened, BaseModel.open(base_of(SEED_ONLY)) as base:
        assert opened.layers == {}
        with pytest.raises(CheckFailedError, match="nothing is adapted"):
            opened.pair_shape(base)


def test_a_layer_with_half_its_vectors_says_which_is_missing(checkpoint):
    folder = checkpoint(KEPT)
    gone = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
    edit(folder, lambda tensors: tensors.pop(gone))
    with Checkpoint.open(folder) as opened:
        layer = opened.layers["model.layers.0.self_attn.q_proj"]
        assert layer.lambda_d is None
        assert layer.lambda_b.shape == (64,)


@pytest.mark.parametrize(("name", "expected"), [("peft-0.21.2-llama-bf16-seedonly", "bfloat16"), (SEED_ONLY, None)])
def test_the_bases_dtype_says_what_peft_would_round_through(name, expected):
    with Checkpoint.open(CHECKPOINTS / name) as opened, BaseModel.open(base_of(name)) as base:
        assert assumed_rounding(opened, base) == expected
        assert assumed_rounding(opened, None) is None


def test_a_manifest_that_cannot_be_used_is_remembered_not_raised(checkpoint):
    folder = checkpoint(KEPT)
    for text in ("{", "[]", '{"schema": "vera-tools/manifest/v2"}', "\ufeff{}"):
        (folder / MANIFEST_NAME).write_text(text, "utf-8")
        with Checkpoint.open(folder) as opened:
            assert opened.manifest is None
            assert MANIFEST_NAME in opened.manifest_error.where
            assert opened.recorded is None


@pytest.mark.parametrize("entry", ["{", "[]", "{}", '{"recipe": null}'])
def test_an_embedded_record_that_cannot_be_used_is_remembered_not_raised(checkpoint, entry):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: None, metadata={"format": "pt", METADATA_KEY: entry})
    with Checkpoint.open(folder) as opened:
        assert opened.embedded is None
        assert f"metadata {METADATA_KEY}" in opened.embedded_error.where
    (folder / CONFIG).unlink()
    with pytest.raises(FormatError, match=f"metadata {METADATA_KEY}"):
        Checkpoint.open(folder)


def test_find_sees_every_checkpoint_below_a_folder_in_order(tmp_path):
    for place in ("b", "a/step-2", "a/step-10", ".hidden/c", "a/.cache/d", "e"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / CONFIG).write_text("{}")
    (tmp_path / "e" / CONFIG).unlink()
    (tmp_path / "a" / CONFIG).write_text("{}")
    assert [str(path.relative_to(tmp_path)) for path in find(tmp_path)] == ["a", "a/step-2", "a/step-10", "b"]
    with pytest.raises(FormatError, match="gone: no such folder"):
        list(find(tmp_path / "gone"))


def test_reading_a_checkpoint_and_its_base_imports_no_torch():
    adapter, base = str(CHECKPOINTS / SEED_ONLY), str(base_of(SEED_ONLY))
    program = (
        "import sys\n"
        "from vera_tools.checkpoints.base import BaseModel\n"
        "from vera_tools.checkpoints.checkpoint import Checkpoint\n"
        f"with Checkpoint.open({adapter!r}) as c, BaseModel.open({base!r}) as b:\n"
        "    print(c.pair_shape(b).in_max)\n"
        "print(sorted({'torch', 'peft', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["96", "[]"]


def test_a_search_follows_links_and_enters_each_folder_once(tmp_path):
    for name in ("registry/own", "elsewhere/real"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / CONFIG).write_text("{}")
    registry = tmp_path / "registry"
    (registry / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (registry / "loop").symlink_to(registry, target_is_directory=True)
    (registry / "own" / "again").symlink_to(tmp_path / "elsewhere" / "real")
    (registry / "itself").symlink_to("itself")
    assert [str(path.relative_to(registry)) for path in find(registry)] == ["linked/real", "own"]


def broken_link(path):
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (broken_link, "this is a broken link to /nowhere/at/all, not a file"),
        (os.mkfifo, "this is a named pipe, not a file"),
        (os.mkdir, "this is a folder, not a file"),
    ],
)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST_NAME])
def test_what_is_no_file_is_called_what_it_is(checkpoint, make, what, name):
    folder = checkpoint(KEPT)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    if name != MANIFEST_NAME:
        with pytest.raises(FormatError, match=re.escape(f"{folder / name}: {what}")):
            Checkpoint.open(folder)
        return
    with Checkpoint.open(folder) as opened:
        assert opened.manifest is None
        assert str(opened.manifest_error) == f"{folder / name}: {what}"
