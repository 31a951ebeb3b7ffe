"""Whether vLLM serves a LoRA adapter: its rules, held against the tensors that were written and the base's class.

Read in vLLM's sources as of 2026:

- ``vllm/lora/peft_helper.py`` refuses `modules_to_save` and biases, and a rank above ``--max-lora-rank``;
- ``vllm/lora/utils.py``, ``parse_fine_tuned_lora_name``, raises for any tensor that is neither ``lora_A.weight`` nor
  ``lora_B.weight`` (or an embedding's); ``lora_model.py`` passes over the base's own table in
  ``embed_tokens.base_layer.weight`` and ``lm_head.base_layer.weight``;
- names go through the class's ``hf_to_vllm_mapper``, which turns transformers' names for the same class into vLLM's
  (``model.language_model.`` into ``language_model.model.``). ``model_manager.py``, ``activate_adapter``, then asks each
  of its modules for weights of its own name and serves the base's where there are none: a layer under another name is
  left out in silence;
- in a class with several towers it adapts the language model alone, unless ``--enable-tower-connector-lora`` is given
  and the class supports it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vera_tools.architectures import data
from vera_tools.architectures.architecture import Architecture
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.manifest import TensorRecord
from vera_tools.checkpoints.names import OUTPUT_LAYERS
from vera_tools.files.safetensors import TensorInfo

#: What --max-lora-rank may be; adapters of any rank up to it are padded to it.
MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_TAKEN = (".lora_A.weight", ".lora_B.weight", ".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
#: Parts of a configuration that are towers beside the language model.
_TOWERS = ("vision_config", "audio_config", "speech_config", "encoder_config")


@dataclass(frozen=True)
class Service:
    """What vLLM makes of an adapter.

    Attributes:
        max_lora_rank: The --max-lora-rank that it needs, or None where there is none as high.
        obstacles: What stops vLLM from taking it, or from computing with all of it; one clause each.
        conditions: What must hold besides, which nothing here can tell; one clause each.
    """

    max_lora_rank: int | None
    obstacles: tuple[str, ...]
    conditions: tuple[str, ...]


def look(
    tensors: Mapping[str, TensorRecord | TensorInfo],
    modules: Iterable[str],
    config: Mapping[str, Any],
    base: BaseModel | None,
) -> Service:
    """Hold a LoRA adapter against vLLM's rules.

    Args:
        tensors: What was written, by name.
        modules: The adapted modules.
        config: Its adapter_config.json.
        base: Its base model; None where it is not at hand.
    """
    rank = min((rank for rank in MAX_RANKS if rank >= config["r"]), default=None)
    obstacles = [*_of_config(config), *_of_tensors(tensors, config), *_of_tables(tensors, base)]
    conditions = []
    architecture = None if base is None else data.architecture(base.config)
    if base is None:
        conditions.append("its class for the base calls the layers so (name the base with --base)")
    elif architecture is None:
        named = data.class_for(base.config) or "none"
        conditions.append(f"its class for the base ({named} in config.json) calls the layers so")
    else:
        found = _Modules.of(modules, architecture, towers=any(part in base.config for part in _TOWERS))
        obstacles += found.obstacles()
        conditions.append(f"it serves {architecture.name} with LoRA")
        if found.older:
            conditions.append(f"its class knows older names, {found.older[0]} for one")
    return Service(rank, tuple(obstacles), tuple(conditions))


def _of_config(config: Mapping[str, Any]) -> Iterator[str]:
    if config["r"] > MAX_RANKS[-1]:
        yield f"its rank {config['r']} is above vLLM's highest, {MAX_RANKS[-1]}"
    if config["bias"] != "none":
        yield f"it has trained biases (bias {config['bias']!r}), which vLLM refuses"
    if config["modules_to_save"]:
        yield f"it has saved modules ({', '.join(config['modules_to_save'])}), which vLLM refuses"


def _of_tensors(tensors: Iterable[str], config: Mapping[str, Any]) -> Iterator[str]:
    if config["modules_to_save"]:
        return  # said already
    biases = config["bias"] != "none"
    others = sorted(name for name in tensors if not name.endswith(_TAKEN) and not (biases and name.endswith(".bias")))
    if others:
        yield f"vLLM refuses {_tensors(len(others))} that {'is' if len(others) == 1 else 'are'} not LoRA's: {others[0]}"


def _of_tables(tensors: Mapping[str, TensorRecord | TensorInfo], base: BaseModel | None) -> Iterator[str]:
    """A table that vLLM passes over must be the base's own."""
    shapes = None if base is None else {info.shape for _, info in base.tensors.values()}
    for name, record in sorted(tensors.items()):
        if name.endswith(_TAKEN[2:]) and shapes is not None and record.shape not in shapes:
            yield f"its vocabulary was resized, and vLLM would keep the base's own table in the place of {name}"
            return


@dataclass(frozen=True)
class _Modules:
    """The adapted modules that need a word, by what vLLM makes of them."""

    architecture: Architecture
    strange: tuple[str, ...]
    older: tuple[str, ...]
    outside: tuple[str, ...]

    @classmethod
    def of(cls, modules: Iterable[str], architecture: Architecture, *, towers: bool) -> _Modules:
        strange, older, outside = list[str](), list[str](), list[str]()
        for module in modules:
            if not architecture.tree.kinds(module) and not architecture.is_unknown(module):
                (older if _is_older(module, architecture) else strange).append(module)
            elif towers and not _is_in_language_model(module):
                outside.append(module)
        return cls(architecture, tuple(strange), tuple(older), tuple(outside))

    def obstacles(self) -> Iterator[str]:
        name = self.architecture.name
        if self.strange:
            yield (
                f"{name} has no module {self.strange[0]}, so vLLM would serve the base without "
                f"{'it' if len(self.strange) == 1 else f'it and {len(self.strange) - 1} more'}, in silence"
            )
        if self.outside:
            count = f" and {len(self.outside) - 1} more" if len(self.outside) > 1 else ""
            yield f"vLLM adapts the language model of {name} alone, and leaves out {self.outside[0]}{count}"


def _is_older(module: str, architecture: Architecture) -> bool:
    """Whether a name is an older one of the same module; one that only lacks or has the model's prefix is not."""
    weight = f"{module}.weight"
    leads_to, prefix = architecture.parameter_of(weight), f"{architecture.base_model_prefix}."
    return leads_to is not None and leads_to not in (prefix + weight, weight.removeprefix(prefix))


def _is_in_language_model(module: str) -> bool:
    parts = module.split(".")
    return "language_model" in parts or parts[-1] in OUTPUT_LAYERS


def _tensors(number: int) -> str:
    return f"{number} tensor" + "s" * (number != 1)
