"""`from_foreign`: VeRA checkpoints in other programs' forms, brought into PEFT's where the mapping is exact.

Three forms are known whose adapters are VeRA's to the letter and are only named otherwise:

``peft``
    PEFT's own, with names of tensors that a wrapper or a state dict saved by hand gave them, or a config that PEFT
    does not read (see `checkpoints.keys` and `checkpoints.peft_values`).

``peft-draft``
    PEFT's own before 0.11: the config says ``init_vera_weights`` and has empty ``rank_pattern`` and ``alpha_pattern``,
    which later versions refuse, and trained biases stand under the module itself, not under its ``base_layer``.
``anima``
    The training state of the sd-scripts family's trainer for Anima: ``vera_shared_A`` and ``vera_shared_B``, and for
    each module ``lora_unet_<path with underscores>.vera_lambda_b`` and ``.vera_lambda_d``. The base's headers say where
    the dots were. A is drawn from the key, B from key + 1, and both again whenever a wider layer comes along, so that
    often no single draw makes the stored pair; it is taken over as it is.

Everything else is refused under its own name.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from vera_tools.checkpoints import destination, peft_values
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import MODULES, ROOT, WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME, VeraConfig
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, resolve
from vera_tools.checkpoints.writing import base_record, write_checkpoint
from vera_tools.converting.forms import FORMATS, NO_MAPPING, REFUSED
from vera_tools.converting.output import (
    ConversionReport,
    Destination,
    common,
    corrections,
    foreign_metadata,
    refuse_half_a_pair,
)
from vera_tools.errors import CheckFailedError, FormatError, NothingToDoError, NotVeraError, UsageError
from vera_tools.files import atomic, local, opening
from vera_tools.files.safetensors import Deferred, TensorFile
from vera_tools.files.strict_json import parse_json
from vera_tools.projections.identification import identify_pair
from vera_tools.projections.pair import PROJECTIONS, Pair, PairShape
from vera_tools.verifying.recorded import refuse_changed

_SHARED = {"vera_A": "vera_shared_A", "vera_B": "vera_shared_B"}
_VECTORS = ("vera_lambda_b", "vera_lambda_d")


@dataclass(frozen=True, kw_only=True, repr=False)
class ForeignReport(ConversionReport):
    """What was brought in.

    Attributes:
        format: Which form it had.
        renamed: Tensors that have another name now.
    """

    name: ClassVar[str] = "convert"

    format: str
    renamed: int

    def body(self) -> dict[str, Any]:
        """The convert/v1 document's own part."""
        return {**super().body(), "from": self.format, "renamed": self.renamed}


