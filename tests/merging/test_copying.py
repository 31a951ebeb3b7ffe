"""How the files of a merge are made: reserved as a whole where that takes no time."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import vera_tools
from tests.merging.models import make_adapter, make_base
from vera_tools.merging.copying import OutputFile

SHAPES = {"model.layers.0.up": (96, 80), "model.layers.1.up": (96, 80)}
EXTRA = {f"model.rest.{number}": np.full(5000, number, np.float32) for number in range(5)}

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is reserved")


def kind(folder):
    """What coreutils calls a folder's file system."""
    return subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(params=["here", "memory"])
def folder(request, tmp_path):
    if request.param == "here":
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


@linux
def test_a_file_system_in_memory_is_known(folder):
    with OutputFile(folder / "file") as file:
        assert file.is_in_memory() == (kind(folder) == "tmpfs")


@linux
def test_what_is_reserved_has_its_blocks(folder):
    if kind(folder) not in ("tmpfs", "ext2/ext3", "xfs", "btrfs"):
        pytest.skip("this file system may have no fallocate(2)")
    with OutputFile(folder / "file") as file:
        file.reserve(1 << 20)
    status = (folder / "file").stat()
    assert status.st_size == 1 << 20
    assert status.st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("in_memory", [True, False])
def test_in_memory_nobody_waits_for_the_first_file(in_memory, tmp_path, monkeypatch):
    reserved = []
    monkeypatch.setattr(OutputFile, "is_in_memory", lambda file: in_memory)
    monkeypatch.setattr(OutputFile, "reserve", lambda file, size: reserved.append((file.path.name.split(".")[0], size)))
    base = make_base(tmp_path / "base", SHAPES, files=3, extra=EXTRA)
    vera_tools.merge(make_adapter(tmp_path / "adapter", SHAPES, r=16), base=base, output=tmp_path / "out")
    sizes = [(path.stem, path.stat().st_size) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert len(sizes) == 3
    assert reserved == sizes[1 if in_memory else 0 :]
