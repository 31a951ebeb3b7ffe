"""`pytest --vera`, run by a pytest of its own as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit

USES = """
def test_one(verify_vera):
    report = verify_vera(r"{checkpoint}")
    assert report.verdict == "reproducible"
"""


@pytest.fixture
def registry(tmp_path):
    """A good one and an unproven one, a LoRA, a broken one, and a test that uses the fixture."""
    folder = tmp_path / "registry"
    for name, source in (("good", KEPT), ("deep/unproven", SEED_ONLY), ("broken", KEPT), ("lora", KEPT)):
        shutil.copytree(CHECKPOINTS / source, folder / name)
    config = folder / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "peft_type": "LORA"}), "utf-8")
    (folder / "lora" / "adapter_model.safetensors").unlink()
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"short")
    (folder / "test_uses.py").write_text(USES.format(checkpoint=CHECKPOINTS / KEPT), "utf-8")
    return folder


def run_pytest(folder, *arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "-rsf", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "xdist"])
def test_each_adapter_is_a_test(registry, workers):
    result = run_pytest(registry.parent, "--vera", "registry", *workers)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "2 failed, 2 passed, 1 skipped" in result.stdout
    assert "not VeRA: LORA" in result.stdout
    assert re.search(r"deep.unproven: UNPROVEN\n  vera_A and vera_B are not stored", result.stdout)
    assert "next: save it anew" in result.stdout
    assert re.search(r"broken: FAILED tensors.file\n  tensors.file: ", result.stdout)
    assert "FAILED registry/broken/adapter_config.json::vera" in result.stdout.replace(os.sep, "/")
    assert "Traceback" not in result.stdout


def test_what_passes_can_be_said(registry):
    shutil.rmtree(registry / "broken")
    base = base_of(CHECKPOINTS / KEPT)
    arguments = ("--vera", "--vera-require", "unproven", "--vera-base", base, "registry")
    result = run_pytest(registry.parent, *map(str, arguments))
    assert (result.returncode, "3 passed, 1 skipped" in result.stdout) == (0, True), result.stdout
    result = run_pytest(registry.parent, "--vera", "--vera-require-loads", "peft<0.21:bfloat16", "registry/good")
    assert (result.returncode, "good: REPRODUCIBLE" in result.stdout) == (1, True), result.stdout


def test_a_manifest_can_be_demanded(registry):
    arguments = ("--vera", "--vera-require-recorded", "registry/good")
    result = run_pytest(registry.parent, *arguments)
    assert (result.returncode, "good: FAILED manifest.required" in result.stdout) == (1, True), result.stdout
    vera_tools.record(registry / "good")
    assert run_pytest(registry.parent, *arguments).returncode == 0


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_what_pytest_passes_over_is_said(registry, workers):
    """By itself it enters no folder of this name, and the broken adapter in it would pass in silence."""
    (registry / "build").mkdir()
    shutil.move(registry / "broken", registry / "build" / "broken")
    result = run_pytest(registry.parent, "--vera", "--vera-require", "unproven", "registry", *workers)
    assert result.returncode == 0, result.stdout
    assert re.search(r"registry.build.broken is not verified, nor what else lies below", result.stdout)
    result = run_pytest(registry.parent, "--vera", "registry/build", *workers)
    assert "1 failed" in result.stdout


def test_another_base_of_the_same_shapes_fails_as_it_does_in_verify(registry, tmp_path):
    base = shutil.copytree(base_of(CHECKPOINTS / KEPT), tmp_path / "base")
    vera_tools.record(registry / "good", base=base)
    arguments = ("--vera", "--vera-base", str(base), "registry/good")
    assert run_pytest(registry.parent, *arguments).returncode == 0
    edit(base, lambda tensors: [tensors[name].__imul__(2) for name in tensors], file="model.safetensors")
    assert vera_tools.verify(registry / "good", base=base).exit_code == 1
    result = run_pytest(registry.parent, *arguments)
    assert (result.returncode, "base.digests" in result.stdout) == (1, True), result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--vera-require", "sound"), "expected reproducible or assumed"),
        (("--vera-base", "nowhere"), "nowhere: no such file or folder"),
        (("--vera-require-loads", "peft=0.21"), "peft=0.21"),
    ],
)
def test_what_is_asked_wrongly_is_wrong_usage(registry, arguments, words):
    result = run_pytest(registry.parent, "--vera", *arguments, "registry")
    assert result.returncode == 4
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_without_vera_nothing_is_collected_or_imported(registry):
    (registry / "test_light.py").write_text(
        "import sys\n\ndef test_it():\n    assert not {'numpy', 'click', 'vera_tools.verifying'} & set(sys.modules)\n"
    )
    result = run_pytest(registry.parent, "registry/test_light.py", "registry/good")
    assert "1 passed" in result.stdout, result.stdout
