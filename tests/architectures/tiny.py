"""Tiny configurations of transformers' classes: what the class has by default, with every size made small.

Sizes are told by their names. No one rule fits every class, so there are several, tried in order until one gives a
model that can be built: `config` says which. Which modules there are is left alone, but for how many layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

from fixtures.architectures import configs

#: Parameters of a model that counts as tiny, and of one that is taken where there is no smaller one.
SMALL, LIMIT = 4_000_000, 30_000_000

_SKIPPED = re.compile(
    r"^(_|id2label|label2id|transformers_version|architectures|dtype|rope_param|rope_scal|in_channels$)"
)
_LAYERS = re.compile(
    r"(^|_)(num_)?(n_)?(hidden_|encoder_|decoder_|block_|text_|mtp_)*(layers?|blocks)$|^depth$|num_stacks"
)
_LIKE_LAYERS = re.compile(r"feature_layers?$|feat_extract_layers$|^conv_|index_|resnet_layers|residual_layers")
_HEADS = re.compile(r"(^|_)(n_?head|num_head|heads|n_heads|num_heads|attention_heads|q_heads)s?$")
_KV = re.compile(r"(kv_heads|key_value_heads|n_head_kv|kv_n_heads|query_groups|num_groups)$")
_HEAD_DIM = re.compile(r"(head_dim|d_kv|head_size|key_dim|value_dim|kv_channels|qk_channels|v_channels|d_head)$")
_ROPE_DIM = re.compile(r"(rope_head_dim|rotary_dim|rotary_ndims)$")
_RANK = re.compile(r"(lora_rank|_rank)$")
_INNER = re.compile(r"(intermediate|ffn|d_ff|mlp_dim|inner|feed_?forward|d_inner|mlp_hidden|fc_dim|expansion_dim).*$")
_HIDDEN = re.compile(
    r"(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|^dim$|width|projection_dim|proj_dim|embedding_dim"
    r"|^channels$|conv_dim|out_channels|d_latents|d_embed|hidden_channels|output_dim|out_dim|input_dim|feature_size"
    r"|emb_dim|num_features|embed_size|model_dim|_dim|_size)$"
)
_EXPERTS = re.compile(r"(n_routed_experts|num_(local_|routed_)?experts|moe_num_experts|num_experts)$")
_TOP = re.compile(r"(experts_per_tok|top_k|topk|moe_k|num_selected_experts|experts_per_token|top_k_experts)$")
_POSITIONS = re.compile(
    r"(max_position_embeddings|max_(source|target)_positions|n_positions|n_ctx|max_seq_len(gth)?|seq_length)$"
)
_TOKEN = re.compile(r"(token_id|token_index|_id|_index|_token)s?$")
_KEPT = re.compile(
    r"(image_size|patch_size|kernel|stride|num_channels|num_labels|factor|window|chunk|group|level|bucket|scale|mel|rate"
    r"|tubelet|frames|sample|_token|num_queries|conv|vocab|type_vocab|downsampl|merge|pool|hop|fft|bins|codebook|block_size)"
)

#: Model types that rotate by time, height and width.
_SECTIONS = re.compile(r"vl|4v|46v|omni|glm_image|glm_ocr|qwen3_asr")

Recipe = Callable[[str, int], int]


def canonical(name: str, value: int) -> int:
    """Every size of one kind is the same, whatever it was."""
    if name.endswith(("feature_layer", "feature_layers")):
        return 1
    if "vocab" in name and "type" not in name:
        return min(value, 160)
    if _LIKE_LAYERS.search(name):
        return min(value, 32) if name == "conv_dim" else value
    for pattern, small in (
        (_LAYERS, 2), (_KV, 2), (_ROPE_DIM, 4), (_HEADS, 4), (_HEAD_DIM, 8), (_RANK, 16), (_EXPERTS, 4), (_TOP, 2),
        (_POSITIONS, 64),
    ):  # fmt: skip
        if pattern.search(name):
            return min(value, small)
    if name in ("num_embeddings", "base_channels"):
        return min(value, 160 if name == "num_embeddings" else 32)
    if _TOKEN.search(name):
        return value if value < 100 else 40 + value % 50
    if _KEPT.search(name):
        return value
    if _INNER.search(name):
        return min(value, 64)
    return min(value, 32) if _HIDDEN.search(name) else value


def even(name: str, value: int) -> int:
    """The same, with a key and a value for every query."""
    return min(value, 4) if _KV.search(name) else canonical(name, value)


def divided(factor: int) -> Recipe:
    """Every size by the same factor, so that what divides another goes on doing so; heads stay, layers do not."""

    def recipe(name: str, value: int) -> int:
        if _LAYERS.search(name) or _EXPERTS.search(name) or _TOP.search(name) or _POSITIONS.search(name):
            return canonical(name, value)
        if re.search(r"vocab(ulary)?_size$|^n_vocab$|_vocab_size$|num_embeddings$", name) or _TOKEN.search(name):
            return canonical(name, value)
        if _HEADS.search(name) or _KV.search(name) or _KEPT.search(name):
            return value
        return max(value // factor, 1) if value % factor == 0 and value >= 16 * factor else value

    return recipe


def few_layers(name: str, value: int) -> int:
    """Only fewer layers and words."""
    return canonical(name, value) if _LAYERS.search(name) or "vocab" in name or _TOKEN.search(name) else value


def layers_alone(name: str, value: int) -> int:
    """Only fewer layers."""
    return canonical(name, value) if _LAYERS.search(name) else value


RECIPES: dict[str, Recipe] = {
    "canonical": canonical,
    "even": even,
    "divided by 16": divided(16),
    "divided by 8": divided(8),
    "divided by 4": divided(4),
    "few layers": few_layers,
    "layers alone": layers_alone,
    "as it is": lambda name, value: value,
}


def shrunk(document: Any, recipe: Recipe, name: str = "") -> Any:
    """A configuration's values, made small."""
    if isinstance(document, dict):
        small = {k: v if _SKIPPED.search(str(k)) else shrunk(v, recipe, str(k)) for k, v in document.items()}
        return _mamba(_rotary(_layered(small, document)))
    if isinstance(document, list | tuple):
        if name.endswith("section") and all(isinstance(value, int) for value in document):
            return [2, 1, 1] if recipe in (canonical, even) and len(document) == 3 else document
        return [shrunk(value, recipe, name) for value in document]
    if isinstance(document, int) and not isinstance(document, bool) and document > 0:
        return recipe(name, document)
    return document


