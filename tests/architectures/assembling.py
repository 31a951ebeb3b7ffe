"""A parameter made of its pieces in files, and a tensor of the files made of its pieces in parameters.

What pieces mean, as a computation: the tests compare it with what transformers loads and saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_tools.architectures.pieces import Piece

Shape = tuple[int, ...]


def assemble(parts: Sequence[Piece], read: Callable[[str], npt.NDArray[Any]], shape: Shape) -> npt.NDArray[Any]:
    """A parameter of the model, put together from tensors of the files.

    Args:
        parts: All of its pieces, as `Layout.pieces` gives them.
        read: Gives a tensor of the files.
        shape: The parameter's shape.

    Raises:
        ValueError: shapes do not fit.
    """
    columns = shape[-1] if len(shape) > 1 else 1
    rows = [(piece, _oriented(read(piece.key), piece).reshape(-1, columns)) for piece in parts]
    result = np.empty((math.prod(shape) // max(columns, 1), columns), rows[0][1].dtype)
    for piece, values in rows:
        result[piece.of] = values[piece.rows]
    return result.reshape(shape)


def take_apart(parts: Sequence[Piece], read: Callable[[str], npt.NDArray[Any]], shape: Shape) -> npt.NDArray[Any]:
    """A tensor of the files, put together from parameters of the model: the way back from `assemble`.

    Args:
        parts: All pieces in it, as `Layout.pieces_of` gives them.
        read: Gives a parameter of the model.
        shape: The tensor's shape.

    Raises:
        ValueError: shapes do not fit.
    """
    values = [(piece, read(piece.parameter)) for piece in parts]
    first = values[0][1]
    columns = first.shape[-1] if first.ndim > 1 else 1
    oriented = (*shape[:-2], shape[-1], shape[-2]) if parts[0].transposed else shape
    result = np.empty((math.prod(shape) // max(columns, 1), columns), first.dtype)
    for piece, value in values:
        result[piece.rows] = value.reshape(-1, columns)[piece.of]
    return _oriented(result.reshape(oriented), parts[0])


def _oriented(tensor: npt.NDArray[Any], piece: Piece) -> npt.NDArray[Any]:
    return np.swapaxes(tensor, -1, -2) if piece.transposed else tensor
