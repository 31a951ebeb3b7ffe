"""`--require-recorded`, what a report says where no manifest covers the vectors, and what it proposes for a damage."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, MANIFEST, PAIR, SEED_ONLY, WEIGHTS, edit, edit_json, flip, set_config
from tests.command import run_cli, run_json
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.errors import VeraToolsWarning
from vera_tools.testing import assert_reproducible

VECTOR = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"


def vectors_of(tensors):
    return [name for name in tensors if "vera_lambda" in name]


def times(folder, *names, factor=80):
    """Change vectors as a flipped bit of an exponent does."""
    edit(folder, lambda tensors: [tensors[name].__imul__(factor) for name in names or vectors_of(tensors)])


@pytest.fixture
def recorded(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder)
    return folder


class TestRequired:
    def test_what_no_manifest_covers_fails(self, checkpoint):
        folder = checkpoint(KEPT)
        times(folder, VECTOR)
        assert vera_tools.verify(folder).exit_code == 0  # which is why a gate asks for more
        report = vera_tools.verify(folder, require_recorded=True)
        assert (report.exit_code, failed(report.checkpoints[0])) == (1, {"manifest.required"})
        result = run_cli("verify", folder, "--require-recorded")
        lines = result.stdout.splitlines()
        assert (result.returncode, lines[0]) == (1, f"{folder}: FAILED manifest.required; projections REPRODUCIBLE")
        assert lines[1].startswith("  Safe to load, if its vectors are right, with vera-tools")
        assert f"            vera-tools record {folder}" in lines
        vera_tools.record(folder)
        result = run_cli("verify", folder, "--require-recorded")
        assert result.returncode == 0
        assert result.stdout.splitlines()[1].startswith("  Safe to load with vera-tools")

    def test_one_that_is_refused_for_its_manifest_is_not_refused_twice(self, recorded):
        times(recorded, VECTOR)
        report = vera_tools.verify(recorded, require_recorded=True)
        assert (report.exit_code, failed(report.checkpoints[0])) == (1, {"manifest.tensors"})
        assert statuses(report.checkpoints[0])["manifest.required"] == "skip"
        (recorded / WEIGHTS).write_bytes(b"")
        report = vera_tools.verify(recorded, require_recorded=True)
        assert (report.exit_code, failed(report.checkpoints[0])) == (4, {"tensors.file"})

    def test_a_failure_elsewhere_does_not_hide_it(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda tensors: tensors[VECTOR].fill(float("nan")))
        report = one(folder, require_recorded=True)
        assert failed(report) == {"tensors.finite", "manifest.required"}

    def test_what_is_unproven_is_told_how_to_be_proven(self, checkpoint):
        report = one(checkpoint(SEED_ONLY), require_recorded=True)
        assert failed(report) == {"manifest.required"}
        assert report.next_step.words.startswith("save it anew")

    @pytest.mark.parametrize("how", ["option", "environment", "file", "log"])
    def test_every_door_has_it(self, recorded, tmp_path, how, monkeypatch):
        registry = tmp_path / "r"
        shutil.copytree(recorded, registry / "good")
        shutil.copytree(CHECKPOINTS / KEPT, registry / "bare")
        monkeypatch.chdir(tmp_path)
        command, env = ["verify", "-R", "r"], {}
        if how == "option":
            command.append("--require-recorded")
        elif how == "environment":
            env["VERA_TOOLS_VERIFY_REQUIRE_RECORDED"] = "1"
        elif how == "file":
            (tmp_path / "pyproject.toml").write_text("[tool.vera-tools.verify]\nrequire-recorded = true\n")
        else:
            assert run_cli(*command, "--log", "log").returncode == 0  # of which the log says nothing
            assert run_cli("summarize", "log").returncode == 0
            command = ["summarize", "log", "--require-recorded"]
        code, document = run_json(*command, env=env)
        assert code == 1
        assert document["summary"]["failed_checks"] == 1
        assert {entry["path"]: entry["ok"] for entry in document["checkpoints"]} == {"r/bare": False, "r/good": True}

    def test_in_a_test(self, recorded):
        assert assert_reproducible(recorded, require_recorded=True).ok
        with pytest.raises(AssertionError, match=r"FAILED manifest\.required"):
            assert_reproducible(CHECKPOINTS / KEPT, require_recorded=True)


class TestDamage:
    """The command to copy never makes a damage the recorded state."""

    def damages(self):
        yield lambda folder: flip(folder / WEIGHTS, 8 + 4000)
        yield lambda folder: times(folder, VECTOR)
        yield lambda folder: edit(folder, lambda t: [t[name].__imul__(2) for name in vectors_of(t)[1:]])  # all but one
        yield lambda folder: set_config(folder, fan_in_fan_out=True)
        yield lambda folder: edit(folder, lambda tensors: tensors[PAIR[0]].__setitem__((1, 3), 0.5))
        yield lambda folder: edit(folder, lambda tensors: None, metadata={"format": "np"})
        yield lambda folder: (folder / MANIFEST).write_text("{}")
        yield lambda folder: edit_json(folder / MANIFEST, lambda manifest: manifest.update(platform="another"))

    @pytest.mark.parametrize("number", range(8))
    def test_none_is_approved(self, recorded, number):
        list(self.damages())[number](recorded)
        report = vera_tools.verify(recorded)
        assert report.exit_code == 1 or report.checkpoints[0].verdict == "invalid"
        (found,) = report.checkpoints
        assert "record" not in found.next_step.command
        assert "stale" not in str(failed(found))
        for form in (("--format", "github"), ("--format", "human"), ("--format", "junit")):
            assert not re.search(r"vera-tools record", run_cli("verify", recorded, *form).stdout)

    def test_training_is_every_vector(self, recorded):
        times(recorded)
        (found,) = vera_tools.verify(recorded).checkpoints
        assert failed(found) == {"manifest.stale"}
        assert found.next_step.words.startswith("if it was trained on since")
        assert found.next_step.command == f"vera-tools record {recorded}"
        edit(recorded, lambda tensors: tensors[VECTOR].fill(float("nan")))
        assert "record" not in one(recorded).next_step.command  # trained on, and broken

    def test_github_and_the_page_say_the_sentence_too(self, recorded, tmp_path):
        times(recorded)
        words = one(recorded).next_step.words
        assert f"next: {words}: vera-tools record" in run_cli("verify", recorded, "--format", "github").stdout
        run_cli("verify", recorded, "--report", tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text("utf-8")
        assert page.index(f"next: {words}") < page.index("vera-tools record")


class TestRecording:
    def test_what_is_not_as_recorded_is_said(self, recorded):
        times(recorded, VECTOR)
        set_config(recorded, fan_in_fan_out=True)
        message = rf"not what was recorded before: 1 of 10 tensors \({VECTOR}\) and fan_in_fan_out in adapter_config"
        with pytest.warns(VeraToolsWarning, match=message):
            report = vera_tools.record(recorded)
        assert (report.exit_code, len(report.warned)) == (0, 1)
        assert vera_tools.record(recorded).warned == ()

    def test_in_json_and_on_stderr(self, recorded):
        times(recorded)
        code, document = run_json("record", recorded)
        assert (code, len(document["warnings"])) == (0, 1)
        assert "8 of 10 tensors" in document["warnings"][0]
        assert re.search(r"and 5 more\)", document["warnings"][0])
        times(recorded)
        assert "warning: " in run_cli("record", recorded).stderr

    def test_failing_checks_are_named(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda tensors: tensors.pop(VECTOR))
        with pytest.warns(VeraToolsWarning, match=r"it fails tensors\.layers \(missing: "):
            vera_tools.record(folder)

    def test_values_that_are_not_finite_are_named(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda tensors: tensors[VECTOR].__setitem__(0, float("nan")))
        with pytest.warns(VeraToolsWarning, match=r"it fails tensors\.finite \(NaN or infinity in "):
            vera_tools.record(folder)

    def test_a_manifest_that_said_nothing_is_told(self, recorded):
        (recorded / MANIFEST).write_text("{}")
        with pytest.warns(VeraToolsWarning, match="nothing tells what changed since"):
            vera_tools.record(recorded)


class TestShapes:
    def test_an_edited_r_is_asked_for(self, checkpoint):
        folder = checkpoint(KEPT)
        set_config(folder, r=4)
        report = one(folder)
        assert message_of(report, "tensors.shapes") == "r is 4, and every vera_lambda_d has 16 elements: was r edited?"
        assert report.next_step.words.startswith("set r back in adapter_config.json")

    def test_a_pair_of_another_adapter_is_another_matter(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda tensors: tensors.update({name: tensors[name].repeat(2, n) for n, name in enumerate(PAIR)}))
        report = one(folder)
        assert "was r edited?" not in message_of(report, "tensors.shapes")
        assert report.next_step.words.startswith("save it again, alone in its model")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("registry", "vera-tools verify -R registry"),
        ("base", "vera-tools verify ADAPTER --base base"),
        ("/dev/null", "vera-tools verify ADAPTER"),
    ],
)
def test_what_is_no_adapter_is_told_what_to_name(tmp_path, monkeypatch, name, command):
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "registry" / "one")
    shutil.copytree(CHECKPOINTS / f"{KEPT}-base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    result = run_cli("verify", name)
    assert (result.returncode, f"            {command}" in result.stdout.splitlines()) == (4, True)


def test_every_form_counts_in_the_same_way(tmp_path, monkeypatch):
    for name, source in (("good", KEPT), ("nan", KEPT), ("seeds", SEED_ONLY), ("cut", KEPT)):
        shutil.copytree(CHECKPOINTS / source, tmp_path / "r" / name)
    edit(tmp_path / "r" / "nan", lambda tensors: tensors[VECTOR].fill(float("nan")))
    (tmp_path / "r" / "cut" / WEIGHTS).write_bytes(b"")
    (tmp_path / "r" / "lora").mkdir()
    (tmp_path / "r" / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary")
    counts = "2 FAILED a check; verdicts: 2 reproducible, 1 unproven, 1 invalid; 1 skipped"
    human = run_cli("verify", "-R", "r", "--report", "page.html").stdout
    assert human.splitlines()[-1] == f"4 checkpoints: {counts}"
    run_cli("verify", "-R", "r", "--format", "github")
    assert f"\n4 checkpoints: {counts}\n" in (tmp_path / "summary").read_text()
    assert counts in (tmp_path / "page.html").read_text("utf-8")
    summary = json.loads(run_cli("verify", "-R", "r", "--json").stdout)["summary"]
    assert {name: count for name, count in summary.items() if count} == {
        "failed_checks": 2,
        "reproducible": 2,
        "unproven": 1,
        "invalid": 1,
        "skipped": 1,
    }
    assert run_cli("verify", "-", input="gone\n").stdout.splitlines()[-1] == "1 checkpoint: 1 NOT VERIFIED"
    listed = run_cli("verify", "r/good", "-", input="gone\n").stdout.splitlines()
    assert listed[-1] == "2 checkpoints: 1 NOT VERIFIED; verdicts: 1 reproducible"
