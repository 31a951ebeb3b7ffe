"""Layers that do not hold their weight as it is, with stand-ins for those of test_quantised.py."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.nn.models import llama, randomise
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel, base_layers, load_adapter, save_adapter

X = torch.linspace(-1, 1, 18).reshape(3, 6)


class Packed(nn.Module):
    """A layer that nobody knows: int8 codes with a scale for each row, which it dequantises to compute with."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("scales", layer.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (layer.weight.detach() / self.scales).round().to(torch.int8))
        self.register_buffer("offset", layer.bias.detach().clone())

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(), self.offset)


class HQQLinear(nn.Module):
    """The same, as HQQ's layer is built: it is read by `dequantize` and made anew by `quantize`."""

    __module__ = "hqq.core.quantize"

    def __init__(self, layer: Any, config: dict[str, Any], *, compute_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.offload_meta = config.pop("offload_meta")
        self.quant_config, self.compute_dtype, self.device = config, compute_dtype, device
        self.bias = None if layer is None else layer.bias
        if layer is not None:
            self.quantize(layer.weight.detach(), **config)

    def quantize(self, weight: torch.Tensor, *, most: int) -> None:
        self.out_features, self.in_features = weight.shape
        self.meta = {"scale": weight.abs().amax(1, keepdim=True) / most}
        self.W_q = nn.Parameter((weight / self.meta["scale"]).round().to(torch.int8), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        return self.W_q * self.meta["scale"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 5)


def hqq() -> HQQLinear:
    config = {"most": 127, "offload_meta": False}
    return HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")


def adapted(layer: nn.Module, **options: Any) -> VeraModel:
    model = VeraModel(nn.ModuleDict({"it": layer}), VeraConfig(**{"r": 2, "target_modules": ["it"], **options}))
    randomise(model)
    return model


def named(package: str, name: str, parent: type[nn.Module] = nn.Module, **contents: Any) -> nn.Module:
    """A layer whose class has this name, in this package."""
    body = {"__module__": f"{package}.nn.modules", "in_features": 6, "out_features": 5}
    layer = type(name, (parent,), body)(*((6, 5) if parent is nn.Linear else ()))
    for part, value in contents.items():
        setattr(layer, part, value)
    return layer


def integers(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=torch.int8), requires_grad=False)


def test_an_unknown_layer_is_adapted_where_it_is_named(tmp_path):
    packed, plain = Packed(linear()), linear()
    plain.weight.data = packed.dequantize()
    ours, expected = adapted(packed), adapted(plain)
    mine, theirs = ours.model["it"](X), expected.model["it"](X)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, packed(X))
    mine.square().sum().backward(), theirs.square().sum().backward()
    for which in ("vera_lambda_b", "vera_lambda_d"):
        grad = getattr(ours.model["it"], which)["default"].grad
        assert grad.abs().sum() > 0
        assert torch.equal(grad, getattr(expected.model["it"], which)["default"].grad)
    save_adapter(ours, tmp_path / "adapter")
    again = load_adapter(nn.ModuleDict({"it": Packed(linear())}), tmp_path / "adapter")
    assert torch.equal(again.model["it"](X), mine)
    with pytest.raises(UsageError, match="it: a weight of the kind Packed cannot be read and written"):
        ours.merge_and_unload()
    assert ours.get_layer_status()[0].quantization_backend == "Packed"


def test_an_unknown_layer_is_not_adapted_by_default():
    model = nn.ModuleDict({"q_proj": Packed(linear()), "v_proj": nn.Linear(6, 5)})
    assert list(VeraModel(model, VeraConfig(r=2, target_modules="all-linear")).vera_layers()) == ["v_proj"]
    model = nn.ModuleDict({"q_proj": Packed(linear()), "v_proj": nn.Linear(6, 5)})
    model.config = {"model_type": "llama"}
    with pytest.raises(UsageError, match=r"q_proj: nothing says whether this layer is linear \(found Packed\)"):
        VeraModel(model, VeraConfig(r=2))


def test_what_a_quantised_layer_was_made_of_is_not_adapted_inside_it():
    layer = hqq()
    layer.linear_layer = linear()
    model = VeraModel(nn.ModuleDict({"it": layer}), VeraConfig(r=2, target_modules="all-linear"))
    assert list(model.vera_layers()) == ["it"]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: named("aqlm", "QuantizedLinear"), "aqlm"),
        (lambda: named("eetq", "EetqLinear", weight=integers(6, 5)), "eetq"),
        (lambda: named("gptqmodel", "BaseQuantLinear", qweight=integers(1, 5)), "gptq"),
        (lambda: named("neural_compressor", "PatchedLinear"), "inc"),
        (lambda: named("transformer_engine", "Linear", nn.Linear), "te"),
        (lambda: named("somewhere", "Linear", nn.Linear, weight=integers(5, 6)), "int8"),
        (lambda: named("somewhere", "Linear", nn.Linear, weight=nn.Parameter(_subclass("quanto"))), "Other"),
    ],
)
def test_what_cannot_be_read_and_written_is_adapted_by_itself_and_not_merged_into(layer, kind):
    model = VeraModel(nn.Sequential(layer()), VeraConfig(r=2, target_modules="all-linear"))
    assert model.get_model_status().quantization_backend == kind
    vectors = model.model[0].vera_lambda_b["default"], model.model[0].vera_lambda_d["default"]
    assert [vector.dtype for vector in vectors] == [torch.float32] * 2
    with pytest.raises(UsageError, match=f"0: a weight of the kind {kind} cannot be read and written"):
        model.merge_adapter()


