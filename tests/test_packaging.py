"""What a release consists of: the wheel, the source archive, the image, and the workflow that publishes them.

Building needs the extra `release`, and the image's steps a package index: both are `slow`.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest
import yaml

from tests import ROOT
from vera_tools._version import __version__

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
RELEASE = yaml.load((ROOT / ".github/workflows/release.yml").read_text("utf-8"), Loader=yaml.BaseLoader)
DATA = ("schemas", "fixtures/atlas", "fixtures/architectures")  # what the package reads, beside its own code
GIT = ROOT / ".git"  # an unpacked source archive has none


def run(*command, cwd, **env):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def tracked(*folders):
    """The files that a release is made of: what git has, or, in an unpacked archive, what lies there."""
    if GIT.exists():
        listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders, cwd=ROOT).split()
        return {path for path in listed if (ROOT / path).is_file()}
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in found if path.is_file()}


def instructions(text):
    """(keyword, rest) of each line of a Dockerfile; none of ours is continued."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


STEPS = instructions(DOCKERFILE)
BUILD = STEPS[: next(n for n, step in enumerate(STEPS) if n and step[0] == "FROM")]
IMAGE = STEPS[len(BUILD) :]


def sent(path):
    """Whether .dockerignore lets a file through to the engine: the last line that fits it or a folder above counts."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!")
            above = [str(parent) for parent in PurePosixPath(path).parents if str(parent) != "."]
            if any(fnmatch(one, pattern) or fnmatch(f"/{one}", pattern) for one in (path, *above)):
                kept = line.startswith("!")
    return kept


def test_the_image_is_slim_and_runs_as_nobody():
    assert [rest.split()[0] for keyword, rest in STEPS if keyword == "FROM"] == ["python:3.13-slim"] * 2
    assert [rest for keyword, rest in IMAGE if keyword == "USER"] == ["65532:65532"]
    assert ("ENTRYPOINT", '["vera-tools"]') in IMAGE
    assert "RUN" not in {keyword for keyword, _ in IMAGE}  # what was needed to build stays in the first stage
    assert "torch" not in " ".join(rest for keyword, rest in STEPS if keyword == "RUN")


def test_all_that_the_image_copies_is_there_and_sent():
    copied = [source for keyword, rest in BUILD if keyword == "COPY" for source in rest.split()[:-1]]
    for source in copied:
        files = {source} if (ROOT / source).is_file() else tracked(source)
        assert files
        assert {file for file in files if not sent(file)} == set(), source
    assert set(DATA) | {"vera_tools"} <= set(copied)
    assert not sent("tests/test_packaging.py")
    assert not sent("fixtures/checkpoints/x/adapter_model.safetensors")
    assert not sent("vera_tools/cli/__pycache__/verify.pyc")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_steps_of_the_image(tmp_path):
    """They are run as the engine would, but for the paths: below a folder of our own, on this Python."""
    source, home = tmp_path / "src", tmp_path / "opt/vera-tools"
    source.mkdir()
    for keyword, rest in BUILD:
        if keyword == "COPY":
            *names, target = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    for file in tracked(name):
                        place = source / target / PurePosixPath(file).relative_to(name)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(ROOT / file, place)
                else:
                    shutil.copy(ROOT / name, source / target)
        elif keyword == "RUN":
            command = re.sub("^python ", lambda _: f"{shlex.quote(sys.executable)} ", rest)
            command = command.replace("/opt/vera-tools", shlex.quote(str(home)))
            run("bash", "-euc", command, cwd=source, PYTHONPATH="")
        else:
            assert keyword in ("FROM", "WORKDIR")
    shutil.rmtree(source)  # the second stage has none of it
    python, checkpoints = home / "bin/python", ROOT / "fixtures/checkpoints"
    command = [home / "bin/vera-tools", "verify", "--json", checkpoints / "peft-0.21.2-llama-f32-kept"]
    assert '"verdict": "reproducible"' in run(*command, cwd=tmp_path, PYTHONPATH="", HOME="/nonexistent")
    found = "import importlib.util as u; print([n for n in ('numpy', 'torch', 'pip', 'pytest') if u.find_spec(n)])"
    assert run(python, "-c", found, cwd=tmp_path, PYTHONPATH="") == "['numpy']\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive, as RELEASE.md has them made."""
    pytest.importorskip("build", reason="needs the extra release")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "-o", folder, ".", cwd=ROOT, PIP_CONSTRAINT="constraints.txt")
    wheel, archive = folder / f"vera_tools-{__version__}-py3-none-any.whl", folder / f"vera_tools-{__version__}.tar.gz"
    assert set(folder.iterdir()) == {wheel, archive}
    return wheel, archive


