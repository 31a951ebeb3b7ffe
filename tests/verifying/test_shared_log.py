"""Runs that write to one log at the same time lose no line and break none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT
from vera_tools.files import locking


def test_a_run_waits_until_the_log_is_free(tmp_path):
    """Who holds it may be in the middle of a line."""
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "a")
    log = tmp_path / "log"
    run = threading.Thread(target=lambda: vera_tools.verify(tmp_path / "a", log=log))
    with log.open("wb", buffering=0) as held:
        assert locking.wait(held.fileno())
        held.write(b'{"schema": "vera-tools/ver')
        run.start()
        run.join(0.5)
        assert run.is_alive()
        assert log.read_bytes() == b'{"schema": "vera-tools/ver'
    run.join()
    assert [json.loads(line)["path"] for line in log.read_text().splitlines()] == [str(tmp_path / "a")]


def test_two_runs_share_a_log(tmp_path):
    names = [[f"{side}{number}" for number in range(12)] for side in "ab"]
    for name in (*names[0], *names[1]):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    log = tmp_path / "log"
    log.write_bytes(b'{"schema": "vera-tools/verify-line/v1", "cut off')
    runs = [
        subprocess.Popen([sys.executable, "-m", "vera_tools", "verify", "-q", *side, "--log", "log"], cwd=tmp_path)
        for side in names
    ]
    assert [run.wait() for run in runs] == [0, 0]
    # What a run noted at its beginning stays where another one wrote after it.
    written = [line["path"] for line in map(json.loads, log.read_text().splitlines()) if "path" in line]
    assert sorted(written) == sorted((*names[0], *names[1]))
    assert len(vera_tools.summarize(log).checkpoints) == 24
