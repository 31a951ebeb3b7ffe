"""`diff`: two checkpoints, key by key and tensor by tensor, and how far apart the updates are that they make."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vera_tools import blas
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint, Layer
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import ASSUMED, MANIFEST_NAME, METADATA_KEY, ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, arrays, resolve, unproven
from vera_tools.comparing.updates import Norms, Pair, UpdateComparison, Vectors
from vera_tools.dtypes import Array
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, UsageError
from vera_tools.files.safetensors import TensorFile
from vera_tools.projections.floats import max_ulp
from vera_tools.projections.key import seed
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.report import Document, Progress, Report

CARD_NAME = "README.md"
#: Each layer's updates, and why what they show is not certain.
Effect = tuple[tuple["LayerDifference", ...], str | None]
#: Lists in the config that PEFT treats, and writes, as sets.
_UNORDERED = ("target_modules", "modules_to_save")
_CHUNK = 1 << 18  # elements compared at a time


@dataclass(frozen=True)
class TensorDifference(Document):
    """One tensor that both have and that is not the same. Figures are None where they have no meaning.

    Attributes:
        name: Its full name.
        shapes: In A and in B.
        dtypes: In A and in B.
        differing: Share of elements that differ: in their bits, or, between two dtypes, in their values.
        max_abs: Largest absolute difference.
        max_ulp: Largest difference in units in the last place; None between two dtypes.
        cosine: Cosine of the angle between the two.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    differing: float | None = None
    max_abs: float | None = None
    max_ulp: int | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class LayerDifference:
    """How far apart the two updates of one layer's weight are.

    Attributes:
        module: The layer.
        norms: Frobenius norms of A's update, of B's, and of their difference; None where no layer's updates differ,
            for then nothing has to be computed.
    """

    module: str
    norms: Norms | None

    @property
    def difference(self) -> float:
        """Frobenius norm of the difference."""
        return self.norms.difference if self.norms else 0.0

    @property
    def relative_norm(self) -> float | None:
        """Norm of the difference over the norm of A's update; None where that is zero and the difference is not."""
        return _ratio(self.norms.difference, self.norms.a) if self.norms else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the report."""
        return {
            "module": self.module,
            "norm_a": self.norms.a if self.norms else None,
            "norm_b": self.norms.b if self.norms else None,
            "norm_difference": self.difference,
            "relative_norm": self.relative_norm,
        }


@dataclass(frozen=True, repr=False)
class DiffReport(Report):
    """What differs between checkpoints A and B. The exit code is 0 only where config and tensors are equal.

    Attributes:
        a: The first.
        b: The second.
        config: (key, value in A, value in B) where both have the key with different values.
        config_only: Keys that only A has, and that only B has.
        equal_tensors: Number of tensors that are the same bit for bit.
        tensors: Those that are not.
        tensors_only: Names that only A has, and that only B has.
        layers: Each adapted layer's updates, or None where they cannot be compared.
        why_not: Why they cannot, or why what they show is not certain.
        others_equal: Biases and saved modules are the same in both.
        beside: For the metadata, manifest and card, which decide nothing: "equal", "different", "only in a",
            "only in b" or "absent".
    """

    name: ClassVar[str] = "diff"

    a: str
    b: str
    config: tuple[tuple[str, Any, Any], ...]
    config_only: tuple[tuple[str, ...], tuple[str, ...]]
    equal_tensors: int
    tensors: tuple[TensorDifference, ...]
    tensors_only: tuple[tuple[str, ...], tuple[str, ...]]
    layers: tuple[LayerDifference, ...] | None
    why_not: str | None
    others_equal: bool
    beside: dict[str, str]

    @property
    def equal(self) -> bool:
        """Config and tensors are the same."""
        return not (self.config or any(self.config_only) or self.tensors or any(self.tensors_only))

    @property
    def equal_in_effect(self) -> bool | None:
        """They do exactly the same to a base; None where that cannot be known."""
        if self.equal:
            return True
        if not self.others_equal:
            return False
        if self.layers is None:
            return None
        if all(layer.difference == 0 for layer in self.layers):
            return True
        return None if self.why_not else False

    @property
    def relative_norm(self) -> float | None:
        """Norm of all layers' differences together over that of all of A's updates."""
        if self.layers is None:
            return None
        difference = math.hypot(*(layer.difference for layer in self.layers))
        return _ratio(difference, math.hypot(*(layer.norms.a for layer in self.layers if layer.norms)))

    @property
    def exit_code(self) -> int:
        """0 where config and tensors are equal, else 1."""
        return 0 if self.equal else 1

    def body(self) -> dict[str, Any]:
        """The diff/v1 document's own part."""
        return {
            "a": self.a,
            "b": self.b,
            "equal": self.equal,
            "equal_in_effect": self.equal_in_effect,
            "config": {
                "changed": [{"key": key, "a": a, "b": b} for key, a, b in self.config],
                "only_in_a": list(self.config_only[0]),
                "only_in_b": list(self.config_only[1]),
            },
            "tensors": {
                "equal": self.equal_tensors,
                "different": [tensor.to_dict() for tensor in self.tensors],
                "only_in_a": list(self.tensors_only[0]),
                "only_in_b": list(self.tensors_only[1]),
            },
            "effect": None
            if self.layers is None
            else {"relative_norm": self.relative_norm, "layers": [layer.to_dict() for layer in self.layers]},
            "effect_why_not": self.why_not,
            "beside": dict(self.beside),
        }


