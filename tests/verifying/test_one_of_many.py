"""One adapter that nobody thought of, among good ones: it is invalid, and the others are verified."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from tests.adapters import CHECKPOINTS, CONFIG, KEPT, WEIGHTS, config_of
from tests.command import run_cli, run_json
from vera_tools.checkpoints import expressions
from vera_tools.checkpoints.checkpoint import find
from vera_tools.verifying.verifier import Verifier


def config(**values):
    return lambda folder: (folder / CONFIG).write_text(json.dumps({**config_of(folder), **values}))


def text(before, after):
    def change(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(config_of(folder))[:-1] + f", {before}{after}}}")

    return change


def header(change):
    """Write the header again, the tensors' bytes behind it as long as it says."""

    def apply(folder):
        path = folder / WEIGHTS
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        document = json.loads(data[8 : 8 + length])
        tail = change(document) or data[8 + length :]
        new = json.dumps(document).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + tail)

    return apply


def one_tensor(name, shape, code="F32", values=b""):
    def change(document):
        document.clear()
        document[name] = {"dtype": code, "shape": shape, "data_offsets": [0, len(values)]}
        return values or b""

    return header(change)


VECTOR = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"
BAD = {
    "repeats beyond counting": config(target_modules="a{9999999999999999999999}"),
    "a thousand groups": config(target_modules="(" * 1000 + ")" * 1000),
    "five thousand digits": text('"r": ', "9" * 5000),
    "flags in modules_to_save": config(modules_to_save=["(?i)x"]),
    "flags in layers_pattern": config(layers_pattern="(?i)x", layers_to_transform=0),
    "PEFT's own group": config(layers_pattern="(?P<idx>x)", layers_to_transform=0),
    "lists nested deeply": text('"auto_mapping": ', "[" * 100_000),
    "eighteen large dimensions": one_tensor(VECTOR, [2**62] * 18),
    "weights of no columns": one_tensor("base_model.vera_A", [8, 0]),
    "a vector of no dimension": one_tensor(VECTOR, [], values=b"\0" * 4),
    "a million dimensions": one_tensor(VECTOR, [1] * 1_000_000, values=b"\0" * 4),
    "NaN in 65 dimensions": one_tensor(VECTOR, [1] * 65, values=struct.pack("<f", float("nan"))),
    "a name of many dots": one_tensor("base_model.model." + "." * 100_000 + "vera_lambda_b", [1], values=b"\0" * 4),
    "not UTF-8": lambda folder: (folder / CONFIG).write_bytes(b'{"peft_type": "VERA", "x": "\xff"}'),
}
HARMLESS = {
    "half a character": text('"base_model_name_or_path": ', '"\\ud800"'),
    "a value nested 900 deep": text('"future": ', "[" * 900 + "]" * 900),
    "a group of a name that PEFT does not use": config(layers_pattern="(?P<index>layers)", layers_to_transform=[0, 1]),
}


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
