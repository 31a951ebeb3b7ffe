"""How much memory a call takes, by what Python and NumPy allocate."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def traced_peak(call: Callable[[], Result]) -> tuple[int, Result]:
    """The most bytes that were allocated at once during the call, and its result."""
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()
