"""Checkpoints to and from live models, with PEFT as the peer."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import vera_tools.nn
from tests.adapters import (
    CHECKPOINTS,
    GPT2,
    KEPT,
    NAMES,
    SEED_ONLY,
    SEED_ONLY_NAMES,
    base_of,
    edit_manifest,
    files_of,
    put_pickle,
)
from tests.command import run_cli
from tests.nn import crossing
from tests.nn.models import (
    OPTIONS,
    adapted,
    bert,
    fresh,
    llama,
    logits,
    peft_model,
    randomise,
    some_ids,
    train,
    two_adapters,
)
from tests.peers import QUIET_PEERS, base_model, distance, load_peft
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, UnprovenError, UsageError, VeraToolsWarning
from vera_tools.nn import VeraConfig, VeraModel, load_adapter, save_adapter

pytestmark = [pytest.mark.capability, *QUIET_PEERS]


def tolerance(name):
    return 4e-3 if "bf16" in name else 1e-5


def load(name, folder=None, **options):
    with warnings.catch_warnings():
        if name in SEED_ONLY_NAMES:
            warnings.simplefilter("ignore", AssumedRecipeWarning)
        return VeraModel.from_pretrained(base_model(name), folder or CHECKPOINTS / name, **options)


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers:vera_tools.errors.VeraToolsWarning")
@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_gives_the_logits_that_peft_gave(name):
    model = load(name)
    assert distance(model, name) <= tolerance(name)
    with model.disable_adapter():
        assert distance(model, name) > 5e-4
    model.merge_adapter()
    assert distance(model, name) <= (0.05 if "bf16" in name else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_loads_in_peft_to_the_same_logits(name, tmp_path):
    model = load(name)
    save_adapter(model, tmp_path / "out")
    assert distance(load_peft(base_model(name), tmp_path / "out"), name) <= tolerance(name)
    assert run_cli("verify", tmp_path / "out", "--base", base_of(name), "--require", "assumed").returncode == 0
    with Checkpoint.open(tmp_path / "out") as saved:
        assert saved.recorded.origin == ("assumed" if name in SEED_ONLY_NAMES else "stored")


@pytest.mark.parametrize("name", NAMES)
def test_saved_again_every_tensor_has_its_bytes(name, tmp_path):
    save_adapter(load(name), tmp_path / "out")
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (CHECKPOINTS / name, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for tensor in before:
        # The vectors of an adapter that PEFT 0.11 trained in bfloat16 are held, and saved, in float32.
        assert torch.equal(before[tensor].float(), after[tensor].float()), tensor
        if tensor in ("base_model.vera_A", "base_model.vera_B"):
            assert before[tensor].dtype == after[tensor].dtype


def test_saving_is_deterministic(tmp_path):
    model = load(GPT2)
    for folder in ("a", "b"):
        save_adapter(model, tmp_path / folder)
    for name in ("adapter_model.safetensors", "adapter_config.json", "vera_manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", SEED_ONLY_NAMES)
def test_a_seed_only_checkpoint_with_nothing_recorded_is_assumed_in_one_warning_or_refused(name):
    with pytest.warns(AssumedRecipeWarning) as caught:
        model = VeraModel.from_pretrained(base_model(name), CHECKPOINTS / name)
    assert len(caught) == 1
    through = "-via-bf16" if "bf16" in name else ""
    assert f"mt19937-f32-fused{through}" in str(caught[0].message)
    assert model.record_of("default").assumed
    base = base_model(name)
    with pytest.raises(UnprovenError):
        VeraModel.from_pretrained(base, CHECKPOINTS / name, strict=True)
    assert not any("vera" in key for key in base.state_dict()), "a refused adapter left traces"


def test_an_assumption_stays_one_in_what_is_saved(tmp_path):
    model = load(SEED_ONLY)
    for held in (model.vera_A, model.vera_B):  # other digests, of a pair that is still the assumed one
        held["default"].copy_(held["default"].bfloat16())
    assert model.record_of("default").recipe.name == "mt19937-f32-fused-via-bf16"
    model.peft_config["default"].save_projection = True
    save_adapter(model, tmp_path / "narrow")
    with pytest.raises(UnprovenError, match="was assumed when it was recorded"):
        VeraModel.from_pretrained(base_model(SEED_ONLY), tmp_path / "narrow", strict=True)
    model = load(SEED_ONLY)
    config = model.peft_config["default"]
    own = VeraConfig(r=16, target_modules=config.target_modules, projection_prng_key=config.projection_prng_key)
    model.add_adapter("own", own)  # of the same bits, drawn in this process
    assert {name: model.record_of(name).origin for name in ("default", "own")} == {"default": "assumed", "own": "live"}


def test_an_adapter_trained_on_bfloat16_keeps_its_rounded_pair_on_a_float32_base(tmp_path):
    name = "peft-0.21.2-llama-bf16-seedonly"
    save_adapter(load(name), tmp_path / "out")  # records what bfloat16 base it was trained on
    wide = VeraModel.from_pretrained(base_model(SEED_ONLY), tmp_path / "out")
    pair = [wide.vera_A["default"], wide.vera_B["default"]]
    assert all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in pair)


WRONG_RECORDS = {
    "digest": lambda manifest: manifest["projections"]["vera_B"].update(sha256="0" * 64),
    "recipe": lambda manifest: manifest["recipe"].update(name="mt19937-f32-separate", rounding="separate"),
}


@pytest.mark.parametrize("what", WRONG_RECORDS)
def test_a_regenerated_pair_that_is_not_the_recorded_one_is_refused(tmp_path, what):
    model = fresh(save_projection=False)
    save_adapter(model, tmp_path / "a")
    edit_manifest(tmp_path / "a", WRONG_RECORDS[what])
    with pytest.raises(CheckFailedError, match="not what is recorded of it"):
        VeraModel.from_pretrained(llama(), tmp_path / "a")


def test_the_record_in_the_weights_file_is_enough(tmp_path):
    model = adapted(save_projection=False)
    save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "vera_manifest.json").unlink()
    again = VeraModel.from_pretrained(llama(), tmp_path / "a", strict=True)
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))


def test_twelve_steps_of_training_give_pefts_losses_and_checkpoint(tmp_path):
    ours, peers = fresh(), peft_model(llama())
    assert ours.get_nb_trainable_parameters() == peers.get_nb_trainable_parameters()
    losses = train(ours)
    np.testing.assert_allclose(losses, train(peers), rtol=0, atol=1e-5)
    assert losses[-1] < losses[0] - 0.02
    ids = some_ids()
    ours.save_pretrained(tmp_path / "ours")
    peers.save_pretrained(tmp_path / "peers")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "peers"))
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(load_peft(llama(), tmp_path / "ours"), ids), logits(ours, ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(VeraModel.from_pretrained(llama(), tmp_path / "peers"), ids), logits(peers, ids), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("bias", ["all", "vera_only"])
def test_biases_and_saved_modules_are_trained_saved_and_loaded_as_peft_does(bias, tmp_path):
    options = {"bias": bias, "task_type": "SEQ_CLS", "target_modules": ["query", "dense"]}
    ours = VeraModel(bert(layers=2), VeraConfig(**{**OPTIONS, **options}))
    peers = peft_model(bert(layers=2), **options)
    assert ours.get_nb_trainable_parameters() == peers.get_nb_trainable_parameters()

    def step(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        model(input_ids=some_ids(), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()

    step(ours), step(peers)
    ours.save_pretrained(tmp_path / "ours")
    peers.save_pretrained(tmp_path / "peers")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "peers"))
    # With bias="all" PEFT saves a saved module's bias twice more, under the names it has in memory.
    twice = {name for name in second if ".modules_to_save." in name or ".original_module." in name}
    assert first.keys() == second.keys() - twice
    assert any(name.endswith(".bias") for name in first)
    config = [json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "peers")]
    assert set(config[0]["modules_to_save"]) == set(config[1]["modules_to_save"]) == {"classifier", "score"}
    want = logits(peers, some_ids())
    for folder in ("ours", "peers"):
        for loader in (load_peft, VeraModel.from_pretrained):
            got = logits(loader(bert(layers=2), tmp_path / folder), some_ids())
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "head"), [("QuestionAnswering", "qa_outputs"), ("TokenClassification", "classifier")], ids=str
)
def test_the_head_of_a_task_is_trained_and_saved_as_peft_does(task, head, tmp_path):
    task_type = {"QuestionAnswering": "QUESTION_ANS", "TokenClassification": "TOKEN_CLS"}[task]
    options = {"task_type": task_type, "target_modules": ["query", "value"]}
    ours, peers = VeraModel(bert(task), VeraConfig(**{**OPTIONS, **options})), peft_model(bert(task), **options)
    assert ours.get_nb_trainable_parameters() == peers.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path / "ours")
    peers.save_pretrained(tmp_path / "peers")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "peers"))
    assert first.keys() == second.keys()
    assert f"base_model.model.{head}.weight" in first
    VeraModel.from_pretrained(bert(task), tmp_path / "peers")


def test_the_head_of_the_first_adapters_task_is_every_adapters_as_with_peft(tmp_path):
    options = {"target_modules": ["query"], "modules_to_save": ["pooler"]}
    made_by = {"ours": vera_tools.nn, "peers": peft}
    for folder, library in made_by.items():
        first = library.VeraConfig(**{**OPTIONS, "target_modules": ["query"], "task_type": "SEQ_CLS"})
        model = library.get_peft_model(bert(), first)
        with warnings.catch_warnings():
            warnings.simplefilter("error", VeraToolsWarning)
            model.add_adapter("second", library.VeraConfig(**{**OPTIONS, **options}))
        model.save_pretrained(tmp_path / folder)
    written = [load_file(tmp_path / folder / "second" / "adapter_model.safetensors") for folder in made_by]
    assert written[0].keys() == written[1].keys()
    assert "base_model.model.classifier.weight" in written[0]
    config = [json.loads((tmp_path / f / "second" / "adapter_config.json").read_text()) for f in made_by]
    assert set(config[0]["modules_to_save"]) == set(config[1]["modules_to_save"]) == {"pooler", "classifier", "score"}


def test_several_adapters_are_saved_as_peft_lays_them_out(tmp_path):
    model = two_adapters(target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "second" / "adapter_config.json").exists()
    # The pair of "second" is its own, because it is for narrower layers. PEFT cannot hold both, but loads each alone.
    for name, folder in (("default", tmp_path / "out"), ("second", tmp_path / "out" / "second")):
        model.set_adapter(name)
        got = logits(load_peft(llama(), folder), some_ids())
        torch.testing.assert_close(got, logits(model, some_ids()), rtol=0, atol=1e-5)


def test_pefts_auto_class_finds_the_base_of_what_was_saved(tmp_path, monkeypatch):
    """Without a task the config has to name the base's class, as PEFT's own does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    llama().save_pretrained(tmp_path / "base")
    base = type(llama()).from_pretrained(tmp_path / "base")
    model = VeraModel(base, VeraConfig(**OPTIONS))
    randomise(model)
    model.save_pretrained(tmp_path / "ours")
    peft_model(llama()).save_pretrained(tmp_path / "peers")
    ours, peers = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "peers"))
    assert ours["auto_mapping"] == peers["auto_mapping"]
    again = peft.AutoPeftModel.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(again, some_ids()), logits(model, some_ids()), rtol=0, atol=1e-5)
    assert model.peft_config["default"].auto_mapping is None, "saving changed the model's config"


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"task_type": "CAUSAL_LM"}, None),
        ({"auto_mapping": {"base_model_class": "Mine"}}, {"base_model_class": "Mine"}),
    ],
    ids=["task", "kept"],
)
def test_a_task_needs_no_auto_mapping_and_one_that_is_there_is_kept(options, written, tmp_path):
    fresh(**options).save_pretrained(tmp_path / "a")
    assert VeraConfig.from_pretrained(tmp_path / "a").auto_mapping == written


