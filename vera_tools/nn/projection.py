"""The shared projections of a model: one pair of buffers, whatever the number of layers and adapters.

The values ARE the adapter, so nothing that is done to a model may change them in silence. Moving the model moves the
pair once. Casting the model never narrows it: what was float32 stays float32 in a bfloat16 model (and is widened in a
float64 one, which is exact). A model on the meta device, which holds no
values, has its pair on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vera_tools.checkpoints.manifest import Origin, ProjectionRecord
from vera_tools.dtypes import Array, np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.projections.identification import identify
from vera_tools.projections.pair import PROJECTIONS, PairShape
from vera_tools.projections.recipe import Recipe

_identified: dict[tuple[object, ...], Recipe | None] = {}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ProjectionDict(nn.Module):
    """vera_A, or vera_B, of every adapter by name, as buffers. Adapters with the same values hold the same tensor.

    A layer refers to the model's ProjectionDict without registering it, so that the pair stands once in `buffers()` and
    in the state dict, and copies and pickles of the model share it in the same way.
    """

    def __init__(self) -> None:
        super().__init__()
        self._narrowest: dict[str, torch.dtype] = {}
        self._elsewhere: dict[tuple[str, torch.device], Tensor] = {}

    def add(self, name: str, values: Tensor, *, persistent: bool, like: Tensor) -> None:
        """Hold `values` under an adapter's name.

        Args:
            name: The adapter.
            values: In the dtype they are stored in; half types are lifted to float32.
            persistent: Whether `state_dict` contains them.
            like: A base weight. The values go to its device, and become float64 where it is.
        """
        self._narrowest[name] = torch.promote_types(values.dtype, torch.float32)
        device = values.device if like.device.type == "meta" else like.device
        dtype = torch.promote_types(like.dtype, self._narrowest[name])
        self.register_buffer(name, values.to(device=device, dtype=dtype), persistent=persistent)

    def share(self, name: str, other: str, *, persistent: bool, like: Tensor) -> None:
        """Hold under `name` the very tensor that the adapter `other` has; a copy, where `like` is elsewhere."""
        tensor = self[other]
        self.register_buffer(
            name, tensor if like.device.type == "meta" else tensor.to(like.device), persistent=persistent
        )
        self._narrowest[name] = self._narrowest[other]

    def on(self, name: str, device: torch.device) -> Tensor:
        """The adapter's tensor on a device. Where a model is spread over several, each gets one copy, and keeps it."""
        tensor = self[name]
        if tensor.device == device:
            return tensor
        key = (name, device)
        if key not in self._elsewhere:
            self._elsewhere[key] = tensor.to(device)
        return self._elsewhere[key]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._buffers[name]
        assert tensor is not None
        return tensor

    def __setitem__(self, name: str, values: Tensor) -> None:
        """Let an adapter that is here have other values, on the device where they are, and never rounded.

        Raises:
            KeyError: there is no such adapter.
        """
        before = self[name]
        self._narrowest[name] = torch.promote_types(values.dtype, torch.float32)
        dtype = torch.promote_types(before.dtype, self._narrowest[name])
        self._buffers[name] = values.detach().to(dtype)
        self._elsewhere.clear()

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._non_persistent_buffers_set.discard(name)
        del self._narrowest[name]
        self._elsewhere.clear()

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def keys(self) -> KeysView[str]:
        """The adapters' names."""
        return self._tensors().keys()

    def values(self) -> ValuesView[Tensor]:
        """The tensors."""
        return self._tensors().values()

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of adapter name and tensor."""
        return self._tensors().items()

    def extra_repr(self) -> str:
        """One entry per adapter."""
        return ", ".join(f"{name}: {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in self.items())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProjectionDict:
        # `fn` is whatever .to(), .half(), .cuda(), .to_empty() or .share_memory() does to a tensor. It is asked what it
        # wants on an empty one, so that rounding and uninitialised memory never come near the values.
        moved: dict[int, Tensor] = {}
        for name, tensor in self._tensors().items():
            if id(tensor) not in moved:
                wanted = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
                device = tensor.device if wanted.device.type == "meta" else wanted.device
                dtype = torch.promote_types(wanted.dtype, self._narrowest[name])
                result = tensor.to(device=device, dtype=dtype)
                if device.type == "cpu" and wanted.is_shared():  # type: ignore[no-untyped-call]
                    result.share_memory_()  # type: ignore[no-untyped-call]
                moved[id(tensor)] = result
            self._buffers[name] = moved[id(tensor)]
        self._elsewhere.clear()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The default would copy into the tensor in place: rounding it, and changing other adapters that share it.
        for name, tensor in self._tensors().items():
            if name in self._non_persistent_buffers_set:
                continue
            if (values := state_dict.get(prefix + name)) is None:
                missing_keys.append(prefix + name)
            elif values.shape != tensor.shape:
                error_msgs.append(
                    f"{prefix}{name}: expected the shape {tuple(tensor.shape)}, found {tuple(values.shape)}"
                )
            elif not same_bits(tensor.cpu(), values.cpu()):
                self[name] = values.detach().to(tensor.device, copy=True)
        if strict:
            unexpected_keys += [
                key for key in state_dict if key.startswith(prefix) and key[len(prefix) :] not in self._buffers
            ]


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so that -0.0 is not 0.0)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    integers = _INTEGERS[first.element_size()]
    return torch.equal(first.contiguous().view(integers), second.contiguous().view(integers))


def to_tensor(array: Array) -> Tensor:
    """A numpy array (bfloat16 as ml_dtypes has it) as a torch tensor of the same bits."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: Tensor) -> Array:
    """A torch tensor as a numpy array of the same bits, on the CPU."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        array: Array = tensor.view(torch.int16).numpy().view(np_dtype("bfloat16"))
        return array
    return tensor.numpy()


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's plain name, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def shape_of(pair: tuple[Tensor, Tensor]) -> PairShape:
    """r, in_max and out_max.

    Raises:
        CheckFailedError: the two do not fit each other.
    """
    A, B = pair
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.dtype != B.dtype:
        raise CheckFailedError(
            "vera_A and vera_B do not fit each other",
            expected="(r, in_max) and (out_max, r) of one dtype",
            found=f"{list(A.shape)} {dtype_name(A.dtype)} and {list(B.shape)} {dtype_name(B.dtype)}",
        )
    return PairShape(A.shape[0], A.shape[1], B.shape[0])


def holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """Whether a dtype has all of a tensor's values, bit for bit."""
    return same_bits(tensor.to(dtype).to(tensor.dtype), tensor)


