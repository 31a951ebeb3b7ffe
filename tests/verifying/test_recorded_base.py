"""The base that a manifest describes, against the base that is named: `verify --base`, `merge`, and what keeps it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vera_tools
from tests.adapters import GPT2, KEPT, MANIFEST, SEED_ONLY, base_of, edit, edit_manifest, flip
from tests.command import run_cli, run_json
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.checkpoints import base as bases
from vera_tools.errors import CheckFailedError, FormatError, LoadingWarning

BASE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def recorded(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder, base=base_of(KEPT))
    return folder


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(base_of(KEPT), tmp_path / "base")


def change(base, name=Q_PROJ):
    """One bit of one value."""

    def flip_one(tensors):
        tensors[name].reshape(-1).view(np.uint32)[5] ^= 1

    edit(base, flip_one, file=BASE)


def test_the_base_that_was_recorded_passes(recorded, base):
    report = one(recorded, base=base)
    assert not failed(report)
    assert message_of(report, "base.digests") == "4 of 4 adapted weights have the recorded digests"


def test_one_bit_of_one_weight_is_another_base_and_is_named(recorded, base):
    change(base)
    report = one(recorded, base=base)
    assert failed(report) == {"base.digests"}
    assert Q_PROJ in message_of(report, "base.digests")
    assert "1 of 4 weights are other ones" in message_of(report, "base.digests")
    assert vera_tools.verify(recorded, base=base).exit_code == 1
    shown = run_cli("verify", recorded, "--base", base).stdout
    assert "FAILED" in shown
    assert "next:" in shown


def test_without_asking_the_headers_alone_are_compared(recorded, base):
    change(base)
    report = one(recorded, base=base, base_digests=False)
    assert not failed(report)
    assert statuses(report)["base.digests"] == "skip"
    assert "not compared: --base-digests reads" in message_of(report, "base.digests")
    code, document = run_json("verify", recorded, "--base", base, "--no-base-digests")
    assert code == 0
    code, document = run_json("verify", recorded, "--base", base, "--base-digests")
    assert code == 1
    assert document["summary"]["failed_checks"] == 1


def test_a_weight_that_is_not_adapted_is_not_looked_at(recorded, base):
    change(base, "model.embed_tokens.weight")
    assert not failed(one(recorded, base=base))


def test_a_base_in_other_files_is_the_same_base(recorded, base):
    tensors = load_file(base / BASE)
    (base / BASE).unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, base / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], file)
    (base / f"{BASE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert statuses(one(recorded, base=base))["base.digests"] == "pass"
    assert vera_tools.merge(recorded, base=base, output=base.with_name("out")).finished


def test_a_base_saved_without_its_head_is_the_same_base(recorded, base):
    """Its tensors' names lack the outermost module."""
    tensors = {name.removeprefix("model."): array for name, array in load_file(base / BASE).items()}
    save_file(tensors, base / BASE, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    report = one(recorded, base=base)
    assert (statuses(report)["base.recorded"], statuses(report)["base.digests"]) == ("pass", "pass")
    change(base, Q_PROJ.removeprefix("model."))
    assert Q_PROJ.removeprefix("model.") in message_of(one(recorded, base=base), "base.digests")


def test_a_copy_in_another_dtype_cannot_be_compared(recorded, base, tmp_path):
    edit(base, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}), file=BASE)
    report = one(recorded, base=base)
    assert not failed(report)
    assert (statuses(report)["base.recorded"], statuses(report)["base.digests"]) == ("warn", "skip")
    with pytest.warns(LoadingWarning, match=r"is another base than .* was recorded with, or another copy of it"):
        vera_tools.merge(recorded, base=base, output=tmp_path / "out")


def test_without_recorded_digests_the_check_says_so(recorded, base):
    def forget(manifest):
        for record in manifest["base"]["weights"].values():
            record["sha256"] = None

    edit_manifest(recorded, forget)
    change(base)
    report = one(recorded, base=base)
    assert not failed(report)
    assert statuses(report)["base.digests"] == "skip"
    assert "no digests of the base's weights are recorded" in message_of(report, "base.digests")


def test_nothing_recorded_of_a_base_is_no_check(checkpoint, base):
    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    assert not {"base.recorded", "base.digests"} & set(statuses(one(folder, base=base)))


def test_many_checkpoints_hash_a_base_once(recorded, base, monkeypatch):
    shutil.copytree(recorded, recorded.with_name("second"))
    hashed = []
    sha256 = bases.TensorFile.sha256

    def counting(self, name):
        hashed.append(name)
        return sha256(self, name)

    monkeypatch.setattr(bases.TensorFile, "sha256", counting)
    for _ in range(2):
        assert vera_tools.verify(recorded, recorded.with_name("second"), base=base, jobs=2).exit_code == 0
    assert len(hashed) <= 8  # both may begin at once
    assert set(hashed) == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qv"}
    change(base)
    assert vera_tools.verify(recorded, base=base).exit_code == 1


