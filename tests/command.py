"""The command line, run as a user runs it: in a process of its own, with pipes or on a terminal."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from typing import Any

from vera_tools import schema

VERA_TOOLS = (sys.executable, "-m", "vera_tools")


def run_cli(*args: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command with pipes; `env` is added to the environment."""
    return subprocess.run(
        [*VERA_TOOLS, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        timeout=120,
        check=False,
        **options,
    )


def run_json(*args: object, **options: Any) -> tuple[int, dict[str, Any]]:
    """Run a command with --json: the exit code and the document, checked against its schema."""
    result = run_cli(*args, "--json", **options)
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


def plain(text: str) -> str:
    """A terminal's text without its styles."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
