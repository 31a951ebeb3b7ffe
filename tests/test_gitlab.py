"""gitlab-ci.yml, a job for GitLab: its scripts, run by a shell as a runner does it."""

from __future__ import annotations

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

SPEC, JOBS = yaml.safe_load_all((ROOT / "gitlab-ci.yml").read_text("utf-8"))
INPUTS = SPEC["spec"]["inputs"]
((_, JOB),) = JOBS.items()
EXPRESSION = re.compile(r"\$\[\[ inputs\.([a-z-]+) \]\]")

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")


def run_script(part, inputs, where, shell="sh"):
    """One of the job's scripts: all of its lines in one shell, which the first that fails ends."""
    values = {name: given.get("default", "") for name, given in INPUTS.items()} | inputs
    variables = {
        name: EXPRESSION.sub(lambda found: values[found[1]], variable["value"])
        for name, variable in JOB["variables"].items()
    }
    environment = {**os.environ, **variables, "TMPDIR": str(where)}
    command = [shell, "-ec", "\n".join(JOB[part])]
    return subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def here(tmp_path):
    """The environment's vera-tools, where `before_script` would have put it."""
    install_below(tmp_path)
    return tmp_path


def test_nothing_that_is_given_becomes_part_of_a_script():
    for part in ("before_script", "script"):
        assert not EXPRESSION.search("\n".join(JOB[part]))
    for name, variable in JOB["variables"].items():
        assert EXPRESSION.fullmatch(variable["value"]), name
        assert variable["expand"] is False  # or GitLab would put other variables into it, secrets too
        assert not name.startswith("VERA_TOOLS_")  # which are settings
    used = set(EXPRESSION.findall((ROOT / "gitlab-ci.yml").read_text("utf-8")))
    assert used == set(INPUTS)


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_a_registry_is_verified_and_reported(here, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    inputs = {"checkpoints": f"{CHECKPOINTS / KEPT}\n{CHECKPOINTS / SEED_ONLY}\n"}
    result = run_script("script", inputs, here, shell)
    assert result.returncode == 3, result.stderr
    report = JOB["artifacts"]["reports"]["junit"]
    assert JOB["artifacts"]["when"] == "always"
    assert ElementTree.parse(here / report).getroot().get("failures") == "1"


@pytest.mark.parametrize(("inputs", "code"), [
    ({"base": str(base_of(KEPT)), "require-loads": "vera-tools\npeft>=0.21\n"}, 0),
    ({"require-loads": "vera-tools\npeft<0.21:bfloat16"}, 1),
    ({"base": str(base_of("peft-0.21.2-gpt2-conv1d-kept"))}, 1),
    ({"require-recorded": "true"}, 1),
    ({"checkpoints": "nowhere"}, 4),
    ({"checkpoints": '$(touch injected) `touch injected` "; touch injected; "'}, 4),
    ({"require-loads": "$(touch injected) `touch injected`"}, 2),
])  # fmt: skip
def test_what_is_given_reaches_verify_as_it_is(here, inputs, code):
    result = run_script("script", {"checkpoints": str(CHECKPOINTS / KEPT), **inputs}, here)
    assert result.returncode == code, result.stdout + result.stderr
    assert not (here / "injected").exists()


@pytest.mark.slow
def test_the_package_is_installed(tmp_path):
    result = run_script("before_script", {"package": str(ROOT)}, tmp_path)
    assert result.returncode == 0, result.stderr
    result = run_script("script", {"checkpoints": str(CHECKPOINTS / KEPT)}, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
