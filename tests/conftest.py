"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters import CHECKPOINTS, SEED_ONLY, base_of


@pytest.fixture
def checkpoint(tmp_path):
    """Copy a PEFT-made checkpoint, by name, to a place where a test may change it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(CHECKPOINTS / name, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def drift_report():
    """A real run of drift on a seed-only adapter whose recipe is assumed: native and forced rows, effect, logits."""
    import warnings

    from vera_tools import drift
    from vera_tools.errors import AssumedRecipeWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedRecipeWarning)
        return drift(checkpoint=CHECKPOINTS / SEED_ONLY, base=base_of(SEED_ONLY), dtype=["float32", "bfloat16"])


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
def separate_torch() -> Iterator[Callable[[dict[str, Any]], dict[str, str]]]:
    """Ask a torch whose kernels round separately: a request for `torch_draws.digests` gives the two digests."""
    command = [sys.executable, str(Path(__file__).parent / "projections" / "torch_draws.py")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(request: dict[str, Any]) -> dict[str, str]:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer: dict[str, str] = json.loads(process.stdout.readline())
            return answer

        yield ask
        process.stdin.close()
