"""Every kind of hostile file, put to every command that reads it: a documented exit code, and why."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit_json
from tests.command import run_cli
from tests.hostile import BAD, BASES, HARMLESS, ODD
from vera_tools.architectures import witness
from vera_tools.cli import COMMANDS
from vera_tools.drifting import comparison
from vera_tools.errors import FormatError
from vera_tools.platforms import atlas
from vera_tools.verifying import log

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")

#: Commands that read an adapter; {in}, {good}, {base} and {out} stand for folders.
ON_ADAPTERS = (
    "verify {in}",
    "verify {in} --base {base} --format junit",
    "inspect {in} -v",
    "strip-projections {in} -o {out}/s --force",
    "embed-projections {in} -o {out}/e",
    "convert {in} --to lora -o {out}/l --base {base}",
    "convert {in} --from auto -o {out}/c",
    "diff {in} {good}",
    "diff {good} {in} --base {base}",
    "merge {in} --base {base} -o {out}/m",
    "regenerate --checkpoint {in}",
    "record {in}",
)
ON_BASES = (
    "verify {in} --base {base}",
    "embed-projections {in} -o {out}/e --base {base}",
    "convert {in} --to lora -o {out}/l --base {base}",
    "diff {in} {good} --base {base}",
    "merge {in} --base {base} -o {out}/m --dtype bfloat16",
    "merge {in} --base {base} -o {out}/n --max-shard-size 10KB",
    "record {in} --base {base}",
)


def put_to(commands, adapter, base, tmp_path, monkeypatch):
    """Run the commands, each with --json too where it says nothing of a format."""
    monkeypatch.setattr(witness, "is_there", lambda: False)  # a process of seconds, and not what is asked here
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    for line in commands:
        for name, content in before.items():
            (adapter / name).write_bytes(content)
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        places = {"{in}": adapter, "{good}": CHECKPOINTS / KEPT, "{base}": base, "{out}": out}
        arguments = line
        for name, place in places.items():
            arguments = arguments.replace(name, str(place))
        result = run_cli(*arguments.split(), *([] if "--format" in line else ["--json"]))
        assert result.returncode in (0, 1, 2, 3, 4), (line, result.stderr)
        assert "internal error" not in result.stderr + result.stdout, (line, result.stderr)
        assert "cannot be worked on" not in result.stdout, (line, result.stdout)
        assert len(result.stderr) < 10_000, line
        if "--format" not in line:
            assert json.loads(result.stdout)["schema"].startswith("vera-tools/")


@pytest.mark.long
@pytest.mark.parametrize("change", (BAD | ODD | HARMLESS).values(), ids=BAD | ODD | HARMLESS)
def test_an_adapter(change, tmp_path, monkeypatch):
    adapter = Path(shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "in"))
    change(adapter)
    put_to(ON_ADAPTERS, adapter, base_of(KEPT), tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("change", BASES.values(), ids=BASES)
def test_a_base(change, tmp_path, monkeypatch):
    base = Path(shutil.copytree(base_of(KEPT), tmp_path / "base"))
    change(base)
    adapter = Path(shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "in"))
    put_to(ON_BASES, adapter, base, tmp_path, monkeypatch)


def test_every_command_that_reads_a_checkpoint_is_asked():
    asked = {line.split()[0] for line in ON_ADAPTERS}
    # env and summarize read none, drift and the Hub's commands verify what they read.
    assert asked | {"env", "summarize", "drift", "push", "pull"} == set(COMMANDS)


LINE = {
    "schema": "vera-tools/verify-line/v1",
    "tool": {"name": "vera-tools", "version": "0"},
    "path": "hf://a/b",
    "commit": "0" * 40,
    "status": "failed",
    **dict.fromkeys(("kind", "checkpoint", "error", "base")),
}
LINES = {
    "null": None,
    "a list": [],
    "verified, and nothing more": {**LINE, "status": "verified"},
    "skipped, and no kind": {**LINE, "status": "skipped"},
    "failed, and no error": LINE,
    "a further member": {**LINE, "status": "skipped", "kind": "LORA", "more": 1},
    "a member less": {key: value for key, value in LINE.items() if key != "base"},
    "a number for a path": {**LINE, "status": "skipped", "kind": "LORA", "path": 5},
    "a checkpoint that is none": {**LINE, "status": "verified", "checkpoint": {"path": "x"}},
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_of_a_log(line, tmp_path):
    path = tmp_path / "log"
    path.write_text(json.dumps(line) + "\n")
    result = run_cli("verify", CHECKPOINTS / KEPT, "--log", path)
    assert result.returncode == 4, result.stderr
    assert f"{path}: line 1" in result.stderr
    assert "internal error" not in result.stderr
    assert path.read_text().count("\n") == 1


def test_a_line_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "_LONGEST_LINE", 1000)
    (tmp_path / "log").write_text("x" * 2000 + "\n")
    result = run_cli("verify", CHECKPOINTS / KEPT, "--log", tmp_path / "log")
    assert result.returncode == 4
    assert "line 1: too long for a line of a log (expected at most 1000 bytes)" in result.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_or_a_device_is_no_log_and_no_report(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, kind in ((pipe, "a named pipe"), (Path("/dev/zero"), "a device")):
        result = run_cli("verify", CHECKPOINTS / KEPT, "--log", path)
        assert (result.returncode, f"{path}: this is {kind}, not a file" in result.stderr) == (2, True)
        with pytest.raises(FormatError, match=f"this is {kind}"):
            comparison.load(path)


def sound_report() -> dict:
    """The shortest report of the atlas."""
    return min(atlas._documents("fixtures/atlas").values(), key=lambda document: len(json.dumps(document)))


REPORTS = {
    "fewer digests than pairs": lambda d: [rows.pop() for e in d["environments"] for rows in e["digests"].values()],
    "more digests than pairs": lambda d: [
        rows.append(rows[0]) for e in d["environments"] for rows in e["digests"].values()
    ],
    "fewer pairs than digests": lambda d: d["pairs"].pop(),
    "no pair": lambda d: d.update(pairs=[]),
    "null for digests": lambda d: d["environments"][0].update(digests=None),
    "a recipe that is none": lambda d: d["environments"][0]["streams"].update(float32={"name": "x"}),
    "a further member": lambda d: d["environments"][0].update(more=1),
}


@pytest.mark.parametrize("change", REPORTS.values(), ids=REPORTS)
def test_a_saved_report_of_drift(change, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(sound_report()))
    comparison.load(path)
    edit_json(path, change)
    with pytest.raises(FormatError, match=r"report\.json"):
        comparison.load(path)
