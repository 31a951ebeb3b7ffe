"""action.yml, a composite action for GitHub: its shell steps, run as GitHub runs them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of

ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
INSTALL, VERIFY = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{ inputs\.([a-z-]+) \}\}")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run_step(step, inputs, where, path=()):
    """A step's script, with the inputs in its environment, and the exit code, output, summary and path it leaves."""
    values = {name: given.get("default", "") for name, given in ACTION["inputs"].items()} | inputs
    files = {name: where / name for name in ("GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("", "utf-8")
    environment = {
        **os.environ,
        **{name: str(file) for name, file in files.items()},
        **{name: EXPRESSION.sub(lambda found: values[found[1]], text) for name, text in step["env"].items()},
        "RUNNER_TEMP": str(where),
        "PATH": os.pathsep.join([*path, os.environ["PATH"]]),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    result = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    return result, {name: file.read_text("utf-8") for name, file in files.items()}


def test_nothing_that_is_given_becomes_part_of_a_script():
    """An expression in a script would be put there as text: what is given goes through the environment."""
    for step in ACTION["runs"]["steps"]:
        assert "${{" not in step["run"]
        assert all(EXPRESSION.fullmatch(value) for value in step["env"].values())
    used = {
        name for step in ACTION["runs"]["steps"] for value in step["env"].values() for name in EXPRESSION.findall(value)
    }
    assert used == set(ACTION["inputs"])


@pytest.fixture
def here(tmp_path):
    """The environment's vera-tools, as the first step would have put it on the path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "vera-tools").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_tools "$@"\n', "utf-8")
    (folder / "vera-tools").chmod(0o755)
    return str(folder)


def test_a_registry_is_annotated_and_summed_up(tmp_path, here):
    inputs = {"checkpoints": f"{CHECKPOINTS / KEPT}\n\n{CHECKPOINTS / SEED_ONLY}\n", "junit": "report.xml"}
    result, files = run_step(VERIFY, inputs, tmp_path, [here])
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("::warning title=UNPROVEN::")
    assert "2 checkpoints: 1 reproducible, 1 unproven" in files["GITHUB_STEP_SUMMARY"]
    assert ElementTree.parse(tmp_path / "report.xml").getroot().get("failures") == "1"
    result, _ = run_step(VERIFY, {**inputs, "require": "unproven"}, tmp_path, [here])
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(("inputs", "code"), [
    ({"base": str(base_of(CHECKPOINTS / KEPT)), "require-loads": "vera-tools\npeft>=0.21\n"}, 0),
    ({"require-loads": "peft<0.21:bfloat16"}, 1),
    ({"checkpoints": "nowhere"}, 4),
    ({"checkpoints": '$(touch injected) `touch injected` "; touch injected; "'}, 4),
])  # fmt: skip
def test_what_is_given_reaches_verify_as_it_is(tmp_path, here, inputs, code):
    result, _ = run_step(VERIFY, {"checkpoints": str(CHECKPOINTS / KEPT), **inputs}, tmp_path, [here])
    assert result.returncode == code, result.stdout + result.stderr
    assert not (tmp_path / "injected").exists()


@pytest.mark.slow
def test_the_first_step_installs_the_package(tmp_path):
    result, files = run_step(INSTALL, {"package": str(ROOT)}, tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = files["GITHUB_PATH"].split("\n")[:-1]
    result, _ = run_step(VERIFY, {"checkpoints": str(CHECKPOINTS / KEPT)}, tmp_path, [folder])
    assert result.returncode == 0, result.stderr
    assert Path(folder).is_relative_to(tmp_path)
