"""A Llama-shaped bfloat16 base of random weights in five shards, and VeRA adapters for it, written without torch.

Run by benchmarks/merge.py; by itself: ``python benchmarks/synthetic_base.py FOLDER [LAYERS]``. 22 layers are 2.2 GB.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.files import safetensors
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

HIDDEN, INTERMEDIATE, KV, VOCABULARY, SHARDS, RANK = 2048, 5632, 256, 32000, 5, 256
#: (out_features, in_features)
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
TARGETS = {"q_proj,v_proj": ["self_attn.q_proj", "self_attn.v_proj"], "all linear": list(LINEAR)}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the base, in the order in which transformers saves them."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for n in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"model.layers.{n}.{norm}.weight"] = (HIDDEN,)
        result |= {f"model.layers.{n}.{name}.weight": shape for name, shape in LINEAR.items()}
    return {**result, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_base(folder: Path, *, layers: int = 22, seed: int = 0) -> Path:
    """Write the base; weights have a standard deviation of 0.02, as Llama's initialisation."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": KV // 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    everything = shapes(layers)
    total = sum(2 * int(np.prod(shape)) for shape in everything.values())
    done = 0
    for name, shape in everything.items():
        groups[min(SHARDS - 1, done * SHARDS // total)][name] = shape
        done += 2 * int(np.prod(shape))
    # One long random tensor, read at another place each time: drawing two billion normal numbers would take a minute.
    pool = (np.random.default_rng(seed).standard_normal(1 << 25, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        infos = safetensors.layout({name: ("bfloat16", shape) for name, shape in group.items()}, order=list(group))
        header = safetensors.encode_header(infos, {"format": "pt"})
        safetensors.write(folder / file, header, _pieces(pool, group))
        weight_map |= dict.fromkeys(group, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def _pieces(pool: np.ndarray, group: dict[str, tuple[int, ...]]) -> Iterator[np.ndarray]:
    for position, (name, shape) in enumerate(group.items()):
        size = int(np.prod(shape))
        if name.endswith("norm.weight"):
            yield np.ones(size, ml_dtypes.bfloat16)
            continue
        start = 977 * (len(name) + 31 * position) % (1 << 20)
        while size:
            piece = pool[start : start + size]
            yield piece
            size -= piece.size
            start = 0


def write_adapter(folder: Path, targets: list[str], *, layers: int = 22, key: int = 0, scale: float = 0.1) -> Path:
    """Write an adapter of rank 256; lambda_b has the standard deviation `scale`, and lambda_d is about 0.1."""
    rng = np.random.default_rng(key)
    used = [LINEAR[name] for name in targets]
    pair = PairShape(RANK, max(shape[1] for shape in used), max(shape[0] for shape in used))
    recipe = Recipe(prng_key=key, rounded_through="bfloat16")
    vera_A, vera_B = generate(recipe, pair)
    tensors = {"base_model.vera_A": vera_A, "base_model.vera_B": vera_B}
    for n in range(layers):
        for name in targets:
            prefix = f"base_model.model.model.layers.{n}.{name}"
            tensors[f"{prefix}.vera_lambda_b"] = (rng.standard_normal(LINEAR[name][0]) * scale).astype(np.float32)
            tensors[f"{prefix}.vera_lambda_d"] = (0.1 + 0.01 * rng.standard_normal(RANK)).astype(np.float32)
    folder.mkdir(parents=True)
    config = VeraConfig(r=RANK, target_modules=[name.split(".")[1] for name in targets], projection_prng_key=key)
    (folder / "adapter_config.json").write_text(config.to_json())
    safetensors.save(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    return folder


if __name__ == "__main__":
    layer_count = int(sys.argv[2]) if len(sys.argv) > 2 else 22
    target = Path(sys.argv[1])
    write_base(target / "base", layers=layer_count)
    for number, names in enumerate(TARGETS.values()):
        write_adapter(target / f"adapter{number}", names, layers=layer_count)
