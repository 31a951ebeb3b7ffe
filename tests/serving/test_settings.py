"""What a server is told by its environment."""

from __future__ import annotations

import pytest

from tests.adapters import CHECKPOINTS, KEPT
from tests.command import run_cli
from vera_tools.errors import UsageError
from vera_tools.serving import VARIABLES
from vera_tools.serving.settings import MOST_BYTES, Settings


def test_without_a_folder_nothing_is_served():
    assert Settings.read({}) is None
    assert Settings.read({"VERA_TOOLS_VLLM_ADAPTERS": "", "VERA_TOOLS_VERIFY_JOBS": "2"}) is None


def test_what_is_set(tmp_path):
    given = {"VERA_TOOLS_VLLM_ADAPTERS": str(tmp_path)}
    assert Settings.read({**given, "XDG_CACHE_HOME": "/c"}) == Settings(
        tmp_path, tmp_path.__class__("/c/vera-tools/vllm"), MOST_BYTES, "reproducible"
    )
    more = {
        "VERA_TOOLS_VLLM_CACHE": str(tmp_path / "c"),
        "VERA_TOOLS_VLLM_CACHE_BYTES": "5",
        "VERA_TOOLS_VLLM_REQUIRE": "assumed",
    }
    assert Settings.read(given | more) == Settings(tmp_path, tmp_path / "c", 5, "assumed")


@pytest.mark.parametrize(("name", "value", "message"), [
    ("VERA_TOOLS_VLLM_REQIRE", "reproducible", "no setting of vera-tools has this name"),
    ("VERA_TOOLS_VLLM_REQUIRE", "drift", "cannot be served"),
    ("VERA_TOOLS_VLLM_REQUIRE", "unproven", "cannot be served"),
    ("VERA_TOOLS_VLLM_CACHE_BYTES", "20GB", "not a number of bytes"),
    ("VERA_TOOLS_VLLM_CACHE_BYTES", "-1", "not a number of bytes"),
    ("VERA_TOOLS_VLLM_ADAPTERS", "/nowhere/at/all", "no such folder"),
])  # fmt: skip
def test_what_is_wrong_is_refused(tmp_path, name, value, message):
    with pytest.raises(UsageError, match=message):
        Settings.read({"VERA_TOOLS_VLLM_ADAPTERS": str(tmp_path), name: value})


def test_a_gate_without_adapters_is_refused():
    with pytest.raises(UsageError, match="VERA_TOOLS_VLLM_ADAPTERS: is not set, and others are"):
        Settings.read({"VERA_TOOLS_VLLM_REQUIRE": "assumed"})


def test_the_command_line_knows_them(monkeypatch):
    """They may be set where somebody runs a command."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "anything")
    assert run_cli("inspect", "-q", CHECKPOINTS / KEPT).returncode == 0
