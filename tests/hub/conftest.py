"""Fixtures of the tests that move files to and from the Hub."""

from __future__ import annotations

import pytest

from tests.hub.server import without_xet


@pytest.fixture(params=["xet", "lfs"])
def transport(request, monkeypatch):
    """Both ways in which large files travel."""
    if request.param == "lfs":
        without_xet(monkeypatch)
    return request.param
