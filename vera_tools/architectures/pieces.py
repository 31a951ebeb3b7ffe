"""Which rows of which tensor of a file a parameter is made of: transformers' converters, replayed on row numbers.

A file may hold queries, keys and values as one tensor where the model has three parameters, or 64 experts as 64 tensors
where the model has one. The operations that lead from one to the other move whole rows about. Carried out on the rows'
numbers instead of on the rows, they say where each row of a parameter lies in the file, whatever its size.

What is done follows transformers 5.23, core_model_loading.py, class by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vera_tools.architectures.renaming import Gathered, Operation
from vera_tools.errors import CheckFailedError

Numbers = npt.NDArray[np.int64]
Shape = tuple[int, ...]

#: The number of heads that a part of the configuration ("" is all of it) has: see `Architecture.heads`.
Heads = Callable[[str], int]
_ASK = "where transformers and torch are installed, transformers is asked for the shapes"


@dataclass(frozen=True)
class Piece:
    """Rows of a file's tensor that are rows of a parameter.

    Both are seen as matrices whose columns are the last dimension: ``tensor.reshape(-1, columns)``, where `columns` is
    the parameter's last dimension (1 where it has one dimension only).

    Attributes:
        key: The tensor's name in the file.
        rows: Rows of it, in an order in which they stand in the parameter.
        parameter: The parameter's name in the model.
        of: Rows of the parameter, as many.
        transposed: The file's last two dimensions are exchanged first; then `rows` and `of` are all there are.
    """

    key: str
    parameter: str
    rows: slice | Numbers = field(default_factory=lambda: slice(None))
    of: slice | Numbers = field(default_factory=lambda: slice(None))
    transposed: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is the parameter, as it stands."""
        both = (self.rows, self.of)
        return not self.transposed and all(isinstance(rows, slice) and rows == slice(None) for rows in both)


def names(gathered: Gathered) -> tuple[str, ...]:
    """All parameters that come of one entry of a replay."""
    step = gathered.step
    if step is None or len(step.targets) == 1:
        return (gathered.parameter,)
    # A converter's first target stands in the name; the others take its place.
    before, _, after = gathered.parameter.partition(step.targets[0])
    return tuple(before + target + after for target in step.targets)


def pieces(
    gathered: Gathered, shapes: Mapping[str, Shape], *, heads: Heads, parameters: Mapping[str, Shape] | None = None
) -> dict[str, tuple[Piece, ...]]:
    """The pieces of every parameter that comes of one entry of a replay.

    Args:
        gathered: The entry.
        shapes: Shapes of the file's tensors.
        heads: Number of attention heads by part of the configuration.
        parameters: Shapes of parameters of the model, as far as they are known; few operations ask for them.

    Raises:
        CheckFailedError: a source of the converter is missing, shapes do not fit, or a parameter's shape is needed.
    """
    if gathered.step is None:
        (key,) = gathered.keys[0]
        return {gathered.parameter: (Piece(key, gathered.parameter),)}
    return _Conversion(gathered, shapes, heads, parameters or {}).run()


