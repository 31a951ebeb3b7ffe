"""Prints the test modules that run without torch: neither they nor what they import of tests/ import any of it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "peft", "transformers", "accelerate", "safetensors", "sklearn", "matplotlib"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def is_light(path: Path, seen: frozenset[Path] = frozenset()) -> bool:
    """Whether neither the file nor the test files that it imports import anything heavy."""
    names = imports(path)
    if {name.split(".")[0] for name in names} & HEAVY:
        return False
    others = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("tests.")}
    return all(is_light(other, seen | {path}) for other in others - seen - {path} if other.exists())


if __name__ == "__main__":
    sys.stdout.writelines(
        f"{path.relative_to(ROOT).as_posix()}\n" for path in sorted(ROOT.glob("tests/**/test_*.py")) if is_light(path)
    )
