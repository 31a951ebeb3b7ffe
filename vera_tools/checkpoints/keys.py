"""Names of tensors that PEFT does not write, brought back to those that it does.

PEFT looks for a tensor under one name only and drops whatever is called otherwise, so that an adapter whose names went
through a wrapper computes nothing, in silence. Where the odd names come from:

- a wrapper around the model or a part of it: ``torch.compile`` (``_orig_mod``), FSDP (``_fsdp_wrapped_module``),
  activation checkpointing (``_checkpoint_wrapped_module``), Fabric and DeepSpeed (``_forward_module``), and data
  parallelism (``module``);
- PEFT inside PEFT, whose prefix then stands there twice, or layers that were injected, which have none;
- a state dict saved by hand, in which the adapter's name is part of each name (``vera_lambda_b.default``), and the
  projections stand once more under each layer.

What PEFT makes of each was seen by running 0.11.1, 0.14.0, 0.17.0, 0.20.0 and 0.21.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vera_tools.errors import FormatError
from vera_tools.files.safetensors import TensorFile
from vera_tools.projections.pair import PROJECTIONS

ROOT = "base_model."
MODULES = "base_model.model."
VECTORS = ("vera_lambda_b", "vera_lambda_d")
#: The name under which PEFT loads an adapter where no other is asked for.
DEFAULT = "default"

#: Modules that hold the one they wrap under these names. No model of its own has such parts.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
#: Classes that hold what they wrap as "module", by their names in a config's auto_mapping.
_PARALLEL = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
_ENDS = re.compile(rf"^(?P<stem>(?:.*\.)?(?:{'|'.join(VECTORS + PROJECTIONS)}))(?:\.(?P<adapter>[^.]+))?$", re.DOTALL)
_SAVED = re.compile(r"^(?P<stem>.*)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)$", re.DOTALL)


@dataclass(frozen=True)
class Odd:
    """One tensor that PEFT would have called otherwise.

    Attributes:
        found: Its name in the file.
        meant: PEFT's name for it.
        adapter: The adapter's name, where that is all that is odd about it; else None.
        saved: It belongs to a saved module.
    """

    found: str
    meant: str
    adapter: str | None
    saved: bool = False


@dataclass(frozen=True)
class Keys:
    """The odd names in one file; empty for nearly every file.

    Attributes:
        odd: One entry for each tensor.
        repeated: Tensors that stand in the file once more under another name, with the same bytes; they are left out.
        of_a_layer: The projections stand in the file only as the layers' own.
    """

    odd: tuple[Odd, ...] = ()
    repeated: tuple[str, ...] = ()
    of_a_layer: bool = False

    def taken_by_peft_21(self) -> bool:
        """Whether PEFT from 0.21 on takes every odd name when it loads the adapter under its default name."""
        return not self.of_a_layer and all(odd.adapter == DEFAULT and not odd.saved for odd in self.odd)


def put_right(weights: TensorFile, *, auto_mapping: Mapping[str, object] | None) -> Keys:
    """Let `weights` call its tensors as PEFT would have, and say which it calls otherwise.

    Args:
        weights: The open file.
        auto_mapping: The config's, which names the class that PEFT was put around, where it says so.

    Raises:
        FormatError: two tensors that differ would have one name, or the tensors are of several adapters.
    """
    odd = tuple(_odd(weights.tensors, auto_mapping))
    if not odd:
        return Keys()
    _refuse_several_adapters(odd, weights.label)
    meant = {entry.found: entry.meant for entry in odd}
    first: dict[str, str] = {}
    repeated = []
    # Where two are equal, PEFT's own name stays, or the one that is nearest to it.
    for name in sorted(weights.tensors, key=lambda name: (name in meant, len(name))):
        kept = first.setdefault(meant.get(name, name), name)
        if kept != name:
            _refuse_other_values(weights, kept, name)
            repeated.append(name)
    kept_names = {name: meant for meant, name in first.items()}
    weights.rename({name: kept_names.get(name) for name in weights.tensors})
    of_a_layer = any(found.startswith(MODULES) for meant, found in first.items() if meant.startswith(f"{ROOT}vera_"))
    return Keys(odd, tuple(repeated), of_a_layer)


def are_usual(names: Iterable[str]) -> bool:
    """Whether none of the names is odd, whatever the config says: it can only keep a name from being so."""
    return not _odd(names, None)


def _odd(names: Iterable[str], auto_mapping: Mapping[str, object] | None) -> list[Odd]:
    """The names that are not PEFT's own, with what they mean."""
    names = list(names)
    unwrapped = {name: _unwrapped(name) for name in names}
    if _is_wrapped_inside(unwrapped.values(), auto_mapping):
        unwrapped = {name: clean.replace(f"{MODULES}module.", MODULES, 1) for name, clean in unwrapped.items()}
    ends = {name: _ENDS.match(clean) for name, clean in unwrapped.items()}
    bare = any(ends.values()) and not any(clean.startswith(ROOT) for clean in unwrapped.values())
    adapters = {found["adapter"] for found in ends.values() if found} - {None}
    result = []
    for name in names:
        clean, adapter, saved = unwrapped[name], None, False
        if found := ends[name]:
            adapter, clean = found["adapter"], found["stem"]
        elif (inside := _SAVED.match(clean)) and inside["adapter"] in adapters:
            adapter, clean, saved = inside["adapter"], f"{inside['stem']}.{inside['rest']}", True
        if not clean.startswith(ROOT) and (bare or found):
            clean = (ROOT if clean in PROJECTIONS else MODULES) + clean
        if (last := clean.rpartition(".")[2]) in PROJECTIONS:
            clean = ROOT + last  # a layer's own view of the one pair
        if clean != name:
            only_named = adapter is not None and unwrapped[name] == name and name.startswith(ROOT)
            result.append(Odd(name, clean, adapter if only_named else None, saved))
    return result


