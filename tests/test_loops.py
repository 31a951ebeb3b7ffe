"""The loops that change inputs and kill processes, in full; each prints what it counted. They take minutes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import ROOT

LOOPS = {
    "swaps": ["-m", "tests.swap_loop", "--rounds", "1000"],
    "kills of conversions": ["tests/converting/kill_loop.py", "--rounds", "500", "--seed", "0"],
    "kills of merges": ["-m", "tests.merging.kill_loop", "--rounds", "500"],
    "nasty numbers": ["-W", "ignore", "-m", "tests.merging.nasty_loop", "--rounds", "10000"],
}


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="SIGKILL, and folders that are exchanged in one step")
@pytest.mark.parametrize("loop", LOOPS)
def test_in_full(loop, capsys):
    done = subprocess.run([sys.executable, *LOOPS[loop]], cwd=ROOT, capture_output=True, text=True, check=False)
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")
    assert done.returncode == 0, done.stderr
    assert "never" in done.stdout
