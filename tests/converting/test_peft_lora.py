"""Models on which PEFT does not load LoRA as it is written: refused by name, and still so in the installed PEFT."""

from __future__ import annotations

import json

import pytest

from tests.adapters import CHECKPOINTS, KEPT, base_of
from tests.command import run_cli, run_json
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.converting import peft_lora
from vera_tools.converting.lora import to_lora
from vera_tools.converting.peft_lora import RULES

EXPERTS, MIXTRAL, STATE_SPACE = RULES

LLM = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BASES = {
    "deepseek_v3": {**LLM, "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
                    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "llama": {**LLM, "intermediate_size": 48},
}  # fmt: skip


def adapted(kind, folder, target_modules="all-linear", **options):
    """A base of this model type and VeRA on it, on disk."""
    from peft import VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**BASES[kind]))
    model.save_pretrained(folder / "base")
    config = VeraConfig(r=4, target_modules=target_modules, **options)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder / "adapter", folder / "base"


def test_the_model_types_and_layers_are_those_that_peft_has():
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for pattern, rule in (("qwen2_moe", EXPERTS), ("mixtral", MIXTRAL)):
        kinds = conversion._MODEL_TO_CONVERSION_PATTERN.items()
        rewritten = {kind for kind, of in kinds if of == pattern and get_checkpoint_conversion_mapping(kind)}
        assert rule.model_types == rewritten
        assert rule.targets == set(conversion._MOE_TARGET_MODULE_MAPPING[pattern])
    assert set(conversion._MOE_FUSED_TARGETS) == {"qwen2_moe", "mixtral"}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_still_rewrites_the_targets_of_experts(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    _, base = adapted("deepseek_v3", tmp_path)
    config = LoraConfig(target_modules=["down_proj", "gate_proj", "up_proj", "o_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    assert config.target_modules == {"o_proj"}


def test_peft_still_refuses_a_state_space(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    _, base = adapted("mamba", tmp_path)
    config = AutoConfig.from_pretrained(base)
    for kind in STATE_SPACE.model_types:
        model = AutoModelForCausalLM.from_config(config)
        model.config.model_type = kind
        with pytest.raises(ValueError, match=r"Incompatible modules: .*out_proj|incompatible"):
            get_peft_model(model, LoraConfig(target_modules=["out_proj"]))


def test_pefts_own_conversion_is_a_decomposition(tmp_path):
    """docs/comparison.md says so: it needs a rank, and one below ours loses; ours has the factors that there are."""
    import torch
    from peft import PeftModel, convert_to_lora
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    to_lora(CHECKPOINTS / KEPT, tmp_path / "lora", base=base_of(KEPT))
    ours = load_file(tmp_path / "lora/adapter_model.safetensors")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(KEPT)), CHECKPOINTS / KEPT)
    rank = model.peft_config["default"].r
    layers = [name.removesuffix(".lora_A.weight") for name in ours if name.endswith(".lora_A.weight")]
    assert layers
    for kept, smallest, largest in ((rank, 0, 1e-5), (rank // 2, 0.05, 1)):
        _, theirs = convert_to_lora(model, rank=kept)
        for layer in layers:
            change = model.get_submodule(layer).get_delta_weight("default").double()
            A, B = (theirs[f"{layer}.lora_{one}.weight"].double() for one in "AB")
            torch.testing.assert_close(A @ A.T, torch.eye(kept).double(), atol=1e-4, rtol=0)  # singular vectors
            assert smallest <= (change - B @ A).norm() / change.norm() < largest
            A, B = (ours[f"{layer}.lora_{one}.weight"].double() for one in "AB")
            assert A.shape[0] == rank
            assert (change - B @ A).norm() / change.norm() < 1e-6
            assert not torch.allclose(A @ A.T, torch.eye(rank).double(), atol=0.01)


@pytest.mark.parametrize(("kind", "layer"), [("deepseek_v3", "mlp.down_proj"), ("mamba", "mixer.out_proj")])
@pytest.mark.parametrize("known_by", ["base", "class"])
def test_they_are_refused_by_name(kind, layer, known_by, tmp_path):
    adapter, base = adapted(kind, tmp_path)
    arguments = ["--base", base] if known_by == "base" else []
    result = run_cli("convert", adapter, "--to", "lora", "-o", tmp_path / "lora", *arguments)
    assert result.returncode == 1
    assert layer in result.stderr
    assert f"of a model of type {kind}" in result.stderr
    assert "vera-tools merge" in result.stderr
    assert not (tmp_path / "lora").exists()


def test_layers_beside_them_are_named_one_by_one(tmp_path):
    """PEFT would read a pattern as naming experts too."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter, base = adapted("deepseek_v3", tmp_path, target_modules=r".*\.o_proj")
    to_lora(adapter, tmp_path / "lora", base=base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{number}.self_attn.o_proj" for number in range(2)]
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert not loaded.peft_config["default"].target_parameters


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """A model of which loading takes names of today for older ones, and PEFT's VeRA and LoRA on it."""
    from peft import LoraConfig, VeraConfig, get_peft_model

    from tests.architectures import tiny

    folder = tmp_path_factory.mktemp("renamed")
    _, model = tiny.model("DeepseekOcr2ForConditionalGeneration")
    model.save_pretrained(folder / "base")
    for name, config in (("vera", VeraConfig), ("lora", LoraConfig)):
        fresh = type(model).from_pretrained(folder / "base")
        targets = r".*language_model.*\.o_proj"
        get_peft_model(fresh, config(r=4, target_modules=targets)).save_pretrained(folder / name)
    return type(model), folder


def test_peft_still_renames_what_is_named_as_today(renamed):
    from peft import PeftModel

    model_class, folder = renamed
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(model_class.from_pretrained(folder / "base"), folder / "lora")
    PeftModel.from_pretrained(model_class.from_pretrained(folder / "base"), folder / "vera")  # warns of nothing


def test_a_layer_whose_name_peft_would_change_is_refused(renamed, tmp_path):
    _, folder = renamed
    result = run_cli("convert", folder / "vera", "--to", "lora", "-o", tmp_path / "lora", "--base", folder / "base")
    assert result.returncode == 1
    assert "model.language_model.layers.0.self_attn.o_proj: no LoRA that PEFT loads" in result.stderr
    assert "found model.language_model.language_model.layers.0" in result.stderr


def test_a_base_of_another_type_keeps_its_pattern(tmp_path):
    adapter, base = adapted("llama", tmp_path)
    set_pattern = json.loads((adapter / "adapter_config.json").read_text()) | {"target_modules": r".*_proj"}
    (adapter / "adapter_config.json").write_text(json.dumps(set_pattern))
    to_lora(adapter, tmp_path / "lora", base=base)
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["target_modules"] == r".*_proj"


@pytest.mark.parametrize(("kind", "words"), [("deepseek_v3", "LoRA on the experts"), ("mamba", "state space")])
def test_where_nothing_tells_the_type_a_note_says_what_may_be(kind, words, tmp_path):
    adapter, _ = adapted(kind, tmp_path, task_type="CAUSAL_LM")
    code, document = run_json("convert", adapter, "--to", "lora", "-o", tmp_path / "lora")
    assert code == 0
    (note,) = [note for note in document["notes"] if words in note]
    assert "--base" in note


def test_no_note_for_a_model_without_such_layers(tmp_path):
    adapter, _ = adapted("llama", tmp_path, task_type="CAUSAL_LM")
    with Checkpoint.open(adapter) as opened:
        assert peft_lora.model_type(opened, None) is None
        assert peft_lora.doubts(opened, None) == ()
