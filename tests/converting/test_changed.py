"""What was changed after it was recorded is not made anything of: a new manifest would vouch for it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, base_of, config_of, edit, set_config, tensors_of
from tests.merging.models import make_adapter, make_base
from vera_tools.errors import CheckFailedError, VeraToolsWarning

SHAPES = {f"model.layers.{n}.q_proj": (8, 6) for n in range(2)}
VECTOR = "base_model.model.model.layers.0.q_proj.vera_lambda_b"

COMMANDS = {
    "strip": lambda a, out, base: vera_tools.strip_projections(a, out),
    "embed": lambda a, out, base: vera_tools.embed_projections(a, out),
    "convert to lora": lambda a, out, base: vera_tools.to_lora(a, out, base=base),
    "convert from a draft": lambda a, out, base: vera_tools.from_foreign(a, out, base=base),
    "merge": lambda a, out, base: vera_tools.merge(a, base=base, output=out),
}


def flip(tensors):
    """One bit."""
    tensors[VECTOR].view(np.uint32)[3] ^= 1 << 20


def train(tensors):
    """Every vector, as training does."""
    for name, tensor in tensors.items():
        if "lambda" in name:
            tensor += np.float32(0.01)


@pytest.fixture
def made(tmp_path):
    """An adapter with its manifest, for a command by name, and the base."""
    base = make_base(tmp_path / "base", SHAPES)

    def make(command):
        path = make_adapter(tmp_path / "a", SHAPES, r=2)
        if command == "convert from a draft":  # a draft of the format has its lambdas under another name
            set_config(path, d_initial=10**40)  # what PEFT does not read is put right
        vera_tools.record(path)
        if command == "embed":
            vera_tools.strip_projections(path, in_place=True)
        return path

    return make, base


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: edit(path, flip), f"1 changed ({VECTOR})"),
        (lambda path: set_config(path, fan_in_fan_out=True), "fan_in_fan_out"),
    ],
    ids=["a bit", "the config"],
)
def test_what_was_changed_is_refused_until_it_is_recorded_again(command, change, said, made, tmp_path):
    make, base = made
    path = make(command)
    run = COMMANDS[command]
    change(path)
    with pytest.raises(CheckFailedError, match="not what is recorded of it") as found:
        run(path, tmp_path / "out", base)
    assert said in str(found.value)
    assert "record" in found.value.hint
    assert not (tmp_path / "out").exists()
    with pytest.warns(VeraToolsWarning, match="not what was recorded before"):
        vera_tools.record(path)
    run(path, tmp_path / "out", base)
    assert (tmp_path / "out").is_dir()


def test_of_what_was_changed_no_lora_for_llama_cpp_is_made(tmp_path):
    pytest.importorskip("gguf")
    path = shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "a")
    vera_tools.record(path)
    vector = next(name for name in tensors_of(path) if name.endswith("vera_lambda_b"))
    edit(path, lambda tensors: tensors[vector].view(np.uint32).__setitem__(3, 1))
    with pytest.raises(CheckFailedError, match="not what is recorded of it"):
        vera_tools.to_gguf(path, tmp_path / "a.gguf", base=base_of(KEPT))
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_trained_on_is_taken_with_a_warning(command, made, tmp_path):
    make, base = made
    path = make(command)
    edit(path, train)
    with pytest.warns(VeraToolsWarning, match="saved again after training on"):
        COMMANDS[command](path, tmp_path / "out", base)
    assert (tmp_path / "out").is_dir()
    assert config_of(path)["r"] == 2
