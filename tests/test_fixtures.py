"""What is committed under fixtures/ comes out of its committed generator again, as far as this machine can make it."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import pytest

from tests import FIXTURES, ROOT, X86
from tests.adapters import CHECKPOINTS, NAMES
from tests.machine import x86
from tests.peers import make_checkpoints
from tests.projections import torch_draws
from vera_tools.files.safetensors import TensorFile

pytestmark = pytest.mark.capability

GENERATOR = FIXTURES / "generate.py"
WEIGHTS = {True: "model.safetensors", False: "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """Every checkpoint that the PEFT at hand makes, with fused kernels and (in a process of its own) without."""
    import peft

    folder = tmp_path_factory.mktemp("checkpoints")
    names: list[str] = []
    if torch_draws.rounding() == "fused":
        names += make_checkpoints(folder)
    if X86:
        names += request.getfixturevalue("separate_kernels")(make_checkpoints, folder)
    assert names or f"peft-{peft.__version__}" not in " ".join(NAMES)
    return folder, names


def parsed(path):
    document = json.loads(path.read_text())
    if isinstance(document.get("target_modules"), list):  # sets, to PEFT
        document["target_modules"].sort()
    return document


def test_checkpoints_are_made_again(made):
    folder, names = made
    assert set(names) <= set(NAMES)
    for name in [*names, *(f"{adapter}-base" for adapter in names)]:
        here, there = CHECKPOINTS / name, folder / name
        assert sorted(os.listdir(there)) == sorted(os.listdir(here))
        is_base = name.endswith("-base")
        config = "config.json" if is_base else "adapter_config.json"
        assert parsed(there / config) == parsed(here / config)
        with TensorFile.open(here / WEIGHTS[is_base]) as old, TensorFile.open(there / WEIGHTS[is_base]) as new:
            assert new.header == old.header
            for tensor in old.tensors:
                if is_base or tensor.endswith(("vera_A", "vera_B")):
                    assert new.sha256(tensor) == old.sha256(tensor), f"{name}: {tensor}"
                else:  # training adds up in another order on another CPU
                    values = (file.read(tensor).astype(np.float64) for file in (new, old))
                    np.testing.assert_allclose(*values, atol=7e-3, err_msg=f"{name}: {tensor}")
        if not is_base:
            logits = (json.loads((root / "expected_logits.json").read_text())["logits"] for root in (there, here))
            np.testing.assert_allclose(*logits, atol=1e-2)


@x86
def test_the_pair_in_both_roundings_is_made_again(tmp_path):
    subprocess.run([sys.executable, str(GENERATOR), "rounding", "--out", str(tmp_path)], check=True)
    old, new = (json.loads((root / "rounding.json").read_text()) for root in (FIXTURES / "golden", tmp_path))
    if new["torch"] == old["torch"]:
        assert (tmp_path / "rounding.json").read_bytes() == (FIXTURES / "golden" / "rounding.json").read_bytes()
    assert {**new, "torch": None} == {**old, "torch": None}


def test_every_committed_checkpoint_has_a_line_in_the_generator():
    cases = runpy.run_path(str(GENERATOR))["CHECKPOINTS"]
    names = {
        f"peft-{release}-{case.removesuffix('-q')}"
        for case, (_, _, releases, _) in cases.items()
        for release in releases
    }
    assert names == set(NAMES)
    assert {f"{name}-base" for name in names} == {p.name for p in CHECKPOINTS.iterdir() if p.name.endswith("-base")}


def test_the_readme_says_what_everything_is():
    text = (FIXTURES / "README.md").read_text("utf-8")
    for path in FIXTURES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"`{path.name}" in text or f"`{path.name}/" in text, path.name
    for name in NAMES:
        assert f"`{name}`" in text


def test_the_fixtures_stand_alone():
    for path in [*FIXTURES.rglob("*.json"), *FIXTURES.rglob("*.py"), *FIXTURES.rglob("*.md")]:
        text = path.read_text()
        assert str(ROOT) not in text
        assert "/home/" not in text
