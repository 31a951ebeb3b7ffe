"""What `verify` takes from standard input, and what it says where it is given nothing to work on."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.adapters import CHECKPOINTS, KEPT
from tests.command import VERA_TOOLS, run_cli, run_json, run_process
from vera_tools import parts
from vera_tools.errors import UsageError


@pytest.mark.parametrize("name", ["#weird", " lead", "trail ", "#", "\ttab"])
def test_a_line_is_a_path_as_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    code, document = run_json("verify", "-", input=f"\n{name}\n\n{name}2\n")
    assert code == 4
    assert [entry["path"] for entry in document["checkpoints"]] == [name]
    assert [entry["path"] for entry in document["failed"]] == [f"{name}2"]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such names")
def test_a_path_that_is_no_utf8_is_read_logged_and_taken_up_again(tmp_path):
    name = os.fsdecode(b"k\xff")
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    command = [*VERA_TOOLS, "verify", "-", "--log", "log", "--report", "page.html", "--junit", "report.xml"]
    listed = os.fsencode(name) + b"\n" + os.fsencode(CHECKPOINTS / KEPT) + b"\n"
    for taken in ("", "; 2 taken from the log"):
        result = subprocess.run(command, cwd=tmp_path, input=listed, capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.decode() == f"2 checkpoints: 2 reproducible{taken}\n"
    result = run_cli("summarize", "log", "--json", cwd=tmp_path)
    assert (result.returncode, "k\\udcff" in result.stdout) == (0, True)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")
def test_no_standard_input_and_no_folder_are_said(tmp_path):
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *VERA_TOOLS, "verify", "-"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, "standard input is closed" in result.stderr) == (2, True)
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    command = ["sh", "-c", script, "sh", *VERA_TOOLS, "verify", str(CHECKPOINTS / KEPT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, "the current folder cannot be used" in result.stderr) == (2, True)
    assert run_process("--version", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("text", ["1/999999999999999999999", "1/100001", "1/99999999999999999999", "0/2", "٣/٤"])
def test_no_part_of_a_number_that_nobody_means(text):
    with pytest.raises(UsageError):
        parts.parse(text)
    assert run_cli("verify", "-R", CHECKPOINTS / KEPT, "--part", text).returncode == 2


def test_a_verdict_may_be_written_as_it_is_printed():
    assert run_cli("verify", "-q", CHECKPOINTS / KEPT, "--require", "REPRODUCIBLE").returncode == 0
    assert run_json("verify", CHECKPOINTS / KEPT, "--require", "Assumed")[0] == 0


def test_a_move_without_a_start_is_told_in_the_options_names():
    result = run_cli("verify", CHECKPOINTS / KEPT, "--against-loads", "peft")
    assert result.returncode == 2
    assert "--against-loads goes with one --require-loads, to move from (found 0 of them)" in result.stderr


@pytest.mark.parametrize(("log", "hint"), [((), True), (("--log", "log"), False)])
def test_an_interrupt_tells_how_to_go_on(tmp_path, monkeypatch, log, hint):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vera_tools.verifying.registry.work.verify_one", interrupted)
    result = run_cli("verify", "-R", CHECKPOINTS / KEPT, CHECKPOINTS / KEPT, "--part", "1/1", "--jobs", "1", *log)
    assert result.returncode == 130
    assert ("with --log FILE, a later run goes on" in result.stderr) == hint
