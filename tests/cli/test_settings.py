"""Defaults from the environment and from pyproject.toml: what wins, what is refused by name, and what says so."""

from __future__ import annotations

import re
import shutil

import click
import pytest

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of
from tests.command import run_cli, run_json
from vera_tools.cli import COMMANDS, cli, settings

LOADS = "peft>=0.21:float32:windows-x86_64"
FAILS = "peft<0.21:bfloat16"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a registry; the folder where commands run is two levels below the file."""
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "kept")
    shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "seeds")
    shutil.copytree(base_of(CHECKPOINTS / KEPT), tmp_path / "base")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    return tmp_path


def write(folder, text):
    (folder / "pyproject.toml").write_text(text, "utf-8")


def commands():
    context = click.Context(cli)
    return {name: cli.get_command(context, name) for name in COMMANDS}


def test_what_can_be_set_are_options_of_the_commands():
    for name, command in commands().items():
        for option in settings.OPTIONS.get(name, ()):
            assert settings.parameter_of(command, option).envvar == settings.variable(name, option)
    assert set(settings.OPTIONS) <= set(COMMANDS)
    assert {option for options in settings.OPTIONS.values() for option in options} == set(settings.KINDS)


def test_nothing_else_is_read_from_the_environment():
    """--help by a variable would end a gate with 0, and --allow-pickle run what lies in a file."""
    assert cli.context_settings.get("auto_envvar_prefix") is None
    for name, command in commands().items():
        known = {settings.variable(name, option) for option in settings.OPTIONS.get(name, ())}
        assert {parameter.envvar for parameter in command.params if parameter.envvar} == known
    dangerous = {
        "allow-pickle",
        "force",
        "overwrite",
        "in-place",
        "output",
        "log",
        "python",
        "part",
        "include",
        "junit",
    }
    assert not dangerous & set(settings.KINDS)


def test_the_line_wins_over_the_environment_and_that_over_the_file(project):
    write(project, f'[tool.vera-tools.verify]\nrequire-loads = ["{FAILS}"]\n')
    assert run_cli("verify", project / "kept").returncode == 1
    environment = {"VERA_TOOLS_VERIFY_REQUIRE_LOADS": f"{LOADS} vera-tools"}
    code, document = run_json("verify", project / "kept", env=environment)
    assert code == 0
    origin = "VERA_TOOLS_VERIFY_REQUIRE_LOADS"
    assert document["defaults"] == [{"option": "--require-loads", "value": [LOADS, "vera-tools"], "from": origin}]
    code, document = run_json("verify", project / "kept", "--require-loads", "vera-tools", env=environment)
    assert "defaults" not in document


def test_what_was_not_given_is_said(project):
    write(project, f'[tool.vera-tools.verify]\nbase = "base"\njobs = 2\nrequire-loads = ["{FAILS}"]\n')
    result = run_cli("verify", project / "kept")
    assert result.returncode == 1
    where = f"{project / 'pyproject.toml'}: [tool.vera-tools.verify]"
    assert result.stderr == f"using --base {project / 'base'}, --jobs 2, --require-loads {FAILS} (from {where})\n"
    result = run_cli("verify", project / "seeds", env={"VERA_TOOLS_VERIFY_REQUIRE": "unproven"})
    assert "using --require unproven (from VERA_TOOLS_VERIFY_REQUIRE)\n" in result.stderr
    assert run_cli("verify", project / "kept", "-q").stderr == ""


def test_a_base_is_relative_to_its_file(project):
    write(project, '[tool.vera-tools.verify]\nbase = "base"\n')
    _, document = run_json("verify", project / "kept")
    assert "base.modules" in {
        check["id"] for check in document["checkpoints"][0]["checks"] if check["status"] == "pass"
    }
    assert settings.default_map({"verify": {"base": "hf://a/b"}}, project / "x")["verify"]["base"] == "hf://a/b"


def test_the_nearest_file_with_the_table_is_read(project):
    write(project, '[tool.vera-tools.merge]\nbase = "../base"\nverify = true\nstrict = true\n')
    write(project / "a", "[tool.other]\nvera-tools = 1\n")
    write(project / "a" / "b", "this is not TOML, and nothing of ours\n")
    found = settings.load(project / "a" / "b")
    assert found == (project / "pyproject.toml", {"merge": {"base": "../base", "verify": True, "strict": True}})
    write(project / "a", "[tool.vera-tools]\n")
    assert settings.load(project / "a" / "b") == (project / "a" / "pyproject.toml", {})


def test_a_file_that_came_with_a_checkpoint_is_not_read(project, monkeypatch):
    """Nor is any other looked for where the checkpoints lie: only from the current folder upwards."""
    write(project / "kept", '[tool.vera-tools.verify]\nbase = "nowhere"\n')
    assert run_cli("verify", project / "kept").returncode == 0
    monkeypatch.chdir(project / "kept")
    result = run_cli("verify", ".")
    assert (result.returncode, result.stderr) == (0, "")


def test_no_file_makes_a_gate_looser(project, monkeypatch):
    monkeypatch.chdir(project)
    for command in ("verify", "summarize"):
        write(project, f'[tool.vera-tools.{command}]\nrequire = "drift"\n')
        result = run_cli("verify", "-R", ".")
        assert result.returncode == 2
        assert f"tool.vera-tools.{command}.require: cannot be set in a file" in result.stderr
        assert f"set VERA_TOOLS_{command.upper()}_REQUIRE" in result.stderr


@pytest.mark.parametrize(("text", "words"), [
    ("verfy = {}", "tool.vera-tools.verfy: no command that has settings"),
    ("verify.jbos = 1", "verify.jbos: cannot be set (expected one of base, jobs, require-loads, require-recorded, "),
    ("verify.allow-pickle = true", "tool.vera-tools.verify.allow-pickle: cannot be set"),
    ("verify.require_loads = []", "tool.vera-tools.verify.require_loads: cannot be set"),
    ("verify.jobs = true", "tool.vera-tools.verify.jobs: wrong type (expected an integer, found True)"),
    ("verify.jobs = '2'", "tool.vera-tools.verify.jobs: wrong type (expected an integer, found '2')"),
    ("merge.strict = 1", "tool.vera-tools.merge.strict: wrong type (expected a boolean, found 1)"),
    ("verify.base = ''", "tool.vera-tools.verify.base: wrong type (expected a string, found '')"),
    ("verify.require-loads = 'peft'", "tool.vera-tools.verify.require-loads: wrong type (expected an array of strings"),
    ("verify = 3", "tool.vera-tools.verify: not a table"),
    ("verify.jobs = 0", "[tool.vera-tools.verify]: Invalid value for '--jobs': 0 is not in the range x>=1"),
    ("verify = {", "pyproject.toml: not TOML: "),
])  # fmt: skip
def test_what_is_wrong_in_a_file_is_refused_by_name(project, text, words):
    write(project, f"[tool.vera-tools]\n{text}\n")
    result = run_cli("verify", project / "kept")
    assert result.returncode == 2
    assert words in result.stderr
    assert str(project / "pyproject.toml") in result.stderr
    assert run_cli("verify", "--help").returncode == 0


def test_a_table_that_is_none_is_refused(project):
    write(project, "[tool]\nvera-tools = 3\n")
    assert "tool.vera-tools: not a table" in run_cli("verify", project / "kept").stderr


@pytest.mark.parametrize(("name", "value", "words"), [
    ("VERA_TOOLS_VERIFY_JOBS", "two", "VERA_TOOLS_VERIFY_JOBS: Invalid value for '--jobs'"),
    ("VERA_TOOLS_VERIFY_REQUIRE", "anything", "VERA_TOOLS_VERIFY_REQUIRE: Invalid value for '--require'"),
    ("VERA_TOOLS_VERIFY_REQUIRE_LOAD", LOADS, "VERA_TOOLS_VERIFY_REQUIRE_LOAD: no setting"),
    ("VERA_TOOLS_VERIFY_HELP", "1", "VERA_TOOLS_VERIFY_HELP: no setting"),
    ("VERA_TOOLS_VERSION", "1", "VERA_TOOLS_VERSION: no setting"),
    ("VERA_TOOLS_VERIFY_ALLOW_PICKLE", "1", "VERA_TOOLS_VERIFY_ALLOW_PICKLE: no setting"),
])  # fmt: skip
def test_what_is_wrong_in_the_environment_is_refused_by_name(project, name, value, words):
    result = run_cli("verify", project / "kept", env={name: value})
    assert result.returncode == 2
    assert words in result.stderr


def test_flags_can_be_set_and_unset(project):
    write(project, "[tool.vera-tools.record]\nstrict = true\n")
    result = run_cli("record", project / "seeds", "--base", project / "base")
    assert result.returncode == 3
    assert "using --strict (from " in result.stderr
    result = run_cli("record", project / "seeds", "--base", project / "base", env={"VERA_TOOLS_RECORD_STRICT": "0"})
    assert result.returncode == 0
    assert "using no --strict (from VERA_TOOLS_RECORD_STRICT)" in result.stderr


def test_what_a_call_has_no_use_for_is_not_said_to_be_used(project):
    """inspect looks at a base for one checkpoint alone."""
    env = {"VERA_TOOLS_INSPECT_BASE": str(project / "base")}
    assert "using --base" in run_cli("inspect", project / "kept", env=env).stderr
    for arguments in (["-R", project / "kept"], [project / "kept", project / "seeds"]):
        assert "using" not in run_cli("inspect", *arguments, env=env).stderr
        assert run_json("inspect", *arguments, env=env)[1].get("defaults", []) == []


def test_a_file_that_cannot_be_read_is_refused(project):
    (project / "pyproject.toml").mkdir()
    assert run_cli("verify", project / "kept").returncode == 2


def test_the_documentation_lists_them_all():
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", text, re.MULTILINE))
    documented = {command: tuple(re.findall(r"`([a-z-]+)`", options)) for command, options in rows.items()}
    assert documented == settings.OPTIONS
