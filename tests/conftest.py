"""Fixtures that several test modules share."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"
CHECKPOINTS = FIXTURES / "checkpoints"
NAMES = sorted(path.name for path in CHECKPOINTS.iterdir() if not path.name.endswith("-base"))


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

    name = "peft-0.21.2-llama-f32-seedonly"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedRecipeWarning)
        return drift(checkpoint=CHECKPOINTS / name, base=base_of(name), dtype=["float32", "bfloat16"])


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


def base_of(name: str) -> Path:
    """The base model that a checkpoint in fixtures/ was trained on."""
    return CHECKPOINTS / f"{name}-base"


def run_cli(*args: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "vera_tools", *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
        **options,
    )


def run_json(*args: object, **options: Any) -> tuple[int, dict[str, Any]]:
    """Run the command line with --json: the exit code and the document, checked against its schema."""
    from vera_tools import schema

    result = run_cli(*args, "--json", **options)
    document = json.loads(result.stdout)
    report = document["schema"].split("/")[1]
    schema.validate(document, f"{report}.v1", where=f"--json of {args[0]}")
    return result.returncode, document


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


def plain(text: str) -> str:
    """Terminal text without its styles."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def run_terminal(*args: object, columns: int = 80, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the command line on a real (pseudo-)terminal: exit code and everything it showed, stderr included."""
    import fcntl
    import pty
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **(env or {})}
    command = [sys.executable, "-m", "vera_tools", *map(str, args)]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment) as process:
        os.close(follower)
        shown = bytearray()
        while True:
            try:
                data = os.read(leader, 65536)
            except OSError:  # Linux says EIO once the last writer has gone
                break
            if not data:
                break
            shown += data
    os.close(leader)
    return process.returncode, shown.decode().replace("\r\n", "\n")
