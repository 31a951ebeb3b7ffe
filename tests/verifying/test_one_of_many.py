"""One adapter that nobody thought of, among good ones: it is invalid, and the others are verified."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fuzz import targets
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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
def test_one_of_each_kind_among_a_thousand(tmp_path):
    root = tmp_path / "registry"
    kinds = BAD | ODD
    for number in range(1000):
        folder = root / f"{number:04}"
        folder.mkdir(parents=True)
        for name, content in targets.adapter().items():
            (folder / name).write_bytes(content)
    for number, change in enumerate(kinds.values()):
        folder = root / f"{number * 7:04}"
        shutil.rmtree(folder)
        change(Path(shutil.copytree(CHECKPOINTS / KEPT, folder)))
    code, document = run_json("verify", "-R", root)
    assert code in (1, 4)
    assert len(document["checkpoints"]) == 1000
    sound = [entry for entry in document["checkpoints"] if entry["verdict"] == "reproducible" and entry["ok"]]
    assert len(sound) == 1000 - len(kinds)
    said = [check["message"] for entry in document["checkpoints"] for check in entry["checks"]]
    assert not [message for message in said if "cannot be worked on" in message]


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
