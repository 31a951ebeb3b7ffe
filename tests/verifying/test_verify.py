"""`verify` on adapters that PEFT really made: verdicts, registries, pickles, and what a terminal shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, NAMES, SEED_ONLY, base_of, put_pickle, replace_pair, take_as_live
from tests.command import plain, run_cli, run_json, run_process, run_terminal
from tests.verifying.reports import failed, one
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.files import safetensors
from vera_tools.projections.recipe import Recipe

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
        assert document["summary"] == {
            "reproducible": 9,
            "assumed": 0,
            "unproven": 3,
            "drift": 0,
            "invalid": 0,
            "skipped": 0,
            "failed_checks": 0,
        }
        assert [Path(entry["path"]).name for entry in document["checkpoints"]] == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_recorded_checkpoints_are_reproducible(self, name, checkpoint):
        folder, base = checkpoint(name), None
        if EXPECTED[name][0] == "reproducible":
            vera_tools.record(folder)
        else:
            rounding = "separate" if "noavx" in name else "fused"
            through = "-via-bf16" if "bf16" in name else ""
            base = base_of(name)
            vera_tools.record(folder, base=base, recipe=f"mt19937-f32-{rounding}{through}")
        code, document = run_json("verify", folder)
        (entry,) = document["checkpoints"]
        scope = "projections, vectors and config are covered"
        if EXPECTED[name][0] == "unproven":
            assert (code, entry["verdict"]) == (3, "assumed")
            assert entry["scope"].startswith(scope + "; ")
            take_as_live(folder)
            code, document = run_json("verify", folder)
            (entry,) = document["checkpoints"]
        assert (code, entry["verdict"]) == (0, "reproducible")
        assert entry["scope"] == scope + ("" if base else "; in_max not checked against a base")
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
        assert document["summary"]["failed_checks"] == 1

    def test_shared_pairs_are_computed_once(self, tmp_path, monkeypatch):
        for n in range(5):
            shutil.copytree(CHECKPOINTS / KEPT, tmp_path / f"kept-{n}")
            folder = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / f"seed-{n}")
            vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
            take_as_live(folder)
        from vera_tools.verifying import verifier as verifying

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
        replace_pair(damaged, Recipe(prng_key=101, prng_key_B=102))
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
        result = run_process("verify", CHECKPOINTS / KEPT, env={"PYTHONPATH": str(tmp_path)})
        assert result.returncode == 0, result.stderr

    def test_pickle_is_not_read_by_default(self, checkpoint):
        folder = checkpoint(KEPT)
        put_pickle(folder)
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
    commands = [line for line in lines if line.startswith("            vera-tools ")]  # whole, to be copied
    assert all(len(line) <= 80 for line in lines if line not in commands), max(lines, key=len)
    assert len(commands) == (name == SEED_ONLY)
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b[3" not in shown
    _, coloured = run_terminal("verify", name, "--base", f"{name}-base", *options)
    assert "\x1b[1;3" in coloured


def test_pipes_get_one_fact_a_line():
    result = run_cli("verify", CHECKPOINTS / KEPT)
    assert "  scope     vectors not covered: no manifest; in_max not checked against a base\n" in result.stdout
    assert "\x1b" not in result.stdout


def test_progress_is_shown_on_a_terminal_only():
    _, shown = run_terminal("verify", "-R", CHECKPOINTS)
    assert "verifying" in shown or "━" in shown
    assert run_cli("verify", "-R", CHECKPOINTS).stderr == ""


def test_an_error_is_of_the_part_that_it_is_in_whatever_the_folder_is_called(checkpoint, tmp_path):
    """A folder's name that looks like the config's does not make its weights' error one of the config."""
    folder = checkpoint(KEPT).rename(tmp_path / "adapter_config.json")
    (folder / "adapter_model.safetensors").write_bytes(b"not safetensors")
    assert failed(one(folder)) == {"tensors.file"}
    (folder / "adapter_config.json").write_text("{")
    assert failed(one(folder)) == {"config.schema"}
