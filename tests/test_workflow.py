"""The workflow for GitHub runs what README promises, on every system and Python that pyproject.toml names.

tests/test_packaging.py has the one that publishes.
"""

from __future__ import annotations

import os
import re

import pytest
import yaml

from tests import ROOT

# YAML 1.1 takes the key "on" for a truth value; as a BaseLoader reads it, everything is text.
WORKFLOW = yaml.load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"), Loader=yaml.BaseLoader)
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PYTHONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
SYSTEMS = ["ubuntu-24.04", "ubuntu-24.04-arm", "macos-15", "windows-2025"]


def steps(job):
    return WORKFLOW["jobs"][job]["steps"]


def test_every_python_that_the_package_names_is_run():
    assert len(PYTHONS) >= 5
    assert f'requires-python = ">={PYTHONS[0]}"' in PROJECT
    matrix = WORKFLOW["jobs"]["dependencies"]["strategy"]["matrix"]
    assert matrix == {"system": SYSTEMS, "python": PYTHONS, "versions": ["lowest", "newest"]}
    minors = re.search(r"for minor in ([\d ]+);", (ROOT / ".ci/lowest").read_text("utf-8"))
    assert minors is not None
    assert [f"3.{minor}" for minor in minors[1].split()] == PYTHONS


def test_every_system_runs_everything():
    assert WORKFLOW["jobs"]["everything"]["strategy"]["matrix"] == {"system": SYSTEMS}
    assert all(WORKFLOW["jobs"][job]["runs-on"] == "${{ matrix.system }}" for job in ("dependencies", "everything"))


def test_the_site_and_the_packages_are_built():
    (script,) = [step["run"] for step in steps("release") if "run" in step]
    assert "-e '.[dev,docs,release]'" in script
    assert script.splitlines()[-1].endswith("pytest -m slow tests/test_site.py tests/test_packaging.py")


def test_it_runs_the_scripts_that_are_run_by_hand():
    conditions = {step["run"]: step["if"] for step in steps("dependencies") if "run" in step}
    assert conditions == {
        ".ci/lowest python": "matrix.versions == 'lowest'",
        ".ci/lowest --newest python": "matrix.versions == 'newest'",
    }
    unix, windows = [step["run"] for step in steps("everything") if "run" in step]
    assert unix == ".ci/run"
    readme = re.search(r"<!-- the test command -->\n```bash\n(.*?)\n```", (ROOT / "README.md").read_text("utf-8"))
    assert readme is not None
    plain = re.sub(r"\.venv/Scripts/python -m ", ".venv/bin/", " && ".join(windows.strip().split("\n")))
    assert plain.replace("python -m venv", "python3 -m venv") == readme[1]


def test_coverage_is_measured_by_the_script():
    (run,) = [step["run"] for step in steps("coverage") if "run" in step]
    assert ".ci/coverage" in run
    assert os.access(ROOT / ".ci/coverage", os.X_OK)


@pytest.mark.parametrize("job", WORKFLOW["jobs"])
def test_it_has_no_rights(job):
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in WORKFLOW["jobs"][job]


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / ".github/workflows").iterdir()))
def test_actions_cannot_change_and_say_their_version(name):
    uses = re.findall(r"uses: *(.*)", (ROOT / ".github/workflows" / name).read_text("utf-8"))
    assert len(uses) >= 4
    assert all(re.fullmatch(r"(actions|pypa)/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in uses)
