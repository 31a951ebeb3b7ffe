"""Whole processes, measured: wall time and peak memory, paired in one run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

PYTHON = [sys.executable, "-W", "ignore"]
#: Settings that slow numpy's BLAS on some machines have no place in a benchmark, nor has one that makes Python compile
#: an editable install at every start, where an installed package comes compiled.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "PYTHONDONTWRITEBYTECODE")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in UNSET}


@dataclass(frozen=True)
class Run:
    """One process: seconds of wall time, and peak resident memory in MB."""

    seconds: float
    peak_mb: float


def run(command: list[str], *, expect: int = 0) -> Run:
    """Run one process to its end."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode != expect:
        sys.exit(f"{command} exited {process.returncode}: {errors.decode()}")
    return Run(seconds, usage.ru_maxrss / 1000)


def paired(commands: dict[str, list[str]], *, repeats: int = 5) -> dict[str, Run]:
    """Run the commands in turn, `repeats` times round; the median time and the largest memory of each."""
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(run(command))
    return {
        name: Run(statistics.median(r.seconds for r in done), max(r.peak_mb for r in done))
        for name, done in runs.items()
    }


def load() -> str:
    """How busy the machine is, to be printed beside every figure."""
    return f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
