"""docs/scale.md: its scripts are those in examples/scale, and each does what one `verify` of everything does."""

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
from tests.command import run_json

SCRIPTS = ROOT / "examples" / "scale"
posix = pytest.mark.skipif(os.name != "posix", reason="these are shell scripts")


def test_the_page_shows_the_files():
    page = (ROOT / "docs" / "scale.md").read_text("utf-8")
    blocks = re.findall(r"^```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    for script in SCRIPTS.iterdir():
        assert script.read_text("utf-8") in blocks, script.name
        assert f"examples/scale/{script.name}" in page


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("scale") / "my registry"
    for n in range(5):
        shutil.copytree(CHECKPOINTS / (KEPT if n % 2 else SEED_ONLY), root / f"{n}")
    (root / "3" / "adapter_model.safetensors").write_bytes(b"")
    return root


@pytest.fixture
def run(root, tmp_path):
    """Runs a script with these variables, and gives its exit code."""

    command_here = tmp_path / "bin" / "vera-tools"
    command_here.parent.mkdir()
    command_here.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_tools "$@"\n')
    command_here.chmod(0o755)

    def ran(*command, **variables):
        path = f"{command_here.parent}:{os.environ['PATH']}"
        python = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        places = {"REGISTRY": str(root), "LOGS": str(tmp_path / "the logs")}
        environment = {**os.environ, **python, "PATH": path, **places, **variables}
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)

    return ran


def together(tmp_path, root):
    """The report of all logs, which is that of one `verify`."""
    found = run_json("summarize", *sorted((tmp_path / "the logs").glob("*.jsonl")))
    assert found == run_json("verify", "-R", root, "--jobs", "1")
    return found


@posix
@pytest.mark.long
def test_slurm(root, run, tmp_path):
    summarize = ("bash", SCRIPTS / "summarize.slurm")
    slurm = {"PARTS": "2", "SLURM_CPUS_PER_TASK": "1"}
    # As with --array=1, by which a single task is submitted again.
    run("bash", SCRIPTS / "verify.slurm", **slurm, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_MAX="1")
    early = run(*summarize)
    assert (early.returncode, "part 2/2 was never begun" in early.stderr) == (4, True)
    run("bash", SCRIPTS / "verify.slurm", **slurm, SLURM_ARRAY_TASK_ID="2")
    assert together(tmp_path, root)[0] == run(*summarize).returncode == 4
    assert (tmp_path / "the logs" / "registry.html").exists()
    # what sbatch reads
    script = (SCRIPTS / "verify.slurm").read_text()
    directives = dict(re.findall(r"^#SBATCH --(\w+[\w-]*)=(.*)", script, re.MULTILINE))
    assert {"array", "cpus-per-task"} <= directives.keys()
    assert f"PARTS=${{PARTS:-{directives['array'].removeprefix('1-')}}}" in script


@posix
@pytest.mark.long
def test_kubernetes(root, run, tmp_path):
    job = yaml.safe_load((SCRIPTS / "verify.yaml").read_text())
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (spec["completionMode"], str(spec["completions"])) == ("Indexed", variables["PARTS"])
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {variables["REGISTRY"], variables["LOGS"]} == mounted
    (tmp_path / "the logs").mkdir()
    command = (*container["command"], *container["args"])
    for index in range(2):
        assert run(*command, PARTS="2", JOB_COMPLETION_INDEX=f"{index}").returncode == 0
    assert together(tmp_path, root)[0] == 4
    assert run(*command, PARTS="2", JOB_COMPLETION_INDEX="2").returncode == 2  # no such part


@posix
@pytest.mark.long
def test_xargs(root, run, tmp_path):
    done = run("bash", SCRIPTS / "verify-xargs.sh", PARTS="3", HANDS="2")
    assert done.returncode == together(tmp_path, root)[0] == 4
    assert "5 checkpoints: 1 FAILED a check" in done.stdout


@pytest.mark.slow
def test_dask(root, run, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        done = run(sys.executable, SCRIPTS / "verify_dask.py", cluster.scheduler_address, str(root))
    assert (done.returncode, "exit code 4" in done.stdout) == (4, True), done.stderr


@pytest.mark.slow
def test_ray(root, run, tmp_path):
    pytest.importorskip("ray")
    done = run(sys.executable, SCRIPTS / "verify_ray.py", str(root), RAY_USAGE_STATS_ENABLED="0", RAY_ADDRESS="local")
    assert (done.returncode, "exit code 4" in done.stdout) == (4, True), done.stderr
    shutil.copy(tmp_path / "registry.jsonl", tmp_path / "log")
    assert run_json("summarize", tmp_path / "log") == run_json("verify", "-R", root, "--jobs", "1")
