"""The sweep over one class of each kind, as it is run over all; and what it judges by."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.architectures import bases, judging, sweep, table, tiny
from vera_tools.architectures import data

#: One class of each kind, and what it stands for.
KINDS = {
    "LlamaForCausalLM": "plain",
    "GPT2LMHeadModel": "Conv1D, tied head",
    "BertForMaskedLM": "tied head with a bias",
    "GPTNeoXForCausalLM": "head under its old name in the file",
    "T5ForConditionalGeneration": "one table for encoder, decoder and head",
    "BartForSequenceClassification": "one table for encoder and decoder",
    "ImageGPTForImageClassification": "Conv1D beside Linear, some of them square",
    "LlavaForConditionalGeneration": "two towers, older prefixes",
    "PaliGemmaForConditionalGeneration": "tied head of a tower",
    "ViTForImageClassification": "renamed throughout",
    "NomicBertModel": "queries, keys and values in one tensor of the file",
    "Qwen3MoeForCausalLM": "experts",
    "MambaForCausalLM": "state space, tied head",
}
#: What PEFT does not load, so that it is refused: by class and column, with a part of the reason.
REFUSED = {("MambaForCausalLM", f"{adapter}/saved/lora"): "refuses LoRA" for adapter in ("linear", "saved")}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The lines of a run of the command over these classes."""
    out = tmp_path_factory.mktemp("sweep") / "sweep.jsonl"
    only = f"^({'|'.join(KINDS)})$"
    command = [sys.executable, "-m", "tests.architectures.sweep", "--out", str(out), "--only", only]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, result.stderr
    return sweep.read(out)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_what_each_command_makes_of_an_adapter_is_what_pefts_live_model_computes(documents, name):
    pairs = documents[name]["pairs"]
    assert {pair["command"] for pair in pairs} == {"verify", "merge", "lora"}, documents[name]["why"]
    for pair in pairs:
        column = f"{pair['adapter']}/{pair['base']}/{pair['command']}"
        assert pair["peft"] == "right", (column, pair)
        expected = REFUSED.get((name, column))
        if expected is None:
            assert (pair["outcome"], pair["reason"]) == ("right", ""), column
        else:
            assert pair["outcome"] == "refused", column
            assert expected in pair["reason"], column


@pytest.mark.long
def test_outputs_are_compared_too(documents):
    assert all(pair["by"] == "outputs and weights" for pair in documents["LlamaForCausalLM"]["pairs"])


# ---- what it judges by


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama as it is loaded, and PEFT's live model of it."""
    folder = tmp_path_factory.mktemp("llama")
    _, model = tiny.model("LlamaForCausalLM")
    tiny.disturb(model)
    model.save_pretrained(folder / "base")
    loaded, _ = bases.load(type(model), folder / "base")
    return loaded, judging.adapted(loaded, folder / "adapter", "LlamaForCausalLM", saved=True)


def test_the_base_without_its_adapter_is_not_taken_for_pefts_model(llama):
    loaded, live = llama
    assert live.unlike_base
    assert judging.difference(loaded, live).startswith("other outputs")


def test_a_weight_that_no_input_reaches_is_compared(llama):
    import torch

    loaded, live = llama
    merged = copy.deepcopy(loaded)
    merged.load_state_dict(live.weights)
    assert judging.difference(merged, live) == ""
    with torch.no_grad():
        merged.model.embed_tokens.weight[-1] += 0.5  # a word that is not among the inputs
    assert judging.difference(merged, live).startswith("other weights: model.embed_tokens.weight (1 of")


def test_keys_that_transformers_misses_are_seen(tmp_path):
    from safetensors.torch import load_file, save_file

    _, model = tiny.model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.other.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    _, wrong = bases.load(type(model), tmp_path)
    assert wrong == {"missing_keys": ["model.norm.weight"], "unexpected_keys": ["model.other.weight"]}


def test_an_internal_error_is_a_crash_and_a_refusal_is_not():
    assert judging.refusal(1, "internal error: KeyError: 'x'")[0] == judging.CRASH
    assert judging.refusal(1, "base: x: the base has no such module")[0] == judging.REFUSED


# ---- what it writes


def test_the_page_is_made_of_the_file():
    assert table.PAGE.read_text("utf-8") == table.page(json.loads(table.FILE.read_text("utf-8")))


def test_nothing_that_ships_is_wrong_or_crashes():
    """Nobody commits the table of a run in which something with exit code 0 computes something else."""
    found = json.loads(table.FILE.read_text("utf-8"))
    for name, letters in found["classes"].items():
        assert set(letters) <= {".", "r", "p", " "}, name


def test_the_table_is_of_all_classes_and_nearly_all_is_right():
    found = json.loads(table.FILE.read_text("utf-8"))
    assert {*found["classes"], *found["untested"]} == set(data.tables()["classes"])
    for number, column in enumerate(table.COLUMNS):
        if not column.endswith("lora"):
            letters = "".join(classes.ljust(len(table.COLUMNS))[number] for classes in found["classes"].values())
            assert letters.count(".") >= 0.95 * (letters.count(".") + letters.count("r")), column


def test_reasons_name_no_folders_of_the_run(tmp_path):
    pair = {"adapter": "linear", "base": "saved", "command": "merge", "outcome": "refused", "exit_code": 1,
            "reason": "/tmp/x1/bases/saved: model.a: no such module", "peft": "right"}  # fmt: skip
    found = table.compact([{"class": "LlamaModel", "pairs": [pair], "why": ""}])
    assert found["classes"] == {"LlamaModel": " r"}
    assert found["reasons"] == {"LlamaModel": {"exit 1: ...: model.a: no such module": ["linear/saved/merge"]}}
    page = table.page(found)
    assert "| `merge --verify` | exit 1: ...: model.a: no such module | LlamaModel |" in page


def test_a_run_that_was_cut_short_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    out = tmp_path / "sweep.jsonl"
    out.write_text('{"class": "LlamaModel", "pairs": [], "why": "no", "seconds": 0}\n')
    asked = []
    monkeypatch.setattr(judging, "quiet", lambda: None)
    monkeypatch.setattr(sweep, "run", lambda names, jobs: asked.extend(names) or [])
    sweep.main(["--out", str(out), "--only", "^Llama(Model|ForCausalLM)$"])
    assert asked == ["LlamaForCausalLM"]
    assert "1 classes, of which without a pair: 1" in capsys.readouterr().out
