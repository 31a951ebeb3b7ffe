"""One tensor of a merge's result: where it comes from, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from vera_tools.architectures.pieces import Piece
from vera_tools.checkpoints.placement import Part, Placement
from vera_tools.dtypes import BITS, CODES, FLOATS
from vera_tools.errors import CheckFailedError
from vera_tools.files.safetensors import TensorInfo
from vera_tools.merging.changes import Change, Product, Replacement
from vera_tools.merging.tying import Untying

Kind = Literal["copied", "cast", "merged", "replaced", "added"]


class Origin(NamedTuple):
    """A tensor of the base: the file that it lies in, and its entry there."""

    file: str
    info: TensorInfo


@dataclass(frozen=True)
class Copied:
    """A tensor of the result (`info`: its entry in the output file) whose bytes are the base's."""

    kind: ClassVar[Kind] = "copied"

    info: TensorInfo
    origin: Origin


@dataclass(frozen=True)
class Cast:
    """A tensor of the result whose values are the base's, in another dtype."""

    kind: ClassVar[Kind] = "cast"

    info: TensorInfo
    origin: Origin


@dataclass(frozen=True)
class Merged:
    """A weight of the result: the base's with products added to it.

    Attributes:
        info: Its entry in the output file.
        origin: The base's weight.
        products: What is added.
        transposed: The weight is stored as (in_features, out_features).
    """

    kind: ClassVar[Kind] = "merged"

    info: TensorInfo
    origin: Origin
    products: tuple[Product, ...]
    transposed: bool


@dataclass(frozen=True)
class Replaced:
    """A tensor of the result that an adapter saved: in the place of the base's, or new where `origin` is None.

    `transposed`: the file stores it the other way round than the class.
    """

    info: TensorInfo
    origin: Origin | None
    saved: Replacement
    transposed: bool = False

    @property
    def kind(self) -> Kind:
        """It is "replaced", or "added" where the base has none."""
        return "added" if self.origin is None else "replaced"


@dataclass(frozen=True)
class Patched:
    """A tensor of the result some rows of which an adapter saved, as parameters of their own; the rest is the base's.

    `patches`: each saved tensor, with the rows that it is.
    """

    kind: ClassVar[Kind] = "replaced"

    info: TensorInfo
    origin: Origin
    patches: tuple[tuple[Replacement, Piece], ...]


#: One tensor of the result.
Entry = Copied | Cast | Merged | Replaced | Patched
#: One whose values are computed.
Computed = Cast | Merged | Replaced | Patched


def entries(placement: Placement, untying: Untying, dtype: str | None) -> dict[str, list[Entry]]:
    """The result's tensors by the base's files, new ones at the end of the last; offsets are not final yet.

    Args:
        placement: Where the class's parameters lie in the base.
        untying: What becomes of them.
        dtype: What floating-point tensors are cast to, or None.

    Raises:
        CheckFailedError: what is to be changed and what is to be replaced are parts of one tensor.
    """
    base, changes = placement.base, untying.changes
    own = {name for name, _ in untying.added.values()}
    by_tensor: dict[str, list[tuple[Change, Part]]] = {}
    new: dict[str, Change] = {}
    for name, change in changes.items():
        if name in own:
            continue
        if not placement.layout.gives(name):
            if placement.holder(name) is None:
                new[name] = change
            continue  # it is one tensor with another that changes alike
        for part in placement.parts(name):
            by_tensor.setdefault(part.info.name, []).append((change, part))
    files: dict[str, list[Entry]] = {
        file_name: [
            _entry(info, Origin(file_name, info), by_tensor.get(name, []), dtype) for name, info in file.tensors.items()
        ]
        for file_name, file in base.files.items()
    }
    last = files[list(files)[-1]]
    for name, (parameter, tensor) in untying.added.items():
        origin = Origin(*base.tensors[tensor])
        whole = Part(origin.info, Piece(tensor, parameter))
        mine = [(changes[parameter], whole)] if parameter in changes else []
        last.append(_entry(replace(origin.info, name=name), origin, mine, dtype))
    for name, change in new.items():
        assert isinstance(change, Replacement)  # a product has a weight that it is added to
        info = replace(change.tensor, name=placement.new_name(name))
        last.append(Replaced(_cast(info, dtype), None, change))
    return files


def _entry(info: TensorInfo, origin: Origin, changes: list[tuple[Change, Part]], dtype: str | None) -> Entry:
    info = _cast(info, dtype)
    if not changes:
        return Copied(info, origin) if origin.info.dtype == info.dtype else Cast(info, origin)
    products = [p for change, part in changes if isinstance(change, tuple) for p in change if p.part.info is part.info]
    saved = [(change, part.piece) for change, part in changes if isinstance(change, Replacement)]
    if saved and products:
        raise CheckFailedError(
            "a part of this tensor is saved and another adapted",
            where=f"{origin.file}: {origin.info.name}",
            hint="merge with PEFT",
        )
    if products:
        part, linear = products[0].part, products[0].linear
        return Merged(info, origin, tuple(products), linear.transposed != part.piece.transposed)
    (first, piece), *_ = saved
    if not (piece.is_whole or piece.transposed):
        return Patched(info, origin, tuple(saved))
    if not piece.transposed:  # as large as the adapter's, where a vocabulary is resized
        info = _shaped(info, first.tensor.shape)
    return Replaced(info, origin, first, piece.transposed)


def _shaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    size = 1
    for length in shape:
        size *= length
    return TensorInfo(info.name, info.dtype, shape, 0, size * BITS[CODES[info.dtype]] // 8)


def _cast(info: TensorInfo, dtype: str | None) -> TensorInfo:
    """The entry of a tensor in the result, in the dtype it is cast to; where it lies is not known yet."""
    target = dtype if dtype is not None and info.dtype in FLOATS else info.dtype
    return TensorInfo(info.name, target, info.shape, 0, info.size * BITS[CODES[target]] // 8)
