"""Names of tensors that PEFT does not write: what PEFT makes of them, what we say, and what we write."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import vera_tools
from tests.adapters import WEIGHTS, edit, set_config
from tests.command import run_cli, run_json
from tests.peers import QUIET_PEERS
from tests.trained import distance, llama, load, logits, trained
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import FormatError

# Where a machine draws separately, what is stripped loads exactly in few places, and strip says so.
pytestmark = [*QUIET_PEERS, pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")]
INSIDE = "base_model.model."
VECTOR = "model.layers.0.self_attn.q_proj.vera_lambda_b"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter that PEFT trained and saved, its whole state dict, and its logits."""
    folder = tmp_path_factory.mktemp("made")
    llama().save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(llama())
        model.save_pretrained(folder / "adapter")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if "vera" in name}
    return folder / "base", folder / "adapter", state, logits(model)


def renamed(rename):
    return lambda tensors, state: {rename(name): tensor for name, tensor in tensors.items()}


def vectors(end):
    return renamed(lambda name: name + end if "lambda" in name else name)


ODD = {
    "compiled before PEFT": renamed(lambda name: name.replace(INSIDE, f"{INSIDE}_orig_mod.")),
    "compiled after PEFT": renamed(lambda name: f"_orig_mod.{name}"),
    "layers compiled": renamed(lambda name: name.replace(".self_attn.", "._orig_mod.self_attn.")),
    "FSDP inside": renamed(lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn.")),
    "FSDP outside": renamed(lambda name: f"_fsdp_wrapped_module.{name}"),
    "checkpointed": renamed(lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")),
    "data parallel": renamed(lambda name: f"module.{name}"),
    "data parallel and compiled": renamed(lambda name: f"module._orig_mod.{name}"),
    "data parallel before PEFT": renamed(lambda name: name.replace(INSIDE, f"{INSIDE}module.")),
    "PEFT inside PEFT": renamed(lambda name: name.replace(INSIDE, INSIDE * 2)),
    "no prefix": renamed(lambda name: name.removeprefix(INSIDE).removeprefix("base_model.")),
    "vectors without prefix": renamed(lambda name: name.removeprefix(INSIDE)),
    "vectors of default": vectors(".default"),
    "vectors of another": vectors(".vera"),
    "all of default": renamed(lambda name: f"{name}.default"),
    "all of another": renamed(lambda name: f"{name}.vera"),
    "weights": vectors(".weight"),
    "state dict": lambda tensors, state: state,
    "state dict of the layers": lambda tensors, state: {n: t for n, t in state.items() if n.startswith(INSIDE)},
    "compiled state dict": lambda tensors, state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "both": lambda tensors, state: {**tensors, **{f"{name}.default": tensor for name, tensor in tensors.items()}},
}


def put(folder: Path, tensors):
    """Write tensors that may share memory."""
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def odd(made, tmp_path):
    def write(change):
        _, adapter, state, _ = made
        folder = Path(shutil.copytree(adapter, tmp_path / "odd"))
        put(folder, change(load_file(adapter / WEIGHTS), state))
        return folder

    return write


def peft_takes(folder, expected) -> bool:
    """Whether PEFT loads the adapter and computes what it was trained to compute."""
    try:
        return distance(load(folder), expected) == 0
    except (ValueError, KeyError, RuntimeError):
        return False


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_verify_says_what_peft_does(change, made, odd):
    base, _, _, expected = made
    folder = odd(change)
    taken = peft_takes(folder, expected)
    for report in (one(folder), one(folder, base=base)):
        assert (report.verdict, failed(report)) == ("reproducible", {"tensors.names"})
        assert report.exit_code() == 1
        rows = {(load.loader, load.base_dtype): load.exact for load in report.loads if not load.options}
        assert rows["peft>=0.21", "float32"] is taken
        assert rows["peft>=0.11,<0.21", "float32"] is False
        assert rows["vera-tools", "float32"] is True
    message = message_of(report, "tensors.names")
    assert "convert --from auto" in message
    assert ("from 0.21 on, as long as the adapter is loaded as 'default'" in message) is taken


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
def test_whatever_is_written_has_pefts_names(change, made, odd, tmp_path):
    base, adapter, _, expected = made
    folder, names = odd(change), set(load_file(adapter / WEIGHTS))
    code, document = run_json("convert", folder, "--from", "auto", "-o", tmp_path / "clean")
    assert code == 0
    assert (document["from"], document["renamed"] > 0) == ("peft", True)
    vera_tools.strip_projections(folder, tmp_path / "stripped")
    vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    vera_tools.to_lora(folder, tmp_path / "lora", base=base)
    vera_tools.merge(folder, base=base, output=tmp_path / "merged")
    for written in ("clean", "embedded"):
        assert set(load_file(tmp_path / written / WEIGHTS)) == names
    for written in ("clean", "embedded", "stripped", "lora"):
        assert one_is_well(tmp_path / written)
        assert distance(load(tmp_path / written), expected) < 1e-6
    assert distance(llama(tmp_path / "merged"), expected) < 1e-6
    assert run_cli("convert", tmp_path / "clean", "--from", "auto", "-o", tmp_path / "again").returncode == 2


def one_is_well(folder) -> bool:
    report = one(folder)
    return report.verdict == "invalid" if folder.name == "lora" else report.ok


def test_in_place_and_recorded(made, odd):
    folder = odd(ODD["state dict"])
    vera_tools.record(folder)
    assert failed(one(folder)) == {"tensors.names"}
    vera_tools.from_foreign(folder, in_place=True)
    assert one(folder).ok
    assert one(folder).verdict == "reproducible"


def test_live_model_reads_them(made, odd):
    _, _, _, expected = made
    model = vera_tools.VeraModel.from_pretrained(llama(), odd(ODD["PEFT inside PEFT"]))
    assert distance(model, expected) < 1e-6


def test_a_part_of_the_models_own_may_be_called_module(made, odd):
    """Only the config tells it from a wrapper: PEFT writes the class that it was put around, where there is no task."""
    folder = odd(ODD["data parallel before PEFT"])
    set_config(folder, auto_mapping={"base_model_class": "DistributedDataParallel", "parent_library": "torch"})
    assert failed(one(folder)) == {"tensors.names"}
    set_config(folder, auto_mapping={"base_model_class": "Net", "parent_library": "__main__"})
    with Checkpoint.open(folder) as opened:
        assert "module.model.layers.0.self_attn.q_proj" in opened.layers
    assert statuses(one(folder))["tensors.names"] == "pass"


def test_two_values_of_one_tensor_are_refused(made, odd):
    folder = odd(ODD["both"])
    edit(folder, lambda tensors: tensors.update({f"{INSIDE}{VECTOR}.default": np.zeros(32, np.float32)}))
    with pytest.raises(FormatError, match="means the same one to PEFT"):
        Checkpoint.open(folder)
    assert one(folder).verdict == "invalid"


def test_layers_with_other_projections_are_refused(made, odd):
    folder = odd(ODD["state dict"])
    name = f"{INSIDE}model.layers.1.self_attn.v_proj.vera_B.default"
    edit(folder, lambda tensors: tensors.update({name: tensors[name] + 1}))
    with pytest.raises(FormatError, match="means the same one to PEFT"):
        Checkpoint.open(folder)


def test_two_adapters_in_one_file_are_refused_by_name(made, odd):
    def both(tensors, state):
        return {f"{name}.{adapter}": tensor for name, tensor in tensors.items() for adapter in ("default", "zweite")}

    with pytest.raises(FormatError, match=r"several adapters in one file.*found default, zweite.*selected_adapters"):
        Checkpoint.open(odd(both))


def test_a_saved_module_in_a_state_dict(tmp_path):
    """PEFT fails on it: KeyError; what it means is clear all the same."""
    llama().save_pretrained(tmp_path / "base")
    model = trained(llama(), modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path / "adapter")
    kept = {n: t for n, t in model.state_dict().items() if "vera" in n or "lm_head" in n}
    put(tmp_path / "adapter", kept)
    with pytest.raises(KeyError):
        load(tmp_path / "adapter")
    report = one(tmp_path / "adapter", base=tmp_path / "base")
    assert failed(report) == {"tensors.names"}
    assert not any(load.exact for load in report.loads if load.loader != "vera-tools")
    vera_tools.from_foreign(tmp_path / "adapter", tmp_path / "clean")
    assert one(tmp_path / "clean", base=tmp_path / "base").ok
    assert distance(load(tmp_path / "clean"), logits(model)) == 0
    vera_tools.merge(tmp_path / "adapter", base=tmp_path / "base", output=tmp_path / "merged")
    assert distance(llama(tmp_path / "merged"), logits(model)) < 1e-6


COPIES = {
    "both tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "head and biases": {"modules_to_save": ["lm_head"], "bias": "all"},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "neither": {},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("config", COPIES.values(), ids=COPIES)
def test_what_peft_writes_beside_saved_modules_is_accepted(config, tied, tmp_path):
    """After the vocabulary was resized, PEFT writes tables as they are called inside its wrapper, too."""
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    resized = llama(tmp_path / "base")
    resized.resize_token_embeddings(70)
    resized.save_pretrained(tmp_path / "resized")
    resized.config._name_or_path = str(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(resized, task_type="CAUSAL_LM", **config)
        model.save_pretrained(tmp_path / "adapter")
    expected, written = logits(model), load_file(tmp_path / "adapter" / WEIGHTS)
    copies = [name for name in written if ".modules_to_save." in name or ".original_module." in name]
    assert bool(copies) == ("modules_to_save" in config)
    for options in ({}, {"base": tmp_path / "resized"}):
        assert failed(one(tmp_path / "adapter", **options)) == set()
    vera_tools.strip_projections(tmp_path / "adapter", tmp_path / "stripped")
    vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert (tmp_path / "embedded" / WEIGHTS).read_bytes() == (tmp_path / "adapter" / WEIGHTS).read_bytes()
    assert run_cli("inspect", tmp_path / "adapter").returncode == 0
    assert run_cli("convert", tmp_path / "adapter", "--from", "auto", "-o", tmp_path / "x").returncode == 2
    vera_tools.to_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "resized")
    for output in ("embedded", "stripped", "lora"):
        base = llama(tmp_path / "base")
        base.resize_token_embeddings(70)
        assert distance(load(tmp_path / output, base), expected) < 1e-6


def test_the_names_of_a_normal_file_are_its_own(made):
    _, adapter, _, _ = made
    with Checkpoint.open(adapter) as opened:
        assert (opened.keys.odd, opened.keys.repeated, opened.is_odd) == ((), (), False)
        assert set(opened.weights.tensors) == set(load_file(adapter / WEIGHTS))
