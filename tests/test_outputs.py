"""What the commands print and write over fixtures/ is what tests/transcripts/ holds, byte for byte."""

from __future__ import annotations

import difflib

import pytest

from tests import X86
from tests.outputs import COMMANDS, EXPECTED, transcript


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_said_before(command, request, monkeypatch):
    if command == "drift":
        if not X86:
            pytest.skip("the kernels without fused multiply-add are there on x86-64 alone")
        monkeypatch.setattr("vera_tools.drifting.drift.ask", request.getfixturevalue("probes").ask)
    expected = (EXPECTED / f"{command}.txt").read_text("utf-8").splitlines()
    found = transcript(command).text
    difference = list(difflib.unified_diff(expected, found, "tests/transcripts", "now", n=1, lineterm=""))
    assert not difference, "\n".join([*difference[:60], "if this is meant: python -m tests.outputs --write"])
