"""What a search takes for an adapter: by any of its files, whoever searches, wherever it lies."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, MANIFEST, SEED_ONLY, WEIGHTS, base_of, files_of, set_config
from tests.command import run_cli, run_json
from vera_tools.checkpoints.presence import find
from vera_tools.testing import plugin

LORA = b'{"peft_type": "LORA", "r": 8}'


def put_lora(folder, name="base_model.model.h.0.attn.lora_A.weight"):
    folder.mkdir(parents=True)
    (folder / CONFIG).write_bytes(LORA)
    save_file({name: np.zeros(4, np.float32)}, folder / WEIGHTS, {"format": "pt", "note": "not vera_lambda_b"})


@pytest.fixture
def registry(tmp_path):
    """A recorded adapter, beside a LoRA and a folder that is no adapter's."""
    root = tmp_path / "reg"
    shutil.copytree(CHECKPOINTS / KEPT, root / "good")
    shutil.copytree(CHECKPOINTS / KEPT, root / "hit")
    vera_tools.record(root / "hit")
    put_lora(root / "lora")
    put_lora(root / "pvera", "base_model.model.h.0.attn.pvera_lambda_b")
    (root / "pvera" / CONFIG).write_bytes(LORA.replace(b"LORA", b"PVERA"))
    save_file({"model.w": np.zeros(2, np.float32)}, root / WEIGHTS)  # a base model that somebody called so
    return root


def lost_config(folder):
    (folder / CONFIG).unlink()


def lost_config_and_manifest(folder):
    (folder / CONFIG).unlink()
    (folder / MANIFEST).unlink()


def lost_all_but_what_says_what_it_is(folder):
    """A file that this tool wrote is a checkpoint where it is named; a folder without a config is none, as for PEFT."""
    vera_tools.strip_projections(folder, in_place=True)
    lost_config_and_manifest(folder)


def other_case(folder):
    (folder / CONFIG).rename(folder / "adapter_config.JSON")


def manifest_alone(folder):
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()


