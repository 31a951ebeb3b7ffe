"""What is said about vLLM, held against tensors that were written and classes of transformers."""

from __future__ import annotations

import json
import warnings

import pytest
from safetensors import safe_open

import vera_tools
from tests.adapters import BERT, CHECKPOINTS, GPT2, KEPT, WEIGHTS, base_of
from tests.command import run_cli, run_json
from tests.peers import QUIET_PEERS
from tests.trained import SIZES, llama, trained
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.converting import vllm

pytestmark = QUIET_PEERS
PLAIN = {"r": 4, "bias": "none", "modules_to_save": None}


def obstacles(report) -> str:
    return "; ".join(report.vllm.obstacles)


def refused_by_vllm(folder) -> list[str]:
    """Tensors for which vLLM's parse_fine_tuned_lora_name raises, but for those that lora_model.py passes over."""
    with safe_open(folder / WEIGHTS, "np") as file:
        names = file.keys()
    passed_over = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B", *passed_over)
    return [name for name in names if not name.endswith(ends)]


def test_a_plain_adapter(tmp_path):
    result = run_cli("convert", CHECKPOINTS / KEPT, "--to", "lora", "--base", base_of(KEPT), "-o", tmp_path / "lora")
    assert result.returncode == 0
    assert "takes it with --max-lora-rank 16, provided that it serves LlamaForCausalLM with LoRA" in result.stdout
    assert refused_by_vllm(tmp_path / "lora") == []


@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedShapeWarning")
def test_without_a_base_the_class_is_not_known(tmp_path):
    report = vera_tools.to_lora(CHECKPOINTS / KEPT, tmp_path / "lora")
    assert report.vllm.obstacles == ()
    assert report.vllm.conditions == ("its class for the base calls the layers so (name the base with --base)",)


def test_biases_and_saved_modules_by_the_config(tmp_path):
    _, document = run_json("convert", CHECKPOINTS / BERT, "--to", "lora", "--base", base_of(BERT), "-o", tmp_path / "a")
    assert "saved modules (classifier, score)" in document["vllm"]["obstacles"][0]
    report = vera_tools.to_lora(CHECKPOINTS / GPT2, tmp_path / "b", base=base_of(GPT2))
    assert obstacles(report) == "it has trained biases (bias 'lora_only'), which vLLM refuses"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tables_that_peft_saves_without_being_asked(tied, tmp_path):
    """After resize_token_embeddings PEFT saves both tables, and nothing in the config tells."""
    base, adapter = resized(tmp_path, tied=tied)
    report = vera_tools.to_lora(adapter, tmp_path / "lora", base=base)
    refused = refused_by_vllm(tmp_path / "lora")
    assert len(refused) == 2
    assert obstacles(report) == f"vLLM refuses 2 tensors that are not LoRA's: {sorted(refused)[0]}"
    assert (
        "cannot take it"
        in run_cli("convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "lora", "--overwrite").stdout
    )


def test_a_table_that_vllm_passes_over(tmp_path):
    """The head is adapted and its vocabulary resized: vLLM would keep the base's own rows."""
    base, adapter = resized(tmp_path, target_modules=["q_proj", "lm_head"])
    report = vera_tools.to_lora(adapter, tmp_path / "lora", base=f"{base}-resized")
    assert refused_by_vllm(tmp_path / "lora") == []
    assert report.vllm.obstacles == ()
    with Checkpoint.open(tmp_path / "adapter") as opened:
        tensors = opened.other_tensors
    assert list(tensors) == ["base_model.model.lm_head.base_layer.weight"]
    with BaseModel.open(base) as opened:
        (word,) = vllm.look(tensors, [], PLAIN, opened).obstacles
    assert "its vocabulary was resized" in word


def resized(folder, *, tied=False, **config):
    """A base, and an adapter that was trained on it after its vocabulary grew."""
    llama(tie_word_embeddings=tied).save_pretrained(folder / "base")
    model = llama(folder / "base")
    model.resize_token_embeddings(70)
    model.save_pretrained(folder / "base-resized")
    model.config._name_or_path = str(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(model, task_type="CAUSAL_LM", **config).save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


TEXT = {**SIZES, "head_dim": 8, "sliding_window": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture
def gemma(tmp_path):
    """A base with a vision tower."""
    import transformers

    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=8),
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_on(model, folder, targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained(model, target_modules=targets).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedShapeWarning")
def test_the_towers_of_a_vision_language_model(gemma, tmp_path):
    import transformers

    def model():
        return transformers.Gemma3ForConditionalGeneration.from_pretrained(gemma)

    language = adapter_on(model(), tmp_path / "language", r".*language_model.*\.(q|v)_proj")
    report = vera_tools.to_lora(language, tmp_path / "a", base=gemma)
    assert report.vllm.obstacles == ()
    assert report.vllm.conditions == ("it serves Gemma3ForConditionalGeneration with LoRA",)
    both = adapter_on(model(), tmp_path / "both", ["q_proj"])
    with Checkpoint.open(both) as adapter, BaseModel.open(gemma) as base:
        (word,) = vllm.look({}, adapter.layers, PLAIN, base).obstacles
    assert word.startswith("vLLM adapts the language model of Gemma3ForConditionalGeneration alone, and leaves out")
    assert "vision_tower" in word


@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedShapeWarning")
def test_the_language_model_alone_under_another_prefix(gemma, tmp_path):
    """Trained on the text class, served by the whole: vLLM finds no layer of these names and says nothing."""
    import transformers

    text = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT))
    alone = adapter_on(text, tmp_path / "alone", ["q_proj"])
    report = vera_tools.to_lora(alone, tmp_path / "lora", base=gemma)
    assert "Gemma3ForConditionalGeneration has no module model.layers.0.self_attn.q_proj" in obstacles(report)
    assert "in silence" in obstacles(report)


def test_a_model_without_its_head_calls_its_layers_otherwise(tmp_path):
    import transformers

    llama().save_pretrained(tmp_path / "base")
    headless = transformers.LlamaModel.from_pretrained(tmp_path / "base")
    adapter = adapter_on(headless, tmp_path / "adapter", ["q_proj"])
    report = vera_tools.to_lora(adapter, tmp_path / "lora", base=tmp_path / "base")
    assert "LlamaForCausalLM has no module layers.0.self_attn.q_proj" in obstacles(report)


def test_a_class_that_nobody_knows(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    adapter = adapter_on(llama(), tmp_path / "adapter", ["q_proj"])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config.update(architectures=["OwnForCausalLM"], model_type="own")
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    report = vera_tools.to_lora(adapter, tmp_path / "lora", base=tmp_path / "base")
    assert report.vllm.conditions == ("its class for the base (OwnForCausalLM in config.json) calls the layers so",)


@pytest.mark.parametrize(("r", "needs"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512), (513, None)])
def test_ranks(r, needs):
    found = vllm.look({}, [], {**PLAIN, "r": r}, None)
    assert found.max_lora_rank == needs
    assert bool(found.obstacles) == (needs is None)