def test_vectors_without_values_cannot_be_saved(tmp_path):
    model = VeraModel(llama(), VeraConfig(**OPTIONS), low_cpu_mem_usage=True)
    with pytest.raises(UsageError, match=r"layers.0.mlp.down_proj.vera_lambda_b: is on the meta device"):
        model.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"mine")
    (tmp_path / "adapter_config.json").write_text("old")
    model = fresh()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "vera_manifest.json",
    ]
    VeraModel.from_pretrained(llama(), tmp_path, strict=True)


@pytest.mark.parametrize("options", [{"num_key_value_heads": 4}, {"intermediate_size": 160}])
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_changes(options, tmp_path):
    save_adapter(fresh(), tmp_path / "a")
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    other = LlamaForCausalLM(LlamaConfig(**{**shape, "num_attention_heads": 4, "num_key_value_heads": 2, **options}))
    keys = list(other.state_dict())
    with pytest.raises(CheckFailedError, match=r"vera_lambda_b|too small"):
        VeraModel.from_pretrained(other, tmp_path / "a")
    assert list(other.state_dict()) == keys


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("classifier.weight", (1, 32), r"classifier.weight: the model has another shape \(expected \[1, 32\]"),
        ("classifier.bias", (1,), r"classifier.bias: the model has another shape"),
        ("query.base_layer.bias", (1,), r"query.base_layer.bias: the model has another shape"),
        ("query.vera_lambda_b", (32, 1), r"does not fit vera_lambda_b \(expected out_features \[32, 1\], found 32\)"),
        ("query.vera_lambda_d", (16, 1), r"vera_lambda_d contradicts .* \(expected 16, found \[16, 1\]\)"),
    ],
)
def test_no_tensor_is_spread_over_a_larger_one(name, shape, words, tmp_path):
    """torch copies a row into every row of a larger tensor, and says nothing."""
    options = {**OPTIONS, "bias": "vera_only", "task_type": "SEQ_CLS", "target_modules": ["query"]}
    model = VeraModel(bert(), VeraConfig(**options))
    save_adapter(model, tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    full = next(key for key in tensors if key.endswith(name))
    save_file({**tensors, full: torch.ones(shape)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "vera_manifest.json").unlink()  # or it is refused for what it was
    for load_into in (lambda: VeraModel.from_pretrained(bert(), tmp_path), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(CheckFailedError, match=words):
            load_into()
    after = model.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_bias_of_two_names_is_saved_under_both_as_peft_does(tmp_path):
    options = {"bias": "all", "target_modules": ["query"]}
    VeraModel(bert("MaskedLM"), VeraConfig(**{**OPTIONS, **options})).save_pretrained(tmp_path / "ours")
    peft_model(bert("MaskedLM"), **options).save_pretrained(tmp_path / "peers")
    first, second = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "peers"))
    assert first.keys() == second.keys()
    for folder in ("ours", "peers"):
        VeraModel.from_pretrained(bert("MaskedLM"), tmp_path / folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    save_adapter(fresh(), tmp_path / "a")
    with pytest.raises(CheckFailedError, match=r"6 tensors are missing from the checkpoint \(model.layers.2"):
        VeraModel.from_pretrained(llama(layers=3), tmp_path / "a")
    with pytest.raises(CheckFailedError, match=r"6 tensors have no place in the model \(model.layers.1"):
        VeraModel.from_pretrained(llama(layers=1), tmp_path / "a")


def test_a_pair_that_no_recipe_makes_is_never_saved_without_it(tmp_path):
    save_adapter(fresh(), tmp_path / "a")
    model = VeraModel.from_pretrained(llama(), tmp_path / "a")
    state = model.state_dict()
    model.load_state_dict({**state, "vera_A.default": state["vera_A.default"] * 2})
    model.save_pretrained(tmp_path / "kept")  # stored: fine, with no recipe in the manifest
    assert json.loads((tmp_path / "kept" / "vera_manifest.json").read_text())["recipe"] is None
    model.peft_config["default"].save_projection = False
    with pytest.raises(UsageError, match="would be lost"):
        model.save_pretrained(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_saving_seed_only_on_a_half_base_says_that_peft_would_draw_another_pair(tmp_path):
    model = fresh(torch.bfloat16, save_projection=False)
    with pytest.warns(VeraToolsWarning, match="PEFT would draw others"):
        save_adapter(model, tmp_path / "a")
    again = VeraModel.from_pretrained(llama(torch.bfloat16), tmp_path / "a", strict=True)
    assert torch.equal(again.vera_B["default"], model.vera_B["default"])


def test_a_legacy_pickle_is_read_on_request(checkpoint):
    name = "peft-0.11.1-llama-f32-kept"
    folder = checkpoint(name)
    put_pickle(folder)
    assert distance(load(name, folder, allow_pickle=True), name) <= 1e-5


def test_load_adapter_on_a_plain_model_and_on_an_adapted_one(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a")
    again = load_adapter(llama(), tmp_path / "a")
    assert load_adapter(again, tmp_path / "a", "twin") is again
    assert again.vera_A["twin"] is again.vera_A["default"]
    assert again.active_adapters == ["default"]
    assert not any(p.requires_grad for p in again.parameters())
    again.set_adapter("twin")
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))


def test_an_adapter_on_the_hub(hub):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "adapters/"))
    model = VeraModel.from_pretrained(base_model(KEPT), "hf://ann/x/adapters")
    assert distance(model, KEPT) <= 1e-5