def from_foreign(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    format: str | None = None,
    base: str | os.PathLike[str] | None = None,
    prng_key: int | None = None,
    in_features: int | None = None,
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
    in_place: bool = False,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> ForeignReport:
    """Write another program's VeRA checkpoint in PEFT's form.

    Args:
        checkpoint: A folder or a safetensors file.
        output: The folder to write.
        format: "peft", "peft-draft" or "anima". Default: what its tensors and config look like.
        base: The base model; "anima" needs it for the modules' names, a seed-only draft for in_max.
        prng_key: The key, for "anima" where the file's metadata does not say it. Default: 0, the trainer's own.
        in_features: Largest in_features of the adapted layers, for a seed-only draft without a base.
        recipe: Name of the recipe of a seed-only draft. Default: PEFT's is assumed, with a warning.
        stored_dtype: The dtype that an assumed pair was kept in.
        strict: Refuse to assume a recipe, and one that was assumed or stated when it was recorded.
        in_place: Replace the checkpoint itself, in one step; not for "anima".
        overwrite: Replace `output` where it exists.
        allow_pickle: Read a legacy adapter_model.bin too.

    Raises:
        NotVeraError: a form that has no exact mapping; its name is in the message.
        NothingToDoError: it has PEFT's form already.
        FormatError: unreadable, or malformed.
        CheckFailedError: the base does not fit.
        UsageError: something must be named (base, in_features), or the output cannot be where it was asked for.
    """
    if format is not None and format not in FORMATS:
        raise UsageError("not a format that can be brought in", expected=" or ".join(FORMATS), found=format)
    folder, name = opening.locate(checkpoint)
    if CONFIG_NAME not in folder.names():
        if format in ("peft", "peft-draft"):
            raise FormatError(f"there is no {CONFIG_NAME}", where=folder.label)
        if in_place:
            raise UsageError("a training state is not converted in place", where=os.fspath(checkpoint), hint="use -o")
        return _from_anima(folder, name, opening.spelled(checkpoint), output, base, prng_key, overwrite=overwrite)
    if format == "anima":
        raise FormatError(f"not a training state: it has an {CONFIG_NAME}", where=os.fspath(checkpoint))
    _refuse_adapter_hub(folder)
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(Checkpoint.open(checkpoint, allow_pickle=allow_pickle))
        except NotVeraError as error:
            raise _with_reason(error) from error
        target = Destination.of(opened, output, in_place=in_place, overwrite=overwrite, base=base)
        refuse_half_a_pair(opened)
        _refuse_by_name(opened.weights)
        config, names = _draft_config(opened), _draft_names(opened)
        renamed = sum(old != new for old, new in names.items())
        is_draft = renamed > 0 or config != opened.raw_config
        if not is_draft and not opened.is_odd:
            raise NothingToDoError("it has PEFT's form already", where=opened.label)
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        assumptions = Assumptions.stated(
            model, in_features=in_features, recipe=recipe, stored_dtype=stored_dtype, strict=strict
        )
        resolved = resolve(opened, assumptions)
        refuse_changed(opened)
        tensors = {new: opened.weights.deferred(old) for old, new in names.items()}
        with target.open(model) as out:
            text = json.dumps(config, indent=2)
            metadata = foreign_metadata(opened)
            manifest = write_checkpoint(
                out, text, tensors, resolved.record, metadata=metadata, base=base_record(opened, model)
            )
            size = (out / WEIGHTS_NAME).stat().st_size
        return ForeignReport(
            **common(opened, target, manifest, size),
            origin=resolved.origin,
            format="peft-draft" if is_draft else "peft",
            renamed=renamed + len(opened.keys.odd),
            notes=corrections(opened),
        )


def _refuse_adapter_hub(folder: local.Folder) -> None:
    where = folder.path_of(CONFIG_NAME)
    config = peft_values.read(local.read_text(folder, CONFIG_NAME), where=where).document
    if isinstance(config, dict) and "peft_type" not in config and {"config", "model_class"} <= config.keys():
        raise NotVeraError(
            "no exact mapping to VeRA: adapter-hub draws its matrices from the global generator",
            kind="ADAPTER-HUB",
            where=where,
        )


def _refuse_by_name(weights: TensorFile) -> None:
    for name in weights.tensors:
        for fragment, (kind, why) in REFUSED.items():
            if fragment in name:
                raise NotVeraError(f"{NO_MAPPING}: {why}", kind=kind, where=f"{weights.label}: {name}")


def _with_reason(error: NotVeraError) -> NotVeraError:
    """The refusal of another kind of adapter, with why it cannot become VeRA, where that is known."""
    why = next((why for kind, why in REFUSED.values() if kind == error.kind.upper()), None)
    return error if why is None else NotVeraError(f"{NO_MAPPING}: {why}", kind=error.kind, where=error.where)


def _draft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config = dict(checkpoint.raw_config)
    if "init_vera_weights" in config:
        config.setdefault("init_weights", config.pop("init_vera_weights"))
    for key in ("rank_pattern", "alpha_pattern"):
        if config.pop(key, None):
            raise NotVeraError(
                "no exact mapping to VeRA: it has ranks or scales of its own for some modules",
                kind="PEFT-DRAFT-PATTERNS",
                where=f"{checkpoint.folder.path_of(CONFIG_NAME)}: {key}",
            )
    return config


def _draft_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Old name to new: an adapted module's bias moves to its base_layer."""
    biases = {f"{MODULES}{module}.bias": f"{MODULES}{module}.base_layer.bias" for module in checkpoint.layers}
    return {name: biases.get(name, name) for name in checkpoint.weights.tensors}


def _from_anima(
    folder: local.Folder,
    name: str | None,
    label: str,
    output: str | os.PathLike[str] | None,
    base: str | os.PathLike[str] | None,
    prng_key: int | None,
    *,
    overwrite: bool,
) -> ForeignReport:
    if output is None:
        raise UsageError("say where to write (-o)", where=label)
    files = [name] if name else [entry for entry in folder.names() if entry.endswith(".safetensors")]
    if len(files) != 1:
        raise FormatError(
            "not one file", where=label, expected="one safetensors file", found=f"{len(files)}", hint="name the file"
        )
    target = destination.refuse_folder(output, overwrite=overwrite, inputs=(label, base))
    with contextlib.ExitStack() as stack:
        weights = stack.enter_context(TensorFile(folder.open(files[0])))
        _refuse_by_name(weights)
        vectors = _anima_vectors(weights)
        if base is None:
            hint = "name it with --base, headers are enough"
            raise UsageError("only the base says what the modules are called", where=label, hint=hint)
        model = stack.enter_context(BaseModel.open(base))
        modules = _unflattened(vectors, model)
        key = _anima_key(weights) if prng_key is None else prng_key
        record = _anima_record(weights, key)
        names = {_SHARED[short]: ROOT + short for short in PROJECTIONS}
        names |= {f"{flat}.{v}": f"{MODULES}{module}.{v}" for flat, module in modules.items() for v in _VECTORS}
        tensors: dict[str, Deferred] = {new: weights.deferred(old) for old, new in names.items()}
        config = VeraConfig(
            r=record.shape.r, target_modules=sorted(modules.values()), projection_prng_key=key, inference_mode=True
        )
        with destination.on_disk(target) as path, atomic.folder(path, overwrite=overwrite) as out:
            manifest = write_checkpoint(out, config, tensors, record, metadata=weights.metadata)
            size = (out / WEIGHTS_NAME).stat().st_size
            folder.check_unchanged()
            model.check_unchanged()
        return ForeignReport(
            path=label,
            output=str(target),
            in_place=False,
            projections=record,
            origin="stored",
            input_bytes=weights.size,
            output_bytes=size,
            manifest_bytes=len(manifest.to_json().encode()),
            carried_over=(),
            left_out=(),
            format="anima",
            renamed=len(names),
            notes=("PEFT before 0.21 draws another pair on loading: it needs vera_tools.nn.peft or the LoRA export",),
        )


def _anima_vectors(weights: TensorFile) -> list[str]:
    """The flattened module names; anything that is no part of VeRA is refused."""
    found: dict[str, set[str]] = {}
    for name in weights.tensors:
        if name in _SHARED.values():
            continue
        flat, _, vector = name.partition(".")
        if vector not in _VECTORS or not flat.startswith(("lora_unet_", "lora_te")):
            raise NotVeraError(
                "no exact mapping to VeRA",
                kind="UNKNOWN",
                where=f"{weights.label}: {name}",
                hint="it is not a known form",
            )
        found.setdefault(flat, set()).add(vector)
    missing = [name for name in _SHARED.values() if name not in weights.tensors]
    missing += [f"{flat}.{v}" for flat, have in found.items() for v in _VECTORS if v not in have]
    if missing:
        raise FormatError(f"{missing[0]} is missing", where=weights.label)
    if len({flat.partition("_")[2].partition("_")[0] for flat in found}) > 1:
        raise NotVeraError(
            "no exact mapping to VeRA: it adapts two models, and a PEFT adapter has one base",
            kind="ANIMA-TWO-MODELS",
            where=weights.label,
        )
    return list(found)


def _unflattened(vectors: list[str], base: BaseModel) -> dict[str, str]:
    """Flattened name to module name. Every name must fit one module of the base, and only one."""
    paths: dict[str, set[str]] = {}
    for tensor in base.tensors:
        parts = tensor.removesuffix(".weight").split(".")
        if tensor.endswith(".weight"):
            for start in range(len(parts)):
                paths.setdefault("_".join(parts[start:]), set()).add(".".join(parts[start:]))
    result = {}
    for flat in vectors:
        fits = paths.get(flat.split("_", 2)[2], set())
        if len(fits) != 1:
            raise CheckFailedError(
                "the base has no such module" if not fits else "the base has several such modules",
                where=f"{base.label}: {flat}",
                expected="one module of this name, dots taken for underscores",
                found=" and ".join(sorted(fits)) or "none",
            )
        result[flat] = next(iter(fits))
    return result


def _anima_key(weights: TensorFile) -> int:
    """The key that the training arguments in the metadata name, or the trainer's default."""
    text = weights.metadata.get("ss_network_args")
    arguments = parse_json(text, where=f"{weights.label}: ss_network_args") if text else {}
    value = arguments.get("vera_projection_prng_key", 0) if isinstance(arguments, dict) else 0
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise FormatError("not a PRNG key", where=f"{weights.label}: ss_network_args", found=repr(value)) from error


def _anima_record(weights: TensorFile, key: int) -> ProjectionRecord:
    infos = {short: weights.tensors[long] for short, long in _SHARED.items()}
    a, b = infos["vera_A"].shape, infos["vera_B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or infos["vera_A"].dtype != infos["vera_B"].dtype:
        raise FormatError("vera_shared_A and vera_shared_B do not fit each other", where=weights.label)
    pair = Pair(
        PairShape(a[0], a[1], b[0]),
        infos["vera_A"].dtype,
        lambda name, start, stop: weights.read_elements(infos[name], start, stop),
    )
    found = identify_pair(pair, prng_key=key)
    sha256 = {short: weights.sha256(_SHARED[short]) for short in PROJECTIONS}
    return ProjectionRecord(found.recipe if found.exact else None, "stored", pair.shape, pair.dtype, sha256)
