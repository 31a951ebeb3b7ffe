"""The data on architectures against transformers itself, class by class; as a program, over all that can be built tiny.

    python -m tests.architectures.proof [CLASS...]      # a line for each class that is not exact, then a table

A tiny model of the class is saved by transformers, so that its files have the names that lie on the Hub. The replay,
which knows the data alone, must then find every parameter in the files with the values that the model has; and say of
ties, kinds and targets what transformers and PEFT say.
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tests.architectures import assembling, tiny
from vera_tools.architectures import data
from vera_tools.architectures.architecture import Architecture
from vera_tools.architectures.layout import Layout
from vera_tools.errors import VeraToolsError


def problems(name: str) -> list[str]:
    """Everything in which the data is not what transformers does with a tiny model of this class; each as one line.

    Raises:
        ValueError: there is no tiny model of the class.
    """
    _, model = tiny.model(name)
    tiny.disturb(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text("utf-8"))
        stored = _stored(Path(folder))
    known = data.architecture(config, name)
    if known is None:
        return ["no data"]
    state = dict(model.state_dict())
    values = list(_values(known, state, stored))
    if values and not _loads(model, stored):
        values = []  # transformers itself does not get back what it has saved
    layout = Layout(known, {key: value.shape for key, value in stored.items()})
    return [*values, *_renamings(known, model, stored), *_ties(known, model), *_modules(layout, model)]


def _stored(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def _values(known: Architecture, state: dict[str, Any], stored: dict[str, np.ndarray]) -> Iterable[str]:
    """Every parameter is made of the file's rows, every row is a parameter's, and nothing is left over."""
    shapes = {key: value.shape for key, value in stored.items()}
    layout = Layout(known, shapes, {name: tuple(value.shape) for name, value in state.items()})
    for key in layout.unexpected:
        yield f"values: {key} leads to no parameter"
    for key in layout.superseded:
        yield f"values: {key} is superseded"
    for parameter in layout.names:
        if parameter not in state:
            yield f"values: the model has no {parameter}"
            continue
        value = state[parameter].numpy()
        try:
            found = assembling.assemble(layout.pieces(parameter), stored.__getitem__, value.shape)
        except (VeraToolsError, ValueError) as error:
            yield f"values: {parameter}: {error}"
            continue
        if found.shape != value.shape or not np.array_equal(found, value):
            yield f"values: {parameter} has other values"
    for key, value in stored.items():
        try:
            parts = layout.pieces_of(key)
        except VeraToolsError:
            continue  # said above
        if not parts:
            if key not in (*layout.unexpected, *layout.superseded):
                yield f"values: {key} is not in any parameter"
            continue
        try:
            found = assembling.take_apart(parts, lambda name: state[name].numpy(), value.shape)
        except (KeyError, ValueError) as error:
            yield f"values: {key} taken apart: {error}"
            continue
        if not np.array_equal(found, value):
            yield f"values: {key} taken apart has other values"
    for parameter in state:
        if layout.holder(parameter) is None and not (known.may_lack(parameter) or known.may_be_tied(parameter)):
            yield f"values: {parameter} is not in the files"


def _loads(model: Any, stored: dict[str, np.ndarray]) -> bool:
    """Whether transformers makes the same model again of what it has saved."""
    import torch

    try:
        again = type(model).from_pretrained(
            None, config=model.config, state_dict={key: torch.tensor(value) for key, value in stored.items()}
        )
    except Exception:
        return False
    mine, theirs = model.state_dict(), again.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _renamings(known: Architecture, model: Any, stored: dict[str, np.ndarray]) -> Iterable[str]:
    """Names as transformers renames them: those of the file, the model's own, and the same without the prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    from vera_tools.architectures.renaming import natural_order, replay

    state = model.state_dict()
    prefix = model.base_model_prefix
    kinds = {
        "saved": list(stored),
        "own": list(state),
        "bare": [name.removeprefix(f"{prefix}.") for name in state],
        "longer": [f"{prefix}.{name}" for name in state],
        "old norms": [key.replace("LayerNorm.weight", "LayerNorm.gamma") for key in stored],
    }
    for kind, names in kinds.items():
        names = list(dict.fromkeys(names))
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        ours = replay(names, known.steps, prefix=known.base_model_prefix, stores=known.stores)
        of_key = {key: entry for entry, found in ours.gathered.items() for keys in found.keys.values() for key in keys}
        assert sorted(names, key=natural_order) == sorted(names, key=dot_natural_key)
        for key in sorted(names, key=dot_natural_key):
            theirs, _ = rename_source_key(key, renamings, converters, prefix, state)
            if theirs not in state and key in state:
                theirs, _ = rename_source_key(key, [], [], prefix, state)
            expected = theirs if theirs in state else None
            if of_key.get(key) != expected and key not in ours.superseded:
                yield f"renaming, {kind}: {key} is {of_key.get(key)}, not {expected}"