@blas.one_thread()
def diff(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    strict: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> DiffReport:
    """Compare two checkpoints: config, tensors, and the updates that they make to a base's weights.

    Args:
        a: A folder, a safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        b: Another.
        base: Their base model: gives each layer's in_features, and in_max of a seed-only checkpoint.
        in_features: in_max of a seed-only checkpoint. Default: the other one's, where it adapts the same modules.
        strict: Assume no recipe for a seed-only checkpoint with nothing recorded.
        allow_pickle: Read a legacy adapter_model.bin too.
        progress: Called once a layer.

    Raises:
        FormatError: one of them is unreadable, malformed, or not VeRA.
        CheckFailedError: the base does not fit.
        UnprovenError: a recipe would be assumed, or was assumed or stated when it was recorded, and `strict`.
    """
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(Checkpoint.open(x, allow_pickle=allow_pickle)) for x in (a, b))
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        changed, only_a, only_b = _diff_configs(one.config, two.config)
        first, second = one.weights.tensors, two.weights.tensors
        both = [name for name in first if name in second]
        found = {name: _diff_tensor(one.weights, two.weights, name) for name in both}
        tensors = {name: difference for name, difference in found.items() if difference is not None}
        vectors_only = tuple(tuple(sorted(x.keys() - y.keys())) for x, y in ((first, second), (second, first)))
        others = {*one.other_tensors, *two.other_tensors}
        layers: tuple[LayerDifference, ...] | None = None
        why_not = None
        try:
            layers, why_not = _effects(one, two, model, in_features=in_features, strict=strict, progress=progress)
        except (CheckFailedError, UsageError, ValueError) as error:
            why_not = str(error)
        return DiffReport(
            one.label,
            two.label,
            changed,
            (only_a, only_b),
            equal_tensors=len(both) - len(tensors),
            tensors=tuple(tensors.values()),
            tensors_only=(vectors_only[0], vectors_only[1]),
            layers=layers,
            why_not=why_not,
            others_equal=not others & {*tensors, *vectors_only[0], *vectors_only[1]},
            beside=_diff_beside(one, two),
        )


def _diff_configs(
    a: VeraConfig, b: VeraConfig
) -> tuple[tuple[tuple[str, Any, Any], ...], tuple[str, ...], tuple[str, ...]]:
    """Values that differ, with PEFT's defaults filled in, and keys that only one has."""
    first, second = a.to_dict(), b.to_dict()

    def comparable(key: str, value: Any) -> Any:
        return set(value) if key in _UNORDERED and isinstance(value, list) else value

    changed = tuple(
        (key, first[key], second[key])
        for key in sorted(first.keys() & second.keys())
        if comparable(key, first[key]) != comparable(key, second[key])
    )
    return changed, tuple(sorted(first.keys() - second.keys())), tuple(sorted(second.keys() - first.keys()))


