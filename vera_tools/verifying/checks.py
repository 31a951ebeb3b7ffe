"""The checks that `verify` works through: each looks at one thing and says pass, fail, warn or skip.

A failed check makes a checkpoint not ok, whatever its verdict; a warning changes nothing. Checks never raise for what
they find in a checkpoint that could be opened. Those of config, header and values are here; `recorded` has those
against a manifest, `fit` those against a base model.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from vera_tools.architectures import data
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import MODULES, Checkpoint
from vera_tools.checkpoints.manifest import ASSUMED, Origin
from vera_tools.checkpoints.names import TASK_HEADS, copied_from, is_embedding, lies_in_saved
from vera_tools.checkpoints.placement import Placement
from vera_tools.checkpoints.targeting import idle
from vera_tools.dtypes import FLOATS, np_dtype
from vera_tools.errors import VeraToolsError
from vera_tools.files.safetensors import TensorInfo, digests_in
from vera_tools.files.safetensors_library import LIBRARY
from vera_tools.projections.identification import Identification
from vera_tools.projections.key import same_key, seed
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.findings import MATCH, Check


class Scan(NamedTuple):
    """What one pass over a tensor's bytes finds."""

    sha256: str
    bad: int | None
    zero: bool


def scan(checkpoint: Checkpoint) -> dict[str, Scan]:
    """Read every tensor once: its digest, its first element that is NaN or infinite, and whether it is all zero."""
    found: dict[str, Scan] = {}
    for infos, pieces in checkpoint.weights.runs():
        if len(infos) == 1:
            found[infos[0].name] = _scan(infos[0], pieces)
        else:
            found |= _scan_run(infos, next(pieces, memoryview(b"")))
        for info in infos:
            checkpoint.weights.note(info, found[info.name].sha256)
    return found


def structure(checkpoint: Checkpoint, base: BaseModel | None = None) -> Iterator[Check]:
    """Config and header against each other: no tensor is read.

    Args:
        checkpoint: The checkpoint.
        base: Its base, where it is at hand, for what a config without target_modules means.
    """
    yield Check("config.schema", "pass", "every key that PEFT knows has a value that PEFT takes")
    yield key(checkpoint)
    yield _save_projection(checkpoint)
    yield _official(checkpoint)
    yield _layers(checkpoint)
    shapes = _shapes(checkpoint)
    yield shapes
    if shapes.status == "pass":
        yield _out_max(checkpoint)
    yield dtypes(checkpoint)
    yield _saved(checkpoint, base)
    yield _unexpected(checkpoint, base)


def values(checkpoint: Checkpoint, scans: dict[str, Scan]) -> Iterator[Check]:
    """What the tensors hold."""
    bad = [f"{name}{_place(checkpoint.weights.tensors[name], s.bad)}" for name, s in scans.items() if s.bad is not None]
    if bad:
        yield Check("tensors.finite", "fail", f"NaN or infinity in {some(bad)}")
    else:
        yield Check("tensors.finite", "pass", f"no NaN and no infinity in {len(scans)} tensors")
    for vector in ("vera_lambda_b", "vera_lambda_d"):
        names = [name for name in scans if name.endswith(f".{vector}")]
        zero = sum(scans[name].zero for name in names)
        message = f"{len(names) - zero} of {len(names)} {vector} are non-zero"
        if names and zero == len(names):
            message = f"every {vector} is all zeros: the adapter does nothing yet, so equal outputs would prove nothing"
        yield Check(f"tensors.{vector[5:]}", "warn" if names and zero == len(names) else "pass", message)


def match(identified: Identification, key: int, origin: Origin) -> Check:
    """The verdict on a stored pair in words: what it was found to be, against the config's key."""
    recipe = identified.recipe
    if identified.made_by(key):
        message = f"vera_A and vera_B are bit-identical to what key {key} gives"
        if origin in ASSUMED:
            message += f"; that it is the trained pair was {origin}"
        return Check(MATCH, "pass", message)
    if identified.exact and recipe:
        return Check(MATCH, "warn", f"vera_A and vera_B were made with {drawn_with(recipe)}; the config says key {key}")
    extents = {name: match.extent for name, match in identified.matches.items() if match.match != "identical"}
    if len(extents) == len(PROJECTIONS) and len(set(extents.values())) == 1:
        return Check(MATCH, "warn", f"{' and '.join(extents)} differ from what key {key} gives in {extents['vera_A']}")
    parts = [f"{name} differs from what key {key} gives in {extent}" for name, extent in extents.items()]
    return Check(MATCH, "warn", "; ".join(parts))


