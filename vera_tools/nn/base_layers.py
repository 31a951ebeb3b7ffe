"""The layers that adapters are put on: which can be, and how the weight of each kind is read and written.

An adapter's update is added to a layer's output and needs nothing of its weight, so every layer that maps in_features
to out_features can carry one. Only merging looks at the weight. The kinds, their names and the way they are merged are
PEFT 0.21's (``peft/utils/quantization_utils.py``): a quantised weight is dequantised, added to and quantised again.

Libraries are known by the names of their classes, and imported only where one of their weights is merged into.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vera_tools.errors import UsageError

#: The dtypes of weights that hold their values as they are. float8 and integers are quantised.
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Kind:
    """How a layer holds its weight. This one holds it as it is: `torch.nn.Linear`, or transformers' Conv1D.

    Attributes:
        name: PEFT's name for it; None for a weight that is held as it is.
        rounds: Whether writing a weight rounds it to fewer values than the dtype it is read in has.
    """

    name: str | None = None
    rounds = False

    def check(self, layer: nn.Module) -> str | None:
        """Why nothing can be merged into the layer's weight as it is now; None where something can."""
        if "weight" not in layer._parameters:  # weight_norm and other parametrisations
            return "the weight is computed from other parameters at every use, so nothing can be merged into it"
        return None

    def read(self, layer: nn.Module) -> Tensor:
        """The weight in a dtype to add to; not to be written to."""
        return _tensor(layer).detach()

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        """Let the layer compute with another weight."""
        _tensor(layer).data.copy_(weight)  # in place, so that a weight that is tied to another module stays tied

    def keep(self, layer: nn.Module) -> dict[str, Any]:
        """What `restore` needs to put back, bit by bit, what `write` changes."""
        return {"weight": _tensor(layer).detach().clone()}

    def restore(self, layer: nn.Module, kept: dict[str, Any]) -> None:
        """Put back what was kept."""
        self.write(layer, kept["weight"])


class ForwardOnly(Kind):
    """A layer whose weight nothing here can read and write."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, layer: nn.Module) -> str | None:
        """Always."""
        return f"a weight of the kind {self.name} cannot be read and written exactly"


class _Quantised(Kind):
    """A weight that is quantised again when it is written."""

    rounds = True
    #: The attributes of the layer that `write` replaces.
    parts: tuple[str, ...] = ("weight",)

    def check(self, layer: nn.Module) -> str | None:
        """None: it can always be read."""
        return None

    def keep(self, layer: nn.Module) -> dict[str, Any]:
        """The parts themselves: `write` puts others in their place and leaves these as they are."""
        return {name: getattr(layer, name) for name in self.parts}

    def restore(self, layer: nn.Module, kept: dict[str, Any]) -> None:
        """Put the parts back."""
        for name, part in kept.items():
            setattr(layer, name, part)


class _Bitsandbytes8(_Quantised):
    name = "bnb 8bit"
    parts = ("weight", "state")

    def check(self, layer: nn.Module) -> str | None:
        if _tensor(layer).dtype != torch.int8:
            return "the weight is not quantised yet (it is when the layer is moved to a device), or has_fp16_weights"
        return None

    def read(self, layer: nn.Module) -> Tensor:
        import bitsandbytes

        weight: Any = layer.weight
        scales = weight.SCB if layer.state.SCB is None else layer.state.SCB  # type: ignore[union-attr]
        read: Tensor = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, scales.to(weight.device))
        return read

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        before: Any = layer.weight
        state: Any = copy.copy(layer.state)
        # It is quantised when it goes from the CPU to a device, the CPU among them.
        new = type(before)(weight.to("cpu"), requires_grad=False, has_fp16_weights=False)
        layer.weight = new.to(before.device)
        # The state that was there may be kept, and holds what the layer computed with where it has run already.
        state.reset_grads()
        layer.state = state


class _Bitsandbytes4(_Quantised):
    name = "bnb 4bit"
    parts = ("weight", "quant_state")

    def check(self, layer: nn.Module) -> str | None:
        if getattr(layer.weight, "quant_state", None) is None:
            return "the weight is not quantised yet: it is when the layer is moved to a device"
        return None

    def read(self, layer: nn.Module) -> Tensor:
        import bitsandbytes

        weight: Any = layer.weight
        data, state = weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # A forward in evaluation mode has packed it in another way, for CPUs with AVX512-BF16; reading it as it is
            # would give other values without an error. That changes `state` too, which the layer goes on using.
            data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        read: Tensor = bitsandbytes.functional.dequantize_4bit(data, state)
        return read

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        before: Any = layer.weight
        # torch.compile leaves attributes with an underscore.
        options = {name: value for name, value in vars(before).items() if name != "data" and not name.startswith("_")}
        options |= {"requires_grad": False, "bnb_quantized": False}
        new = type(before)(weight.to("cpu"), **options).to(before.device)
        layer.weight, layer.quant_state = new, new.quant_state


class _HQQ(_Quantised):
    name = "hqq"
    parts = ("W_q", "meta")

    def read(self, layer: nn.Module) -> Tensor:
        read: Tensor = layer.dequantize()  # type: ignore[operator]
        return read

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        old: Any = layer
        config = copy.deepcopy(old.quant_config)
        new = type(old)(
            None,
            {**config, "offload_meta": old.offload_meta},
            compute_dtype=old.compute_dtype,
            device=old.device,
        )
        new.quantize(weight, **config)
        # Into the layer that is there, which keeps its bias and its hooks.
        old.W_q, old.meta = new.W_q, new.meta


class _Torchao(_Quantised):
    name = "torchao"

    def __init__(self, config: Callable[[], Any] | None) -> None:
        self.config = config

    def check(self, layer: nn.Module) -> str | None:
        if self.config is None:
            return "nothing says how torchao is to quantise the weight again: load the base with TorchAoConfig for that"
        try:
            self.read(layer)
        except NotImplementedError:
            return f"torchao cannot dequantise a weight of the type {type(layer.weight).__name__}"
        return None

    def read(self, layer: nn.Module) -> Tensor:
        read: Tensor = _tensor(layer).dequantize()
        return read

    def write(self, layer: nn.Module, weight: Tensor) -> None:
        from torchao import quantize_

        assert self.config is not None
        before = _tensor(layer)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(layer, self.config())
        new = type(layer.weight)
        if new is not type(before):
            layer.weight = before
            raise UsageError(
                "torchao's config does not quantise this layer as it was",
                expected=type(before).__name__,
                found=new.__name__,
            )


PLAIN = Kind()
#: The kinds by package and name of the layer's class, or of one that it derives from. gptqmodel's are AWQ's too.
_KINDS: dict[tuple[str, str], Kind] = {
    ("bitsandbytes", "Linear8bitLt"): _Bitsandbytes8(),
    ("bitsandbytes", "Linear4bit"): _Bitsandbytes4(),
    ("hqq", "HQQLinear"): _HQQ(),
    ("aqlm", "QuantizedLinear"): ForwardOnly("aqlm"),
    ("eetq", "EetqLinear"): ForwardOnly("eetq"),
    ("gptqmodel", "BaseQuantLinear"): ForwardOnly("gptq"),
    ("neural_compressor", "PatchedLinear"): ForwardOnly("inc"),
    ("transformer_engine", "Linear"): ForwardOnly("te"),
    ("transformer_engine", "LayerNormLinear"): ForwardOnly("te"),
}


def kind_of(layer: nn.Module, torchao_config: Callable[[], Any] | None = None) -> Kind:
    """How a layer that `can_be_adapted` holds its weight.

    Args:
        layer: The layer.
        torchao_config: Gives what torchao quantises the model's weights by.
    """
    if known := _known(layer):
        return known
    weight = getattr(layer, "weight", None)
    if any(cls.__module__.partition(".")[0] == "torchao" for cls in type(weight).__mro__):
        return _Torchao(torchao_config)  # a tensor that claims the dtype it was quantised from
    if not _is_plain_linear(layer):
        return ForwardOnly(type(layer).__name__)
    if not isinstance(weight, Tensor):  # weight_norm and the like, which `check` tells
        return PLAIN
    if weight.dtype not in FLOATS:
        return ForwardOnly(str(weight.dtype).removeprefix("torch."))
    # Another library's kind of tensor may look like a matrix of floats, and not take what is written into it.
    own = type(weight).__module__.partition(".")[0] == "torch"
    return PLAIN if own else ForwardOnly(type(weight).__name__)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is known to be linear, quantised or not."""
    return _is_plain_linear(layer) or _known(layer) is not None


