"""Small products are computed on one thread, and workers' on one each, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import threadpoolctl

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT
from vera_tools import blas
from vera_tools.comparing import diff as comparing
from vera_tools.merging import execution


def threads():
    return {found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"}


def test_one_thread(monkeypatch):
    np.ones((2, 2)) @ np.ones((2, 2))
    for name in blas.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        before = threads()
        with blas.one_thread():
            assert threads() == {1}
        assert threads() == before
        monkeypatch.setenv("MKL_NUM_THREADS", "2")
        with blas.one_thread():
            assert threads() == before


def test_diff_computes_on_one(monkeypatch):
    found = []

    def noted(*arguments, **options):
        found.append(threads())
        raise KeyError("enough")

    for name in blas.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(comparing.Checkpoint, "open", noted)
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        try:
            vera_tools.diff(CHECKPOINTS / KEPT, CHECKPOINTS / KEPT)
        except KeyError:
            assert found == [{1}]


ALONE = """
import os, sys
from vera_tools import blas
blas.start_alone()
import numpy, threadpoolctl
print(max(found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"))
print(blas.threads(), *[name for name in blas.VARIABLES if name in os.environ])
"""


@pytest.mark.parametrize("stated", [None, "2"])
def test_a_command_that_has_workers_starts_no_thread_of_blas(stated):
    environment = {name: value for name, value in os.environ.items() if name not in blas.VARIABLES}
    environment |= {} if stated is None else {"OMP_NUM_THREADS": stated}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, check=True)
    has, wanted = done.stdout.splitlines()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if stated is not None:
        threads = min(int(stated), cpus)  # OpenBLAS starts no more than it may use CPUs
        assert (has, wanted) == (f"{threads}", f"{threads} OMP_NUM_THREADS")
    else:
        assert wanted == str(cpus)
        assert has == ("1" if "openblas" in str(threadpoolctl.threadpool_info()) else wanted)


def test_numpy_that_is_there_already_keeps_its_threads(monkeypatch):
    for name in blas.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    blas.start_alone()
    assert not any(name in os.environ for name in blas.VARIABLES)
    with threadpoolctl.threadpool_limits(limits=2, user_api="blas"):
        assert {blas.threads()} == threads()


def test_a_merge_has_as_many_workers_as_blas_would_have_threads(monkeypatch):
    monkeypatch.setattr(blas, "threads", lambda: 3)
    with execution.workers(None) as count:
        assert (count, threads()) == (3, {1})
    monkeypatch.setattr(blas, "threads", lambda: 64)
    with execution.workers(None) as count:
        assert count == execution.MOST_WORKERS
    with execution.workers(20) as count:
        assert count == 20
