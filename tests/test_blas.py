"""Small products are computed on one thread, unless the user said otherwise."""

from __future__ import annotations

import numpy as np
import threadpoolctl

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT
from vera_tools import blas
from vera_tools.comparing import diff as comparing


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
