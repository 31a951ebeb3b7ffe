"""One batch, many adapters: which adapter each row of the batch uses.

The projections are shared, so rows with different adapters differ in two vectors only. All rows of a batch go through
the same two matrix products, and each is scaled by its own vectors. Only adapters with a pair of their own (another
rank, say) need products of their own, for their rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vera_tools.errors import UsageError
from vera_tools.nn.functional import add_vera_rows

if TYPE_CHECKING:
    from vera_tools.nn.layer import VeraLinear

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

    def apply(self, layer: VeraLinear, x: Tensor, result: Tensor) -> Tensor:
        """The layer's output, with every row's own adapter.

        Args:
            layer: The layer.
            x: Its input, (rows, ..., in_features).
            result: Its base layer's output, (rows, ..., out_features).
        """
        names = self.for_input(x, where=layer.name)
        for adapters in layer.adapters_by_pair(names):
            index = {name: i for i, name in enumerate(adapters)}
            chosen = [row for row, name in enumerate(names) if name in index]
            A, B = layer.projections(adapters[0], x.device)
            which = self._index([index[names[row]] for row in chosen], x.device)
            d = torch.stack([layer.vera_lambda_d[name] for name in adapters])[which]
            b = torch.stack([layer.vera_lambda_b[name] for name in adapters])[which]
            if len(chosen) == len(names):
                result = add_vera_rows(result, x, A=A, B=B, d=d, b=b)
            else:
                at = self._index(chosen, x.device)
                update = add_vera_rows(result[at], x[at], A=A, B=B, d=d, b=b)
                result = result.to(update.dtype).index_copy(0, at, update)
        return result

    def _index(self, values: list[int], device: torch.device) -> Tensor:
        key = (tuple(values), device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(values, device=device)
        return self._indices[key]
