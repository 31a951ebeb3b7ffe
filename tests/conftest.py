"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
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
