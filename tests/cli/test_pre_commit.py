"""The hook for pre-commit: one checkpoint once, and what the real pre-commit makes of .pre-commit-hooks.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY
from vera_tools.cli import pre_commit

(HOOK,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))


def test_two_files_of_a_checkpoint_are_one():
    given = ["--base", "b", "a/adapter_config.json", "c/d/adapter_model.safetensors", "a/adapter_model.safetensors"]
    assert pre_commit.arguments(given) == ["verify", "--recursive", "--base", "b", "--", "a", "c/d"]
    assert pre_commit.arguments(["adapter_config.json"]) == ["verify", "--recursive", "--", "."]


def test_the_hook_is_called_with_all_files_of_an_adapter_and_no_others():
    for name in pre_commit.FILES:
        assert re.search(HOOK["files"], name)
        assert re.search(HOOK["files"], f"deep/er/{name}")
        assert not re.search(HOOK["files"], f"my_{name}")
    assert not re.search(HOOK["files"], "config.json")
    assert f'{HOOK["entry"]} = "vera_tools.cli.pre_commit:main"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert HOOK["require_serial"]  # else pre-commit would hand the files of one checkpoint to several processes


@pytest.mark.parametrize(("names", "code", "words"), [
    ([KEPT], 0, "REPRODUCIBLE"),
    ([KEPT, SEED_ONLY], 3, "UNPROVEN"),
    ([], 0, ""),
])  # fmt: skip
def test_it_ends_as_verify_does(monkeypatch, capsys, names, code, words):
    files = [str(CHECKPOINTS / name / file) for name in names for file in pre_commit.FILES[:2]]
    monkeypatch.setattr(sys, "argv", ["vera-tools-pre-commit", *files])
    with pytest.raises(SystemExit) as stop:
        pre_commit.main()
    assert stop.value.code == code
    assert capsys.readouterr().out.count(words) == (1 if words else 1 - len(names))


@pytest.mark.slow
def test_the_real_pre_commit_runs_it(tmp_path):
    """It installs this repository as it is committed, and hands over the files of a repository of somebody's."""
    pytest.importorskip("pre_commit")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: pre-commit installs what is committed")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    git = ["git", "-C", str(theirs), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    command = [sys.executable, "-m", "pre_commit", "try-repo", str(ROOT), HOOK["id"], "--all-files", "--verbose"]
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "home")}
    for name, outcome, words in ((KEPT, "Passed", "REPRODUCIBLE"), (SEED_ONLY, "Failed", "UNPROVEN")):
        shutil.copytree(CHECKPOINTS / name, theirs / name)
        subprocess.run([*git, "add", "-A"], check=True)
        result = subprocess.run(command, cwd=theirs, env=environment, capture_output=True, text=True, check=False)
        assert (result.returncode == 0) == (outcome == "Passed"), result.stdout + result.stderr
        assert re.search(rf"verify VeRA adapters\.+{outcome}", result.stdout)
        assert words in result.stdout
