"""The command line: run in this process, in one of its own with pipes, or on a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vera_tools import schema
from vera_tools.cli import main

VERA_TOOLS = (sys.executable, "-m", "vera_tools")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_cli(
    *args: object, env: dict[str, str] | None = None, cwd: Path | None = None, input: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: what it prints, and the code that it exits with."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for name in ("stdout", "stderr")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        if cwd is not None:
            patch.chdir(cwd)
        for name, stream in (*streams.items(), ("stdin", io.StringIO(input))):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, args)))
    for stream in streams.values():
        stream.seek(0)
    return subprocess.CompletedProcess(
        args, int(stop.value.code or 0), streams["stdout"].read(), streams["stderr"].read()
    )


def run_process(*args: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with pipes: for what its environment, its system or its end decides."""
    return subprocess.run(
        [*VERA_TOOLS, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=600,
        check=False,
        **options,
    )


def run_json(*args: object, run: Run = run_cli, **options: Any) -> tuple[int, dict[str, Any]]:
    """Run a command with --json: the exit code and the document, checked against its schema."""
    result = run(*args, "--json", **options)
    document = json.loads(result.stdout)
    report = document["schema"].split("/")[1]
    schema.validate(document, f"{report}.v1", where=f"--json of {args[0]}")
    return result.returncode, document


def run_terminal(*args: object, columns: int = 80, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a command on a real (pseudo-)terminal: the exit code and everything it showed, stderr included."""
    import fcntl  # POSIX alone has these, and the other functions run everywhere
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), **(env or {})}
    command = [*VERA_TOOLS, *map(str, args)]
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


def install_below(folder: Path) -> None:
    """Put this environment's command where a pipeline has installed it: in vera-tools/bin."""
    command = folder / "vera-tools" / "bin" / "vera-tools"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_tools "$@"\n', "utf-8")
    command.chmod(0o755)


def plain(text: str) -> str:
    """A terminal's text without its styles."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def is_running(pid: int | str) -> bool:
    """Whether a process is there and has not ended, of Linux; one that nobody has waited for has ended too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