def _diff_tensor(a: TensorFile, b: TensorFile, name: str) -> TensorDifference | None:
    """None where the two are the same bit for bit."""
    first, second = a.tensors[name], b.tensors[name]
    shapes, dtypes = (first.shape, second.shape), (first.dtype, second.dtype)
    same_kind = shapes[0] == shapes[1] and dtypes[0] == dtypes[1]
    if same_kind and all(x == y for x, y in zip(a.chunks(first), b.chunks(second), strict=True)):
        return None
    if shapes[0] != shapes[1] or not all(dtype.startswith(("float", "bfloat", "int", "uint")) for dtype in dtypes):
        return TensorDifference(name, shapes, dtypes)
    figures = _Figures()
    for start in range(0, first.size, _CHUNK):
        stop = min(start + _CHUNK, first.size)
        figures.add(a.read_elements(first, start, stop), b.read_elements(second, start, stop))
    return figures.difference(name, shapes, dtypes)


class _Figures:
    """Running figures of the difference between two tensors of one shape."""

    def __init__(self) -> None:
        self.size = self.differing = 0
        self.max_abs, self.max_ulp = 0.0, 0
        self.dot = self.norm_a = self.norm_b = 0.0

    def add(self, a: Array, b: Array) -> None:
        x, y = a.astype(np.float64), b.astype(np.float64)
        if a.dtype == b.dtype:
            bits = np.dtype(f"u{a.dtype.itemsize}")
            self.differing += int(np.count_nonzero(a.view(bits) != b.view(bits)))
            self.max_ulp = max(self.max_ulp, max_ulp(a, b))
        else:
            self.differing += int(np.count_nonzero(x != y))
        self.size += a.size
        with np.errstate(invalid="ignore", over="ignore"):
            self.max_abs = max(self.max_abs, float(np.abs(x - y).max(initial=0.0)), key=_nan_last)
            self.dot += float(np.dot(x, y))
            self.norm_a += float(np.dot(x, x))
            self.norm_b += float(np.dot(y, y))

    def difference(
        self, name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtypes: tuple[str, str]
    ) -> TensorDifference:
        lengths = math.sqrt(self.norm_a) * math.sqrt(self.norm_b)
        floats = dtypes[0] == dtypes[1] and "float" in dtypes[0]
        return TensorDifference(
            name,
            shapes,
            dtypes,
            differing=self.differing / self.size if self.size else 0.0,
            max_abs=self.max_abs if math.isfinite(self.max_abs) else None,
            max_ulp=self.max_ulp if floats and math.isfinite(self.max_abs) else None,
            cosine=max(-1.0, min(1.0, self.dot / lengths)) if lengths and math.isfinite(self.dot) else None,
        )


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _effects(
    a: Checkpoint,
    b: Checkpoint,
    base: BaseModel | None,
    *,
    in_features: int | None,
    strict: bool,
    progress: Progress | None,
) -> Effect:
    """Each layer's updates side by side."""
    one, two = (_Side.of(x, other, base, in_features, strict=strict) for x, other in ((a, b), (b, a)))
    pair_a = one.pair()
    pair_b = pair_a if one.bits == two.bits else two.pair()
    for side, pair in ((a, pair_a), (b, pair_b)):
        for name, matrix in zip(PROJECTIONS, pair, strict=True):
            _refuse_nonfinite(side, ROOT + name, matrix)
    comparison = UpdateComparison(pair_a, pair_b)
    assumed = [x.label for x, side in ((a, one), (b, two)) if side.assumed]
    why_not = (
        f"{' and '.join(assumed)}: the recipe is assumed, and another would make another difference"
        if assumed and not comparison.same_pair
        else None
    )
    modules = list(dict.fromkeys([*a.layers, *b.layers]))
    vectors = {module: (_vectors(a, module), _vectors(b, module)) for module in modules}
    if all(comparison.same(*sides) for sides in vectors.values()):
        return tuple(LayerDifference(module, None) for module in modules), None
    widths = {}
    if base is not None:
        widths = {linear.module: linear.in_features for linear in (*a.linears(base), *b.linears(base))}
    layers = []
    for done, (module, sides) in enumerate(vectors.items()):
        width = widths.get(module, min(pair_a[0].shape[1], pair_b[0].shape[1]))
        layers.append(LayerDifference(module, comparison.layer(width, *sides)))
        if progress:
            progress(done + 1, len(modules), module)
    return tuple(layers), why_not


