"""The Llama of these tests, quantised by the libraries themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.nn.models import llama

#: What is quantised; the rest of the model is held as it is.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = ("bitsandbytes 8 bit", "bitsandbytes nf4", "torchao int8", "hqq", "float8")


class Float8Linear(nn.Linear):
    """A weight that is held in float8 and computed with in the input's dtype, as layerwise casting does it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def base(kind: str, folder: Path, *, compute: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A new model of the kind, the same one in every call; a test is skipped where its library is not installed."""
    if kind == "hqq":
        return _hqq(compute)
    if kind == "float8":
        return _replaced(llama(compute), _float8)
    import transformers

    path = folder / "base"
    if not path.exists():
        llama().save_pretrained(path)
    if kind == "torchao int8":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        if kind == "bitsandbytes 8 bit":
            config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        else:
            config = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
            )
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(
        path, quantization_config=config, device_map=device, dtype=compute
    )
    return model.eval()


def _hqq(compute: torch.dtype) -> nn.Module:
    """transformers 5.23 does not quantise with HQQ: its own class does."""
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    return _replaced(llama(compute), lambda layer: core.HQQLinear(layer, config, compute_dtype=compute, device="cpu"))


def _float8(layer: nn.Linear) -> nn.Module:
    new = Float8Linear(layer.in_features, layer.out_features, bias=False)
    new.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return new


def _replaced(model: nn.Module, make: Any) -> nn.Module:
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if own in LINEAR:
            setattr(model.get_submodule(parent), own, make(module))
    return model
