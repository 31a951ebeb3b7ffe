"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import X86, kernels
from tests.adapters import CHECKPOINTS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """`-n auto`: one worker for each core that this process may use; each holds torch, and few tests last long."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes():
    """Workers, and the processes that they start, share the cores: none of them computes with a thread for each."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")


@pytest.fixture
def checkpoint(tmp_path):
    """Copy a PEFT-made checkpoint, by name, to a place where a test may change it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def probes(tmp_path_factory):
    """The probe of `drift`, which answers from memory what it was asked before."""
    from tests.drifting.probes import Probes

    return Probes(tmp_path_factory.mktemp("probes"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on loopback with nothing on it, which the client uses in this process and in those it starts."""
    from tests.hub.server import HubServer, point_client

    with HubServer(tmp_path / "hub-storage") as server:
        point_client(server, tmp_path / "hf-home", monkeypatch)
        yield server
    assert server.failures == []


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of a given size, for the length of a `with`; a skip where this user may not mount one."""

    @contextlib.contextmanager
    def mount(size):
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
            pytest.skip("no right to mount a file system")
        try:
            yield folder
        finally:
            subprocess.run(["umount", folder], check=True)

    return mount


@pytest.fixture(scope="session")
def separate_kernels() -> Iterator[kernels.Call]:
    """Call a function where torch's kernels round separately, whatever they do here; a skip where no CPU has such."""
    if not X86:
        pytest.skip("only x86-64 has kernels without fused multiply-add")
    with kernels.under("default") as call:
        yield call


@pytest.fixture
def memory(request):
    """A place in the store that is this process's memory, empty and of this test's own."""
    from tests.stores import Bucket

    bucket = Bucket(f"memory://{request.node.name.split('[')[0]}")
    yield bucket
    for path in list(bucket.files()):
        bucket.remove(path)
