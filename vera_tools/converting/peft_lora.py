"""Where PEFT does not load a LoRA adapter as it is written, though it would load VeRA on the same layers.

Three rules, all for LoRA alone:

- With transformers 5, whose mixtures of experts keep all experts in one parameter, PEFT takes LoRA on ``gate_proj`` or
  ``down_proj`` for LoRA on the experts as transformers 4 had them. It rewrites the targets to that parameter, on dense
  layers and shared experts too, and the adapter's own tensors lead nowhere
  (peft/utils/transformers_weight_conversion.py, `_convert_peft_config_moe`).
- It renames the keys of LoRA as transformers renames those of older files on loading. Where such a renaming takes a
  name of today for an older one, the key leads nowhere (`convert_peft_adapter_state_dict_for_transformers` there).
- On a state space's ``out_proj`` and ``conv1d`` it refuses LoRA, because fast kernels read their weights past the
  module (peft/tuners/tuners_utils.py, `_check_lora_target_modules_mamba`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from vera_tools.architectures import data
from vera_tools.architectures.architecture import Architecture
from vera_tools.architectures.renaming import natural_order
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import CheckFailedError


@dataclass(frozen=True)
class Rule:
    """Layers on which PEFT does not load LoRA.

    Attributes:
        model_types: Of the bases that it is in force for.
        targets: Last parts of the layers' names.
        telling: What stands in the names of such layers where the model type is not known.
        rewrites: PEFT takes these names for others; else it refuses them.
        what: What PEFT does.
    """

    model_types: frozenset[str]
    targets: frozenset[str]
    telling: tuple[str, ...]
    rewrites: bool
    what: str


_EXPERTS = "with transformers 5, PEFT takes LoRA on these layers for LoRA on the experts, and leaves them as they were"
_STATE_SPACE = "PEFT refuses LoRA on these layers of a state space"

# fmt: off
_FUSED = frozenset({
    "Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
    "qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open",
})
_MIXTRAL = frozenset({"minimax", "minimax_m2", "mixtral"})
_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
# fmt: on

#: As of PEFT 0.21.2 with transformers 5.23.0.
RULES = (
    Rule(_FUSED, frozenset({"gate", "gate_proj", "up_proj", "down_proj"}), ("expert",), True, _EXPERTS),
    Rule(_MIXTRAL, frozenset({"gate", "w1", "w2", "w3"}), ("expert",), True, _EXPERTS),
    Rule(_MAMBA, frozenset({"out_proj", "conv1d"}), ("mamba", "mixer"), False, _STATE_SPACE),
)


def model_type(checkpoint: Checkpoint, base: BaseModel | None) -> str | None:
    """The model type of the base, as its config.json or the adapter's own config says; None where neither does."""
    if base is not None and base.model_type is not None:
        return base.model_type
    name = (checkpoint.config.auto_mapping or {}).get("base_model_class")
    entry = data.tables()["classes"].get(name) if isinstance(name, str) else None
    return None if entry is None else str(entry["model_type"])


def refuse_unloadable(layers: Collection[str], kind: str | None, known: Architecture | None, *, label: str) -> None:
    """Stop where PEFT would not load the LoRA of these layers on a base of this model type and class.

    Args:
        layers: The modules that the adapter is on.
        kind: The base's model type, where it is known.
        known: The class that PEFT adapted, where it is known.
        label: The adapter's name for messages.

    Raises:
        CheckFailedError: it would not; the message names a layer and says what PEFT does.
    """
    for rule in RULES:
        found = [module for module in layers if _last(module) in rule.targets]
        if found and kind in rule.model_types:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CheckFailedError(
                f"no LoRA that PEFT loads: {rule.what}",
                where=f"{label}: {found[0]}{more}",
                expected=f"no adapter on {', '.join(sorted(rule.targets))} of a model of type {kind}",
                hint="merge it into its base: `vera-tools merge`",
            )

    if known is None:
        return
    for module, name in _renamed(layers, known):
        raise CheckFailedError(
            "no LoRA that PEFT loads: with transformers 5, PEFT takes this for a name of an older file",
            where=f"{label}: {module}",
            expected=f"a name that loading {known.name} leaves alone",
            found=name,
            hint="merge it into its base: `vera-tools merge`",
        )


def unfound(checkpoint: Checkpoint, base: BaseModel | None) -> tuple[str, ...]:
    """What is to be said, for a note, of names that PEFT finds in a bare model alone; the LoRA has them too.

    Raises:
        CheckFailedError: PEFT does not find them at all; the message names one, and the class that lacks it.
    """
    lost = checkpoint.unfound(base) if base is not None else None
    if lost is None:
        return ()
    if lost.bare is not None:
        return (f"its names are those of {lost.bare}: around a {lost.model_class}, PEFT drops it in silence",)
    more = f" and {len(lost.modules) - 1} more" if len(lost.modules) > 1 else ""
    raise CheckFailedError(
        "no LoRA that PEFT loads: it finds no module of this name, and drops what is on it in silence",
        where=f"{checkpoint.label}: {lost.modules[0]}{more}",
        expected=f"modules of {lost.model_class}",
        hint="merge it into its base: `vera-tools merge`",
    )


def _renamed(layers: Collection[str], known: Architecture) -> Iterator[tuple[str, str]]:
    """Layers whose keys PEFT renames, and to what."""
    if (
        known.model_type not in data.tables()["conversions"]
    ):  # PEFT renames by the model type's own renamings or not at all
        return
    active: set[int] = set()
    end = ".lora_A.default.weight"
    for module in sorted(layers, key=natural_order):
        name = module + end
        for step in known.steps:
            if not step.operations:
                name, _ = step.apply(name, active)
        if not (module + end).endswith(name):  # PEFT takes a prefix that was cut off as one that was missing
            yield module, name.removesuffix(end)


def doubts(checkpoint: Checkpoint, kind: str | None) -> tuple[str, ...]:
    """What cannot be ruled out where nothing says of which type the base is: one sentence each, for a note."""
    if kind is not None:
        return ()
    found = {
        rule.what: next(module for module in checkpoint.layers if _is_telling(module, rule))
        for rule in RULES
        if any(_is_telling(module, rule) for module in checkpoint.layers)
    }
    return tuple(f"{what}, if {module} is one (name the base with --base)" for what, module in found.items())


def names_targets(kind: str | None) -> bool:
    """Whether PEFT reads a pattern of targets otherwise on this model type, so that each layer must be named."""
    return any(rule.rewrites and kind in rule.model_types for rule in RULES)


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _is_telling(module: str, rule: Rule) -> bool:
    """Whether a layer's name alone makes it likely that a rule is in force: a router, or a part of what it is about."""
    last = _last(module)
    return last in rule.targets and (last == "gate" or any(word in module for word in rule.telling))