def drawn_with(recipe: Recipe) -> str:
    """The key of a recipe in words, with what else is not PEFT's way."""
    how = f"key {recipe.prng_key}" + ("" if recipe.prng_key_B is None else f" and, for vera_B, key {recipe.prng_key_B}")
    return how + (", vera_B first" if recipe.b_first else "")


def key(checkpoint: Checkpoint) -> Check:
    """The check `config.key`."""
    key, record = checkpoint.config.projection_prng_key, checkpoint.recorded
    recipe = None if record is None or checkpoint.projections else record.recipe  # a stored pair is looked at itself
    if recipe is not None and not same_key(recipe.prng_key, key):
        message = f"projection_prng_key {key}, and the recorded pair was made with {drawn_with(recipe)}"
        return Check("config.key", "fail", message)
    if key == seed(key):
        return Check("config.key", "pass", f"projection_prng_key {key}")
    message = (
        f"of projection_prng_key {key} only the low 32 bits matter, which is harmless: it is the same as {seed(key)}"
    )
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


def _official(checkpoint: Checkpoint) -> Check:
    if objection := checkpoint.weights.objection():
        return Check("tensors.official", "fail", f"what PEFT reads with disagrees: {objection}")
    return Check("tensors.official", "pass", f"{LIBRARY} finds the same {len(checkpoint.weights.tensors)} tensors")


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
        return Check("tensors.layers", "fail", f"missing: {some(missing)}")
    targets = checkpoint.config.target_modules
    without = idle(targets, checkpoint.layers) if isinstance(targets, list) else []
    checkpoint.targeting.prepare(without)
    without = [target for target in without if not checkpoint.targeting.keeps_from_adapting(target)]
    if without:
        message = (
            f"target_modules names {some(without)}, for which there are no vectors: --base tells whether any is missing"
        )
        return Check("tensors.layers", "warn", message)
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
    lengths = {layer.lambda_d.shape for layer in checkpoint.layers.values() if layer.lambda_d}
    rows = {pair["vera_A"].shape[:1]} if "vera_A" in pair else set()
    if len(lengths) == 1 and lengths != {(r,)} and rows <= lengths:  # all of it agrees, but for the config
        (length,) = lengths
        message = f"r is {r}, and every vera_lambda_d has {' x '.join(map(str, length))} elements: was r edited?"
        return Check("tensors.shapes", "fail", message)
    if wrong and len(pair) == 2 and len(pair["vera_A"].shape) == 2 and pair["vera_A"].shape[0] > r:
        wrong.append(
            "PEFT saves the pair of the model's first adapter with every other one, which then cannot be loaded"
        )
    if not pair and checkpoint.recorded and checkpoint.recorded.shape.r != r:
        wrong.append(f"recorded r {checkpoint.recorded.shape.r}, expected {r}")
    if wrong:
        return Check("tensors.shapes", "fail", some(wrong))
    return Check("tensors.shapes", "pass", f"every shape fits r = {r} and the others")


def _out_max(checkpoint: Checkpoint) -> Check:
    widest = checkpoint.widest
    if "vera_B" in checkpoint.projections:
        out_max = checkpoint.projections["vera_B"].shape[0]
    elif checkpoint.recorded:
        out_max = checkpoint.recorded.shape.out_max
    else:
        return Check("tensors.out_max", "pass", f"out_max is {widest}, by the longest vera_lambda_b")
    if out_max != widest:
        message = (
            f"vera_B has {out_max} rows, the longest vera_lambda_b {widest} elements: a layer is missing, or PEFT "
            "saved this adapter beside a first, wider one, whose pair it then shares"
        )
        return Check("tensors.out_max", "fail", message)
    return Check("tensors.out_max", "pass", f"vera_B has {out_max} rows, as the longest vera_lambda_b has elements")


