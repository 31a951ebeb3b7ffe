"""How many threads linear algebra has: one, for small products and beside other workers."""

from __future__ import annotations

import contextlib
import os
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
