"""VeraModel: adapters added, chosen, copied and moved; PEFT is the peer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.nn.models import (
    OPTIONS,
    Tiny,
    adapted,
    fresh,
    llama,
    logits,
    peft_model,
    randomise,
    some_ids,
    tiny,
    train,
    two_adapters,
)
from tests.peers import QUIET_PEERS, load_peft
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraLinear, VeraModel, save_adapter
from vera_tools.nn.projection import is_recorded, recorded, same_bits

pytestmark = QUIET_PEERS


# What a new adapter is.


def test_a_new_adapter_does_nothing_and_trains_only_its_vectors():
    base = llama()
    want = logits(base, some_ids())
    model = VeraModel(base, VeraConfig(**OPTIONS))
    assert torch.equal(logits(model, some_ids()), want)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "vera_lambda" in name}
    layer = model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, VeraLinear)
    assert (layer.vera_lambda_d["default"] == OPTIONS["d_initial"]).all()
    assert (layer.vera_lambda_b["default"] == 0).all()


def test_the_projections_are_pefts_bit_for_bit():
    ours, peers = fresh(), peft_model(llama())
    for name in ("vera_A", "vera_B"):
        mine, theirs = getattr(ours, name)["default"], getattr(peers.base_model, name)["default"]
        assert mine.shape == theirs.shape
        # On a machine without fused multiply-add PEFT's own draw is the one that differs.
        if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
            assert torch.equal(mine, theirs)


def test_without_init_weights_the_vectors_are_ones_and_normal():
    layer = next(iter(fresh(init_weights=False).vera_layers().values()))
    assert (layer.vera_lambda_b["default"] == 1).all()
    assert 0.3 < layer.vera_lambda_d["default"].std() < 2


@pytest.mark.parametrize(
    "options", [{}, {"vera_dropout": 0.3}, {"target_modules": "all-linear"}, {"init_weights": False}]
)
def test_the_same_state_gives_pefts_outputs_and_gradients(options):
    ours, peers = adapted(**options), peft_model(llama(), **options)
    randomise(peers)
    for model in (ours, peers):
        model.train()
        torch.manual_seed(11)
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
    theirs = {name.removeprefix("base_model."): p.grad for name, p in peers.named_parameters() if p.grad is not None}
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_bases_keep_exact_projections_and_float32_vectors(dtype):
    model, full = adapted(dtype), adapted()
    for name in ("vera_A", "vera_B"):
        assert same_bits(getattr(model, name)["default"], getattr(full, name)["default"])
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "vera_lambda" in n)
    output = model(some_ids()).logits
    assert output.dtype == dtype
    assert (output.float() - logits(full, some_ids())).abs().max() < 0.05
    losses = train(model)
    assert losses[-1] < losses[0]


def test_a_float64_base_computes_in_float64():
    model = adapted(torch.float64)
    assert model.vera_A["default"].dtype == torch.float64
    assert same_bits(model.vera_A["default"].float(), adapted().vera_A["default"])
    assert model(some_ids()).logits.dtype == torch.float64


# Several adapters.


def test_adapters_with_the_same_pair_share_one_buffer():
    model = two_adapters()
    assert model.vera_A["second"] is model.vera_A["default"]
    assert sum(1 for name, _ in model.named_buffers() if name.startswith("vera_")) == 2
    for layer in model.vera_layers().values():
        assert layer.vera_A["second"] is model.vera_A["default"]


def test_several_adapters_are_added_up_before_the_sum_is_rounded():
    model = adapted(torch.bfloat16)
    model.add_adapter("second", VeraConfig(**OPTIONS))
    randomise(model, seed=9)
    layer, x = next(iter(model.vera_layers().values())), torch.randn(4, 64).bfloat16()
    changes = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        wide = layer.get_delta_weight(name)
        changes[name] = x.float() @ wide.T
    model.set_adapter(["default", "second"])
    with torch.no_grad():
        base, found = layer.base_layer(x), layer(x)
    once = (base + changes["default"] + changes["second"]).bfloat16()
    twice = (base + changes["default"]).bfloat16() + changes["second"]
    assert found.dtype == torch.bfloat16
    off, off_twice = ((found != other.bfloat16()).float().mean() for other in (once, twice))
    assert off < 0.02 < 0.1 < off_twice


def test_a_pair_of_half_values_that_changed_by_less_than_they_tell_apart_is_another():
    model = fresh()
    half = (model.vera_A["default"].bfloat16(), model.vera_B["default"].bfloat16())
    record = recorded(half, "stored", prng_key=7)
    wide = (half[0].float(), half[1].float())
    assert is_recorded(wide, record)
    for place in (0, 1):
        changed = [own.clone() for own in wide]
        changed[place][0, 0] *= 1 + 2**-12
        assert torch.equal(changed[place].bfloat16(), half[place])
        assert not is_recorded((changed[0], changed[1]), record)


def test_other_values_stay_where_they_are():
    model = two_adapters()
    model.vera_A["second"] = model.vera_A["second"].to("meta")  # the one other device that every machine has
    assert model.get_model_status().devices == {"default": ["cpu"], "second": ["cpu", "meta"]}
    assert model.get_layer_status()[0].devices["second"] == ["cpu", "meta"]


@pytest.mark.parametrize("options", [{"r": 8}, {"target_modules": ["q_proj"]}])
def test_an_adapter_with_another_pair_gets_its_own(options, tmp_path):
    model = two_adapters(**options)
    assert model.vera_A["second"].shape != model.vera_A["default"].shape
    save_adapter(model, tmp_path / "a", "second")
    alone = load_peft(llama(), tmp_path / "a")
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, some_ids()), logits(alone, some_ids()), rtol=0, atol=1e-5)


def test_another_key_is_refused_in_pefts_words():
    model, peer = adapted(), peft_model(llama())
    config = VeraConfig(**{**OPTIONS, "projection_prng_key": 8})
    with pytest.raises(ValueError, match="Vera PRNG initialisation key must be the same for all adapters") as ours:
        model.add_adapter("second", config)
    import peft

    with pytest.raises(ValueError, match="Vera PRNG initialisation key") as theirs:
        peer.add_adapter("second", peft.VeraConfig(**{**OPTIONS, "projection_prng_key": 8}))
    assert str(ours.value) == str(theirs.value)
    assert list(model.peft_config) == ["default"]


def test_a_loaded_adapter_of_another_key_is_refused_too(tmp_path):
    save_adapter(adapted(projection_prng_key=8), tmp_path / "a")
    with pytest.raises(ValueError, match="must be the same for all adapters"):
        adapted().load_adapter(tmp_path / "a", "second")


def test_two_adapters_with_biases_are_refused():
    model = VeraModel(Tiny(), VeraConfig(r=4, target_modules=["0"], bias="vera_only"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", VeraConfig(r=4, target_modules=["0"]))


@pytest.mark.parametrize("name", ["", "a.b", "default", "__base__", "keys"])
def test_impossible_names_are_refused(name):
    with pytest.raises(UsageError):
        tiny().add_adapter(name, VeraConfig(r=4, target_modules=["0"]))


def test_set_adapter_chooses_what_is_computed_and_trained():
    model = two_adapters()
    first = logits(model, some_ids())
    model.set_adapter("second")
    second = logits(model, some_ids())
    assert not torch.equal(first, second)
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"second"}
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(model, some_ids()), first)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter(["default", "second"])
    both = logits(model, some_ids())
    assert not torch.equal(both, first)
    peer = peft_model(llama())
    import peft

    peer.add_adapter("second", peft.VeraConfig(**OPTIONS))
    randomise(peer)
    peer.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(peer, some_ids()), both, rtol=0, atol=1e-5)


def test_adding_an_adapter_leaves_what_is_trained_alone(tmp_path):
    model = adapted()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("second", VeraConfig(**OPTIONS))
    save_adapter(model, tmp_path / "a", "second")
    model.load_adapter(tmp_path / "a", "third")
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(wanted for name, wanted in after.items() if name not in before)


def test_delete_adapter():
    model = two_adapters(r=8)
    model.set_adapter("second")
    second = logits(model, some_ids())
    model.delete_adapter("default")
    assert torch.equal(logits(model, some_ids()), second)
    assert list(model.vera_A) == list(model.peft_config) == ["second"]
    assert not any(".default" in name for name in model.state_dict())
    with pytest.raises(UsageError, match="Adapter default does not exist"):
        model.set_adapter("default")


def test_deleting_the_active_adapter_says_which_is_active_now():
    model = two_adapters()
    with pytest.warns(VeraToolsWarning, match="Setting active adapter to second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]


def test_disable_adapter_computes_the_base_even_where_it_is_merged():
    model = adapted()
    base = logits(llama(), some_ids())
    want = logits(model, some_ids())
    for merged in (False, True):
        if merged:
            model.merge_adapter()
            want = logits(model, some_ids())
        with model.disable_adapter():
            assert torch.equal(logits(model, some_ids()), base)
        assert torch.equal(logits(model, some_ids()), want)


def test_the_end_of_an_inner_disable_adapter_does_not_end_the_outer_one():
    model = adapted()
    base, want = logits(llama(), some_ids()), logits(model, some_ids())
    with model.disable_adapter():
        with model.disable_adapter():
            pass
        assert torch.equal(logits(model, some_ids()), base)
    assert torch.equal(logits(model, some_ids()), want)


# State, copies, moves.


def test_state_dict_round_trip():
    model, other = adapted(), fresh()
    state = model.state_dict()
    assert {name for name in state if name.startswith("vera_")} == {"vera_A.default", "vera_B.default"}
    assert not any("vera_A" in name for name in state if name.startswith("model."))
    peers = {name.removeprefix("base_model.") for name in peft_model(llama()).state_dict()}
    assert state.keys() == {name for name in peers if not (name.startswith("model.") and "vera_A" in name)} - {
        name for name in peers if name.startswith("model.") and "vera_B" in name
    }
    assert other.load_state_dict(state).missing_keys == []
    assert torch.equal(logits(other, some_ids()), logits(model, some_ids()))


def test_state_dict_without_projections():
    model = adapted(save_projection=False)
    assert not any(name.startswith("vera_") for name in model.state_dict())
    other = fresh(save_projection=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, some_ids()), logits(model, some_ids()))


def test_loading_other_projections_changes_one_adapter_alone_and_rounds_nothing():
    model = two_adapters()
    before = model.vera_A["second"].clone()
    state = model.state_dict()
    model.load_state_dict({**state, "vera_A.default": state["vera_A.default"].double() + 1e-12})
    assert same_bits(model.vera_A["second"], before)
    assert torch.equal(model.vera_A["default"], state["vera_A.default"].double() + 1e-12)
    with pytest.raises(RuntimeError, match=r"vera_A.default: expected the shape \(16, 112\)"):
        model.load_state_dict({**state, "vera_A.default": torch.zeros(3, 3)})
    del state["vera_B.second"]
    with pytest.raises(RuntimeError, match=r"Missing key.*vera_B\.second"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), "torch.save"],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_share_one_pair_of_their_own(duplicate):
    model = two_adapters()
    if duplicate == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = duplicate(model)
    for layer in twin.vera_layers().values():
        assert layer.vera_A is twin.vera_A
        assert layer.vera_B is twin.vera_B
    assert twin.vera_A["default"] is twin.vera_A["second"]
    assert twin.vera_A["default"].data_ptr() != model.vera_A["default"].data_ptr()
    assert same_bits(twin.vera_A["default"], model.vera_A["default"])
    assert torch.equal(logits(twin, some_ids()), logits(model, some_ids()))
    twin.half()
    assert same_bits(twin.vera_B["second"], model.vera_B["second"])
    assert sum(name.startswith("vera_") for name, _ in twin.named_buffers()) == 2


CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "there and back": lambda m: m.double().half().float(),
    "inner": lambda m: m.model.half() and m,
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta": lambda m: m.to("meta"),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_moving_and_casting_never_change_or_duplicate_the_pair(cast):
    model = two_adapters()
    values = [t["default"].clone() for t in (model.vera_A, model.vera_B)]
    model = cast(model)
    for held, value in zip((model.vera_A, model.vera_B), values, strict=True):
        assert same_bits(held["default"], value)
        assert held["second"] is held["default"]
        assert all(layer.vera_A is model.vera_A for layer in model.vera_layers().values())
    if cast is CASTS["share_memory"]:
        assert model.vera_A["default"].is_shared()


def test_a_float64_model_widens_the_pair_exactly():
    model = adapted()
    before = model.vera_A["default"].clone()
    model.double()
    assert model.vera_A["default"].dtype == torch.float64
    assert same_bits(model.vera_A["default"].float(), before)
    assert model.record_of("default").recipe.name == "mt19937-f32-fused"


def test_a_model_cast_to_half_still_computes():
    model = adapted()
    want = logits(model, some_ids())
    got = logits(model.bfloat16(), some_ids())
    assert (got - want).abs().max() < 0.05


def test_meta_device_loading(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a")
    with torch.device("meta"):
        empty = llama()
    assert all(p.device.type == "meta" for p in empty.parameters())
    loaded = VeraModel.from_pretrained(empty, tmp_path / "a")
    assert all(p.device.type == "cpu" for name, p in loaded.named_parameters() if "vera_lambda" in name)
    assert same_bits(loaded.vera_A["default"], model.vera_A["default"])
    weights = {name: p for name, p in model.state_dict().items() if "vera" not in name}
    missing = loaded.load_state_dict(weights, strict=False, assign=True).missing_keys
    assert all("vera_" in name for name in missing)
    loaded.model.model.rotary_emb = llama().model.rotary_emb  # its buffers are in no state dict
    assert torch.equal(logits(loaded, some_ids()), logits(model, some_ids()))


def test_low_cpu_mem_usage_makes_the_vectors_on_the_meta_device():
    model = VeraModel(llama(), VeraConfig(**OPTIONS), low_cpu_mem_usage=True)
    vectors = [p for name, p in model.named_parameters() if "vera_lambda" in name]
    assert vectors
    assert all(p.device.type == "meta" for p in vectors)
    state = adapted().state_dict()
    model.load_state_dict(state, assign=True)
    assert torch.equal(logits(model, some_ids()), logits(adapted(), some_ids()))


def test_everything_else_is_the_wrapped_models():
    model = adapted()
    assert model.config is model.model.config
    assert model.get_base_model() is model.model
    assert model.generate(some_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    adapted().print_trainable_parameters()
    ours = capsys.readouterr().out
    peft_model(llama()).print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_a_transformer_encoder_layer_computes_the_adapter_in_evaluation_mode_too():
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = VeraModel(plain, VeraConfig(r=4, target_modules=["linear1", "linear2"]))
    randomise(model)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        training = model.train()(x)
        torch.testing.assert_close(model.eval()(x), training)
        with model.disable_adapter():
            assert not torch.allclose(model(x), training)
    pickle.loads(pickle.dumps(model))


def test_a_replica_for_another_device_is_made_once():
    model = tiny()
    first = model.vera_A.on("default", torch.device("meta"))
    assert model.vera_A.on("default", torch.device("meta")) is first
    assert model.vera_A.on("default", torch.device("cpu")) is model.vera_A["default"]
    model.half()
    assert model.vera_A.on("default", torch.device("meta")) is not first


def test_wrapping_twice_is_refused():
    model = tiny()
    for again in (model, model.model):
        with pytest.raises(UsageError, match="carries VeRA adapters already"):
            VeraModel(again, VeraConfig(r=4, target_modules=["0"]))
