"""What the adapters change in the base, tensor by tensor; whatever does not fit is refused here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vera_tools.checkpoints.base import BaseModel, Linear, Renaming
from vera_tools.checkpoints.checkpoint import MODULES, Layer
from vera_tools.checkpoints.names import lies_in_saved
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

# With bias="all" PEFT saves the biases of a saved module again, under the names of its wrapper in memory.
_WRAPPED = re.compile(r"\.(modules_to_save|original_module)(?=\.)")


@dataclass(frozen=True)
class Product:
    """One adapter's product that is added to one weight: ``(lambda_b * vera_B) @ (lambda_d * vera_A)``."""

    adapter: Adapter
    linear: Linear
    lambda_b: TensorInfo
    lambda_d: TensorInfo

    def factor(self) -> Factor:
        """Its factors, with the adapter's weight multiplied in."""
        adapter, ins, outs = self.adapter, self.linear.in_features, self.linear.out_features
        vera_A, vera_B = adapter.pair
        lambda_b, lambda_d = (
            adapter.checkpoint.weights.read(info.name).astype(np.float64) for info in (self.lambda_b, self.lambda_d)
        )
        return Factor(lambda_b * adapter.weight, vera_B[:outs], lambda_d, vera_A[:, :ins], adapter.columns[:ins])


@dataclass(frozen=True)
class Replacement:
    """One adapter's saved tensor, which takes the place of the base's, or is new."""

    adapter: Adapter
    tensor: TensorInfo


@dataclass(frozen=True)
class Sum:
    """What becomes of a weight that products are added to.

    Attributes:
        products: In an order that does not depend on the order in which the adapters were named.
        transposed: The weight is stored as (in_features, out_features).
        tied_to: The tensor whose values a merged output layer starts from, where the base stores none of its own.
    """

    products: tuple[Product, ...]
    transposed: bool
    tied_to: str | None = None


#: What becomes of one tensor of the base, or of one that it lacks.
Change = Sum | Replacement


def collect(base: BaseModel, adapters: Sequence[Adapter]) -> dict[str, Change]:
    """The changes, by the base's tensor names.

    Raises:
        CheckFailedError: the base lacks a target, or has another shape; NaN or infinity in an adapter.
        FormatError: an adapter is incomplete, or holds a tensor that is not VeRA's.
        UsageError: two adapters bring the same saved tensor, or one that the base lacks has another weight than 1.
    """
    found: dict[str, list[Product] | Replacement] = {}
    # The order of summation decides roundings; an order of content makes it independent of the command line's.
    for adapter in sorted(adapters, key=lambda adapter: (adapter.sha256, adapter.weight)):
        renaming = base.locate(adapter.checkpoint.layers)
        if not adapter.checkpoint.layers:
            raise FormatError("no layer is adapted", where=adapter.checkpoint.weights.label)
        for layer in adapter.checkpoint.layers.values():
            linear = _linear(base, adapter, layer, renaming)
            lambda_b, lambda_d = adapter.vectors(layer, in_features=linear.in_features)
            products = found.setdefault(name := renaming(layer.module) + ".weight", [])
            if isinstance(products, Replacement):
                raise _conflict(adapter, name, products.adapter)
            if products and products[0].linear.transposed != linear.transposed:
                raise CheckFailedError(
                    "the adapters disagree on fan_in_fan_out", where=f"{base.label}: {linear.weight}"
                )
            products.append(Product(adapter, linear, lambda_b, lambda_d))
        for name, tensor in _saved(base, adapter, renaming).items():
            earlier = found.get(name)
            before = earlier[0].linear.weight if isinstance(earlier, list) else name
            if before in base.tensors and _is_equal(base, before, adapter, tensor):
                continue  # PEFT saves some weights of the base beside those it trains
            if earlier is not None:
                raise _conflict(adapter, name, (earlier[0] if isinstance(earlier, list) else earlier).adapter)
            found[name] = _replacement(name, Replacement(adapter, tensor), base)
    return {name: _sum(name, change) if isinstance(change, list) else change for name, change in found.items()}


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


def _linear(base: BaseModel, adapter: Adapter, layer: Layer, renaming: Renaming) -> Linear:
    if layer.lambda_b is None:
        raise FormatError(
            "vera_lambda_b is missing",
            where=f"{adapter.checkpoint.weights.label}: {layer.module}",
            hint="the checkpoint is incomplete",
        )
    return base.linear(
        layer.module,
        out_features=layer.lambda_b.size,
        transposed=adapter.checkpoint.config.fan_in_fan_out,
        renaming=renaming,
    )


def _saved(base: BaseModel, adapter: Adapter, renaming: Renaming) -> dict[str, TensorInfo]:
    """The adapter's biases and saved modules, by the base's names."""
    checkpoint = adapter.checkpoint
    saved = {}
    for full, info in checkpoint.other_tensors.items():
        where = f"{checkpoint.weights.label}: {full}"
        if not full.startswith(MODULES):
            raise FormatError("not a tensor of a VeRA adapter", where=where)
        path = full.removeprefix(MODULES).replace(".base_layer.", ".")
        if path not in base.tensors and _WRAPPED.search(path):
            if MODULES + _WRAPPED.sub("", path) not in checkpoint.other_tensors:
                raise FormatError("a copy of a saved tensor that is itself missing", where=where)
            continue
        new = renaming(path) if path.startswith(renaming.strip) else path  # a head stands outside what is renamed
        name = next((option for option in (renaming(path), path) if option in base.tensors), new)
        if name in base.tensors:
            there = base.tensors[name][1]
            if there.shape != info.shape:
                raise CheckFailedError(
                    "the saved tensor does not fit the base",
                    where=where,
                    expected=str(list(there.shape)),
                    found=str(list(info.shape)),
                    hint="this is another base, or one whose vocabulary or head was resized",
                )
        elif (
            not any(lies_in_saved(path, name) for name in checkpoint.config.modules_to_save or ())
            and ".base_layer." not in full
        ):
            raise CheckFailedError(
                "the base has no such tensor, and modules_to_save does not name it",
                where=where,
                expected=f"a tensor {name} in {base.label}",
            )
        if info.dtype not in FLOATS:
            raise FormatError("a saved tensor is not of a floating-point dtype", where=where, found=info.dtype)
        if not adapter.allow_nonfinite:
            check_finite(checkpoint.weights.read(full), where=where, what="the adapter holds")
        saved[name] = info
    return saved


def _is_equal(base: BaseModel, name: str, adapter: Adapter, saved: TensorInfo) -> bool:
    """Whether a saved tensor has the values of the base's, so that it changes nothing."""
    file, info = base.tensors[name]
    if info.shape != saved.shape:
        return False
    for start in range(0, info.size, BLOCK):
        stop = min(start + BLOCK, info.size)
        theirs = base.files[file].read_elements(info, start, stop).astype(np.float64)
        if not np.array_equal(theirs, adapter.checkpoint.weights.read_elements(saved, start, stop).astype(np.float64)):
            return False
    return True


def _sum(name: str, products: Sequence[Product]) -> Sum:
    linear = products[0].linear
    return Sum(tuple(products), linear.transposed, None if linear.weight == name else linear.weight)


def _replacement(name: str, saved: Replacement, base: BaseModel) -> Replacement:
    if name not in base.tensors and saved.adapter.weight != 1:
        raise UsageError(
            "the base lacks this tensor, so it cannot be weighted",
            where=f"{saved.adapter.label}: {name}",
            expected="weight 1",
            found=f"{saved.adapter.weight:g}",
        )
    return saved
