"""The pytest plugin under which PEFT's tests run: only those about VeRA, without the Hub, on PEFT's model or on ours.

The environment says how: ``PEER_OURS=1`` swaps the model, ``PEER_OUTCOMES`` names the file for what came of each test,
``PEER_LEAVE_OUT`` is an expression for names of tests that are not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

#: What a test about VeRA has in its name. (PVeRA, "average", "coverage" and "several" are something else.)
ABOUT_VERA = re.compile(r"(?<![A-Za-z])vera(?![a-z])|(?<![Pp])V[Ee]RA|(?<![Pp])Vera")
#: Libraries that modules of the suite import for tests about other methods, for the most part.
_NOT_NEEDED = {"diffusers": "StableDiffusionPipeline", "parameterized": "parameterized"}

_outcomes: dict[str, dict[str, str]] = {}


class _Absent:
    """Stands in for what is imported from a library that is not here. As a decorator it leaves the test alone."""

    @staticmethod
    def expand(*args: Any, **kwargs: Any) -> Any:
        return lambda function: function


def pytest_addoption(parser):
    parser.addoption("--regression", action="store_true", help="an option of PEFT's own conftest")


def pytest_configure(config):
    for marker in ("bitsandbytes", "single_gpu_tests", "multi_gpu_tests", "regression"):
        config.addinivalue_line("markers", f"{marker}: one of PEFT's")
    for library, name in _NOT_NEEDED.items():
        if importlib.util.find_spec(library) is None:
            sys.modules[library] = stand_in = types.ModuleType(library)
            stand_in.__dict__.update({name: _Absent, "__version__": "0"})
    if os.environ.get("PEER_OURS"):
        from tests.peer import swap

        swap.swap()


def pytest_collection_modifyitems(items, config):
    left_out = re.compile(os.environ.get("PEER_LEAVE_OUT") or "(?!)")
    chosen = [item for item in items if ABOUT_VERA.search(item.nodeid) and not left_out.search(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def pytest_collection_finish():
    # Its tests ask the Hub once for each model, and its cache from then on: here every model is in the cache.
    for name, module in list(sys.modules.items()):
        if name.endswith(".testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _Asked()


class _Asked(dict):
    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 1


def pytest_runtest_logreport(report):
    known = _outcomes.setdefault(report.nodeid, {"outcome": "passed", "why": "", "seconds": 0})
    known["seconds"] += report.duration
    if report.outcome != "passed":
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        known.update(outcome=report.outcome, why=why)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["PEER_OUTCOMES"]).write_text(json.dumps(_outcomes, indent=1), "utf-8")
