"""A log that tells of files on disk: what is as it was is taken from it, what changed is verified again."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of
from tests.command import run_cli
from vera_tools import schema
from vera_tools._version import TOOL
from vera_tools.verifying.verifier import Verifier


@pytest.fixture
def root(tmp_path):
    for n in range(3):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "r" / f"{n}")
    (tmp_path / "r" / "other").mkdir()
    (tmp_path / "r" / "other" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return tmp_path / "r"


@pytest.fixture
def verified(monkeypatch):
    """The names of those that were really looked at."""
    found = []
    verify = Verifier.verify

    def noted(self, path, **options):
        found.append(os.path.basename(path))
        return verify(self, path, **options)

    monkeypatch.setattr(Verifier, "verify", noted)
    return found


def test_what_did_not_change_is_taken_from_the_log(root, tmp_path, verified):
    log = tmp_path / "log"
    first = vera_tools.verify(root, recursive=True, log=log)
    assert verified == ["0", "1", "2", "other"]
    lines = log.read_text().splitlines()
    for line in lines:
        schema.validate(json.loads(line), "verify-line.v1", where="line")
        assert "loads" not in (json.loads(line)["checkpoint"] or {})
        assert len(line) < 6000
    verified.clear()
    again = vera_tools.verify(root, recursive=True, log=log)
    assert (again, again.from_log, verified) == (first, 4, [])
    assert len(log.read_text().splitlines()) == 4
    assert "; 4 taken from the log" in run_cli("verify", "-R", root, "--log", log).stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""),
        lambda folder: (folder / "adapter_config.json").touch(),
        lambda folder: (folder / "vera_manifest.json").write_text("{}"),
        lambda folder: (folder / "adapter_config.json").unlink(),
    ],
)
def test_what_changed_is_verified_again(root, tmp_path, verified, change):
    log = tmp_path / "log"
    vera_tools.verify(root / "0", root / "1", log=log)
    verified.clear()
    change(root / "1")
    report = vera_tools.verify(root / "0", root / "1", log=log)
    assert (verified, report.from_log) == (["1"], 1)
    fresh = vera_tools.verify(root / "0", root / "1")
    assert report == fresh
    assert vera_tools.summarize(log) == fresh


def test_other_content_under_the_old_size_and_time_is_verified_again(root, tmp_path):
    log = tmp_path / "log"
    assert vera_tools.verify(root / "0", log=log).exit_code == 0
    path = root / "0" / "adapter_model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert vera_tools.verify(root / "0", log=log) == vera_tools.verify(root / "0")


def test_what_changes_while_it_is_verified_is_not_taken(root, tmp_path, verified, monkeypatch):
    log, verify = tmp_path / "log", Verifier.verify

    def changing(self, path, **options):
        outcome = verify(self, path, **options)
        os.utime(os.path.join(path, "adapter_config.json"), ns=(1, 1))
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(Verifier, "verify", changing)
        vera_tools.verify(root / "0", log=log)
    assert json.loads(log.read_text())["files"] is None
    assert vera_tools.verify(root / "0", log=log).from_log == 0


def test_other_conditions_are_another_question(root, tmp_path, verified):
    log, base = tmp_path / "log", shutil.copytree(base_of(KEPT), tmp_path / "base")

    def taken(*paths, **options):
        return vera_tools.verify(*paths, log=log, **options).from_log

    assert [taken(root / "0"), taken(root / "0")] == [0, 1]
    assert [taken(root / "0", base=base), taken(root / "0", base=base)] == [0, 1]
    os.utime(base / "config.json", ns=(1, 1))
    assert [taken(root / "0", base=base), taken(root / "0", base=base)] == [0, 1]
    assert [taken(root / "0", allow_pickle=True), taken(root / "0", allow_pickle=True)] == [0, 1]
    # a search skips what is invalid where it was named
    assert vera_tools.verify(root, recursive=True, log=log).skipped
    report = vera_tools.verify(root / "other", log=log)
    assert (report.from_log, report.exit_code) == (0, 4)
    assert vera_tools.verify(root, recursive=True, log=log).skipped
    # nor is what another version found what this one would find
    log.write_text(log.read_text().replace(TOOL["version"], "0.0.1"))
    assert taken(root, recursive=True) == 0


def test_a_state_that_comes_back_is_not_taken_for_the_newest(root, tmp_path):
    log = tmp_path / "log"
    vera_tools.verify(root / "0", log=log)
    line = log.read_text()
    (root / "0" / "adapter_model.safetensors").write_bytes(b"")
    vera_tools.verify(root / "0", log=log)
    assert vera_tools.verify(root / "0", log=log).from_log == 1
    log.write_text(log.read_text() + line)
    assert vera_tools.verify(root / "0", log=log).exit_code == 4


def test_a_single_file_is_known_by_its_name(tmp_path):
    folder, log = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "a"), tmp_path / "log"
    path = (folder / "adapter_model.safetensors").rename(folder / "step-5.safetensors")
    assert [vera_tools.verify(path, log=log).from_log for _ in range(2)] == [0, 1]
    path.write_bytes(b"")
    report = vera_tools.verify(path, log=log)
    assert (report.from_log, report.exit_code) == (0, 4)