@dataclass(frozen=True)
class _Side:
    """Where one checkpoint's pair comes from.

    Attributes:
        bits: (dtype, shape, sha256) of vera_A and vera_B: equal only where the pairs are.
        pair: Reads or draws it.
        assumed: Its recipe is only assumed.
    """

    bits: tuple[tuple[str, tuple[int, ...], str], ...]
    pair: Callable[[], Pair]
    assumed: bool = False

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, other: Checkpoint, base: BaseModel | None, in_features: int | None, *, strict: bool
    ) -> _Side:
        weights, infos = checkpoint.weights, checkpoint.projections
        if len(infos) == 2:
            checkpoint.pair_shape()  # refuses two that do not fit each other
            sha256 = {n: weights.sha256(ROOT + n) for n in PROJECTIONS}
            bits = tuple((infos[n].dtype, infos[n].shape, sha256[n]) for n in PROJECTIONS)
            origin = checkpoint.origin_of(sha256)
            if strict and origin in ASSUMED:
                raise unproven(origin, where=checkpoint.label)
            return cls(bits, lambda: (weights.read(ROOT + "vera_A"), weights.read(ROOT + "vera_B")), origin in ASSUMED)
        made_like = None
        if checkpoint.recorded is None:
            if in_features is None and base is None and checkpoint.layers.keys() == other.layers.keys():
                shape = other.pair_shape()
                in_features = shape.in_max if shape else None  # the same layers, so the same in_max
            made_like = None if strict else _recipe_of(other, checkpoint)
        assumptions = Assumptions(
            base=base,
            in_features=None if base is not None else in_features,
            method=made_like.recipe.method if made_like and made_like.recipe else None,
            stored_dtype=made_like.dtype if made_like else "float32",
            strict=strict,
        )
        resolved = resolve(checkpoint, assumptions)
        record = resolved.record
        if made_like and record.recipe:
            warnings.warn(
                f"{checkpoint.label}: nothing records which recipe made the projections; assuming "
                f"{record.recipe.name}, which made those of {other.label}",
                AssumedRecipeWarning,
                stacklevel=2,
            )
        bits = tuple((record.dtype, record.shape.of(n), record.sha256[n]) for n in PROJECTIONS)
        return cls(bits, lambda: arrays(checkpoint, resolved), record.assumed)


def _recipe_of(other: Checkpoint, checkpoint: Checkpoint) -> ProjectionRecord | None:
    """What made the other's pair, where it is known and may have made this one: for the same key and ranks."""
    if not other.projections and other.recorded is None:
        return None
    record = resolve(other).record
    keys = {seed(x.config.projection_prng_key) for x in (checkpoint, other)}
    if record.recipe is None or keys != {seed(record.recipe.prng_key)}:
        return None
    heights = [layer.lambda_b.size for layer in checkpoint.layers.values() if layer.lambda_b]
    fits = (checkpoint.config.r, max(heights, default=0)) == (record.shape.r, record.shape.out_max)
    return record if fits else None


def _refuse_nonfinite(checkpoint: Checkpoint, name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise CheckFailedError("holds NaN or infinity", where=f"{checkpoint.label}: {name}")


def _vectors(checkpoint: Checkpoint, module: str) -> Vectors | None:
    layer = checkpoint.layers.get(module, Layer(module, None, None))
    vectors = checkpoint.vectors(layer)
    if vectors is not None:
        for info, values in zip((layer.lambda_b, layer.lambda_d), vectors, strict=True):
            _refuse_nonfinite(checkpoint, info.name if info else module, values)
    return vectors


def _diff_beside(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    metadata = [{k: v for k, v in x.weights.metadata.items() if k != METADATA_KEY} for x in (a, b)]
    records = [x.weights.metadata.get(METADATA_KEY) for x in (a, b)]
    return {
        "metadata": _state(metadata[0] or None, metadata[1] or None),
        "record": _state(*records),
        MANIFEST_NAME: _state(*(_file_digest(x, MANIFEST_NAME) for x in (a, b))),
        CARD_NAME: _state(*(_file_digest(x, CARD_NAME) for x in (a, b))),
    }


def _file_digest(checkpoint: Checkpoint, name: str) -> str | None:
    if name not in checkpoint.folder.names():
        return None
    file = checkpoint.folder.open(name)
    try:
        data = bytearray(file.size)
        file.read_into(memoryview(data), 0)
    finally:
        file.close()
    return hashlib.sha256(data).hexdigest()


def _state(a: object, b: object) -> str:
    if a is None or b is None:
        return "absent" if a is b else "only in b" if a is None else "only in a"
    return "equal" if a == b else "different"


def _ratio(value: float, reference: float) -> float | None:
    if reference:
        return value / reference
    return 0.0 if value == 0 else None
