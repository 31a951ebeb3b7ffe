"""How many threads linear algebra has: one, for small products and beside other workers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

#: Any of these in the environment is a user's own word on how many threads BLAS has.
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, unless the user set how many; also for decorating functions.

    The threads of BLAS wait for each other at every product. For small ones that takes longer than the product, and on
    a machine that others use too very much longer.
    """
    if any(name in os.environ for name in VARIABLES):
        yield
        return
    import threadpoolctl

    with threadpoolctl.threadpool_limits(limits=1, user_api="blas"):
        yield


# How many threads BLAS would have, where `start_alone` kept it from starting them.
_kept_from: int | None = None


def start_alone() -> None:
    """Load numpy with a BLAS that starts no threads, unless the user set how many, or numpy is there already.

    For a command that computes on workers of its own. Otherwise OpenBLAS starts a thread for each CPU, and before they
    have ever had something to do, each waits for that at full speed for a twentieth of a second.
    """
    global _kept_from
    if "numpy" in sys.modules or any(name in os.environ for name in VARIABLES):
        return
    os.environ[VARIABLES[0]] = "1"  # which OpenBLAS reads once; processes that are started from here are not to see it
    try:
        import numpy  # noqa: F401
    finally:
        del os.environ[VARIABLES[0]]
    _kept_from = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """How many threads BLAS has, or would have if `start_alone` had not kept it from starting them."""
    if _kept_from is not None:
        return _kept_from
    import threadpoolctl

    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").info()
    return max((library["num_threads"] for library in libraries), default=os.cpu_count() or 1)