def _layered(small: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """Lists that have an entry for each layer get as many as there are left: one of each sort, and the last one."""
    depth = next((key for key in document if re.fullmatch(r"num_hidden_layers|n_layers?|num_layers", str(key))), None)
    if depth is None or not isinstance(document[depth], int) or small[depth] == document[depth]:
        return small
    before = document[depth]
    lists = {key: value for key, value in document.items() if isinstance(value, list) and len(value) == before}
    wanted = [before - 2, before - 1]
    if lists:
        sorts = [str(sort) for sort in zip(*lists.values(), strict=True)]
        members = [[index for index, other in enumerate(sorts) if other == sort] for sort in dict.fromkeys(sorts)]
        wanted = sorted({index for sort in members for index in sort[:2]} | {before - 1})[-8:]
    stages = [index for index in document.get("out_indices") or [] if isinstance(index, int)]
    while len(wanted) < max(2, len(stages)):
        wanted.insert(0, wanted[0])
    small[depth] = len(wanted)
    for key in lists:
        small[key] = [small[key][index] for index in wanted]
    if isinstance(small.get("per_layer_config"), dict):
        of = {str(key): value for key, value in small["per_layer_config"].items()}
        small["per_layer_config"] = {new: of[str(old)] for new, old in enumerate(wanted) if str(old) in of}
    if "stage_names" in small:  # they follow from the number of layers
        small = {
            key: value for key, value in small.items() if key not in ("stage_names", "out_features", "_out_features")
        }
        small["out_indices"] = list(range(len(wanted) - len(stages) + 1, len(wanted) + 1)) or [len(wanted)]
        small.pop("_out_indices", None)
    for key in ("first_k_dense_replace", "moe_layer_start_index"):
        if isinstance(small.get(key), int):
            small[key] = min(small[key], 1)
    return small


def _rotary(small: dict[str, Any]) -> dict[str, Any]:
    """What is rotated is as wide as a head, or the part of it that is; no more groups of experts than experts."""
    if {"qk_rope_head_dim", "head_dim"} <= small.keys():
        small["head_dim"] = small["qk_rope_head_dim"]
    if {"qk_rope_head_dim", "qk_nope_head_dim", "qk_head_dim"} <= small.keys():
        small["qk_head_dim"] = (small["qk_rope_head_dim"] or 0) + (small["qk_nope_head_dim"] or 0)
    for key in ("n_group", "topk_group", "n_groups"):
        if isinstance(small.get(key), int):
            small[key] = 1
    if {"kv_lora_rank", "num_key_value_heads"} <= small.keys():  # keys and values are made for every head
        small["num_key_value_heads"] = small["num_attention_heads"]
    rope = small.get("rope_parameters")
    heads, width = small.get("num_attention_heads"), small.get("hidden_size")
    if isinstance(rope, dict) and _SECTIONS.search(str(small.get("model_type"))):
        rope.setdefault("mrope_section", [16, 24, 24])  # what the model takes where the configuration does not say
    if isinstance(rope, dict) and "mrope_section" in rope and isinstance(heads, int) and isinstance(width, int):
        size = small.get("head_dim") or width // heads
        half = int(size * (rope.get("partial_rotary_factor") or 1.0)) // 2
        count = len(rope["mrope_section"])
        parts = [half // count] * count
        parts[0] += half - sum(parts)
        small["rope_parameters"] = {**rope, "mrope_section": parts}
    return small


def _mamba(small: dict[str, Any]) -> dict[str, Any]:
    """Heads times their size is what the width is expanded to, where there is a state space."""
    for expand, heads, size in (("mamba_expand", "mamba_n_heads", "mamba_d_head"), ("expand", "num_heads", "head_dim")):
        if {expand, heads, size, "hidden_size"} <= small.keys() and isinstance(small[heads], int):
            small[heads] = 4
            small[size] = int(small[expand] * small["hidden_size"]) // small[heads]
            if "mamba_d_ssm" in small:
                small["mamba_d_ssm"] = small[heads] * small[size]
    return small


def candidates(name: str) -> Iterator[tuple[str, Any]]:
    """Configurations of a class, from the smallest on, each with its recipe; the reason where there is none."""
    default = configs.default(name)
    document = default.to_dict()
    for recipe, rule in RECIPES.items():
        try:
            yield recipe, type(default).from_dict(shrunk(copy.deepcopy(document), rule))
        except Exception as error:  # sizes that this configuration refuses
            yield recipe, error


def model(name: str, *, seed: int = 0) -> tuple[str, Any]:
    """A tiny model of a class with random weights, and the recipe that made it.

    Raises:
        ValueError: none of the recipes gives a model of at most `LIMIT` parameters; the message has the first reason.
    """
    import torch

    from vera_tools.architectures import probe

    reasons = []
    fitting: list[tuple[int, str, Any]] = []
    model_class = configs.model_class(name)
    for recipe, config in candidates(name):
        try:
            if isinstance(config, Exception):
                raise config
            count = sum(p.numel() for p in probe.build(model_class, copy.deepcopy(config)).parameters())
        except Exception as error:
            reasons.append(f"{recipe}: {type(error).__name__}: {' '.join(str(error).split())[:150]}")
            continue
        if count > LIMIT:
            reasons.append(f"{recipe}: {count} parameters")
            continue
        fitting.append((count, recipe, config))
        if count <= SMALL:
            break
    for _, recipe, config in sorted(fitting, key=lambda entry: entry[0]):
        torch.manual_seed(seed)
        return recipe, model_class(config).eval()
    raise ValueError(reasons[0])


def disturb(model: Any, seed: int = 1) -> None:
    """Give every parameter and saved buffer values of its own, so that no two could be taken for each other."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05)
