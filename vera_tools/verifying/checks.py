"""The list of checks that `verify` works through: each looks at one thing and says pass, fail, warn or skip.

A failed check makes a checkpoint not ok, whatever its verdict; a warning changes nothing. Checks never raise for what
they find in a checkpoint that could be opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vera_tools.base import BaseModel
from vera_tools.checkpoint import MODULES, ROOT, Checkpoint
from vera_tools.dtypes import FLOATS, np_dtype
from vera_tools.errors import CheckFailedError, VeraToolsError
from vera_tools.manifest import PROJECTIONS, Manifest, ProjectionRecord
from vera_tools.tensorfile import TensorInfo

Status = Literal["pass", "fail", "warn", "skip"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `id` is "<what>.<which>", stable from release to release."""

    id: str
    status: Status
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The check as it stands in reports."""
        return {"id": self.id, "status": self.status, "message": self.message}


@dataclass(frozen=True)
class Scan:
    """What one pass over a tensor's bytes finds."""

    sha256: str
    bad: int | None
    zero: bool


# The heads that PEFT trains and saves for these tasks, whether or not the config names them.
_TASK_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
_EMBEDDINGS = re.compile(r"\.(embed_tokens|lm_head|wte|wpe|word_embeddings|embed_in|embed_out|shared)\.weight$")


def scan(checkpoint: Checkpoint) -> dict[str, Scan]:
    """Read every tensor once: its digest, its first element that is NaN or infinite, and whether it is all zero."""
    return {name: _scan(checkpoint, info) for name, info in checkpoint.weights.tensors.items()}


def structure(checkpoint: Checkpoint) -> Iterator[Check]:
    """Config and header against each other: no tensor is read."""
    yield Check("config.schema", "pass", "every key that PEFT knows has a value that PEFT takes")
    yield _key(checkpoint)
    yield _save_projection(checkpoint)
    yield _layers(checkpoint)
    shapes = _shapes(checkpoint)
    yield shapes
    if shapes.status == "pass":
        yield _out_max(checkpoint)
    yield _dtypes(checkpoint)
    yield _unexpected(checkpoint)


def values(checkpoint: Checkpoint, scans: dict[str, Scan]) -> Iterator[Check]:
    """What the tensors hold."""
    bad = [f"{name}{_place(checkpoint.weights.tensors[name], s.bad)}" for name, s in scans.items() if s.bad is not None]
    if bad:
        yield Check("tensors.finite", "fail", f"NaN or infinity in {_some(bad)}")
    else:
        yield Check("tensors.finite", "pass", f"no NaN and no infinity in {len(scans)} tensors")
    vectors = [layer.lambda_b.name for layer in checkpoint.layers.values() if layer.lambda_b]
    zero = [name for name in vectors if scans[name].zero]
    if vectors and len(zero) == len(vectors):
        message = "every vera_lambda_b is all zeros: the adapter does nothing yet, so equal outputs would prove nothing"
        yield Check("tensors.lambda_b", "warn", message)
    else:
        yield Check(
            "tensors.lambda_b", "pass", f"{len(vectors) - len(zero)} of {len(vectors)} vera_lambda_b are non-zero"
        )


