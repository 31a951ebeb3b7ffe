"""Scratch memory that a worker keeps."""

from __future__ import annotations

import math
import threading

import numpy as np
from numpy.typing import DTypeLike

from vera_tools.dtypes import Array


class Workspace(threading.local):
    """Scratch arrays, of each thread its own, that are used for block after block and tensor after tensor.

    Large arrays that are freed go back to the system, which hands their memory out again zeroed, page by page: in a
    merge of few weights that took as long as a tenth of the products.
    """

    def __init__(self) -> None:
        self._held: dict[str, Array] = {}

    def array(self, use: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array with arbitrary content. It is the caller's until the same thread asks for the same `use` again."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.size < size:
            self._held[use] = held = np.empty(size, np.uint8)
        return held[:size].view(dtype).reshape(shape)
