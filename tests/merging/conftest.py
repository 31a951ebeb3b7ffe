"""transformers is asked in the tests that are about it: building a class takes seconds, and most tests verify."""

from __future__ import annotations

import pytest

from vera_tools.architectures import witness


@pytest.fixture(autouse=True)
def nobody_to_ask(request, monkeypatch):
    """No transformers to ask, but for tests that are marked otherwise."""
    if "asks" not in request.fixturenames:
        monkeypatch.setattr(witness, "is_there", lambda: False)


@pytest.fixture
def asks():
    """The installed transformers is asked."""
