"""``vera-tools-pre-commit``: what pre-commit calls with the files that changed, and with the options of the hook.

Two changed files of one adapter are one checkpoint, which is verified once. Adapters of other kinds are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

#: The files that an adapter consists of, as .pre-commit-hooks.yaml names them.
FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "vera_manifest.json")


def arguments(given: list[str]) -> list[str]:
    """The command line that verifies the adapters which the given files belong to."""
    files = [Path(argument) for argument in given if Path(argument).name in FILES]
    options = [argument for argument in given if Path(argument).name not in FILES]
    return ["verify", "--recursive", *options, "--", *dict.fromkeys(str(file.parent) for file in files)]


def main() -> NoReturn:
    """Verify the adapters, and exit as `vera-tools verify` does; without a file, with 0."""
    command = arguments(sys.argv[1:])
    if command[-1] == "--":
        sys.exit(0)
    from vera_tools.cli import main as run

    run(command)