def dtypes(checkpoint: Checkpoint) -> Check:
    """Whether the projections and the vectors have dtypes that VeRA computes in."""
    infos = checkpoint.weights.tensors
    ours = {info.name for info in checkpoint.projections.values()}
    ours |= checkpoint.vector_infos.keys()
    wrong = [f"{name} {infos[name].dtype}" for name in infos if name in ours and infos[name].dtype not in FLOATS]
    if wrong:
        return Check("tensors.dtypes", "fail", f"not a floating-point dtype that VeRA computes in: {some(wrong)}")
    pair = {info.dtype for info in checkpoint.projections.values()}
    if len(pair) > 1:
        return Check("tensors.dtypes", "fail", f"vera_A and vera_B have different dtypes: {' and '.join(sorted(pair))}")
    found = sorted({infos[name].dtype for name in ours})
    if len(found) > 1:
        return Check("tensors.dtypes", "warn", f"projections and vectors have different dtypes: {', '.join(found)}")
    return Check("tensors.dtypes", "pass", f"all {found[0]}" if found else "nothing to look at")


def _unexpected(checkpoint: Checkpoint, base: BaseModel | None) -> Check:
    outside = checkpoint.unadapted(base)
    embeddings: list[str] = []
    unknown: list[str] = []
    for name in checkpoint.other_tensors:
        if checkpoint.is_copy(name):
            continue
        if not _is_expected(name.removeprefix(MODULES), checkpoint, base) or not name.startswith(MODULES):
            (embeddings if _is_table(name.removeprefix(MODULES), checkpoint, base) else unknown).append(name)
    if outside or unknown:
        parts = [f"no part of this adapter by its config: {some(unknown)}"] if unknown else []
        meant = "target_modules"
        if checkpoint.config.target_modules is None and base is not None:
            meant += f", which is null: PEFT takes its default for {base.model_type}"
        parts += [f"not in {meant}: {some(outside)}"] if outside else []
        return Check("tensors.unexpected", "fail", "; ".join(parts))
    if embeddings:
        message = f"embeddings are saved too, as PEFT does after resizing them: {some(embeddings)}"
        return Check("tensors.unexpected", "warn", message)
    return Check("tensors.unexpected", "pass", "no tensor that the config does not explain")


def _is_table(parameter: str, checkpoint: Checkpoint, base: BaseModel | None) -> bool:
    """Whether a parameter is an embedding's or an output layer's, which PEFT may save whatever the config says.

    Without a base, any class's may be meant.
    """
    if is_embedding(parameter):
        return True
    parameter = parameter.replace(".base_layer.", ".")
    placement = _known_placement(checkpoint, base)
    if placement is not None:
        return placement.architecture.is_table(parameter)
    return parameter.rpartition(".")[0] in data.table_modules()


def _is_expected(parameter: str, checkpoint: Checkpoint, base: BaseModel | None) -> bool:
    config = checkpoint.config
    module, _, kind = parameter.rpartition(".")
    adapted = module.removesuffix(".base_layer") in checkpoint.layers
    if kind == "bias" and (config.bias == "all" or (config.bias == "vera_only" and adapted)):
        return True
    if checkpoint.targeting.saves(parameter):
        return True
    return adapted and _is_table(parameter, checkpoint, base)  # PEFT saves an output layer that is adapted, too


