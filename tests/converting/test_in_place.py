"""Conversions in place, whole registries, and what a kill, a full disk or an old system leaves behind."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters import BERT, CHECKPOINTS, CONFIG, KEPT, SEED_ONLY, WEIGHTS, base_of, config_of, files_of, flip
from tests.command import run_cli, run_json, run_process
from vera_tools import embed_projections, strip_projections, to_lora, verify
from vera_tools.converting.batch import convert_all
from vera_tools.errors import CheckFailedError, LoadingWarning, SignatureWarning, UsageError, VeraToolsError
from vera_tools.files import atomic, renaming
from vera_tools.projections.pair import PairShape

resource = pytest.importorskip("resource", reason="signals, limits and terminals of POSIX")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders in one step is Linux's"),
    pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning"),
]


def test_there_and_back(checkpoint):
    source = checkpoint(KEPT)
    (source / "runs").mkdir()
    (source / "runs" / "events").write_text("events")
    (source / WEIGHTS).chmod(0o604)
    source.chmod(0o750)
    before = files_of(source)
    report = strip_projections(source, in_place=True)
    assert (report.output, report.in_place) == (str(source), True)
    assert config_of(source)["save_projection"] is False
    assert verify(source).exit_code == 0
    assert embed_projections(source, in_place=True).byte_exact
    after = files_of(source)
    del after["vera_manifest.json"]
    assert after == before
    assert stat.S_IMODE((source / WEIGHTS).stat().st_mode) == 0o604
    assert stat.S_IMODE(source.stat().st_mode) == 0o750
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_to_lora_in_place(checkpoint):
    source = checkpoint(KEPT)
    to_lora(source, in_place=True, base=base_of(KEPT))
    assert config_of(source)["peft_type"] == "LORA"
    assert (source / "expected_logits.json").exists()


def test_a_refusal_changes_nothing(checkpoint):
    source = checkpoint(KEPT)
    flip(source / WEIGHTS, -1)
    before = files_of(source)
    with pytest.raises(CheckFailedError):
        strip_projections(source, in_place=True)
    assert files_of(source) == before
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_where_the_system_cannot_exchange_it_refuses(checkpoint, monkeypatch):
    source = checkpoint(KEPT)
    before = files_of(source)
    monkeypatch.setattr(renaming, "_function", lambda: None)
    with pytest.raises(UsageError, match=r"cannot replace a folder in one step; write to another folder with -o"):
        strip_projections(source, in_place=True)
    assert files_of(source) == before
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_a_signature_is_named_and_stays(checkpoint):
    source = checkpoint(KEPT)
    (source / "model.sig").write_text("{}")
    with pytest.warns(SignatureWarning, match=r"these no longer hold: model\.sig"):
        strip_projections(source, in_place=True)
    assert (source / "model.sig").exists()
    result = run_cli("embed-projections", source, "--in-place")
    assert result.returncode == 0
    assert "warning: " in result.stderr
    assert "model.sig" in result.stderr


def test_a_file_of_another_name_is_not_converted_in_place(checkpoint):
    source = checkpoint(KEPT)
    (source / WEIGHTS).rename(source / "other.safetensors")
    with pytest.raises(UsageError, match="only a whole checkpoint is converted in place"):
        strip_projections(source / "other.safetensors", in_place=True)


@pytest.fixture
def registry(tmp_path):
    """Checkpoints at several depths, one of another kind, one that is broken, one without projections."""
    root = tmp_path / "registry"
    shutil.copytree(CHECKPOINTS / KEPT, root / "team" / "one")
    shutil.copytree(CHECKPOINTS / "peft-0.20.0-llama-bf16-kept", root / "two")
    shutil.copytree(CHECKPOINTS / BERT, root / "two" / "second")
    shutil.copytree(CHECKPOINTS / SEED_ONLY, root / "seed")
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    shutil.copytree(CHECKPOINTS / KEPT, root / "broken")
    (root / "broken" / WEIGHTS).write_bytes((root / "broken" / WEIGHTS).read_bytes()[:-4])
    return root


def statuses(document):
    return {Path(item["path"]).name: item["status"] for item in document["checkpoints"]}


def test_a_whole_registry(registry, tmp_path):
    out = tmp_path / "out"
    code, document = run_json("strip-projections", "-R", registry, "--out-dir", out)
    assert code == 4  # the broken one's, and the rest is done all the same
    assert statuses(document) == {
        "broken": "failed",
        "lora": "skipped",
        "seed": "unchanged",
        "one": "converted",
        "two": "converted",
        "second": "converted",
    }
    counts = {"converted": 3, "damaged": 0, "up_to_date": 0, "unchanged": 1, "skipped": 1, "failed": 1}
    assert document["summary"] == counts
    for path in ("team/one", "two", "two/second"):
        assert verify(out / path).exit_code == 0
    shutil.rmtree(registry / "broken")
    code, document = run_json("embed-projections", "-R", out, "--out-dir", tmp_path / "back")
    assert code == 0
    for path in ("team/one", "two", "two/second"):
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / "back" / path / name).read_bytes() == (registry / path / name).read_bytes()


def test_an_interrupted_run_is_taken_up_again(registry, tmp_path):
    shutil.rmtree(registry / "broken")
    out = tmp_path / "out"
    done = []

    def convert(source, output):
        if len(done) == 2:
            raise KeyboardInterrupt
        report = strip_projections(source, output)
        done.append(source.name)
        return report

    with pytest.raises(KeyboardInterrupt):
        convert_all(registry, out, convert, command="strip-projections")
    inodes = {path: path.stat().st_ino for path in out.rglob("*.safetensors")}
    assert len(inodes) == 2
    code, document = run_json("strip-projections", "-R", registry, "--out-dir", out)
    assert code == 0
    assert (document["summary"]["up_to_date"], document["summary"]["converted"]) == (2, 1)
    assert all(path.stat().st_ino == inode for path, inode in inodes.items())
    code, document = run_json("strip-projections", "-R", registry, "--out-dir", out)
    assert document["summary"]["up_to_date"] == 3


def test_a_changed_source_is_not_taken_for_done(registry, tmp_path):
    shutil.rmtree(registry / "broken")
    run_json("strip-projections", "-R", registry, "--out-dir", tmp_path / "out")
    now = (tmp_path / "out" / "two" / "vera_manifest.json").stat().st_mtime
    os.utime(registry / "two" / WEIGHTS, (now + 10, now + 10))
    code, document = run_json("strip-projections", "-R", registry, "--out-dir", tmp_path / "out")
    assert code == 2
    assert statuses(document)["two"] == "failed"
    code, document = run_json("strip-projections", "-R", registry, "--out-dir", tmp_path / "out", "--overwrite")
    assert code == 0
    assert document["summary"]["converted"] == 3


def test_a_registry_in_place(registry):
    shutil.rmtree(registry / "broken")
    result = run_cli("strip-projections", "-R", registry, "--in-place")
    assert result.returncode == 0
    assert "5 checkpoints: 3 converted, 1 unchanged, 1 skipped" in result.stdout
    assert verify(registry / "two" / "second").exit_code == 0


def test_outputs_below_the_root_are_not_inputs(registry):
    shutil.rmtree(registry / "broken")
    for _ in range(2):
        _, document = run_json("strip-projections", "-R", registry, "--out-dir", registry / "stripped")
        assert len(document["checkpoints"]) == 5


def test_options_that_contradict_each_other(registry, tmp_path):
    for options in (["-R"], ["-R", "-o", "x"], ["--out-dir", "x"], ["-R", "--out-dir", "x", "--in-place"]):
        result = run_cli("strip-projections", registry, *options, cwd=tmp_path)
        assert result.returncode == 2, options
        assert len(result.stderr.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    assert run_cli("strip-projections", "empty", "-R", "--out-dir", "x", cwd=tmp_path).returncode == 4
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("scene", ["in-place", "overwrite"])
def test_killed_at_any_moment_the_old_state_or_the_new_is_there(scene):
    """Twenty real SIGKILLs; `python tests/converting/kill_loop.py` sends hundreds."""
    command = [sys.executable, str(Path(__file__).parent / "kill_loop.py"), "--rounds", "20", "--scene", scene]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert f"{scene}: 20 kills, never a mixture" in result.stdout


@pytest.fixture
def large(tmp_path):
    """A checkpoint whose pair takes 512 kB, stripped: converting it to anything fills a small disk."""
    source = tmp_path / "large"
    shutil.copytree(CHECKPOINTS / SEED_ONLY, source)
    shape = PairShape(r=16, in_max=8000 - 64, out_max=64)
    assert 4 * shape.elements == 512_000
    return source, shape.in_max


def assert_refused_and_untouched(result, folder, before):
    assert result.returncode == 1
    assert re.fullmatch(
        r"error: .*: could not be written: (No space left on device|File too large); nothing was left half-written\n",
        "".join(line for line in result.stderr.splitlines(keepends=True) if not line.startswith("warning")),
    )
    assert files_of(folder) == before


def test_a_full_disk_leaves_nothing_half_written(small_disk, large):
    source, width = large
    with small_disk("300k") as disk:
        result = run_cli("embed-projections", source, "--in-features", width, "-o", disk / "out")
        assert_refused_and_untouched(result, disk, {})


def test_a_full_disk_leaves_the_old_state_in_place(small_disk, large):
    source, width = large
    with small_disk("300k") as disk:
        there = shutil.copytree(source, disk / "ckpt")
        before = files_of(disk)
        result = run_cli("embed-projections", there, "--in-features", width, "--in-place")
        assert_refused_and_untouched(result, disk, before)


def test_a_limit_on_file_sizes_does_the_same(tmp_path, large):
    source, width = large
    before = files_of(tmp_path)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    for options in (["-o", tmp_path / "out"], ["--in-place"]):
        result = run_process("embed-projections", source, "--in-features", width, *options, preexec_fn=limit)
        assert_refused_and_untouched(result, tmp_path, before)


def test_what_only_root_could_do_is_one_clear_line(checkpoint, tmp_path, monkeypatch):
    """A file system that refuses is an error of ours, whatever it says."""
    source = checkpoint(KEPT)

    def refuse(a, b):
        raise PermissionError(1, "Operation not permitted", str(b))

    monkeypatch.setattr(atomic, "exchange", refuse)
    with pytest.raises(VeraToolsError, match="could not be written: Operation not permitted"):
        strip_projections(source, in_place=True)


def test_warnings_name_the_checkpoint_under_recursion(registry, tmp_path):
    shutil.rmtree(registry / "broken")
    with pytest.warns(LoadingWarning, match="two: trained on a bfloat16 base"):
        convert_all(registry, tmp_path / "out", strip_projections, command="strip-projections")


@pytest.mark.parametrize("options", [[], ["-q"], ["--json"]], ids=str)
def test_each_failure_is_one_line_on_stderr(registry, tmp_path, options):
    shutil.copytree(registry / "broken", registry / "team" / "broken")
    result = run_cli("strip-projections", "-R", registry, "--out-dir", tmp_path / "out", *options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 4
    assert len(lines) == 2
    for line, folder in zip(lines, (registry / "broken", registry / "team" / "broken"), strict=True):
        assert line.startswith(f"error: {folder}: {WEIGHTS}: ")
