"""What the adapters change in the base, parameter by parameter; whatever does not fit is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import MODULES, Layer
from vera_tools.checkpoints.names import copied_from, is_embedding
from vera_tools.checkpoints.placement import Linear, Part, Placement, shape_of
from vera_tools.dtypes import FLOATS
from vera_tools.errors import CheckFailedError, FormatError, UsageError
from vera_tools.files.safetensors import TensorInfo
from vera_tools.merging.adapters import Adapter
from vera_tools.merging.arithmetic import BLOCK, Factor
from vera_tools.merging.rounding import check_finite

# Tensors that stand beside a packed weight: GPTQ and AWQ, bitsandbytes, float8 and compressed-tensors scales.
_PACKED = (
    ".qweight",
    ".weight_packed",
    ".weight.absmax",
    ".weight.quant_state.bitsandbytes__nf4",
    ".SCB",
    ".weight_scale",
    ".weight_scale_inv",
)


@dataclass(frozen=True)
class Product:
    """One adapter's product that is added to one weight: ``(lambda_b * vera_B) @ (lambda_d * vera_A)``.

    `part` is the part of the weight that lies in the tensor that is changed.
    """

    adapter: Adapter
    linear: Linear
    lambda_b: TensorInfo
    lambda_d: TensorInfo
    part: Part

    def factor(self) -> Factor:
        """Its factors."""
        adapter, ins, outs = self.adapter, self.linear.in_features, self.linear.out_features
        vera_A, vera_B = adapter.pair
        lambda_b, lambda_d = (
            adapter.checkpoint.weights.read(info.name).astype(np.float64) for info in (self.lambda_b, self.lambda_d)
        )
        rows, piece = None, self.part.piece
        if not (piece.is_whole or piece.transposed):
            count = self.part.info.size // ins
            inside, rows = np.zeros(count), np.zeros(count, np.intp)
            inside[piece.rows], rows[piece.rows] = lambda_b[piece.of], np.arange(outs)[piece.of]
            lambda_b = inside
        return Factor(lambda_b, vera_B[:outs], lambda_d, vera_A[:, :ins], adapter.columns[:ins], rows, adapter.weight)


@dataclass(frozen=True)
class Replacement:
    """One adapter's saved tensor, which takes the place of the base's parameter, or is new.

    `alone`: PEFT trained it in a copy of the module, so that what it was tied with keeps its values.
    """

    adapter: Adapter
    tensor: TensorInfo
    alone: bool


#: What becomes of one parameter: products are added to it, in an order that does not depend on that of the adapters;
#: or a saved tensor takes its place.
Change = tuple[Product, ...] | Replacement


def collect(placement: Placement, adapters: Sequence[Adapter], *, resize: bool = False) -> dict[str, Change]:
    """The changes, by the names of the class's parameters.

    Args:
        placement: Where the adapters' modules lie in the base.
        adapters: The open adapters.
        resize: Take saved embeddings and output layers of another vocabulary than the base's.

    Raises:
        CheckFailedError: the base lacks a target, or has another shape; NaN or infinity in an adapter.
        FormatError: an adapter is incomplete, or holds a tensor that is not VeRA's.
        UsageError: two adapters bring the same saved tensor, or one that the base lacks has another weight than 1.
    """
    found: dict[str, list[Product] | Replacement] = {}
    # The order of summation decides roundings; an order of content makes it independent of the command line's.
    for adapter in sorted(adapters, key=lambda adapter: (adapter.sha256, adapter.weight)):
        if not adapter.checkpoint.layers:
            raise FormatError("no layer is adapted", where=adapter.checkpoint.weights.label)
        for layer in adapter.checkpoint.layers.values():
            linear = _linear(placement, adapter, layer)
            lambda_b, lambda_d = adapter.vectors(layer, in_features=linear.in_features)
            if not linear.is_called:
                continue  # see `without_effect`
            products = found.setdefault(linear.parameter, [])
            if isinstance(products, Replacement):
                raise _conflict(adapter, linear.parameter, products.adapter)
            products += [Product(adapter, linear, lambda_b, lambda_d, part) for part in linear.parts]
        if not placement.architecture.is_known:
            _refuse_unproven(placement, adapter)
        for name, saved in _saved(placement, adapter, resize=resize).items():
            earlier = found.get(name)
            if _is_equal(placement, name, saved):
                continue  # PEFT saves some weights of the base beside those it trains
            if earlier is not None:
                raise _conflict(adapter, name, (earlier[0] if isinstance(earlier, list) else earlier).adapter)
            found[name] = saved
    return {name: tuple(change) if isinstance(change, list) else change for name, change in found.items()}


def _refuse_unproven(placement: Placement, adapter: Adapter) -> None:
    """Of a class that is not known, refuse square weights where the others say that layers are stored both ways.

    PEFT saves one fan_in_fan_out for all, that of the layer it made last.
    """
    linears = adapter.checkpoint.linears(placement.base)
    square = [linear for linear in linears if linear.in_features == linear.out_features]
    ways = {linear.transposed for linear in linears if linear.in_features != linear.out_features}
    if square and ways and ways != {adapter.checkpoint.config.fan_in_fan_out}:
        raise CheckFailedError(
            "nothing says which way round this square weight is stored",
            where=f"{placement.base.label}: {square[0].weight}",
            expected="a class of transformers, or weights that all lie as fan_in_fan_out says",
            hint="install the transformers that has the class beside vera-tools, or merge with PEFT",
        )


def without_effect(placement: Placement, adapters: Sequence[Adapter]) -> list[str]:
    """What is to be said of adapted modules whose weight stays as it is, because the live model computes so too."""
    linears = (linear for adapter in adapters for linear in adapter.checkpoint.linears(placement.base))
    idle = sorted({linear.module for linear in linears if not linear.is_called})
    if not idle:
        return []
    return [
        f"{', '.join(idle)}: adapted, and left as in the base: torch.nn.MultiheadAttention reads the weight of its "
        "output layer and never calls it, so the adapter does nothing in the live model; merge_and_unload adds it"
    ]


def _conflict(adapter: Adapter, name: str, other: Adapter) -> UsageError:
    return UsageError(
        f"{other.label} changes this tensor too, and a saved tensor can only replace it",
        where=f"{adapter.label}: {name}",
        hint="merge the adapters one after the other",
    )


def refuse_quantised(base: BaseModel) -> None:
    """Refuse a base whose weights are packed.

    Raises:
        CheckFailedError: config.json says so, or a tensor beside a weight does.
    """
    method = base.quantisation
    beside = next((name for name in base.tensors if name.endswith(_PACKED)), None)
    if method is None and beside is None:
        return
    raise CheckFailedError(
        "the base is quantised, and a merge would have to round every weight again",
        where=base.label,
        found=method or beside,
        hint="merge into the unquantised base, then quantise the result",
    )


def _linear(placement: Placement, adapter: Adapter, layer: Layer) -> Linear:
    if layer.lambda_b is None:
        raise FormatError(
            "vera_lambda_b is missing",
            where=f"{adapter.checkpoint.weights.label}: {layer.module}",
            hint="the checkpoint is incomplete",
        )
    return placement.linear(layer.module, out_features=layer.lambda_b.size)


def _saved(placement: Placement, adapter: Adapter, *, resize: bool) -> dict[str, Replacement]:
    """The adapter's biases and saved modules, by the class's parameters."""
    checkpoint = adapter.checkpoint
    saved = dict[str, Replacement]()
    for full, info in checkpoint.other_tensors.items():
        where = f"{checkpoint.weights.label}: {full}"
        if not full.startswith(MODULES):
            raise FormatError("not a tensor of a VeRA adapter", where=where)
        if checkpoint.is_copy(full):
            continue  # PEFT loads the tensor that it is a copy of
        if copied_from(full):
            raise FormatError("a copy of a saved tensor that is itself missing", where=where)
        path = full.removeprefix(MODULES).replace(".base_layer.", ".")
        name = placement.parameter(path)
        parts = placement.parts(name)
        if parts:
            is_table = is_embedding(name) or placement.architecture.is_table(name)
            _check_shape(shape_of(parts), info, is_table, where=where, resize=resize and adapter.weight == 1)
        elif not checkpoint.targeting.saves(path) and ".base_layer." not in full:
            raise CheckFailedError(
                "the base has no such tensor, and modules_to_save does not name it",
                where=where,
                expected=f"a tensor {name} in {placement.base.label}",
            )
        elif adapter.weight != 1:
            raise UsageError(
                "the base lacks this tensor, so it cannot be weighted",
                where=f"{adapter.label}: {name}",
                expected="weight 1",
                found=f"{adapter.weight:g}",
            )
        if info.dtype not in FLOATS:
            raise FormatError("a saved tensor is not of a floating-point dtype", where=where, found=info.dtype)
        if not adapter.allow_nonfinite:
            check_finite(checkpoint.weights.read(full), where=where, what="the adapter holds")
        alone = checkpoint.targeting.saves(path)
        saved[name] = Replacement(adapter, info, alone)
    return saved


def _check_shape(there: tuple[int, ...], info: TensorInfo, is_table: bool, *, where: str, resize: bool) -> None:
    if there == info.shape:
        return
    is_table = is_table and there[1:] == info.shape[1:]
    if is_table and resize:
        return
    raise CheckFailedError(
        "the saved tensor does not fit the base",
        where=where,
        expected=str(list(there)),
        found=str(list(info.shape)),
        hint="merge with --resize-vocabulary, which makes the base's tables as large as the adapter's"
        if is_table
        else "this is another base, or one whose head was resized",
    )


def _is_equal(placement: Placement, name: str, saved: Replacement) -> bool:
    """Whether a saved tensor has the values of the base's, so that it changes nothing."""
    parts = placement.parts(name)
    if not parts or shape_of(parts) != saved.tensor.shape:
        return False
    base, weights = placement.base, saved.adapter.checkpoint.weights
    file, info = base.tensors[parts[0].info.name]
    if not parts[0].piece.is_whole:
        columns = info.shape[-1] if len(info.shape) > 1 else 1
        theirs = np.empty((saved.tensor.size // columns, columns))
        for part in parts:
            values = base.files[base.tensors[part.info.name][0]].read(part.info.name).astype(np.float64)
            values = np.swapaxes(values, -1, -2) if part.piece.transposed else values
            theirs = theirs.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
            theirs[part.piece.of] = values.reshape(-1, theirs.shape[1])[part.piece.rows]
        return np.array_equal(theirs.reshape(-1), weights.read(saved.tensor.name).astype(np.float64).reshape(-1))
    for start in range(0, info.size, BLOCK):
        stop = min(start + BLOCK, info.size)
        ours = base.files[file].read_elements(info, start, stop).astype(np.float64)
        if not np.array_equal(ours, weights.read_elements(saved.tensor, start, stop).astype(np.float64)):
            return False
    return True
