"""Adapters on bases that bitsandbytes, torchao and HQQ have quantised; PEFT is the peer. Needs their packages:

pip install -c constraints.txt -e '.[dev,quantised-tests]'
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests.nn import models
from tests.nn.models import OPTIONS, peft_model, randomise, some_ids, train
from tests.nn.quantised import KINDS, base
from tests.peers import QUIET_PEERS, load_peft
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel, save_adapter
from vera_tools.nn.projection import same_bits

pytestmark = [
    *QUIET_PEERS,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
    pytest.mark.filterwarnings("ignore:Calling register_constant:UserWarning"),
]

MERGEABLE = [kind for kind in KINDS if kind != "float8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("quantised")


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """In training mode: to evaluate, bitsandbytes packs 4 bit weights anew, and computes in bfloat16, on some CPUs."""
    return models.logits(model.train(), ids)


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def peers_checkpoint(kind: str, folder: Any, name: str, **options: Any) -> Any:
    """An adapter of PEFT's that does something, and the folder that PEFT has saved it in."""
    model = peft_model(base(kind, folder), **options)
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / name)
    return model, folder / name


def vectors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = [(name, value) for name, value in model.named_parameters() if "vera_lambda" in name]
    return {name.replace("base_model.model.", "model."): value.detach() for name, value in found}


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_pefts(kind, folder):
    peers, saved = peers_checkpoint(kind, folder, f"{kind} to train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peers = load_peft(base(kind, folder), saved, is_trainable=True)
    ours = VeraModel.from_pretrained(base(kind, folder), saved, is_trainable=True)
    before = vectors(ours)
    before = {name: value.clone() for name, value in before.items()}
    mine, theirs = (train(model, steps=4, lr=1e-3) for model in (ours, peers))
    assert mine[-1] < mine[0]
    close(torch.tensor(mine), torch.tensor(theirs))
    theirs_now = vectors(peers)
    assert vectors(ours).keys() == theirs_now.keys()
    for name, value in vectors(ours).items():
        assert not torch.equal(value, before[name])
        close(value, theirs_now[name])
    close(logits(ours, some_ids()), logits(peers, some_ids()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["bitsandbytes 8 bit", "bitsandbytes nf4", "torchao int8"])
def test_the_trainer_trains_it(kind, folder, tmp_path):
    """It refuses what transformers has quantised and carries no adapters."""
    from transformers import Trainer

    from tests.nn.training import trainer

    plain = base(kind, folder)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(Trainer, plain, tmp_path / "plain")
    model = VeraModel(plain, VeraConfig(**OPTIONS))
    before = {name: value.clone() for name, value in vectors(model).items()}
    trainer(Trainer, model, tmp_path / "adapted", save_strategy="no").train()
    after = vectors(model)
    assert all(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_both_ways_with_their_projections(kind, folder):
    peers, saved = peers_checkpoint(kind, folder, f"{kind} stored")
    expected = logits(peers, some_ids())
    ours = VeraModel.from_pretrained(base(kind, folder), saved)
    close(logits(ours, some_ids()), expected)
    assert float((expected - logits(base(kind, folder), some_ids())).abs().max()) > 0.01
    save_adapter(ours, folder / f"{kind} stored again")
    close(logits(load_peft(base(kind, folder), folder / f"{kind} stored again"), some_ids()), expected)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_checkpoints_go_both_ways_without_their_projections(kind, folder):
    peers, saved = peers_checkpoint(kind, folder, f"{kind} seed only", save_projection=False)
    with pytest.warns(AssumedRecipeWarning):
        ours = VeraModel.from_pretrained(base(kind, folder), saved)
    expected = logits(peers, some_ids())
    close(logits(ours, some_ids()), expected)
    save_adapter(ours, folder / f"{kind} seed only again")  # without a warning that PEFT would draw another pair
    close(logits(load_peft(base(kind, folder), folder / f"{kind} seed only again"), some_ids()), expected)


def test_what_peft_rounds_through_float8_is_not_assumed(folder):
    saved = peers_checkpoint("float8", folder, "float8 seed only", save_projection=False)[1]
    with (
        pytest.warns(AssumedRecipeWarning),
        pytest.raises(CheckFailedError, match=r"no recipe describes that.*float8_e4m3fn"),
    ):
        VeraModel.from_pretrained(base("float8", folder), saved)
    ours = VeraModel(base("float8", folder), VeraConfig(**OPTIONS, save_projection=False))
    with pytest.warns(VeraToolsWarning, match="PEFT would draw others on this base"):
        save_adapter(ours, folder / "float8 ours")


def test_a_pair_that_peft_rounds_through_the_compute_dtype_is_assumed_so(folder):
    """PEFT casts the pair to the dtype that a 4 bit layer computes in, whatever its weight is held in."""
    kind, half = "bitsandbytes nf4", torch.bfloat16
    peers = peft_model(base(kind, folder, compute=half), save_projection=False)
    randomise(peers)
    peers.save_pretrained(folder / "nf4 half")
    with pytest.warns(AssumedRecipeWarning, match="bf16"):
        ours = VeraModel.from_pretrained(base(kind, folder, compute=half), folder / "nf4 half")
    assert torch.equal(ours.vera_A["default"], peers.base_model.vera_A["default"].float())


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging_is_pefts_and_unmerging_is_exact(kind, folder):
    peers, saved = peers_checkpoint(kind, folder, f"{kind} to merge")
    ours = VeraModel.from_pretrained(base(kind, folder), saved)
    before, state = logits(ours, some_ids()), _state(ours)
    with pytest.warns(VeraToolsWarning, match="is rounded to them again"):
        ours.merge_adapter(safe_merge=True)
    peers.merge_adapter(safe_merge=True)
    theirs = {name: module for name, module in peers.base_model.model.named_modules() if hasattr(module, "vera_A")}
    for name, layer in ours.vera_layers().items():
        mine = layer.kind.read(layer.base_layer)
        torch.testing.assert_close(mine, theirs[name].get_base_weight(), rtol=0, atol=1e-5, msg=name)
    close(logits(ours, some_ids()), logits(peers, some_ids()))
    effect = (logits(ours, some_ids()) - logits(base(kind, folder), some_ids())).abs().max()
    assert 0 < (logits(ours, some_ids()) - before).abs().max() < effect
    ours.unmerge_adapter()
    after = _state(ours)
    assert len(after) >= 2 * len(ours.vera_layers())
    assert after.keys() == state.keys()
    assert all(same_bits(after[name], value) for name, value in state.items())
    assert torch.equal(logits(ours, some_ids()), before)


def test_a_weight_that_an_evaluation_has_packed_anew_is_read_as_what_it_is():
    """On a CPU with AVX512-BF16. bitsandbytes, and PEFT with it, read other values then, without an error."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def new() -> VeraModel:
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        return VeraModel(torch.nn.Sequential(layer.to("cpu")), VeraConfig(r=4, target_modules=["0"]))

    fresh, used = new(), new()
    with torch.no_grad():
        used.eval()(torch.ones(1, 64))
    weight = used.model[0].weight
    if not getattr(weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no AVX512-BF16, for which bitsandbytes packs weights anew")
    expected = fresh.model[0].kind.read(fresh.model[0].base_layer)
    read = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert read.shape != expected.shape or not torch.allclose(read.float(), expected, rtol=0.1)
    for _ in range(2):  # and what the layer holds stays as it is
        mine = used.model[0].kind.read(used.model[0].base_layer)
        torch.testing.assert_close(mine, expected, rtol=2**-8, atol=0)  # bitsandbytes keeps the scales in bfloat16 then
        assert weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("kind", MERGEABLE)
def test_merging_for_good(kind, folder):
    saved = peers_checkpoint(kind, folder, f"{kind} for good")[1]
    ours = VeraModel.from_pretrained(base(kind, folder), saved)
    with pytest.warns(VeraToolsWarning, match="is rounded to them again"):
        ours.merge_adapter()
    merged = logits(ours, some_ids())
    ours.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraToolsWarning)
        plain = ours.merge_and_unload()
    assert not any("vera" in name for name, _ in plain.named_modules())
    assert torch.equal(logits(plain, some_ids()), merged)


@pytest.mark.parametrize("kind", MERGEABLE)
def test_a_broken_adapter_is_not_merged_safely(kind, folder):
    model = VeraModel(base(kind, folder), VeraConfig(**OPTIONS))
    before = logits(model, some_ids())
    last = list(model.vera_layers().values())[-1]
    with torch.no_grad():
        last.vera_lambda_b["default"][0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model, some_ids()), before)


def test_a_weight_that_cannot_be_read_is_not_merged_into(folder):
    model = VeraModel(base("float8", folder), VeraConfig(**OPTIONS))
    with pytest.raises(UsageError, match="q_proj: a weight of the kind float8_e4m3fn cannot be read and written"):
        model.merge_and_unload()


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_finds_every_quantised_layer(kind, folder):
    model = VeraModel(base(kind, folder), VeraConfig(r=4, target_modules="all-linear"))
    assert len(model.vera_layers()) == 14
    names = {
        "bitsandbytes 8 bit": "bnb 8bit",
        "bitsandbytes nf4": "bnb 4bit",
        "torchao int8": "torchao",
        "float8": "float8_e4m3fn",
    }
    assert model.get_model_status().quantization_backend == names.get(kind, kind)


def test_hqq_keeps_its_bias_when_it_is_merged_into(folder):
    core = pytest.importorskip("hqq.core.quantize")
    plain = torch.nn.Linear(64, 64)
    config = core.BaseQuantizeConfig(nbits=4, group_size=64)
    layer = core.HQQLinear(plain, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
    model = VeraModel(torch.nn.Sequential(layer), VeraConfig(r=4, target_modules=["0"]))
    zero = torch.zeros(1, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraToolsWarning)
        merged = model.merge_and_unload()
    assert torch.equal(merged(zero)[0], plain.bias)


def _state(model: VeraModel) -> dict[str, torch.Tensor]:
    """What the adapted layers hold of their base's weights, whatever its form."""
    found: dict[str, torch.Tensor] = {}

    def add(name: str, value: Any) -> None:
        if hasattr(value, "__tensor_flatten__"):  # torchao's
            parts = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
        elif isinstance(value, torch.Tensor):
            found[name] = value.detach().clone()
            parts = vars(value)  # bitsandbytes' scales
        else:
            parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for part, inner in parts.items():
            if part != "module":
                add(f"{name}.{part}", inner)

    for name, layer in model.vera_layers().items():
        for part, value in layer.kind.keep(layer.base_layer).items():
            add(f"{name}.{part}", value)
    return found