def test_revision_and_subfolder_are_taken_as_peft_takes_them(hub, tmp_path):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "adapters/"))
    config = VeraConfig.from_pretrained("hf://ann/x", "adapters", revision="main", token=None)
    assert config == VeraConfig.from_pretrained(CHECKPOINTS / KEPT)
    with pytest.raises(UsageError, match="hf://owner/name@v1"):
        VeraConfig.from_pretrained(CHECKPOINTS / KEPT, revision="v1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        VeraConfig.from_pretrained("hf://ann/x/adapters", local_files_only=True)
    with pytest.raises(TypeError, match="'r'"):  # PEFT takes it and leaves it: the file's rank holds
        VeraConfig.from_pretrained(CHECKPOINTS / KEPT, r=3)
    for reference, options in (
        ("hf://ann/x", {"revision": "main", "subfolder": "adapters"}),
        ("hf://ann/x/adapters", {"revision": "main"}),
        (CHECKPOINTS, {"subfolder": KEPT}),
    ):
        assert distance(load_adapter(base_model(KEPT), reference, **options), KEPT) <= 1e-5
    with pytest.raises(UsageError, match="hf://owner/name@v1/sub"):
        load_adapter(base_model(KEPT), CHECKPOINTS / KEPT, revision="v1", subfolder="sub")


def test_pefts_further_arguments_are_taken_where_they_change_nothing(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=True, save_embedding_layers="auto")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    options = {"low_cpu_mem_usage": True, "autocast_adapter_dtype": True, "torch_device": "cpu"}
    again = VeraModel.from_pretrained(llama(), tmp_path, config=None, **options)
    again.load_adapter(tmp_path, "second", **options)
    assert torch.equal(logits(again, some_ids()), logits(model, some_ids()))
    for name, value in (("ignore_mismatched_sizes", True), ("cache_dir", "cache"), ("ephemeral_gpu_offload", True)):
        base = llama()
        with pytest.raises(UsageError, match=f"{name}: is not supported"):
            load_adapter(base, tmp_path, **{name: value})
        VeraModel(base, VeraConfig(**OPTIONS))
    with pytest.raises(UsageError, match="safe_serialization: is not supported"):
        model.save_pretrained(tmp_path / "not", safe_serialization=False)
    assert not (tmp_path / "not").exists()
    with pytest.raises(TypeError, match="low_cpu_mem"):
        load_adapter(llama(), tmp_path, low_cpu_mem=True)


def test_push_to_hub_is_not_the_base_models():
    with pytest.raises(UsageError, match="vera-tools push"):
        fresh().push_to_hub("ann/x")


def test_neither_transformers_nor_peft_is_needed():
    code = "import sys, vera_tools.nn.io, vera_tools.nn.peft; print(*({'peft', 'transformers'} & {*sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


@pytest.mark.long
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs AVX2")
def test_a_seed_only_checkpoint_loads_bit_identically_on_a_cpu_of_another_kind(tmp_path, separate_kernels):
    """Saved without AVX2 and loaded with it, then the other way round; PEFT gets other projections both times."""
    assert separate_kernels(crossing.save, tmp_path / "plain") == "DEFAULT"
    assert crossing.load(tmp_path / "plain") == {"ours": True, "peers": False}
    crossing.save(tmp_path / "vector")
    assert separate_kernels(crossing.load, tmp_path / "vector") == {"ours": True, "peers": False}
