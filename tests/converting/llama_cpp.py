"""llama.cpp as the oracle: a transformers base as GGUF, and the logits of it with and without an adapter.

The bindings are those of llama-cpp-py-sync, called through the C interface of llama.h. Where its own library does not
load, that of xllamacpp of the same release of llama.cpp does, named by LLAMA_CPP_LIB.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Array = Any
ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
ARCHITECTURES["Qwen3ForCausalLM"] = "qwen3"


def halves_in_turn(weight: Array, heads: int) -> Array:
    """The rows of each head as llama.cpp's Llama has them: one of its first half, one of its second, and so on."""
    size = weight.shape[0] // heads
    turned = [head[row // 2 + (row % 2) * (size // 2)] for head in np.split(weight, heads) for row in range(size)]
    return np.stack(turned)


def write_base(folder: Path, path: Path) -> None:
    """The model that lies in `folder` in transformers' form, in float32 and without a vocabulary."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    name = ARCHITECTURES[config["architectures"][0]]
    heads, groups, layers = (config[f"num_{key}"] for key in ("attention_heads", "key_value_heads", "hidden_layers"))
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, layers)
    for key, tensor in load_file(folder / "model.safetensors").items():
        turned = tensor.astype(np.float32)
        if name == "llama" and ".q_proj." in key:
            turned = halves_in_turn(turned, heads)
        if name == "llama" and ".k_proj." in key:
            turned = halves_in_turn(turned, groups)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), turned)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(base: Path, ids: list[int], adapter: Path | None = None) -> Array:
    """The logits at every place of `ids`, [place, vocabulary], in float32 throughout."""
    bindings = pytest.importorskip("llama_cpp_py_sync._cffi_bindings")
    try:
        ffi, lib = bindings.ffi, bindings.get_lib()
    except RuntimeError as error:
        pytest.skip(f"llama.cpp's library does not load here: {error}")
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(base).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL, f"llama.cpp does not load {base}"
    options = lib.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = 64
    options.n_threads = options.n_threads_batch = 1
    options.type_k = options.type_v = 0  # float32
    options.flash_attn_type = 0
    context = lib.llama_init_from_model(model, options)
    assert context != ffi.NULL
    try:
        if adapter is not None:
            lora = lib.llama_adapter_lora_init(model, str(adapter).encode())
            assert lora != ffi.NULL, f"llama.cpp does not load {adapter}"
            given = ffi.new("struct llama_adapter_lora *[]", [lora])
            assert lib.llama_set_adapters_lora(context, given, 1, ffi.new("float[]", [1.0])) == 0
        batch = lib.llama_batch_init(len(ids), 0, 1)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, 1
        batch.n_tokens = len(ids)
        assert lib.llama_decode(context, batch) == 0
        width = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        rows = [ffi.buffer(lib.llama_get_logits_ith(context, place), 4 * width) for place in range(len(ids))]
        found = np.stack([np.frombuffer(row, np.float32).copy() for row in rows])
        lib.llama_batch_free(batch)
        return found
    finally:
        lib.llama_free(context)
        lib.llama_model_free(model)
