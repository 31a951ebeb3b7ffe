"""One adapter that nobody thought of, among good ones: it is invalid, and the others are verified."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fuzz import targets
from tests import hostile_places
from tests.adapters import CHECKPOINTS, KEPT, WEIGHTS
from tests.command import run_cli, run_json
from tests.hostile import BAD, HARMLESS, ODD, config
from vera_tools.checkpoints import expressions
from vera_tools.checkpoints.presence import find
from vera_tools.verifying.verifier import Verifier


@pytest.fixture
def registry(tmp_path):
    for name in ("a", "z"):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "registry" / name)
    return tmp_path / "registry"


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_one_bad_adapter_leaves_the_others_verified(change, registry):
    change(Path(shutil.copytree(CHECKPOINTS / KEPT, registry / "bad")))
    code, document = run_json("verify", "-R", registry)
    assert code in (1, 4)
    verdicts = {Path(entry["path"]).name: entry["verdict"] for entry in document["checkpoints"]}
    assert verdicts.pop("bad") in ("invalid", "unproven")
    assert verdicts == {"a": "reproducible", "z": "reproducible"}
    shown = run_cli("verify", "-R", registry)
    assert shown.returncode == code
    assert "internal error" not in shown.stdout + shown.stderr
    result = run_cli("strip-projections", "-R", registry, "--out-dir", registry.parent / "out")
    assert "internal error" not in result.stdout + result.stderr
    assert (registry.parent / "out" / "z" / WEIGHTS).exists()


#: What an adapter among many is, which makes it no good.
NO_GOOD = BAD | ODD | hostile_places.BAD


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """One of each kind of what may lie in an adapter's place, one of each odd name, and one of another kind."""
    root = tmp_path_factory.mktemp("many") / "registry" / "places"
    root.mkdir(parents=True)
    for number, change in enumerate((hostile_places.BAD | hostile_places.OTHERS).values()):
        change(Path(shutil.copytree(CHECKPOINTS / KEPT, root / f"{number:04}")))
    for name in hostile_places.NAMES:
        shutil.copytree(CHECKPOINTS / KEPT, root / os.fsdecode(name))
    return root


@pytest.fixture(scope="module")
def a_thousand(places):
    """Those, one of each kind that no command can do anything with, and sound ones."""
    root = places.parent
    for number, change in enumerate((BAD | ODD).values()):
        change(Path(shutil.copytree(CHECKPOINTS / KEPT, root / f"{number:04}")))
    deep = root.joinpath(*["d"] * 300)  # and one whose path is long
    deep.parent.mkdir(parents=True)
    shutil.copytree(CHECKPOINTS / KEPT, deep)
    (root / "around").symlink_to(root)
    for number in range(1000 - len(NO_GOOD) - len(hostile_places.NAMES) - 1):
        folder = root / f"sound {number}"
        folder.mkdir()
        for name, content in targets.adapter().items():
            (folder / name).write_bytes(content)
    return root


only_posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such files and names")


@only_posix
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
def test_one_of_each_kind_among_a_thousand(a_thousand, tmp_path):
    junit, page, log = (tmp_path / name for name in ("junit.xml", "page.html", "log"))
    code, document = run_json(
        "verify", "-R", a_thousand, "--jobs", "2", "--junit", junit, "--report", page, "--log", log
    )
    assert code == 4
    assert (len(document["checkpoints"]), len(document["skipped"]), document["failed"]) == (1000, 1, [])
    sound = [entry for entry in document["checkpoints"] if entry["verdict"] == "reproducible" and entry["ok"]]
    assert len(sound) == 1000 - len(NO_GOOD)
    said = [check["message"] for entry in document["checkpoints"] for check in entry["checks"]]
    assert not [message for message in said if "cannot be worked on" in message]
    assert not list(a_thousand.rglob("exploded"))
    suites = ElementTree.parse(junit).getroot().findall("testsuite")
    assert sum(suite.get("failures") != "0" for suite in suites) == len(NO_GOOD)
    assert "<script>alert" not in page.read_text("utf-8")
    lines = [json.loads(line)["status"] for line in log.read_text("utf-8").splitlines()]
    assert sorted(lines) == ["skipped"] + ["verified"] * 1000