def recorded(checkpoint: Checkpoint, scans: dict[str, Scan]) -> Iterator[Check]:
    """The checkpoint against its manifest, and against its file's own record."""
    if checkpoint.embedded_error:
        yield Check("metadata.schema", "fail", str(checkpoint.embedded_error))
    elif checkpoint.embedded:
        yield _projection_digests("metadata.projections", checkpoint.embedded, scans)
    manifest = checkpoint.manifest
    if manifest is None:
        if checkpoint.manifest_error:
            yield Check("manifest.schema", "fail", str(checkpoint.manifest_error))
        else:
            yield Check("manifest.schema", "skip", "no manifest: vectors and config are not covered (see `record`)")
        return
    yield Check("manifest.schema", "pass", f"written by {manifest.tool['name']} {manifest.tool['version']}")
    if manifest.projections.assumed:
        message = "the recipe was assumed when the manifest was written, not proven from stored projections"
        yield Check("manifest.assumed", "warn", message)
    yield _projection_digests("manifest.projections", manifest.projections, scans)
    if checkpoint.embedded and checkpoint.embedded != manifest.projections:
        message = "the file's own metadata records another recipe, shape or digest than the manifest"
        yield Check("metadata.manifest", "fail", message)
    tensors = _vectors(manifest, checkpoint, scans)
    yield tensors
    yield _config(manifest, checkpoint, stale=tensors.id == "manifest.stale")
    yield _metadata(manifest, checkpoint)


def against_base(checkpoint: Checkpoint, base: BaseModel) -> Iterator[Check]:
    """The checkpoint against its base model, from headers alone."""
    try:
        linears = checkpoint.linears(base)
    except VeraToolsError as error:
        yield Check("base.modules", "fail", str(error))
        return
    missing = _not_adapted(checkpoint, base)
    if missing:
        message = f"the config adapts modules of the base for which there are no vectors: {_some(missing)}"
        yield Check("base.modules", "fail", message)
    else:
        yield Check("base.modules", "pass", f"all {len(linears)} adapted modules exist, with fitting shapes")
    try:
        known, follows = checkpoint.pair_shape(), _pair_shape_of(checkpoint, base)
    except VeraToolsError as error:
        yield Check("base.pair", "fail", str(error))
        return
    dimensions = f"in_max {follows[0]} and out_max {follows[1]}"
    if known and (known.in_max, known.out_max) != follows:
        message = f"the base gives {dimensions}, the projections have in_max {known.in_max} and out_max {known.out_max}"
        yield Check("base.pair", "fail", message)
    elif known:
        yield Check("base.pair", "pass", f"{dimensions} follow from the base")
    else:
        yield Check("base.pair", "pass", f"the projections can be regenerated: {dimensions} follow from the base")
    yield from _recorded_base(checkpoint, base)


def _key(checkpoint: Checkpoint) -> Check:
    key = checkpoint.config.projection_prng_key
    if 0 <= key < 2**32:
        return Check("config.key", "pass", f"projection_prng_key {key}")
    message = f"of projection_prng_key {key} only the low 32 bits matter: it is the same as {key % 2**32}"
    return Check("config.key", "warn", message)


def _save_projection(checkpoint: Checkpoint) -> Check:
    saved, stored = checkpoint.config.save_projection, sorted(checkpoint.projections)
    if len(stored) == 1:
        return Check("config.save_projection", "fail", f"only {stored[0]} of the two projections is stored")
    if saved and not stored:
        return Check("config.save_projection", "fail", "save_projection is true, but vera_A and vera_B are missing")
    if stored and not saved:
        message = "save_projection is false, so PEFT ignores the vera_A and vera_B that are stored"
        return Check("config.save_projection", "warn", message)
    return Check("config.save_projection", "pass", f"save_projection is {str(saved).lower()}, as the file has it")


def _layers(checkpoint: Checkpoint) -> Check:
    if not checkpoint.layers:
        return Check("tensors.layers", "fail", f"no adapted layer: no tensor is called {MODULES}<module>.vera_lambda_b")
    missing = [
        f"{layer.module}.{name}"
        for layer in checkpoint.layers.values()
        for name, info in (("vera_lambda_b", layer.lambda_b), ("vera_lambda_d", layer.lambda_d))
        if info is None
    ]
    if missing:
        return Check("tensors.layers", "fail", f"missing: {_some(missing)}")
    targets = checkpoint.config.target_modules
    if isinstance(targets, list):
        modules = list(checkpoint.layers)
        idle = [t for t in targets if not any(m == t or m.endswith(f".{t}") for m in modules)]
        if idle:
            message = f"target_modules names modules for which there are no vectors: {_some(idle)}"
            return Check("tensors.layers", "fail", message)
    return Check(
        "tensors.layers", "pass", f"{len(checkpoint.layers)} layers, each with vera_lambda_b and vera_lambda_d"
    )


