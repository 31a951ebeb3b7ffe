"""action.yml, a composite action for GitHub: its shell steps, run as GitHub runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
import yaml

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of
from tests.command import install_below
from vera_tools import schema

ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
INSTALL, VERIFY = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{ inputs\.([a-z-]+) \}\}")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run_step(step, inputs, where):
    """A step's script, with the inputs in its environment, and the exit code, output and summary it leaves."""
    values = {name: given.get("default", "") for name, given in ACTION["inputs"].items()} | inputs
    summary = where / "summary"
    summary.write_text("", "utf-8")
    environment = {
        **os.environ,
        "GITHUB_STEP_SUMMARY": str(summary),
        **{name: EXPRESSION.sub(lambda found: values[found[1]], text) for name, text in step["env"].items()},
        "RUNNER_TEMP": str(where),
    }
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    result = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    return result, summary.read_text("utf-8")


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
    """The environment's vera-tools, where the first step would have put it."""
    install_below(tmp_path)


def test_a_registry_is_annotated_and_summed_up(tmp_path, here):
    checkpoints = f"{CHECKPOINTS / KEPT}\n\n{CHECKPOINTS / SEED_ONLY}\n"
    inputs = {"checkpoints": checkpoints, "junit": "report.xml", "attest": "statement.json"}
    result, summary = run_step(VERIFY, inputs, tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("::warning title=UNPROVEN::")
    assert "2 checkpoints: 1 reproducible, 1 unproven" in summary
    assert ElementTree.parse(tmp_path / "report.xml").getroot().get("failures") == "1"
    assert not (tmp_path / "statement.json").exists()
    result, _ = run_step(VERIFY, {**inputs, "require": "unproven"}, tmp_path)
    assert (result.returncode, result.stdout) == (0, "")
    schema.validate(json.loads((tmp_path / "statement.json").read_text("utf-8")), "attestation.v1", where="statement")


@pytest.mark.parametrize(("inputs", "code"), [
    ({"base": str(base_of(CHECKPOINTS / KEPT)), "require-loads": "vera-tools\npeft>=0.21\n"}, 0),
    ({"require-loads": "peft<0.21:bfloat16"}, 1),
    ({"base": str(base_of("peft-0.21.2-gpt2-conv1d-kept"))}, 1),
    ({"require-recorded": "true"}, 1),
    ({"require-recorded": "yes"}, 2),
    ({"checkpoints": "nowhere"}, 4),
    ({"checkpoints": '$(touch injected) `touch injected` "; touch injected; "'}, 4),
])  # fmt: skip
def test_what_is_given_reaches_verify_as_it_is(tmp_path, here, inputs, code):
    result, _ = run_step(VERIFY, {"checkpoints": str(CHECKPOINTS / KEPT), **inputs}, tmp_path)
    assert result.returncode == code, result.stdout + result.stderr
    assert not (tmp_path / "injected").exists()


@pytest.mark.slow
def test_the_first_step_installs_the_package(tmp_path):
    result, _ = run_step(INSTALL, {"package": str(ROOT)}, tmp_path)
    assert result.returncode == 0, result.stderr
    result, _ = run_step(VERIFY, {"checkpoints": str(CHECKPOINTS / KEPT)}, tmp_path)
    assert result.returncode == 0, result.stderr
