"""What all commands have in common: help, --json also for errors, exit codes, one error boundary, quiet and colour."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import click
import pytest

import vera_tools
from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT
from tests.command import run_cli, run_json, run_process
from vera_tools import schema
from vera_tools._version import __version__
from vera_tools.cli import COMMANDS, cli

SOURCE = CHECKPOINTS / KEPT


def commands():
    context = click.Context(cli)
    return {name: cli.get_command(context, name) for name in COMMANDS}


def test_version_and_help():
    assert run_cli("--version").stdout.split()[-1] == __version__
    assert run_cli("-h").stdout == run_cli("--help").stdout
    assert all(name in run_cli("-h").stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = commands()[name]
    assert command.name == name
    assert command.help
    options = [p for p in command.params if isinstance(p, click.Option)]
    assert not [option.name for option in options if not option.help]
    assert {"as_json", "quiet", "verbose"} <= {option.name for option in options}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_and_has_a_schema(name):
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"vera-tools {name}" in path.read_text() for path in documents)
    report = {"summarize": "verify"}.get(name, name)
    assert schema.load(f"{report}.v1")["properties"]["schema"] == {"const": f"vera-tools/{report}/v1"}


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_option_is_usage(name):
    code, document = run_json(name, "--no-such-option")
    assert code == 2
    assert document["error"]["type"] == "UsageError"
    assert f"{name} --help" in document["error"]["hint"]


def test_errors_are_one_line_on_stderr_and_one_document_on_stdout(tmp_path):
    result = run_cli("inspect", tmp_path / "nothing")
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: .*nothing: no such file or folder\n", result.stderr)
    result = run_cli("inspect", tmp_path / "nothing", "--json")
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


def test_traceback_only_on_request(tmp_path):
    result = run_process("inspect", tmp_path / "nothing", env={"VERA_TOOLS_DEBUG": "1"})
    assert "Traceback" in result.stderr


def test_internal_errors_are_one_line_too(monkeypatch, capsys):
    from vera_tools.cli import main

    def broken(*args, **kwargs):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(vera_tools, "inspect", broken)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(SOURCE)])
    assert stop.value.code == 1
    assert "internal error: ZeroDivisionError: a bug" in capsys.readouterr().err


def test_quiet_says_nothing():
    result = run_cli("verify", SOURCE, "-q")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_colour_only_where_asked_for():
    assert "\x1b[" not in run_cli("verify", SOURCE).stdout
    coloured = run_cli("verify", SOURCE, env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout
    assert "\x1b[" in coloured
    plain = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in plain.splitlines()] == run_cli("verify", SOURCE).stdout.splitlines()


def test_broken_pipe_is_silent():
    command = [sys.executable, "-m", "vera_tools", "verify", *[str(SOURCE)] * 3, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""


def test_start_is_light():
    """Version, the help of all commands, errors and completion need none of the heavy libraries.

    Completed are the commands, and of each its options, and a path where it takes one.
    """
    script = """
import contextlib, os, sys
import click
theirs = set(sys.modules)  # in Python 3.10 with subprocess
from vera_tools.cli import COMMANDS, main
for arguments in [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS), ["verify", "--no-such"]]:
    with contextlib.suppress(SystemExit):
        main(arguments)
for words in ["", *(f"{name} {typed}" for name in COMMANDS for typed in ("--d", "--base my-", "my-"))]:
    count = str(max(1, len(words.split())))
    os.environ |= {"_VERA_TOOLS_COMPLETE": "bash_complete", "COMP_WORDS": f"vera-tools {words}", "COMP_CWORD": count}
    with contextlib.suppress(SystemExit):
        main([])
heavy = {"torch", "numpy", "rich", "jsonschema", "huggingface_hub", "safetensors", "importlib.metadata"}
heavy |= {"concurrent.futures", "ctypes", "logging", "subprocess", "tempfile"}  # some milliseconds each
print(sorted(heavy & set(sys.modules) - theirs), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Usage: vera-tools push" in result.stdout
    assert "plain,--device" in result.stdout
    assert "plain,summarize" in result.stdout
    assert result.stdout.count("file,my-") > len(COMMANDS)
    assert result.stderr.splitlines()[-1] == "[]"


def test_nothing_is_searched_for_garbage_at_the_end():
    script = f"""
import atexit, gc, sys
from vera_tools.__main__ import main
sys.argv[1:] = ["verify", {str(SOURCE)!r}]
atexit.register(lambda: print(len(gc.get_objects())))
main()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) < 1000


def test_module_and_script_are_the_same():
    script = os.path.join(os.path.dirname(sys.executable), "vera-tools")
    assert subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout == (
        run_process("--version").stdout
    )


def test_a_full_disk_behind_stdout_is_one_line():
    for arguments in (
        ["verify", str(SOURCE)],
        ["verify", str(SOURCE), "--json"],
        ["inspect", "/nothing", "--json"],
        ["-h"],
    ):
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "vera_tools", *arguments]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert result.returncode == 1
        lines = result.stderr.splitlines()
        assert lines[-1] == "error: the output could not be written: No space left on device"
        assert len(lines) == (2 if "/nothing" in arguments else 1)


@pytest.mark.long
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize(
    "name",
    ["\u00fcmlaut \u4e00".encode(), b"b\xff\xfe d", b"esc\x1b[31mred", "bidi\u202eknil\nx: REPRODUCIBLE".encode()],
)
def test_any_path_is_shown_on_any_terminal_and_written_as_json(tmp_path, name, encoding):
    folder = shutil.copytree(SOURCE, tmp_path / os.fsdecode(name))
    env = {"PYTHONIOENCODING": encoding}
    for arguments in (["verify"], ["verify", "-v"], ["inspect"]):
        shown = run_bytes(*arguments, folder, env=env).decode(encoding)
        assert all(line.isprintable() for line in shown.splitlines())
        assert "\nx: REPRODUCIBLE" not in shown
    document = json.loads(run_bytes("verify", folder, "--json", env=env).decode(encoding))
    assert document["checkpoints"][0]["path"] == str(folder)
    shown = run_bytes("inspect", folder / "gone", env=env).decode(encoding)
    assert shown.startswith("error: ")
    assert shown[:-1].isprintable()


def test_what_looks_like_markup_is_text(tmp_path):
    folder = shutil.copytree(SOURCE, tmp_path / "[red]run[")
    assert "[red]run[: VeRA" in run_cli("inspect", folder).stdout
    (tmp_path / "[").mkdir()
    shutil.copytree(SOURCE, tmp_path / "[" / "b]")
    assert "[/b]: VeRA" in run_cli("inspect", tmp_path / "[" / "b]").stdout


def run_bytes(*arguments: object, env: dict[str, str]) -> bytes:
    """What a command writes, stderr included."""
    command = [sys.executable, "-m", "vera_tools", *map(str, arguments)]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env}, check=False
    ).stdout