def _saved(checkpoint: Checkpoint, base: BaseModel | None) -> Check:
    parameters = [name.removeprefix(MODULES) for name in checkpoint.other_tensors]
    # PEFT names the usual heads itself, and a model may have others: their absence proves nothing.
    heads = {head for names in TASK_HEADS.values() for head in names}
    there = {name for parameter in parameters for name in checkpoint.targeting.saving(parameter)}
    absent = [name for name in checkpoint.config.modules_to_save or [] if name not in there]
    if nested := next(filter(None, map(checkpoint.targeting.nested, parameters)), None):
        message = (
            f"modules_to_save means {nested[0]} and, inside it, {nested[1]}: PEFT saves the inner one as it was before "
            "training, and cannot load the file"
        )
        return Check("tensors.saved", "fail", message)
    lost = [name for name in checkpoint.other_tensors if copied_from(name) and not checkpoint.is_copy(name)]
    if lost:
        message = f"without the tensors that PEFT loads, of which these are copies by their names: {some(lost)}"
        return Check("tensors.saved", "fail", message)
    missing = [name for name in absent if name not in heads]
    idle_names = _of_no_module(missing, checkpoint, base)
    absent, missing = ([name for name in names if name not in idle_names] for names in (absent, missing))
    if missing:
        return Check("tensors.saved", "fail", f"modules_to_save names {some(missing)}, of which nothing is in the file")
    if absent and not any(lies_in_saved(parameter, head) for parameter in parameters for head in heads):
        message = (
            f"modules_to_save names {some(absent)}, and no head is in the file: --base tells whether one is missing"
        )
        return Check("tensors.saved", "warn", message)
    if idle_names:
        message = f"modules_to_save names {some(idle_names)}, of which the base has no module: PEFT passes over that"
        return Check("tensors.saved", "warn", message)
    return Check("tensors.saved", "pass", f"{len(parameters)} tensors of biases and saved modules")


def _of_no_module(entries: list[str], checkpoint: Checkpoint, base: BaseModel | None) -> list[str]:
    """Entries of modules_to_save that mean no module of the base's class, of which all is known."""
    placement = _known_placement(checkpoint, base) if entries else None
    if placement is None or placement.renaming is not None:
        return []
    return [entry for entry in entries if not placement.architecture.may_have_module(entry)]


def _known_placement(checkpoint: Checkpoint, base: BaseModel | None) -> Placement | None:
    """What the adapter's names mean in a base whose class is known; None where nothing says so."""
    with contextlib.suppress(VeraToolsError):  # which `base.modules` reports
        placement = checkpoint.placement(base) if base is not None else None
        return placement if placement is not None and placement.architecture.is_known else None
    return None


def _scan_run(infos: list[TensorInfo], data: memoryview) -> dict[str, Scan]:
    """`_scan` of neighbours, whose values are looked at together: a look at each would take as long as its digest."""
    first = infos[0].start
    digests, found = digests_in(infos, data), dict[str, Scan]()
    for dtype, group in itertools.groupby(infos, lambda info: info.dtype):
        same = list(group)
        start, stop = same[0].start, same[-1].stop
        if dtype not in FLOATS or start == stop:
            found |= {info.name: Scan(digests[info.name], None, True) for info in same}
            continue
        values = np.frombuffer(data[start - first : stop - first], np_dtype(dtype))
        if not np.isfinite(values).all():
            found |= {info.name: _scan(info, [data[info.start - first : info.stop - first]]) for info in same}
            continue
        places = [(info.start - start) // values.itemsize for info in same]
        # The first value nearly always tells that not all are zero. An empty tensor may stand at the end, and has none.
        told = (values[[min(place, len(values) - 1) for place in places]] != 0).tolist()
        for info, place, tells in zip(same, places, told, strict=True):
            nonzero = info.nbytes and (tells or values[place : place + info.size].any())
            found[info.name] = Scan(digests[info.name], None, not nonzero)
    return found


def _scan(info: TensorInfo, pieces: Iterable[memoryview]) -> Scan:
    digest, bad, zero, done = hashlib.sha256(), None, True, 0
    dtype = np_dtype(info.dtype) if info.dtype in FLOATS else None
    for piece in pieces:
        digest.update(piece)
        if dtype is None:
            continue
        values = np.frombuffer(piece, dtype)
        # The first value nearly always tells, and in a small tensor a look at all takes as long as its digest.
        zero = zero and not (values.size and values[0]) and not values.any()
        if bad is None:
            finite = np.isfinite(values)
            if not finite.all():
                bad = done + int(np.argmin(finite))
            done += finite.size
    return Scan(digest.hexdigest(), bad, zero)


def _place(info: TensorInfo, index: int | None) -> str:
    place = np.unravel_index(index or 0, info.shape) if info.shape else ()
    return str([int(i) for i in place])


def some(items: Iterable[object], most: int = 3) -> str:
    """The first few of many, in a sentence."""
    texts = [str(item) for item in items]
    rest = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + rest