def _subclass(package: str) -> torch.Tensor:
    """A tensor that looks like a matrix of floats, and is another library's."""
    kind = type("Other", (torch.Tensor,), {"__module__": f"{package}.tensor"})
    return torch.zeros(5, 6).as_subclass(kind)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda: named("bitsandbytes", "Linear8bitLt", nn.Linear, state=SimpleNamespace(SCB=None)),
            "not quantised yet .*or has_fp16_weights",
        ),
        (lambda: named("bitsandbytes", "Linear4bit", nn.Linear, compute_dtype=None), "not quantised yet"),
        (
            lambda: named("somewhere", "Linear", nn.Linear, weight=nn.Parameter(_subclass("torchao"))),
            "load the base with TorchAoConfig",
        ),
    ],
)
def test_a_known_kind_is_not_merged_into_where_it_cannot_be(layer, reason):
    model = VeraModel(nn.Sequential(layer()), VeraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UsageError, match=f"0: .*{reason}"):
        model.merge_adapter()


def test_torchao_is_not_asked_for_another_weight_than_was_there(monkeypatch):
    """A config for other layers leaves this one as it is, which is then not what the base was."""
    layer = named("somewhere", "Linear", nn.Linear, weight=nn.Parameter(_subclass("torchao")))
    before = layer.weight
    before.dequantize = lambda: torch.zeros(5, 6)
    monkeypatch.setitem(__import__("sys").modules, "torchao", SimpleNamespace(quantize_=lambda layer, config: None))
    model = nn.Sequential(layer)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=lambda: None))
    ours = VeraModel(model, VeraConfig(r=2, target_modules=["0"]))
    with (
        pytest.warns(VeraToolsWarning, match="rounded to them again"),
        pytest.raises(UsageError, match="config does not quantise this layer as it was"),
    ):
        ours.merge_adapter()
    assert layer.weight is before
    assert not ours.model[0].merged


def test_merging_quantises_again_and_unmerging_is_exact():
    model = adapted(hqq())
    layer = model.model["it"]
    before, codes = layer(X), copy.deepcopy(layer.base_layer.W_q)
    weight = layer.base_layer.dequantize() + layer.get_delta_weight("default")
    with pytest.warns(VeraToolsWarning, match="merged into hqq weights is rounded to them again"):
        model.merge_adapter(safe_merge=True)
    expected = hqq()
    expected.quantize(weight, most=127)
    assert torch.equal(layer.base_layer.dequantize(), expected.dequantize())
    assert torch.equal(layer(X), expected(X))  # with the bias
    assert not torch.equal(layer.base_layer.W_q, codes)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.W_q, codes)
    assert torch.equal(layer(X), before)
    with pytest.warns(VeraToolsWarning, match="rounded to them again"):
        plain = model.merge_and_unload()
    assert torch.equal(plain["it"](X), expected(X))


def test_a_broken_adapter_leaves_a_quantised_weight_alone():
    model = adapted(hqq())
    codes = model.model["it"].base_layer.W_q
    with torch.no_grad():
        model.model["it"].vera_lambda_b["default"][0] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert model.model["it"].base_layer.W_q is codes


def test_two_adapters_are_rounded_together():
    model = adapted(hqq())
    model.add_adapter("second", VeraConfig(r=2, target_modules=["it"]))
    randomise(model)
    layer = model.model["it"]
    weight = layer.base_layer.dequantize()
    for name in ("default", "second"):
        weight = weight + layer.get_delta_weight(name)
    expected = hqq()
    expected.quantize(weight, most=127)
    with pytest.warns(VeraToolsWarning, match="rounded to them again"):
        model.merge_adapter(["default", "second"])
    assert torch.equal(layer.base_layer.W_q, expected.W_q)


def test_a_layer_that_passes_no_gradient_back_is_not_trained_through():
    class Frozen(Packed):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.detach())

    model = adapted(Frozen(linear()))
    model.model["it"](X)  # below it nothing is trained
    below = X.clone().requires_grad_()
    with pytest.raises(UsageError, match=r"it: no gradient goes back through the base layer \(found Frozen\)"):
        model.model["it"](below)
    with torch.no_grad():
        assert model.model["it"](below).shape == (3, 5)


def test_the_trainer_takes_a_quantised_base_with_adapters():
    from transformers.trainer_utils import validate_quantization_for_training

    base = llama(layers=1)
    base.is_quantized = True
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    validate_quantization_for_training(VeraModel(base, VeraConfig(r=2, target_modules=["q_proj"])))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_vectors_follow_the_dtype_that_a_quantised_layer_computes_in(autocast):
    layer = named("bitsandbytes", "Linear4bit", nn.Linear, compute_dtype=torch.bfloat16, weight=integers(15, 1))
    config = VeraConfig(r=2, target_modules=["0"])
    model = VeraModel(nn.Sequential(layer), config, autocast_adapter_dtype=autocast)
    assert base_layers.cast_dtype(layer) == torch.bfloat16
    expected = torch.float32 if autocast else torch.bfloat16
    assert model.model[0].vera_lambda_d["default"].dtype == expected
    assert model.vera_A["default"].dtype == torch.float32


def test_the_manifest_records_no_quantised_weight(tmp_path):
    import json

    model = VeraModel(
        nn.ModuleDict({"packed": hqq(), "plain": linear()}), VeraConfig(r=2, target_modules=["packed", "plain"])
    )
    save_adapter(model, tmp_path / "adapter")
    base = json.loads((tmp_path / "adapter" / "vera_manifest.json").read_text())["base"]
    assert list(base["weights"]) == ["plain.weight"]
