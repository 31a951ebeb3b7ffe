"""A plugin for pytest where torch and what stands on it are not installed: what imports any of it is skipped.

PYTHONPATH=.ci python -m pytest -p without_torch
"""

from __future__ import annotations

import sys

import pytest

_ABSENT = {"accelerate", "matplotlib", "peft", "sklearn", "torch", "transformers"}


class _Skipping:
    """Asked for a module after everything else has been: when it is nowhere."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in _ABSENT:
            raise pytest.skip.Exception(f"{name} is not installed", allow_module_level=True)


sys.meta_path.append(_Skipping())
