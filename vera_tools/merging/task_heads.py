"""Heads that only the adapter has: config.json is the base's, and says nothing of them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vera_tools.checkpoints.names import OUTPUT_LAYERS, TASK_HEADS
from vera_tools.merging.entries import Merged, Replaced
from vera_tools.merging.plan import Plan

_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}


def notes(plan: Plan) -> list[str]:
    """What to set in the result's config.json so that it loads with a head that the base lacks.

    It is said and not set: which class of transformers has the head, its name alone does not prove.
    """
    added = [entry for entry in plan.entries if isinstance(entry, Replaced) and not entry.origin and _head(entry)]
    heads = sorted({_head(entry) for entry in added})
    if not heads:
        return []
    config = plan.base.config
    architectures = list(config.get("architectures") or [])
    tasks = {str(entry.saved.adapter.checkpoint.config.task_type) for entry in added}
    ending = next((_CLASSES[task] for task in sorted(tasks) if task in _CLASSES), None)
    settings = []
    if not (ending and any(name.endswith(ending) for name in architectures)):
        settings.append(_architecture(architectures, ending))
    labels = _labels(added)
    if labels is None:
        settings.append("num_labels to the head's number of labels")
    elif labels != _configured_labels(config):
        settings.append(f'"num_labels": {labels}' + (" (instead of id2label)" if "id2label" in config else ""))
    found = []
    if trunk := _renamed_trunk(plan):
        theirs, ours = trunk
        found.append(
            f"the class with this head calls {theirs} what the base calls {ours}: load the result by "
            f'from_pretrained(..., key_mapping={{"^{ours}": "{theirs}"}})'
        )
    if not settings:
        return found
    return [
        f"the base has no {' or '.join(heads)}, and config.json is the base's: to load the result with this head, set "
        + " and ".join(settings)
        + " in config.json",
        *found,
    ]


def _renamed_trunk(plan: Plan) -> tuple[str, str] | None:
    """The leading part of the modules' names in the adapter and in the base, where each has one of its own.

    One that is only lacking, transformers adds itself.
    """
    for entry in plan.entries:
        for product in entry.products if isinstance(entry, Merged) else ():
            theirs, _, rest = product.linear.module.partition(".")
            ours = entry.info.name.removesuffix(f".{rest}.weight")
            if rest and ours != entry.info.name and ours != theirs and "." not in ours:
                return theirs, ours
    return None


def _head(entry: Replaced) -> str:
    """The head that an added tensor belongs to, or ""."""
    config = entry.saved.adapter.checkpoint.config
    heads = {head for names in TASK_HEADS.values() for head in names} | set(config.modules_to_save or ())
    parts = entry.info.name.split(".")[:-1]
    return next((part for part in parts if part in heads and part not in OUTPUT_LAYERS), "")


def _labels(added: Iterable[Replaced]) -> int | None:
    """Rows of the head's only matrix, or of its last one where that bears the name it has in RoBERTa's heads."""
    matrices = [entry.info for entry in added if entry.info.name.endswith(".weight") and len(entry.info.shape) == 2]
    last = matrices if len(matrices) == 1 else [info for info in matrices if info.name.endswith(".out_proj.weight")]
    return last[0].shape[0] if len(last) == 1 else None


def _configured_labels(config: dict[str, object]) -> object:
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) else config.get("num_labels", 2)  # 2 is transformers' default


def _architecture(architectures: list[str], ending: str | None) -> str:
    instead = f" (it is {architectures[0]})" if architectures else ""
    if ending is None:
        return f"architectures to the class that has it{instead}"
    family = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model)$", "", architectures[0]) if architectures else "..."
    return f'"architectures": ["{family}{ending}"]{instead}'