def _shapes(checkpoint: Checkpoint) -> Check:
    r = checkpoint.config.r
    wrong = []
    for layer in checkpoint.layers.values():
        if layer.lambda_d and layer.lambda_d.shape != (r,):
            wrong.append(f"{layer.lambda_d.name} {list(layer.lambda_d.shape)}, expected [{r}]")
        if layer.lambda_b and (len(layer.lambda_b.shape) != 1 or not layer.lambda_b.size):
            wrong.append(f"{layer.lambda_b.name} {list(layer.lambda_b.shape)}, expected [out_features]")
    pair = checkpoint.projections
    for name, axis in (("vera_A", 0), ("vera_B", 1)):
        if name in pair and (len(pair[name].shape) != 2 or pair[name].shape[axis] != r or 0 in pair[name].shape):
            expected = f"[{r}, in_max]" if name == "vera_A" else f"[out_max, {r}]"
            wrong.append(f"{name} {list(pair[name].shape)}, expected {expected}")
    if not pair and checkpoint.recorded and checkpoint.recorded.shape.r != r:
        wrong.append(f"recorded r {checkpoint.recorded.shape.r}, expected {r}")
    if wrong:
        return Check("tensors.shapes", "fail", _some(wrong))
    return Check("tensors.shapes", "pass", f"every shape fits r = {r} and the others")


def _out_max(checkpoint: Checkpoint) -> Check:
    widest = max((layer.lambda_b.size for layer in checkpoint.layers.values() if layer.lambda_b), default=0)
    if "vera_B" in checkpoint.projections:
        out_max = checkpoint.projections["vera_B"].shape[0]
    elif checkpoint.recorded:
        out_max = checkpoint.recorded.shape.out_max
    else:
        return Check("tensors.out_max", "pass", f"out_max is {widest}, by the longest vera_lambda_b")
    if out_max != widest:
        message = f"vera_B has {out_max} rows, the longest vera_lambda_b {widest} elements: is a layer missing?"
        return Check("tensors.out_max", "fail", message)
    return Check("tensors.out_max", "pass", f"vera_B has {out_max} rows, as the longest vera_lambda_b has elements")


def _dtypes(checkpoint: Checkpoint) -> Check:
    infos = checkpoint.weights.tensors
    ours = {info.name for info in checkpoint.projections.values()}
    ours |= {i.name for layer in checkpoint.layers.values() for i in (layer.lambda_b, layer.lambda_d) if i}
    wrong = [f"{name} {infos[name].dtype}" for name in infos if name in ours and infos[name].dtype not in FLOATS]
    if wrong:
        return Check("tensors.dtypes", "fail", f"not a floating-point dtype that VeRA computes in: {_some(wrong)}")
    pair = {info.dtype for info in checkpoint.projections.values()}
    if len(pair) > 1:
        return Check("tensors.dtypes", "fail", f"vera_A and vera_B have different dtypes: {' and '.join(sorted(pair))}")
    found = sorted({infos[name].dtype for name in ours})
    if len(found) > 1:
        return Check("tensors.dtypes", "warn", f"projections and vectors have different dtypes: {', '.join(found)}")
    return Check("tensors.dtypes", "pass", f"all {found[0]}" if found else "nothing to look at")


