"""Runs that write to one log at the same time lose no line and break none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from tests.adapters import CHECKPOINTS, KEPT


def test_two_runs_share_a_log(tmp_path):
    names = [[f"{side}{number}" for number in range(12)] for side in "ab"]
    for name in (*names[0], *names[1]):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    log = tmp_path / "log"
    log.write_bytes(b'{"cut off')
    runs = [
        subprocess.Popen([sys.executable, "-m", "vera_tools", "verify", "-q", *side, "--log", "log"], cwd=tmp_path)
        for side in names
    ]
    assert [run.wait() for run in runs] == [0, 0]
    written = [json.loads(line)["path"] for line in log.read_text().splitlines()]
    assert sorted(written) == sorted((*names[0], *names[1]))