def digests(pair: Iterable[Tensor]) -> dict[str, str]:
    """sha256 of vera_A and vera_B by name."""
    bits = (to_array(tensor).reshape(-1).view("u1").data for tensor in pair)
    return {name: hashlib.sha256(data).hexdigest() for name, data in zip(PROJECTIONS, bits, strict=True)}


def is_recorded(pair: tuple[Tensor, Tensor], record: ProjectionRecord) -> bool:
    """Whether a pair, in whatever dtype it is held, has the values that a record tells of."""
    dtype: torch.dtype = getattr(torch, record.dtype)
    return all(holds(dtype, own) for own in pair) and digests(own.to(dtype) for own in pair) == record.sha256


def described(pair: tuple[Tensor, Tensor], origin: Origin, recipe: Recipe | None = None) -> ProjectionRecord:
    """What there is to record of a pair: its shapes, dtype and digests, and the recipe, where one is known to make it.

    Raises:
        CheckFailedError: the two do not fit each other.
    """
    return ProjectionRecord(recipe, origin, shape_of(pair), dtype_name(pair[0].dtype), digests(pair))


def recorded(pair: tuple[Tensor, Tensor], origin: Origin, *, prng_key: int) -> ProjectionRecord:
    """The same, with the recipe looked for.

    Raises:
        CheckFailedError: the two do not fit each other.
    """
    record = described(pair, origin)
    # Asked at every checkpoint of a run, where the pair stays what it was.
    asked = (*record.sha256.values(), prng_key)
    if asked not in _identified:
        found = identify(to_array(pair[0]), to_array(pair[1]), prng_key=prng_key)
        _identified[asked] = found.recipe if found.exact else None
    return replace(record, recipe=_identified[asked])