def _ties(known: Architecture, model: Any) -> Iterable[str]:
    """Groups of parameters that are one tensor."""
    groups: dict[int, set[str]] = collections.defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    theirs = {frozenset(group) for group in groups.values() if len(group) > 1}
    theirs = {group for group in theirs if not all(known.may_be_tied(name) for name in group)}
    ours = {frozenset(group) for group in known.tied(dict(model.named_parameters(remove_duplicate=False)))}
    for group in theirs - ours:
        yield f"ties: not known: {sorted(group)[:3]} ({len(group)})"
    for group in ours - theirs:
        yield f"ties: not there: {sorted(group)[:3]} ({len(group)})"
    for target, source in model.all_tied_weights_keys.items():
        if known.tied_to(target) not in (source, known.tied_to(source)) and not known.may_be_tied(target):
            yield f"ties: {target} is tied to {known.tied_to(target)}, not {source}"


def _modules(layout: Layout, model: Any) -> Iterable[str]:
    """Kinds, embeddings, and the modules that PEFT's "all-linear" adapts."""
    known = layout.architecture
    import peft
    import torch
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from transformers.pytorch_utils import Conv1D

    classes = {
        "Linear": torch.nn.Linear,
        "Conv1D": Conv1D,
        "Embedding": torch.nn.Embedding,
        "Conv1d": torch.nn.Conv1d,
        "Conv2d": torch.nn.Conv2d,
        "LayerNorm": torch.nn.LayerNorm,
    }
    for name, module in model.named_modules(remove_duplicate=False):
        kind = next((kind for kind, one in classes.items() if isinstance(module, one)), None)
        stores = any(True for _ in module.parameters())
        if kind in ("Linear", "Conv1D", "Embedding") and stores and layout.kind(name) != kind:
            yield f"kinds: {name} is {layout.kind(name)}, not {kind}"
        if kind is None and stores and layout.kind(name) in ("Linear", "Conv1D"):
            yield f"kinds: {name} is {layout.kind(name)}, not {type(module).__name__}"
    for getter, name in (("input", known.input_embeddings), ("output", known.output_embeddings)):
        try:
            module = getattr(model, f"get_{getter}_embeddings")()
        except NotImplementedError:
            module = None
        found = {
            other for other, one in model.named_modules(remove_duplicate=False) if one is module and module is not None
        }
        if (name is None) != (not found) or (name is not None and name not in found):
            yield f"embeddings: {getter} is {name}, not {sorted(found)[:2]}"
    for task in (None, "SEQ_CLS"):
        adapter = peft.VeraConfig(target_modules="all-linear", task_type=task)
        theirs = set(_maybe_include_all_linear_layers(adapter, model).target_modules)
        names = {name for name, module in model.named_modules() if any(True for _ in module.parameters())}
        ours = {name for name in names if layout.is_linear_target(name, task_type=task)}
        if ours != theirs:
            yield f"targets, {task}: {sorted(ours - theirs)[:2]} too many, {sorted(theirs - ours)[:2]} too few"


def main(names: list[str]) -> None:
    """Every class, or those named."""
    import os

    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    counts: collections.Counter[str] = collections.Counter()
    causes: dict[str, list[str]] = collections.defaultdict(list)
    for name in names or sorted(data.tables()["classes"]):
        try:
            found = problems(name)
        except ValueError as error:
            counts["not built tiny"] += 1
            print(f"{name}: NOT BUILT {error}", flush=True)
            continue
        except Exception as error:
            found = [f"crash: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        counts["not exact" if found else "exact"] += 1
        for cause in sorted({line.split(":")[0] for line in found}):
            causes[cause].append(name)
        if found:
            print(f"{name}: {len(found)}: {' | '.join(found[:3])}", flush=True)
    print()
    print(f"{sum(counts.values())} classes: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    for cause, classes in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"  {cause}: {len(classes)}: {' '.join(classes)}")


if __name__ == "__main__":
    main(sys.argv[1:])
