"""What code for PEFT calls, beside what the other modules test: PEFT's own suite (tests/peer) says what that is."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch

import vera_tools.nn
from tests import ROOT
from tests.nn.models import (
    OPTIONS,
    Tiny,
    adapted,
    bert,
    fresh,
    llama,
    logits,
    made,
    randomise,
    some_ids,
    tiny,
    two_adapters,
)
from tests.peers import QUIET_PEERS
from vera_tools.checkpoints import peft_arguments
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsWarning
from vera_tools.nn import (
    VeraConfig,
    VeraModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)

pytestmark = QUIET_PEERS


def vector_dtypes(model):
    return {p.dtype for name, p in model.named_parameters() if model.prefix in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_in_half_precision_where_asked(dtype, tmp_path):
    model = VeraModel(llama(dtype), VeraConfig(**OPTIONS), autocast_adapter_dtype=False)
    model.add_adapter("second", VeraConfig(**OPTIONS), autocast_adapter_dtype=False)
    randomise(model)
    assert vector_dtypes(model) == {dtype}
    assert model.vera_A["default"].dtype == torch.float32
    expected = logits(model, some_ids())
    model.save_pretrained(tmp_path)

    again = VeraModel.from_pretrained(llama(dtype), tmp_path, autocast_adapter_dtype=False)
    assert vector_dtypes(again) == {dtype}
    assert torch.equal(logits(again, some_ids()), expected)
    again.load_adapter(tmp_path, "wide")
    assert again.vera_layers()["model.layers.0.self_attn.q_proj"].vera_lambda_b["wide"].dtype == torch.float32
    again.set_adapter("wide")
    assert torch.equal(logits(again, some_ids()), expected)


def test_a_name_that_is_there_gets_the_checkpoints_values_in_place(tmp_path):
    model = adapted()
    expected = logits(model, some_ids())
    model.save_pretrained(tmp_path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    randomise(model, seed=9)
    assert not torch.equal(logits(model, some_ids()), expected)
    assert model.load_adapter(tmp_path, "default", is_trainable=True) == ([], [])
    assert torch.equal(logits(model, some_ids()), expected)
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in parameters]

    for other in ({"r": 8}, {"target_modules": ["q_proj"]}):
        with pytest.raises(UsageError, match="is another one"):
            fresh(**other).load_adapter(tmp_path, "default")
    model.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        model.load_adapter(tmp_path, "default")


def test_an_adapter_that_is_loaded_to_be_trained_is(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = VeraModel.from_pretrained(llama(), tmp_path)
    assert not any(p.requires_grad for p in model.parameters())
    model.load_adapter(tmp_path, "second", is_trainable=True)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}


def test_a_config_in_the_place_of_the_checkpoints(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    config = VeraConfig(**{**OPTIONS, "vera_dropout": 0.5})
    again = VeraModel.from_pretrained(llama(), tmp_path, config=config)
    assert again.peft_config["default"].vera_dropout == 0.5
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))
    for name, value in (("projection_prng_key", 8), ("r", 8)):
        with pytest.raises(UsageError, match=f"config: {name}"):
            VeraModel.from_pretrained(llama(), tmp_path, config=VeraConfig(**{**OPTIONS, name: value}))


def test_a_checkpoint_of_an_older_layout(tmp_path):
    class Older(Tiny):
        def __init__(self):
            super().__init__()
            self.middle = self.inner
            del self.inner

        def forward(self, x):
            return self.head(self.middle(x))

    older = VeraModel(Older(), VeraConfig(r=4, target_modules=["0", "2"]))
    randomise(older)
    older.save_pretrained(tmp_path)
    with pytest.raises(CheckFailedError, match="does not fit"):
        VeraModel.from_pretrained(Tiny(), tmp_path)
    x = torch.randn(3, 6)
    for model, options in ((Tiny(), {"key_mapping": {"^middle": "inner"}}), (Tiny(), {})):
        if not options:
            model._checkpoint_conversion_mapping = {"^middle": "inner"}
        assert torch.equal(VeraModel.from_pretrained(model, tmp_path, **options)(x), older.eval()(x))
    with pytest.raises(UsageError, match="one name"):
        VeraModel.from_pretrained(Tiny(), tmp_path, key_mapping={r"\.(0|2)\.": ".0."})


@pytest.mark.parametrize("options", [{}, {"save_projection": False}, {"bias": "all"}, {"modules_to_save": ["head"]}])
def test_the_state_dict_is_that_of_the_checkpoint(options, tmp_path):
    from safetensors.torch import load_file

    model = tiny(**options)
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)

    other = VeraModel(Tiny(), VeraConfig(**{"r": 4, "target_modules": ["0", "2"], **options}))
    assert set_peft_model_state_dict(other, state) == ([], [])
    x = torch.randn(3, 6)
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_a_state_dict_that_does_not_fit():
    model = tiny()
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    lost = "base_model.model.inner.0.vera_lambda_b"
    result = set_peft_model_state_dict(model, {**{k: v for k, v in state.items() if k != lost}, "else": state[lost]})
    assert result == (["model.inner.0.vera_lambda_b.default"], ["else"])
    with pytest.raises(CheckFailedError, match="size mismatch"):
        set_peft_model_state_dict(model, {**state, lost: state[lost][1:]})
    before = model.vera_layers()["inner.0"].vera_lambda_b["default"].clone()
    with pytest.warns(VeraToolsWarning, match="left as it was"):
        set_peft_model_state_dict(model, {**state, lost: state[lost][1:]}, ignore_mismatched_sizes=True)
    assert torch.equal(model.vera_layers()["inner.0"].vera_lambda_b["default"], before)
    with pytest.raises(ValueError, match="however they were not present"):
        set_peft_model_state_dict(model, {k: v for k, v in state.items() if "vera_A" not in k})


def test_projections_that_come_with_a_state_dict_are_one_adapters_own():
    model = two_adapters()
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    state["base_model.vera_A"] += 1
    kept = model.vera_A["second"].clone()
    set_peft_model_state_dict(model, state)
    assert torch.equal(model.vera_A["default"], state["base_model.vera_A"])
    assert torch.equal(model.vera_A["second"], kept)
    model.vera_A["default"] += 1
    assert torch.equal(model.vera_A["default"], state["base_model.vera_A"] + 1)
    with pytest.raises(KeyError):
        model.vera_A["third"] = kept


def test_the_bases_own_state_dict_is_found_below_adapters():
    base = Tiny()
    expected = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = VeraModel(base, VeraConfig(r=4, target_modules=["0"], modules_to_save=["head"]))
    found = get_base_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    set_base_model_state_dict(model, {name: tensor + 1 for name, tensor in expected.items()})
    assert torch.equal(model.vera_layers()["inner.0"].weight, expected["inner.0.weight"] + 1)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        set_base_model_state_dict(model, {"inner.0.weight": expected["inner.0.weight"]})
    result = set_base_model_state_dict(model, {"inner.0.weight": expected["inner.0.weight"], "x": 0}, strict=False)
    assert result.unexpected_keys == ["x"]
    assert len(result.missing_keys) == len(expected) - 1
    model.merge_adapter()
    for call in (lambda: get_base_model_state_dict(model), lambda: set_base_model_state_dict(model, expected)):
        with pytest.raises(UsageError, match=r"hold an adapter, which is merged; call unmerge_adapter\(\) first"):
            call()


def test_a_saved_module_knows_its_own_adapters_only():
    model = VeraModel(bert(), VeraConfig(r=4, target_modules=["query"]))
    model.add_adapter("headed", VeraConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    (head,) = model.saved_modules().values()
    assert head.active_adapters == []
    model.set_adapter("headed")
    assert head.active_adapters == ["headed"]
    assert model.modules_to_save == {"classifier"}
    assert model.targeted_module_names == ["bert.encoder.layer.0.attention.self.query"]
    assert model.get_model_status().active_adapters == ["headed"]
    model.set_adapter("default")
    assert model.get_model_status().active_adapters == ["default"]
    assert model.has_active_enabled_adapter
    model.disable_adapter_layers()
    assert not model.has_active_enabled_adapter


def test_layers_that_do_not_agree_are_said_before_adapters_are_disabled():
    model = adapted()
    next(iter(model.vera_layers().values())).enable_adapters(False)
    message = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(VeraToolsWarning, match=message), model.disable_adapter():
        pass
    assert not any(layer.disable_adapters for layer in model.vera_layers().values())


def test_a_base_that_checkpoints_its_gradients_is_made_ready():
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = VeraModel(base, VeraConfig(**OPTIONS)).train()
    randomise(model)
    model(some_ids(), labels=some_ids()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)

    class Embedded(Tiny):
        def get_input_embeddings(self):
            return self.inner[0]

    plain = Embedded()
    VeraModel(plain, VeraConfig(r=4, target_modules=["2"])).prepare_model_for_gradient_checkpointing(plain)
    assert plain.inner[0](torch.randn(2, 6)).requires_grad


def test_the_card_is_kept_and_completed(tmp_path):
    base = bert()
    base.config._name_or_path = "ann/tiny"
    model = VeraModel(base, VeraConfig("SEQ_CLS", r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text("utf-8")
    for line in ("library_name: peft", "base_model: ann/tiny", "pipeline_tag: text-classification", "# A VeRA adapter"):
        assert line in text
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# Mine\r\n")
    model.save_pretrained(tmp_path)
    mine = (tmp_path / "README.md").read_bytes()
    assert mine.startswith(b"---\r\nlicense: mit\r\n")
    assert mine.endswith(b"---\r\n# Mine\r\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == mine
    base.config._name_or_path = "/home/ann/tiny"
    model.save_pretrained(tmp_path / "local")
    assert "ann" not in (tmp_path / "local/README.md").read_text("utf-8")
    for broken in (b"---\n[\n---\n", b"\xff"):
        (tmp_path / "README.md").write_bytes(broken)
        with pytest.warns(VeraToolsWarning, match="left as it is"):
            model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_bytes() == broken


def test_a_safe_merge_raises_what_pefts_does():
    model = adapted()
    next(iter(model.vera_layers().values())).vera_lambda_b["default"].data[0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_the_config_has_pefts_methods(tmp_path):
    config = VeraConfig("CAUSAL_LM", r=4)
    assert config.task_type == "CAUSAL_LM"
    assert config.peft_type.value == "VERA" == f"{config.peft_type}"
    assert not config.is_prompt_learning
    config.save_pretrained(tmp_path / "below")
    path = tmp_path / "below/adapter_config.json"
    assert VeraConfig.from_json_file(path) == config.to_dict()
    path.write_text(path.read_text().replace("{", '{"runtime_config": {},', 1))
    assert VeraConfig.from_json_file(path) == config.to_dict()
    assert VeraConfig.from_pretrained(tmp_path, subfolder="below").r == 4
    with pytest.raises(ValueError, match=r"Invalid task type: 'x'\. Must be one of the following task types: SEQ_CLS"):
        VeraConfig(task_type="x")


def test_arguments_in_pefts_order(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path, True, ["second"], False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second"]
    model = VeraModel.from_pretrained(model=llama(), model_id=tmp_path / "second", adapter_name="x", token=None)
    model.add_adapter(adapter_name="y", peft_config=VeraConfig(**OPTIONS))
    assert list(model.peft_config) == ["x", "y"]
    with pytest.raises(ValueError, match="Adapter with name 'y' already exists"):
        model.add_adapter("y", VeraConfig(**OPTIONS))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")


def test_the_trainers_card_is_that_of_the_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = (tmp_path / "README.md").read_bytes()
    (tmp_path / "README.md").unlink()
    model.create_or_update_model_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == expected
    assert model.peft_type == "VERA"


def named_as_in_peft():
    import peft

    pairs = [(VeraModel, peft.PeftModel, name) for name in ("from_pretrained", "load_adapter", "save_pretrained")]
    pairs += [(VeraModel, peft.PeftModel, name) for name in ("add_adapter", "set_adapter", "set_requires_grad")]
    pairs += [(VeraModel, peft.tuners.vera.VeraModel, name) for name in ("merge_and_unload", "merge_adapter")]
    pairs += [(vera_tools.nn, peft, name) for name in vera_tools.nn.__all__ if name.startswith(("get_", "set_"))]
    pairs += [(VeraConfig, peft.VeraConfig, name) for name in ("from_pretrained", "save_pretrained", "from_json_file")]
    layer = peft.tuners.vera.layer.Linear
    layers = ("merge", "unmerge", "get_delta_weight", "delete_adapter", "reset_vera_parameters", "enable_adapters")
    return pairs + [(vera_tools.nn.VeraLinear, layer, name) for name in layers]


@pytest.mark.parametrize(
    ("ours", "theirs", "name"), named_as_in_peft(), ids=lambda value: getattr(value, "__name__", value)
)
def test_arguments_have_pefts_names_and_order(ours, theirs, name):
    mine, pefts = (list(inspect.signature(getattr(owner, name)).parameters.values()) for owner in (ours, theirs))
    by_place = [p.name for p in pefts if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in mine if p.kind is p.POSITIONAL_OR_KEYWORD] == by_place
    known = {p.name: p.default for p in mine}
    different = {p.name for p in pefts if p.name in by_place and known[p.name] is not p.default != known[p.name]}
    assert different <= {"is_main_process"}, "None is rank 0 here"


def test_what_is_refused_is_documented():
    from huggingface_hub import hf_hub_download

    text = (ROOT / "docs/training.md").read_text("utf-8")
    known = peft_arguments.LOADING | peft_arguments.SAVING
    refused = [name for name, argument in known.items() if argument.same is not None]
    assert [name for name in refused if f"`{name}" not in text] == []
    # What PEFT passes on to the Hub's client, but for what it is called with itself.
    internal = {"repo_id", "filename", "subfolder", "revision", "library_name", "library_version"}
    internal |= {"headers", "tqdm_class", "dry_run"}
    assert inspect.signature(hf_hub_download).parameters.keys() - internal <= known.keys()


def test_errors_are_of_pefts_kinds(tmp_path):
    import peft

    fresh().save_pretrained(tmp_path)
    state = get_peft_model_state_dict(fresh())
    shorter = {name: tensor[1:] if "lambda_b" in name else tensor for name, tensor in state.items()}

    def loaded_onto_another_base(library):
        model = getattr(library, "PeftModel", VeraModel)
        model.from_pretrained(llama(head_dim=8), tmp_path)

    kinds = {
        RuntimeError: (
            lambda library: library.set_peft_model_state_dict(made(library), shorter),
            loaded_onto_another_base,
        ),
        TypeError: (
            lambda library: made(library).merge_adapter(adapter_names="default"),
            lambda library: made(library, target_modules=["q_proj", "embed_tokens"]),
        ),
        ValueError: (
            lambda library: made(library, target_modules=["nothing"]),
            lambda library: made(library).set_adapter("other"),
            lambda library: made(library).delete_adapter("other"),
            lambda library: made(library).add_adapter("default", library.VeraConfig(**OPTIONS)),
        ),
    }
    for kind, calls in kinds.items():
        for call in calls:
            for library in (peft, vera_tools.nn):
                with pytest.raises(kind):
                    call(library)