@only_posix
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
def test_every_form_says_the_same_of_all_kinds_of_places(places, jobs):
    kinds, names = len(hostile_places.BAD), len(hostile_places.NAMES)
    command = ("verify", "-R", places, "--jobs", jobs)
    result = run_cli(*command)
    assert (result.returncode, result.stderr) == (4, "")
    assert result.stdout.splitlines()[-1].startswith(f"{kinds + names} checkpoints: {kinds} FAILED a check; verdicts: ")
    assert not re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", result.stdout)
    result = run_cli(*command, "--format", "jsonl")
    assert result.returncode == 4
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(line["status"] for line in lines) == ["skipped"] + ["verified"] * (kinds + names)
    result = run_cli(*command, "--format", "github")
    assert (result.returncode, len(result.stdout.splitlines())) == (4, kinds)
    result = run_cli(*command, "--failed-only")
    assert (result.returncode, len(result.stdout.splitlines())) == (4, kinds)
    result = run_cli(*command, "--format", "junit")
    suites = ElementTree.fromstring(result.stdout).findall("testsuite")
    assert (result.returncode, sum(suite.get("failures") != "0" for suite in suites)) == (4, kinds)


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_peft_takes_is_verified_like_the_others(change, registry):
    change(Path(shutil.copytree(CHECKPOINTS / KEPT, registry / "odd")))
    code, document = run_json("verify", "-R", registry)
    assert (code, document["summary"]["reproducible"]) == (0, 3)
    assert run_json("record", registry / "odd")[0] == 0
    assert run_json("verify", registry / "odd")[0] == 0


@pytest.mark.parametrize(
    "error", [RecursionError("deep"), OverflowError(), MemoryError(), UnicodeError("half"), KeyError("x"), OSError(24)]
)
def test_whatever_escapes_is_that_ones_own(error, registry, monkeypatch):
    shutil.copytree(CHECKPOINTS / KEPT, registry / "bad")
    verify = Verifier._verify

    def fail(self, path, checkpoint):
        if Path(path).name == "bad":
            raise error
        return verify(self, path, checkpoint)

    monkeypatch.setattr(Verifier, "_verify", fail)
    code, document = run_json("verify", "-R", registry)
    assert (code, document["summary"]["reproducible"], document["summary"]["invalid"]) == (4, 2, 1)
    (bad,) = (entry for entry in document["checkpoints"] if entry["verdict"] == "invalid")
    assert f"cannot be worked on: {type(error).__name__}" in bad["checks"][0]["message"]
    monkeypatch.setenv("VERA_TOOLS_DEBUG", "1")
    with pytest.raises(type(error)):
        run_cli("verify", "-R", registry)


def test_an_interrupt_that_became_another_error_is_nobodys_own(registry, monkeypatch):
    """Not a verdict on the adapter that was at hand just then."""

    def fail(self, path, checkpoint):
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(Verifier, "_verify", fail)
    assert run_cli("verify", "-R", registry).returncode == 130


def test_folders_nested_a_thousand_deep(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            inside = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = inside
    finally:
        os.close(here)
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "z")
    try:
        assert [path.name for path in find(tmp_path)] == ["z"]
    finally:  # from above, because what removes folders gives up on them too
        while (tmp_path / "d" / "d").exists():
            (tmp_path / "d" / "d").rename(tmp_path / "next")
            (tmp_path / "d").rmdir()
            (tmp_path / "next").rename(tmp_path / "d")


def test_an_expression_takes_one_process_for_all_layers(registry, monkeypatch):
    """Repeats of groups are evaluated outside, because they may never end."""
    runs = []
    run = expressions.subprocess.run
    monkeypatch.setattr(expressions.subprocess, "run", lambda *a, **k: runs.append(k["input"]) or run(*a, **k))
    config(target_modules=r"(model\.|layers\.|\d+\.|self_attn\.)+(q|v)_proj")(registry / "a")
    assert run_json("verify", registry / "a")[0] == 0
    assert len(runs) == 1
    config(target_modules=r"(.*)*(.*)*(.*)*x")(registry / "a")
    code, document = run_json("verify", "-R", registry)
    assert (code, document["summary"]["reproducible"]) == (4, 1)
