"""What the tests of `drift` share: real probes, each asked once, and a whole report."""

from __future__ import annotations

import warnings

import pytest

from tests.adapters import CHECKPOINTS, SEED_ONLY, base_of
from vera_tools import drift
from vera_tools.drifting import drift as drifting
from vera_tools.errors import AssumedRecipeWarning


@pytest.fixture(scope="module", autouse=True)
def _asked_once(probes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drifting, "ask", probes.ask)
        yield


@pytest.fixture(scope="session")
def drift_report():
    """A real run of drift on a seed-only adapter whose recipe is assumed: native and forced rows, effect, logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedRecipeWarning)
        return drift(checkpoint=CHECKPOINTS / SEED_ONLY, base=base_of(SEED_ONLY), dtype=["float32", "bfloat16"])