def can_be_adapted(layer: nn.Module) -> bool:
    """Whether a layer says which size it maps to which."""
    return is_conv1d(layer) or all(
        isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features")
    )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, whose weight is (in, out), found out without importing transformers."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(module).__mro__)


def features(layer: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a layer that `can_be_adapted`."""
    if is_conv1d(layer):
        shape = whole_shape(_tensor(layer))
        return shape[0], shape[1]
    return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]


def whole_shape(tensor: Tensor) -> torch.Size:
    """A parameter's shape, also where DeepSpeed's ZeRO-3 has spread it over processes and left an empty one here."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def weight_like(layer: nn.Module) -> Tensor:
    """The layer's weight; where that is quantised, an empty tensor with the device and dtype that adapters follow."""
    held = (getattr(layer, name, None) for name in ("weight", "qweight", "W_q"))
    tensors = (tensor for tensor in held if isinstance(tensor, Tensor))
    tensor = next(itertools.chain(tensors, layer.parameters(), layer.buffers()), torch.empty(0))
    if kind_of(layer) is PLAIN:
        return tensor
    dtype = cast_dtype(layer)
    return torch.empty(0, device=tensor.device, dtype=dtype if dtype in FLOATS else torch.float32)


def cast_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype that PEFT casts the shared pair to when it adapts the layer; float32 where it does not.

    bitsandbytes' 4 bit layers have one that they compute in, torchao's weights the one that they were quantised from,
    and HQQ's layers no weight to look at.
    """
    weight = next((w for name in ("weight", "qweight") if isinstance(w := getattr(layer, name, None), Tensor)), None)
    if weight is None:
        return torch.float32
    dtype = getattr(layer, "compute_dtype", weight.dtype)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _known(layer: nn.Module) -> Kind | None:
    names = ((cls.__module__.partition(".")[0], cls.__name__) for cls in type(layer).__mro__)
    return next((_KINDS[name] for name in names if name in _KINDS), None)


def _is_plain_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def _tensor(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