class _Conversion:
    """One converter at work on row numbers: each array holds, for each row, its number among all rows of all keys."""

    def __init__(
        self, gathered: Gathered, shapes: Mapping[str, Shape], heads: Heads, parameters: Mapping[str, Shape]
    ) -> None:
        assert gathered.step is not None
        self.step, self.heads, self.parameters = gathered.step, heads, parameters
        self.names = dict(zip(self.step.targets, names(gathered), strict=True))
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.transposed = False
        self.where = gathered.parameter
        start = 0
        self.values: dict[str, list[Numbers]] = {}
        for number, source in enumerate(self.step.sources):
            for key in gathered.keys.get(number, ()):
                shape = self._leading(shapes[key])
                rows = math.prod(shape)
                self.keys.append(key)
                self.starts.append(start)
                self.values.setdefault(source, []).append(np.arange(start, start + rows).reshape(shape))
                start += rows
        self.stop = start
        self.file_shape = shapes[self.keys[0]]

    def run(self) -> dict[str, tuple[Piece, ...]]:
        """Carry out all operations, and read the pieces off the numbers."""
        for operation in self.step.operations:
            method = getattr(self, f"_{operation.name}", None)
            if method is None:
                raise CheckFailedError(f"an operation that is not known: {operation.name}", where=self.where)
            try:
                method(operation)
            except (ValueError, IndexError) as error:
                raise CheckFailedError(f"{operation.name} does not fit the file: {error}", where=self.where) from error
        return {self.names[target]: self._pieces(self.names[target], one) for target, (one,) in self.values.items()}

    def _pieces(self, parameter: str, numbers: Numbers) -> tuple[Piece, ...]:
        if self.transposed:
            return (Piece(self.keys[0], parameter, transposed=True),)
        flat = numbers.reshape(-1)
        owner = np.searchsorted(self.starts, flat, side="right") - 1
        found = []
        for index in dict.fromkeys(owner.tolist()):
            of = np.flatnonzero(owner == index)
            stop = self.starts[index + 1] if index + 1 < len(self.keys) else self.stop
            rows = flat[of] - self.starts[index]
            found.append(
                Piece(
                    self.keys[index],
                    parameter,
                    _slice(rows, stop - self.starts[index]),
                    _slice(of, flat.size),
                )
            )
        return tuple(found)

    def _leading(self, shape: Shape) -> Shape:
        """A file tensor's shape, its columns counted as one."""
        if self.step.operations[0].name == "Conv3dToLinear":
            return (shape[0], 1)
        return (*shape[:-1], 1) if len(shape) > 1 else shape

    def _only(self) -> Numbers:
        ((source, arrays),) = self.values.items()
        if len(arrays) != 1:
            raise CheckFailedError(f"{len(arrays)} tensors where one is converted", where=f"{self.where}: {source}")
        return arrays[0]

    def _axis(self, operation: Operation, array: Numbers) -> int:
        """The dimension that an operation works along, which must not be that of the columns."""
        axis: int = operation["dim"] or 0
        if axis < 0 or (array.ndim > 1 and axis >= array.ndim - 1):
            raise CheckFailedError(f"{operation.name} along the columns", where=self.where)
        return axis

    def _Chunk(self, operation: Operation) -> None:
        array = self._only()
        axis, count = self._axis(operation, array), len(self.step.targets)
        size = -(-array.shape[axis] // count)
        parts = np.split(array, range(size, array.shape[axis], size), axis=axis)
        self.values = {target: [part] for target, part in zip(self.step.targets, parts, strict=True)}

    def _Split(self, operation: Operation) -> None:
        array = self._only()
        axis = self._axis(operation, array)
        known = [self.parameters.get(self.names[target], ())[axis : axis + 1] for target in self.step.targets]
        sizes = [size[0] if size else None for size in known]
        if sizes.count(None) == 1:  # the last one follows
            sizes[sizes.index(None)] = array.shape[axis] - sum(size or 0 for size in sizes)
        if None in sizes or sum(size or 0 for size in sizes) != array.shape[axis]:
            raise CheckFailedError(
                "how the tensor is divided follows from the model's shapes alone",
                where=self.where,
                expected=f"rows of {', '.join(self.names.values())} that sum to {array.shape[axis]}",
                found=str(sizes),
                hint=_ASK,
            )
        parts = np.split(array, np.cumsum([size or 0 for size in sizes])[:-1], axis=axis)
        self.values = {target: [part] for target, part in zip(self.step.targets, parts, strict=True)}

    def _Concatenate(self, operation: Operation) -> None:
        if missing := [source for source in self.step.sources if source not in self.values]:
            raise CheckFailedError("a part of the parameter is not in the file", where=self.where, expected=missing[0])
        arrays = [array for source in self.step.sources for array in self.values[source]]
        (target,) = self.step.targets
        self.values = {target: [np.concatenate(arrays, axis=self._axis(operation, arrays[0]))]}

    def _MergeModulelist(self, operation: Operation) -> None:
        axis: int = operation["dim"] or 0
        stacked = {source: [np.stack(arrays, axis=axis)] for source, arrays in self.values.items()}
        self.values = {self.step.targets[0]: next(iter(stacked.values()))} if len(stacked) == 1 else stacked

    def _Interleave(self, operation: Operation) -> None:
        array = self._only()
        axis = self._axis(operation, array)
        half = array.shape[axis] // 2
        pair = (2, half) if operation["inverse"] else (half, 2)
        split = array.reshape((*array.shape[:axis], *pair, *array.shape[axis + 1 :]))
        self.values = {self.step.targets[0]: [np.swapaxes(split, axis, axis + 1).reshape(array.shape)]}

    def _Transpose(self, operation: Operation) -> None:
        array, shape = self._only(), self.file_shape
        last = {len(shape) - 2, len(shape) - 1}
        if {operation["dim0"] or 0, operation["dim1"]} != last or len(self.step.operations) > 1:
            raise CheckFailedError("a transposition among other operations", where=self.where)
        (target,) = self.step.targets
        if operation["check_dims"]:
            expected = self.parameters.get(self.names[target])
            if expected is None:
                raise CheckFailedError(
                    "whether the file's tensor is transposed follows from the model's shape alone",
                    where=self.where,
                    expected=f"the shape of {self.names[target]}",
                    hint=_ASK,
                )
            self.transposed = shape != expected
        else:
            self.transposed = True
        self.values = {target: [array]}

    def _Conv3dToLinear(self, operation: Operation) -> None:
        (target,) = self.step.targets
        self.values = {target: [self._only()]}

    def _PermuteForRope(self, operation: Operation) -> None:
        wanted: Sequence[str] | None = operation["permute_layer_names"]
        lone = len(self.step.targets) == 1 and len(self.step.sources) == 1
        found: dict[str, list[Numbers]] = {}
        for name, (array,) in self.values.items():
            target = self.step.targets[0] if lone else name
            if wanted is None or any(part in name for part in wanted):
                rows = array.shape[0]
                count = self.heads(operation["subconfig_key"] or "")
                half = rows // count // 2
                pair = (2, half) if operation["inverse"] else (half, 2)
                split = array.reshape((count, *pair, *array.shape[1:]))
                array = np.swapaxes(split, 1, 2).reshape(array.shape)
            found[target] = [array]
        self.values = found

    def _ErnieFuseAndSplitTextVisionExperts(self, operation: Operation) -> None:
        stack: int = operation["stack_dim"] or 0
        fused: dict[str, list[Numbers]] = {target: [] for target in self.step.targets}
        for source in self.step.sources:
            arrays = self.values[source]
            size = math.ceil(len(arrays) / len(self.step.targets))
            for number, target in enumerate(self.step.targets):
                fused[target].append(np.stack(arrays[number * size : (number + 1) * size], axis=stack))
        axis: int = operation["concat_dim"]
        self.values = {target: [np.concatenate(parts, axis=axis)] for target, parts in fused.items()}


def _slice(numbers: Numbers, size: int) -> slice | Numbers:
    """Consecutive numbers as a slice, all of them as the whole slice."""
    start, stop = int(numbers[0]), int(numbers[0]) + numbers.size
    if not np.array_equal(numbers, np.arange(start, stop)):
        return numbers
    return slice(None) if (start, stop) == (0, size) else slice(start, stop)