def nothing_but_names(folder):
    """Weights of which nothing but the header's own name of a vector tells, written with an escape."""
    lost_config_and_manifest(folder)
    header = json.dumps({"a.vera_lambda_b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    data = header.replace("vera_", "\\u0076era_").encode()
    (folder / WEIGHTS).write_bytes(len(data).to_bytes(8, "little") + data + b"\0" * 4)


def cut_off(folder):
    lost_config_and_manifest(folder)
    (folder / WEIGHTS).write_bytes(b"")


def called_lora(folder):
    set_config(folder, peft_type="LORA")


def called_lora_without_weights(folder):
    set_config(folder, peft_type="LORA")
    (folder / WEIGHTS).unlink()


def called_lora_without_manifest(folder):
    set_config(folder, peft_type="LORA")
    (folder / MANIFEST).unlink()


def weights_of_a_lora(folder):
    save_file({"base_model.model.h.0.attn.lora_A.weight": np.zeros(4, np.float32)}, folder / WEIGHTS)


def weights_of_a_lora_and_no_config(folder):
    weights_of_a_lora(folder)
    (folder / CONFIG).unlink()


HIDDEN = [
    lost_config,
    lost_config_and_manifest,
    lost_all_but_what_says_what_it_is,
    other_case,
    manifest_alone,
    nothing_but_names,
    cut_off,
    called_lora,
    called_lora_without_weights,
    called_lora_without_manifest,
    weights_of_a_lora,
    weights_of_a_lora_and_no_config,
]


@pytest.mark.parametrize("hide", HIDDEN)
def test_no_search_passes_over_an_adapter_that_lost_a_file(registry, hide):
    hit = registry / "hit"
    hide(hit)
    code, document = run_json("verify", "-R", registry)
    assert code == 4
    verdicts = {entry["path"]: entry for entry in document["checkpoints"]}
    assert {path: entry["verdict"] for path, entry in verdicts.items()} == {
        str(registry / "good"): "reproducible",
        str(hit): "invalid",
    }
    assert document["summary"]["skipped"] == 2
    _, alone = run_json("verify", hit)
    assert verdicts[str(hit)]["checks"] == alone["checkpoints"][0]["checks"]
    parts = [run_json("verify", "-R", registry, "--part", f"{n}/2") for n in (1, 2)]
    assert sorted(entry["path"] for _, part in parts for entry in part["checkpoints"]) == sorted(verdicts)
    assert max(code for code, _ in parts) == 4
    code, census = run_json("inspect", "-R", registry)
    assert (code, [entry["path"] for entry in census["failed"]]) == (4, [str(hit)])
    code, batch = run_json("strip-projections", "-R", registry, "--out-dir", registry.parent / "out")
    assert (code, batch["summary"]["failed"], batch["summary"]["skipped"]) == (4, 1, 2)


def test_what_was_made_a_lora_is_skipped_with_its_own_manifest(registry):
    vera_tools.to_lora(registry / "good", registry / "made", base=base_of(KEPT))
    report = vera_tools.verify(registry, recursive=True)
    assert report.exit_code == 0
    assert (str(registry / "made"), "LORA") in report.skipped
    (registry / "made" / MANIFEST).write_bytes((registry / "hit" / MANIFEST).read_bytes())
    report = vera_tools.verify(registry, recursive=True)
    assert report.exit_code == 4
    (found,) = (one for one in report.checkpoints if one.path.endswith("made"))
    assert "of kind LORA, and vera_manifest.json records an adapter of kind VERA" in found.cause
    (registry / "made" / MANIFEST).write_text("{}")
    assert vera_tools.verify(registry, recursive=True).exit_code == 4


def test_a_header_is_read_of_what_has_no_config_alone(registry, monkeypatch):
    """The walk itself opens nothing of adapters that have one."""
    opened = []
    monkeypatch.setattr("vera_tools.checkpoints.presence.LocalFile", lambda path: opened.append(path))
    with pytest.raises(AttributeError):  # of the file that is not opened
        list(find(registry))
    (registry / WEIGHTS).unlink()
    opened.clear()
    assert [path.name for path in find(registry)] == ["good", "hit", "lora", "pvera"]
    assert not opened


@pytest.mark.parametrize("hide", [lost_config, lost_config_and_manifest, called_lora])
def test_a_store_is_searched_in_the_same_way(registry, memory, hide):
    hide(registry / "hit")
    address = memory.put("reg", registry)
    report = vera_tools.verify(address, recursive=True)
    assert report.exit_code == 4
    verdicts = {one.path.rpartition("/")[2]: one.verdict for one in report.checkpoints}
    assert (verdicts, len(report.skipped)) == ({"good": "reproducible", "hit": "invalid"}, 2)


@pytest.mark.parametrize("hide", [lost_config, lost_config_and_manifest, called_lora])
def test_a_repository_is_searched_in_the_same_way(registry, hub, hide):
    hide(registry / "hit")
    hub.add_repo("ann/all", files_of(registry))
    report = vera_tools.verify("hf://ann/*")
    assert report.exit_code == 4
    verdicts = {one.path.rpartition("/")[2]: one.verdict for one in report.checkpoints}
    assert (verdicts, len(report.skipped)) == ({"good": "reproducible", "hit": "invalid"}, 2)


@pytest.mark.parametrize("hide", [lost_config, lost_config_and_manifest, manifest_alone])
def test_pytest_collects_it(registry, hide, pytester_free_parent):
    hide(registry / "hit")
    found = [pytester_free_parent(path) for path in sorted(registry.rglob("*")) if path.is_file()]
    assert [path.parent.name for path in filter(None, found)] == ["good", "hit", "lora", "pvera"]


@pytest.fixture
def pytester_free_parent(monkeypatch):
    """What the plugin collects of a file, without a pytest of its own."""

    class Asked:
        config = type("Config", (), {"getoption": staticmethod(lambda name: True)})

    monkeypatch.setattr(plugin.Adapter, "from_parent", staticmethod(lambda parent, path: path))
    return lambda path: plugin.pytest_collect_file(path, Asked)


def test_a_seed_only_one_without_a_config_is_seen(tmp_path):
    folder = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "seeds")
    lost_config(folder)
    result = run_cli("verify", "-R", tmp_path)
    assert (result.returncode, "no adapter_config.json" in result.stdout) == (4, True)