def test_a_base_that_changes_while_it_is_hashed_is_no_answer(recorded, base, monkeypatch):
    sha256 = bases.TensorFile.sha256

    def changing(self, name):
        digest = sha256(self, name)
        flip(base / BASE, -1)
        return digest

    monkeypatch.setattr(bases.TensorFile, "sha256", changing)
    with pytest.raises(FormatError, match="was changed while it was read"):
        vera_tools.verify(recorded, base=base)


class TestMerge:
    def test_another_base_is_refused_and_nothing_is_left(self, recorded, base, tmp_path):
        change(base)
        with pytest.raises(CheckFailedError, match=rf"{Q_PROJ}: this weight is not that of the base") as caught:
            vera_tools.merge(recorded, base=base, output=tmp_path / "out")
        assert str(recorded) in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
        code, document = run_json("merge", recorded, "--base", base, "-o", tmp_path / "out")
        assert code == 1
        assert "record --base" in document["error"]["hint"]

    def test_a_part_of_a_shared_merge_refuses_it_itself(self, recorded, base, tmp_path):
        change(base)
        with pytest.raises(CheckFailedError, match=rf"{Q_PROJ}: this weight is not that"):
            vera_tools.merge(recorded, base=base, output=tmp_path / "out", part=(1, 1))

    def test_where_it_is_meant_it_is_recorded_and_merged(self, recorded, base, tmp_path):
        change(base)
        vera_tools.record(recorded, base=base)
        assert vera_tools.merge(recorded, base=base, output=tmp_path / "out").finished

    def test_what_an_earlier_process_merged_into_another_base_is_refused_too(self, recorded, base, tmp_path):
        """Parts that were written before the manifest said which base it is."""
        change(base)
        plain = shutil.copytree(recorded, tmp_path / "plain")
        (plain / MANIFEST).unlink()
        vera_tools.merge(plain, base=base, output=tmp_path / "out", part=(1, 1))
        shutil.copy(recorded / MANIFEST, plain)
        with pytest.raises(CheckFailedError, match=rf"{Q_PROJ}: this weight is not that"):
            vera_tools.merge(plain, base=base, output=tmp_path / "out", finish=True)
        assert not (tmp_path / "out").exists()

    def test_any_of_several_adapters_may_say_so(self, recorded, base, tmp_path):
        plain = shutil.copytree(recorded, tmp_path / "plain")
        (plain / MANIFEST).unlink()
        change(base)
        for order in ([plain, recorded], [recorded, plain]):
            with pytest.raises(CheckFailedError, match=str(recorded)):
                vera_tools.merge(order, base=base, output=tmp_path / "out")


class TestConvert:
    @pytest.mark.parametrize(("convert", "name"), [("to_lora", "lora"), ("to_gguf", "adapter.gguf")])
    def test_another_base_is_refused_and_nothing_is_left(self, recorded, base, tmp_path, convert, name):
        if convert == "to_gguf":
            pytest.importorskip("gguf")
        change(base)
        with pytest.raises(CheckFailedError, match=rf"{Q_PROJ}: this weight is not that of the base") as caught:
            getattr(vera_tools, convert)(recorded, tmp_path / name, base=base)
        assert str(recorded) in str(caught.value)
        assert not (tmp_path / name).exists()
        change(base)
        assert getattr(vera_tools, convert)(recorded, tmp_path / name, base=base)

    def test_a_copy_in_another_dtype_is_told_of(self, recorded, base, tmp_path):
        edit(base, lambda tensors: tensors.update({k: v.astype(np.float16) for k, v in tensors.items()}), file=BASE)
        with pytest.warns(LoadingWarning, match=r"is another base than .* was recorded with, or another copy of it"):
            vera_tools.to_lora(recorded, tmp_path / "lora", base=base)


class TestKept:
    """What is made from a checkpoint says of the base what that said."""

    def weights(self, folder):
        return json.loads((folder / MANIFEST).read_text())["base"]["weights"]

    @pytest.mark.parametrize("given", [True, False], ids=["base given", "no base"])
    def test_through_strip_embed_and_convert(self, recorded, base, tmp_path, given):
        before = self.weights(recorded)
        assert all(record["sha256"] for record in before.values())
        options = {"base": base} if given else {}
        vera_tools.strip_projections(recorded, tmp_path / "stripped")
        vera_tools.to_lora(tmp_path / "stripped", tmp_path / "lora", **options)
        change(base)  # only its shapes are asked for when projections are embedded
        vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "embedded", **options)
        for name in ("stripped", "embedded", "lora"):
            assert self.weights(tmp_path / name) == before

    def test_recording_with_another_base_changes_it(self, recorded, base):
        before = self.weights(recorded)
        change(base)
        vera_tools.record(recorded, base=base)
        now = self.weights(recorded)
        assert {name for name in now if now[name] != before[name]} == {Q_PROJ}


@pytest.mark.parametrize("name", [GPT2, SEED_ONLY])
@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedRecipeWarning")
def test_other_layouts_of_weights(name, checkpoint):
    folder = checkpoint(name)
    vera_tools.record(folder, base=base_of(name))
    assert statuses(one(folder, base=base_of(name)))["base.digests"] == "pass"
