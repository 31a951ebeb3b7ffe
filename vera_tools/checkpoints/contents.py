"""What an adapter's file holds, by its header alone: projections, the layers' vectors, and whatever else.

In a registry most headers are equal, so that this is found out once for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vera_tools.checkpoints import keys
from vera_tools.checkpoints.keys import MODULES, ROOT, VECTORS
from vera_tools.files.safetensors import TensorFile, TensorInfo
from vera_tools.memo import Memo
from vera_tools.projections.pair import PROJECTIONS

# Tensor name fragments of the adapters that are mistaken for VeRA, and their kinds.
_FOREIGN = {
    "pvera_": "PVERA",
    "randlora_": "RANDLORA",
    ".lora_A": "LORA",
    ".lora_B": "LORA",
    "vblora_": "VBLORA",
    ".lokr_": "LOKR",
    ".hada_": "LOHA",
    ".oft_": "OFT",
    ".ia3_": "IA3",
}


@dataclass(frozen=True)
class Layer:
    """One adapted module and its two vectors; None where the file lacks one."""

    module: str
    lambda_b: TensorInfo | None
    lambda_d: TensorInfo | None


@dataclass(frozen=True)
class Contents:
    """What the tensors of a file are, each group in the file's order.

    Attributes:
        projections: By their short names "vera_A" and "vera_B".
        layers: The adapted modules, by name.
        others: Whatever is neither a projection nor a VeRA vector: biases, saved modules, and what does not belong.
    """

    projections: Mapping[str, TensorInfo]
    layers: Mapping[str, Layer]
    others: Mapping[str, TensorInfo]

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo]) -> Contents:
        """Sort the tensors by their names."""
        projections = {name: tensors[ROOT + name] for name in PROJECTIONS if ROOT + name in tensors}
        found: dict[str, dict[str, TensorInfo]] = {}
        others = {}
        for name, info in tensors.items():
            module, _, vector = name.removeprefix(MODULES).rpartition(".")
            if name.startswith(MODULES) and vector in VECTORS:
                found.setdefault(module, {})[vector] = info
            elif name not in (ROOT + projection for projection in projections):
                others[name] = info
        layers = {module: Layer(module, *map(vectors.get, VECTORS)) for module, vectors in found.items()}
        return cls(projections, layers, others)


def of_usual(weights: TensorFile) -> Contents | None:
    """The contents of a file of which each name is one that PEFT writes for VeRA; None where one is not."""
    header = weights.parsed
    if not header.is_shared:
        return _of_usual(header.tensors)
    return _memo(header.sha256, lambda: _of_usual(header.tensors), weight=len(header.data))


#: Bytes of the headers whose contents are remembered.
_memo = Memo(2 << 20)


def _of_usual(tensors: Mapping[str, TensorInfo]) -> Contents | None:
    if foreign(tensors) is not None or not keys.are_usual(tensors):
        return None
    return Contents.of(tensors)


def foreign(names: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The first tensor of another kind of adapter, and that kind; None where there is none."""
    for name in names:
        for fragment, kind in _FOREIGN.items():
            if fragment in name:
                return name, kind
    return None