@pytest.mark.slow
def test_twine_and_check_wheel_contents_find_nothing(built):
    pytest.importorskip("twine", reason="needs the extra release")
    run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=ROOT)
    run(sys.executable, "-m", "check_wheel_contents", built[0], cwd=ROOT)


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        metadata = wheel.read(f"vera_tools-{__version__}.dist-info/METADATA").decode("utf-8")
        scripts = wheel.read(f"vera_tools-{__version__}.dist-info/entry_points.txt").decode("utf-8")
    data = {f"vera_tools/{path}" for path in tracked(*DATA) if path.endswith(".json")}
    assert names == tracked("vera_tools") | data
    assert "vera_tools/py.typed" in names
    assert f"\nVersion: {__version__}\n" in metadata
    for line in ("vera-tools = vera_tools.__main__:main", "vera-tools = vera_tools.testing.plugin"):
        assert line in scripts


@pytest.mark.slow
def test_the_source_archive_runs_its_tests(built, tmp_path):
    """All of them are found there, and those run that read files of the project."""
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (top,) = tmp_path.iterdir()
    everything = tracked(".")
    there = {path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file()}
    assert everything - there == set()
    assert there - everything == {"PKG-INFO"}
    pytest_there = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run(*pytest_there, "--collect-only", "tests", cwd=top, PYTHONPATH=str(top))
    files = [f"tests/test_{name}.py" for name in ("workflow", "action", "architecture", "packaging")]
    out = run(*pytest_there, "-rs", *files, "tests/cli/test_pre_commit.py", cwd=top, PYTHONPATH=str(top))
    assert re.search(r"\b\d{3,} passed", out), out


@pytest.mark.skipif(not GIT.exists(), reason="an unpacked archive says nothing of what it lacks")
def test_the_source_archive_takes_all_that_lies_at_the_top():
    include = re.search(r"^include = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert include is not None
    patterns = re.findall(r'"/(.+)"', include[1])
    taken_anyway = {".gitignore", "pyproject.toml", "PKG-INFO"}
    names = {PurePosixPath(path).parts[0] for path in tracked(".")} - taken_anyway
    assert {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)} == set()


def test_a_release_is_built_and_checked_before_it_is_published():
    assert RELEASE["on"] == {"push": {"tags": ["v*"]}}
    build, publish = RELEASE["jobs"]["build"], RELEASE["jobs"]["publish"]
    script = "\n".join(step.get("run", "") for step in build["steps"])
    for command in ("python -m build", "twine check --strict", "check-wheel-contents", "vera-tools verify"):
        assert command in script
    assert publish["needs"] == "build"
    assert all("run" not in step for step in publish["steps"])  # nothing of the project runs with the right to publish


def test_only_the_publishing_job_can_prove_who_it_is_and_nobody_has_a_token():
    assert RELEASE["permissions"] == {"contents": "read"}
    assert "permissions" not in RELEASE["jobs"]["build"]
    publish = RELEASE["jobs"]["publish"]
    assert publish["permissions"] == {"attestations": "write", "id-token": "write"}
    assert publish["environment"] == "pypi"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text("utf-8")


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("tag", "code"), [(f"v{__version__}", 0), (__version__, 1), (f"v{__version__}.1", 1)])
def test_the_tag_has_to_be_the_version(tag, code):
    (script,) = [step["run"] for step in RELEASE["jobs"]["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", "")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "GITHUB_REF_NAME": tag, "PATH": path}
    assert subprocess.run(["bash", "-euc", script], cwd=ROOT, env=environment, check=False).returncode == code


@pytest.mark.slow
def test_zizmor_finds_nothing_in_the_workflows():
    zizmor = Path(sys.executable).parent / "zizmor"
    if not zizmor.exists():
        pytest.skip("needs the extra release")
    run(zizmor, "--offline", "--no-progress", "--persona", "pedantic", ".github/workflows", cwd=ROOT)
