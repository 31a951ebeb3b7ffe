"""What PEFT adapts where target_modules is null: its choice for the base's model type.

From PEFT's `TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING` (peft/utils/constants.py) in every release from 0.11.0,
the first that has VeRA, to 0.21.2. Entries were only added: none was ever changed or removed.
"""

from __future__ import annotations

_EVER_SINCE = (0, 11)

#: The first release that has them, the targets, and the model types.
_ENTRIES: tuple[tuple[tuple[int, int], str, str], ...] = (
    (_EVER_SINCE, "q_proj v_proj", "bart gpt_neo gptj llama opt phi stablelm"),
    ((0, 12), "q_proj v_proj", "qwen2"),
    ((0, 13), "q_proj v_proj", "gemma gemma2 mistral mixtral"),
    ((0, 16), "q_proj v_proj", "gemma3_text llama4 qwen3"),
    (_EVER_SINCE, "query value", "bert electra layoutlm roberta xlm-roberta"),
    (_EVER_SINCE, "query_key_value", "bloom chatglm falcon gpt_neox RefinedWeb RefinedWebModel"),
    (_EVER_SINCE, "c_attn", "gpt2 gpt_bigcode"),
    (_EVER_SINCE, "q v", "mt5 t5"),
    (_EVER_SINCE, "q v q_proj v_proj", "blip-2"),
    ((0, 13), "c_proj c_attn", "btlm"),
    (_EVER_SINCE, "qkv_proj", "codegen"),
    (_EVER_SINCE, "in_proj", "deberta"),
    (_EVER_SINCE, "query_proj value_proj", "deberta-v2"),
    (_EVER_SINCE, "Wqkv", "mpt"),
    ((0, 18), "key value receptance output", "rwkv"),
    ((0, 18), "r_proj k_proj v_proj o_proj key value", "rwkv7"),
    ((0, 20), "q_proj k_proj v_proj o_proj", "nemotron_h"),
)

#: By model type: a list of names, or a regular expression.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    **{model_type: names.split() for _, names, model_types in _ENTRIES for model_type in model_types.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
_SINCE = {model_type: since for since, _, model_types in _ENTRIES for model_type in model_types.split()}
_SINCE["gemma4"] = (0, 19)


def since(model_type: str) -> str | None:
    """The first release of PEFT with a default for a model type, as "0.13"; None where every one with VeRA has it.

    Raises:
        KeyError: none has one.
    """
    first = _SINCE[model_type]
    return None if first == _EVER_SINCE else f"{first[0]}.{first[1]}"