def _unexpected(checkpoint: Checkpoint) -> Check:
    config = checkpoint.config
    outside = [module for module in checkpoint.layers if not config.targets(module)]
    embeddings: list[str] = []
    unknown: list[str] = []
    for name in checkpoint.other_tensors:
        if not _is_expected(name.removeprefix(MODULES), checkpoint) or not name.startswith(MODULES):
            (embeddings if _EMBEDDINGS.search(name) else unknown).append(name)
    if outside or unknown:
        parts = [f"no part of this adapter by its config: {_some(unknown)}"] if unknown else []
        parts += [f"not in target_modules: {_some(outside)}"] if outside else []
        return Check("tensors.unexpected", "fail", "; ".join(parts))
    if embeddings:
        message = f"embeddings are saved too, as PEFT does after resizing them: {_some(embeddings)}"
        return Check("tensors.unexpected", "warn", message)
    return Check("tensors.unexpected", "pass", "no tensor that the config does not explain")


def _is_expected(parameter: str, checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    module, _, kind = parameter.rpartition(".")
    if kind == "bias" and config.bias == "all":
        return True
    if kind == "bias" and config.bias == "vera_only" and module.removesuffix(".base_layer") in checkpoint.layers:
        return True
    saved = [*(config.modules_to_save or []), *_TASK_HEADS.get(config.task_type or "", [])]
    parts = module.split(".")
    return any(".".join(parts[: n + 1]).endswith(name) for n in range(len(parts)) for name in saved)


def _projection_digests(check: str, record: ProjectionRecord, scans: dict[str, Scan]) -> Check:
    stored = {name: scans[ROOT + name].sha256 for name in PROJECTIONS if ROOT + name in scans}
    wrong = [name for name, digest in stored.items() if digest != record.sha256[name]]
    if wrong:
        message = f"{' and '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not what was recorded: changed since"
        return Check(check, "fail", message)
    if not stored:
        return Check(check, "pass", "recipe and digests of the projections are recorded")
    return Check(check, "pass", "the stored projections have the recorded digests")


def _vectors(manifest: Manifest, checkpoint: Checkpoint, scans: dict[str, Scan]) -> Check:
    pair = {ROOT + name for name in PROJECTIONS}
    recorded, found = set(manifest.tensors) - pair, set(scans) - pair
    if recorded != found:
        parts = [f"missing {_some(sorted(recorded - found))}"] if recorded - found else []
        parts += [f"not recorded {_some(sorted(found - recorded))}"] if found - recorded else []
        return Check("manifest.tensors", "fail", "; ".join(parts))
    changed = sorted(name for name in found if manifest.tensors[name].sha256 != scans[name].sha256)
    if not changed:
        return Check("manifest.tensors", "pass", f"all {len(found)} tensors have the recorded digests")
    vectors = [i.name for layer in checkpoint.layers.values() for i in (layer.lambda_b, layer.lambda_d) if i]
    moved = sum(name in set(changed) for name in vectors)
    if 2 * moved >= len(vectors) and not any(_is_changed(manifest, scans, name) for name in pair):
        message = (
            f"{moved} of {len(vectors)} vectors are not the recorded ones, while the projections are: saved again "
            "after training on? Renew the manifest with `record`"
        )
        return Check("manifest.stale", "fail", message)
    message = (
        f"{len(changed)} of {len(found)} tensors are not the recorded ones, too few for training on (which moves all "
        f"vectors), so this looks like corruption: {_some(changed)}"
    )
    return Check("manifest.tensors", "fail", message)


def _is_changed(manifest: Manifest, scans: dict[str, Scan], name: str) -> bool:
    short = name.removeprefix(ROOT)
    return name in scans and scans[name].sha256 != manifest.projections.sha256[short]


def _config(manifest: Manifest, checkpoint: Checkpoint, *, stale: bool) -> Check:
    then, now = _comparable(manifest.config), _comparable(checkpoint.raw_config)
    keys = sorted(
        key for key in then.keys() | now.keys() if then.get(key) != now.get(key) or (key in then) != (key in now)
    )
    if not keys:
        return Check("manifest.config", "pass", "adapter_config.json says what was recorded")
    changes = [f"{key} {then.get(key, 'absent')!r} became {now.get(key, 'absent')!r}" for key in keys]
    return Check("manifest.config", "warn" if stale else "fail", _some(changes))


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    # PEFT keeps these as sets, so their order changes from one saving to the next.
    return {
        key: sorted(map(str, value))
        if key in ("target_modules", "modules_to_save") and isinstance(value, list)
        else value
        for key, value in config.items()
    }


def _metadata(manifest: Manifest, checkpoint: Checkpoint) -> Check:
    then, now = manifest.metadata, checkpoint.weights.metadata
    changed = sorted(key for key in then.keys() & now.keys() if then[key] != now[key])
    if changed:
        return Check("manifest.metadata", "fail", f"the file's metadata changed: {_some(changed)}")
    gone, new = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
    if gone and new:
        return Check("manifest.metadata", "fail", f"the file's metadata has {_some(new)} in place of {_some(gone)}")
    if gone or new:  # PEFT saving into the same folder drops what it does not know
        what = f"lost {_some(gone)}" if gone else f"gained {_some(new)}"
        return Check("manifest.metadata", "warn", f"the file's metadata {what}: another program saved it")
    return Check("manifest.metadata", "pass", "the file's metadata is the recorded one")


def _not_adapted(checkpoint: Checkpoint, base: BaseModel) -> list[str]:
    """Modules of the base that the config would adapt and the checkpoint does not."""
    config = checkpoint.config
    if config.target_modules is None or config.target_modules == "all-linear":
        return []
    renaming = base.locate(checkpoint.layers)
    known = {renaming(module) for module in checkpoint.layers}
    return sorted(
        module
        for name, (_, info) in base.tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2 and not _EMBEDDINGS.search(f".{name}")
        for module in [name.removesuffix(".weight")]
        if module not in known and config.targets(_unrename(module, renaming.strip, renaming.add))
    )


def _unrename(module: str, strip: str, add: str) -> str:
    return strip + module.removeprefix(add)


def _pair_shape_of(checkpoint: Checkpoint, base: BaseModel) -> tuple[int, int]:
    linears = checkpoint.linears(base)
    if not linears:
        raise CheckFailedError("nothing is adapted", where=checkpoint.label)
    return max(linear.in_features for linear in linears), max(linear.out_features for linear in linears)


def _recorded_base(checkpoint: Checkpoint, base: BaseModel) -> Iterator[Check]:
    weights = checkpoint.manifest.base.weights if checkpoint.manifest else {}
    if not weights:
        return
    found = {linear.weight: linear for linear in checkpoint.linears(base)}
    wrong = [
        name
        for name, record in weights.items()
        if name not in found or (found[name].info.shape, found[name].info.dtype) != (record.shape, record.dtype)
    ]
    if wrong:
        message = f"not the base that was recorded: {_some(sorted(wrong))}"
        yield Check("base.recorded", "warn", message)
    else:
        yield Check("base.recorded", "pass", f"{len(weights)} adapted weights have the recorded shapes and dtypes")


def _scan(checkpoint: Checkpoint, info: TensorInfo) -> Scan:
    digest, bad, zero, done = hashlib.sha256(), None, True, 0
    dtype = np_dtype(info.dtype) if info.dtype in FLOATS else None
    for chunk in checkpoint.weights.chunks(info):
        digest.update(chunk)
        zero = zero and not np.frombuffer(chunk, np.uint8).any()
        if dtype is not None and bad is None:
            finite = np.isfinite(np.frombuffer(chunk, dtype))
            if not finite.all():
                bad = done + int(np.argmin(finite))
            done += finite.size
    return Scan(digest.hexdigest(), bad, zero)


def _place(info: TensorInfo, index: int | None) -> str:
    place = np.unravel_index(index or 0, info.shape) if info.shape else ()
    return str([int(i) for i in place])


def _some(items: Iterable[object], most: int = 3) -> str:
    texts = [str(item) for item in items]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest
