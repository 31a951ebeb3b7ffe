"""The hook for pre-commit: one checkpoint once, and what the real pre-commit makes of .pre-commit-hooks.yaml."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import vera_tools
from tests import ROOT
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, MANIFEST, PICKLE, SEED_ONLY, WEIGHTS, edit
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
    assert HOOK["always_run"]  # pre-commit names no file that a commit deletes
    assert HOOK["id"] == pre_commit.HOOK
    assert HOOK["require_serial"]  # else pre-commit would hand the files of one checkpoint to several processes


@pytest.mark.parametrize(("names", "code", "words"), [
    ([KEPT], 0, "REPRODUCIBLE"),
    ([KEPT, SEED_ONLY], 3, "UNPROVEN"),
    ([], 0, ""),
])  # fmt: skip
def test_it_ends_as_verify_does(repository, capsys, names, code, words):
    files = [str(CHECKPOINTS / name / file) for name in names for file in pre_commit.FILES[:2]]
    assert repository.hook(*files) == code
    assert capsys.readouterr().out.count(words) == (1 if words else 1 - len(names))


class Repository:
    """Somebody's repository, with git itself, and the hook as pre-commit calls it in there."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._patch = folder, monkeypatch
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("GIT_", "PRE_COMMIT"))]:
            monkeypatch.delenv(name)
        self.git("init", "-q")

    def git(self, *arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True).stdout

    def commit(self):
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "a change")

    def hook(self, *given):
        """The exit code where pre-commit hands over these files and options."""
        self._patch.setattr(sys, "argv", ["vera-tools-pre-commit", *given])
        with pytest.raises(SystemExit) as stop:
            pre_commit.main()
        return stop.value.code or 0

    def changed(self):
        """The files that pre-commit hands over, as it asks git for them."""
        names = self.git("diff", "--staged", "--name-only", "--diff-filter=ACMRTUXB").split("\n")
        return [name for name in names if re.search(HOOK["files"], name)]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "theirs"
    folder.mkdir()
    return Repository(folder, monkeypatch)


@pytest.fixture
def adapter(repository):
    """A recorded adapter in there, below a folder with a name that is not plain."""
    folder = repository.folder / "the models" / "[a]"
    shutil.copytree(CHECKPOINTS / KEPT, folder)
    vera_tools.record(folder)
    repository.commit()
    return folder


@pytest.mark.parametrize("how", [("rm", "-q"), ("rm", "-q", "--cached")])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, MANIFEST])
def test_a_file_that_a_commit_takes_from_an_adapter_is_named(repository, adapter, capsys, how, name):
    path = f"the models/[a]/{name}"
    repository.git(*how, "--", f":(literal){path}")
    assert repository.hook(*repository.changed()) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: deleted, and its adapter stays ({CONFIG if name != CONFIG else WEIGHTS}, ")
    command = re.search(r"(git restore .*?) brings it back", said)[1]
    assert ("SKIP=vera-tools-verify" in said) == (name == MANIFEST)
    subprocess.run(command, shell=True, cwd=repository.folder, check=True)
    assert repository.git("status", "--porcelain") == ""
    assert repository.hook() == 0


def test_a_manifest_that_goes_with_a_changed_vector_is_missed(repository, adapter, capsys):
    """The adapter itself verifies: nothing but its manifest tells that a vector changed."""
    (adapter / MANIFEST).unlink()
    edit(adapter, lambda tensors: next(t for name, t in tensors.items() if "lambda" in name).__imul__(80))
    repository.git("add", "-A")
    assert repository.changed() == [f"the models/[a]/{WEIGHTS}"]
    assert repository.hook(*repository.changed()) == 1
    shown = capsys.readouterr()
    assert "REPRODUCIBLE" in shown.out
    assert f"the models/[a]/{MANIFEST}: deleted" in shown.err
    assert repository.hook("--require-recorded", *repository.changed()) == 1
    assert "FAILED manifest.required" in capsys.readouterr().out


def test_a_renamed_config_is_a_lost_one(repository, adapter, capsys):
    repository.git("mv", f"the models/[a]/{CONFIG}", "the models/[a]/adapter_config.JSON")
    assert repository.hook(*repository.changed()) == 1
    assert f"{CONFIG}: deleted" in capsys.readouterr().err


def test_what_is_removed_or_moved_as_a_whole_passes(repository, adapter):
    repository.git("mv", "the models", "elsewhere")
    assert repository.hook(*repository.changed()) == 0
    repository.commit()
    repository.git("rm", "-qr", "elsewhere")
    assert (repository.changed(), repository.hook()) == ([], 0)


def test_weights_in_their_other_form_are_no_loss(repository, adapter):
    (adapter / PICKLE).write_bytes(b"a pickle")
    repository.commit()
    (adapter / PICKLE).unlink()
    repository.git("add", "-A")
    assert repository.hook() == 0


def test_other_kinds_may_lose_what_they_like(repository, adapter):
    config = adapter / CONFIG
    config.write_text('{"peft_type": "LORA"}')
    (adapter / WEIGHTS).write_bytes(b"")
    repository.commit()
    (adapter / MANIFEST).unlink()
    repository.git("add", "-A")
    assert repository.hook() == 0
    repository.commit()
    config.unlink()
    repository.git("add", "-A")
    assert repository.hook() == 0


def test_between_two_commits_their_difference_counts(repository, adapter, monkeypatch):
    (adapter / MANIFEST).unlink()
    repository.commit()
    assert repository.hook() == 0  # nothing is staged
    monkeypatch.setenv("PRE_COMMIT_FROM_REF", "HEAD~1")
    monkeypatch.setenv("PRE_COMMIT_TO_REF", "HEAD")
    assert repository.hook() == 1


def test_where_git_says_nothing_nothing_passes(repository, capsys):
    shutil.rmtree(repository.folder / ".git")
    assert repository.hook() == 2
    assert "git cannot be asked what is deleted; not a git repository" in capsys.readouterr().err.replace("fatal: ", "")


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
    subprocess.run([*git, "commit", "-q", "-m", "both"], check=True)
    subprocess.run([*git, "rm", "-q", f"{KEPT}/{CONFIG}"], check=True)
    command.remove("--all-files")
    result = subprocess.run(command, cwd=theirs, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{KEPT}/{CONFIG}: deleted, and its adapter stays ({WEIGHTS})" in result.stdout
