"""The two projections as a pair: their names, their shapes, and stored ones that are read by ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vera_tools.dtypes import Array

#: PEFT's names of the two, in the order in which it draws them.
PROJECTIONS = ("vera_A", "vera_B")


@dataclass(frozen=True)
class PairShape:
    """The dimensions of a projection pair: vera_A is (r, in_max), vera_B is (out_max, r)."""

    r: int
    in_max: int
    out_max: int

    @property
    def vera_A(self) -> tuple[int, int]:
        """Shape of vera_A."""
        return (self.r, self.in_max)

    @property
    def vera_B(self) -> tuple[int, int]:
        """Shape of vera_B."""
        return (self.out_max, self.r)

    @property
    def elements(self) -> int:
        """Elements in the two tensors together."""
        return self.r * (self.in_max + self.out_max)

    def of(self, name: str) -> tuple[int, int]:
        """The shape of the tensor called `name` ("vera_A" or "vera_B")."""
        return self.vera_A if name == "vera_A" else self.vera_B


@dataclass(frozen=True)
class Pair:
    """Stored projections, readable by ranges.

    Attributes:
        shape: r, in_max, out_max.
        dtype: The stored dtype of both.
        read: (name, start, stop) -> elements of the flattened tensor.
    """

    shape: PairShape
    dtype: str
    read: Callable[[str, int, int], Array]

    @classmethod
    def of(cls, vera_A: Array, vera_B: Array) -> Pair:
        """A pair that is in memory.

        Raises:
            ValueError: not (r, in_max) and (out_max, r) of one floating-point dtype.
        """
        if vera_A.ndim != 2 or vera_B.ndim != 2 or vera_A.shape[0] != vera_B.shape[1] or vera_A.dtype != vera_B.dtype:
            raise ValueError(
                "expected vera_A (r, in_max) and vera_B (out_max, r) of one dtype, "
                f"found {vera_A.dtype}{list(vera_A.shape)} and {vera_B.dtype}{list(vera_B.shape)}"
            )
        flat = {"vera_A": vera_A.reshape(-1), "vera_B": vera_B.reshape(-1)}
        shape = PairShape(vera_A.shape[0], vera_A.shape[1], vera_B.shape[0])
        return cls(shape, vera_A.dtype.name, lambda name, start, stop: flat[name][start:stop])
