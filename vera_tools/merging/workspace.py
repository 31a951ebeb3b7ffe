"""Scratch memory that a worker keeps."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from vera_tools.dtypes import Array

#: By how many bytes a row of `Workspace.padded` is longer: a CPU's cache line.
_GAP = 64
#: Elements that numpy takes at a time from arrays whose rows do not follow each other.
_ROW = 256


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

    def padded(self, use: str, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        """The same, each row a little longer than asked for.

        Rows of 2048 or 4096 elements that follow each other fall on the same few places of a CPU's cache: a BLAS that
        writes several of them at a time takes a tenth longer, and a fifth longer with few ranks.
        """
        return self.array(use, (shape[0], shape[1] + _GAP // np.dtype(dtype).itemsize), dtype)

    def matrix(self, use: str, shape: tuple[int, int], dtype: DTypeLike) -> Array:
        """The same, each row as long as asked for, and so with a gap behind it."""
        return self.padded(use, shape, dtype)[:, : shape[1]]


@contextlib.contextmanager
def row_by_row() -> Iterator[None]:
    """Let numpy compute row by row where rows do not follow each other, or each has a number of its own.

    Since 2.3 it copies rows of up to 2048 elements into a buffer first to have longer ones, which takes three times as
    long as a sum.
    """
    before = np.setbufsize(_ROW)
    try:
        yield
    finally:
        np.setbufsize(before)
