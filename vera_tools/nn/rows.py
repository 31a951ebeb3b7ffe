"""One batch, many adapters: which adapter each row of the batch uses.

The projections are shared, so rows with different adapters differ in two vectors only. All rows of a batch go through
the same two matrix products, and each is scaled by its own vectors. Only adapters with a pair of their own (another
rank, say) need products of their own, for their rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.errors import UsageError

#: The name for a row that uses no adapter (PEFT's).
NO_ADAPTER = "__base__"


class Rows:
    """The adapter of each row of a batch.

    Attributes:
        names: One adapter name, or `NO_ADAPTER`, for each row.
        copies: How often generation repeats each row (beams, or sequences to return).
        positions: Length of the rows, for models that flatten (rows, positions) before a layer.
    """

    def __init__(self, names: Sequence[str], *, copies: int = 1) -> None:
        self.names = tuple(names)
        self.copies = copies
        self.positions = 1
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the whole model, which notes the length of the rows."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() >= 2]
        self.positions = tensors[0].shape[1] if tensors else 1

    def for_input(self, x: Tensor, *, where: str) -> tuple[str, ...]:
        """One name for each entry of x's first dimension.

        Raises:
            UsageError: x is neither (rows, ...) nor (rows * positions, features), for rows with or without copies.
        """
        for rows in dict.fromkeys((1, self.copies)):
            for positions in dict.fromkeys((1, self.positions if x.dim() == 2 else 1)):
                if x.shape[0] == len(self.names) * rows * positions:
                    return tuple(name for name in self.names for _ in range(rows * positions))
        raise UsageError(
            "adapter_names does not fit what reaches this layer",
            where=where,
            expected=f"{len(self.names)} rows",
            found=f"an input of shape {list(x.shape)}",
        )

    def index(self, values: list[int], device: torch.device) -> Tensor:
        """These numbers as a tensor on a device, made once for all layers."""
        key = (tuple(values), device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(values, device=device)
        return self._indices[key]
