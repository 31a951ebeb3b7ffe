"""The safetensors library as a witness: where it agrees with our reader, where it does not, and after every write."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import struct

import numpy as np
import pytest

import vera_tools
from tests import FIXTURES
from tests.adapters import CHECKPOINTS, KEPT, WEIGHTS, base_of
from tests.command import run_json
from tests.merging.models import make_adapter, make_base
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files import safetensors, safetensors_library
from vera_tools.files.safetensors import TensorFile

HOSTILE = runpy.run_path(str(FIXTURES / "hostile" / "safetensors_files.py"))["FILES"]
READ_BY_THE_LIBRARY = {
    "name-twice",
    "entry-list",
    "entry-with-more",
    "leading-space",
    "metadata-null",
}

# Our reader multiplies a shape without a bound and finds no bytes in it; the library's product overflows on the way.
OVERFLOW = json.dumps({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}).encode()


@pytest.fixture(params=["in memory", "on disk"])
def place(request, monkeypatch, tmp_path):
    """Linux has files in memory; elsewhere the header lies in a temporary folder, and nothing of it is left there."""
    if request.param == "on disk":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield request.param
    assert not list(tmp_path.glob("vera-tools-*"))


@pytest.fixture
def file():
    with TensorFile.open(CHECKPOINTS / KEPT / WEIGHTS) as file:
        yield file


def test_both_find_the_same_in_real_files(place):
    for path in sorted(CHECKPOINTS.glob("*/*.safetensors")):
        with TensorFile.open(path) as file:
            assert file.objection() is None


@pytest.mark.parametrize("name", HOSTILE)
def test_a_refusal_says_whether_the_library_reads_the_file(name, place, tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(HOSTILE[name].data)
    with pytest.raises(FormatError) as caught:
        TensorFile.open(path)
    assert (f"{safetensors_library.LIBRARY} does read it" in str(caught.value)) == (name in READ_BY_THE_LIBRARY)


def test_every_difference_is_told(file, monkeypatch):
    theirs = safetensors_library.read(file.header, file.size)

    def told(change=lambda tensors: None, metadata=None):
        tensors = dict(theirs.tensors)
        change(tensors)
        monkeypatch.setattr(
            safetensors_library, "read", lambda *_: safetensors_library.Contents(tensors, metadata or theirs.metadata)
        )
        return file.objection()

    def backwards(tensors):
        items = list(tensors.items())[::-1]
        tensors.clear()
        tensors.update(items)

    name = "base_model.vera_A"
    words = f"{safetensors_library.LIBRARY} finds {{}} under {name}, where float32 [16, 64] was read"
    assert told() is None
    assert told(lambda tensors: tensors.update({name: ("float32", (64, 16))})) == words.format("float32 [64, 16]")
    assert told(lambda tensors: tensors.update({name: ("int32", (16, 64))})) == words.format("int32 [16, 64]")
    assert told(lambda tensors: tensors.pop(name)) == words.format("nothing")
    assert "float32 [2] under extra, where nothing" in told(lambda tensors: tensors.update(extra=("float32", (2,))))
    assert told(backwards) == f"{safetensors_library.LIBRARY} finds the tensors in another order"
    assert told(metadata={"format": "other"}) == f"{safetensors_library.LIBRARY} finds other metadata"


def test_a_size_of_many_gigabytes_takes_no_room(place):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 32], "data_offsets": [0, 1 << 34]}}).encode()
    assert safetensors_library.read(header, 8 + len(header) + (1 << 34)) == ({"a": ("float32", (1 << 32,))}, {})


def test_verify_fails_what_the_library_cannot_read(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(CHECKPOINTS / KEPT, folder)
    data = (folder / WEIGHTS).read_bytes()
    with TensorFile.open(folder / WEIGHTS) as file:
        body = data[file.data_start :]
        header = json.loads(file.header)
    header["a"] = {**json.loads(OVERFLOW)["a"], "data_offsets": [len(body), len(body)]}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + body)
    code, document = run_json("verify", folder)
    (check,) = [check for check in document["checkpoints"][0]["checks"] if check["id"] == "tensors.official"]
    assert check["status"] == "fail"
    assert f"{safetensors_library.LIBRARY} cannot read the file" in check["message"]
    assert code == 1


def test_what_is_written_is_opened_with_the_library(tmp_path):
    with pytest.raises(CheckFailedError, match=r"what was written would be read otherwise: safetensors .* cannot read"):
        safetensors.write(tmp_path / "file", OVERFLOW, [])
    safetensors.save(tmp_path / "good", {"a": np.zeros(3, np.float32)}, {"format": "pt"})


@pytest.mark.parametrize("command", ["strip", "embed", "lora", "regenerate", "merge"])
def test_every_command_that_writes_asks_the_library(command, tmp_path, monkeypatch):
    kept = CHECKPOINTS / KEPT
    stripped = tmp_path / "stripped"
    vera_tools.strip_projections(kept, output=stripped)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "out"
    commands = {
        "strip": lambda: vera_tools.strip_projections(kept, output=out),
        "embed": lambda: vera_tools.embed_projections(stripped, output=out),
        "lora": lambda: vera_tools.to_lora(kept, base=base_of(KEPT), output=out),
        "regenerate": lambda: vera_tools.regenerate(checkpoint=kept, output=out),
        "merge": lambda: vera_tools.merge(
            make_adapter(tmp_path / "adapter"), base=make_base(tmp_path / "base"), output=out
        ),
    }
    monkeypatch.setattr(TensorFile, "objection", lambda _: "it is upside down")
    with pytest.raises(CheckFailedError, match="would be read otherwise: it is upside down"):
        commands[command]()
    assert not set(tmp_path.iterdir()) - set(before) - {tmp_path / "adapter", tmp_path / "base"}