def _unwrapped(name: str) -> str:
    if not name.startswith(("_", "module.")) and "._" not in name and f"{ROOT}model.{ROOT}" not in name:
        return name  # nearly every one
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module" and parts[1] in ("module", "base_model"):
        del parts[0]
    name = ".".join(parts)
    while name.startswith(MODULES + ROOT):
        name = name.removeprefix(MODULES)
    return name


def _is_wrapped_inside(names: Iterable[str], auto_mapping: Mapping[str, object] | None) -> bool:
    """Whether PEFT was put around a model that data parallelism wraps; a model's own part may be called "module"."""
    own, library = ((auto_mapping or {}).get(key) for key in ("base_model_class", "parent_library"))
    of_transformers = isinstance(library, str) and library.startswith("transformers.")  # none has a part of that name
    if isinstance(own, str) and own not in _PARALLEL and not of_transformers:
        return False
    inside = [name for name in names if name.startswith(MODULES)]
    return bool(inside) and all(name.startswith(f"{MODULES}module.") for name in inside)


def _refuse_several_adapters(odd: Iterable[Odd], where: str) -> None:
    adapters = sorted({found["adapter"] for entry in odd if (found := _ENDS.match(entry.found)) and found["adapter"]})
    if len(adapters) > 1:
        raise FormatError(
            "tensors of several adapters in one file",
            where=where,
            expected="those of one",
            found=", ".join(adapters[:3]) + (f" and {len(adapters) - 3} more" if len(adapters) > 3 else ""),
            hint="save each with save_pretrained(..., selected_adapters=[NAME])",
        )


def _refuse_other_values(weights: TensorFile, one: str, two: str) -> None:
    a, b = weights.tensors[one], weights.tensors[two]
    if (a.shape, a.dtype) != (b.shape, b.dtype) or weights.sha256(one) != weights.sha256(two):
        raise FormatError(
            f"another tensor than {one}, which means the same one to PEFT",
            where=f"{weights.label}: {two}",
            expected="equal bytes",
            found=f"{list(a.shape)} {a.dtype} and {list(b.shape)} {b.dtype}",
            hint="save it again with save_pretrained",
        )
