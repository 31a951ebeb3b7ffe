"""What the adapters change in the base, tensor by tensor; whatever does not fit is refused here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vera_tools.checkpoints.base import BaseModel, Linear, Renaming
from vera_tools.checkpoints.checkpoint import MODULES, Layer
from vera_tools.checkpoints.names import lies_in_saved
from vera_tools.dtypes import FLOATS
from vera_tools.errors import CheckFailedError, FormatError, UsageError
from vera_tools.files.safetensors import TensorInfo
from vera_tools.merging.adapters import Adapter
from vera_tools.merging.arithmetic import BLOCK
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
class Part:
    """One adapter's part in one tensor: a layer whose product is added, or a tensor that takes the base's place."""

    adapter: Adapter
    layer: Layer | None = None
    linear: Linear | None = None
    replacement: TensorInfo | None = None


@dataclass(frozen=True)
class Change:
    """What becomes of one tensor.

    Attributes:
        kind: "merged" (a product is added), "replaced" (a saved tensor of the adapter) or "added" (the base has none).
        parts: The adapters' parts, in an order that does not depend on the order in which they were named.
        transposed: A merged weight is stored as (in_features, out_features).
        tied_to: The tensor whose values a merged output layer starts from, where the base stores none of its own.
    """

    kind: Literal["merged", "replaced", "added"]
    parts: tuple[Part, ...]
    transposed: bool = False
    tied_to: str | None = None


@dataclass
class _Collected:
    linear: Linear | None = None
    parts: list[Part] = field(default_factory=list)


def collect(base: BaseModel, adapters: Sequence[Adapter]) -> dict[str, Change]:
    """The changes, by the base's tensor names.

    Raises:
        CheckFailedError: the base lacks a target, or has another shape; NaN or infinity in an adapter.
        FormatError: an adapter is incomplete, or holds a tensor that is not VeRA's.
        UsageError: two adapters bring the same saved tensor, or one that the base lacks has another weight than 1.
    """
    found: dict[str, _Collected] = {}
    # The order of summation decides roundings; an order of content makes it independent of the command line's.
    for adapter in sorted(adapters, key=lambda adapter: (adapter.sha256, adapter.weight)):
        renaming = base.locate(adapter.checkpoint.layers)
        if not adapter.checkpoint.layers:
            raise FormatError("no layer is adapted", where=adapter.checkpoint.weights.label)
        for layer in adapter.checkpoint.layers.values():
            linear = _linear(base, adapter, layer, renaming)
            adapter.check_vectors(layer, in_features=linear.in_features)
            entry = found.setdefault(renaming(layer.module) + ".weight", _Collected(linear))
            assert entry.linear is not None
            if entry.linear.transposed != linear.transposed:
                raise CheckFailedError(
                    "the adapters disagree on fan_in_fan_out", where=f"{base.label}: {linear.weight}"
                )
            entry.parts.append(Part(adapter, layer=layer, linear=linear))
        for name, tensor in _saved(base, adapter, renaming).items():
            entry = found.get(name, _Collected())
            before = name if entry.linear is None else entry.linear.weight
            if before in base.tensors and _is_equal(base, before, adapter, tensor):
                continue  # PEFT saves some weights of the base beside those it trains
            found[name] = entry
            if entry.parts:
                raise UsageError(
                    f"{entry.parts[0].adapter.label} changes this tensor too, and a saved tensor can only replace it",
                    where=f"{adapter.label}: {name}",
                    hint="merge the adapters one after the other",
                )
            entry.parts.append(Part(adapter, replacement=tensor))
    return {name: _change(name, entry, base) for name, entry in found.items()}


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


def _change(name: str, entry: _Collected, base: BaseModel) -> Change:
    parts = tuple(entry.parts)
    if entry.linear is not None:
        tied_to = None if entry.linear.weight == name else entry.linear.weight
        return Change("merged", parts, entry.linear.transposed, tied_to)
    if name in base.tensors:
        return Change("replaced", parts)
    if parts[0].adapter.weight != 1:
        raise UsageError(
            "the base lacks this tensor, so it cannot be weighted",
            where=f"{parts[0].adapter.label}: {name}",
            expected="weight 1",
            found=f"{parts[0].adapter.weight:g}",
        )
    return Change("added", parts)
