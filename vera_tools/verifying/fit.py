"""The checkpoint against its base model: from headers alone, but for the recorded digests of the base's weights."""

from __future__ import annotations

from collections.abc import Iterator

from vera_tools.architectures import data
from vera_tools.architectures.architecture import LINEAR
from vera_tools.checkpoints.base import BaseModel, rounds_through
from vera_tools.checkpoints.checkpoint import MODULES, Checkpoint
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.checkpoints.names import TASK_HEADS, is_embedding, lies_in_saved
from vera_tools.checkpoints.placement import Placement, Unfound, shape_of
from vera_tools.checkpoints.recorded_base import RecordedBase
from vera_tools.dtypes import FLOATS
from vera_tools.errors import CheckFailedError, VeraToolsError
from vera_tools.verifying.checks import some
from vera_tools.verifying.findings import Check


def against_base(checkpoint: Checkpoint, base: BaseModel, *, digests: bool) -> Iterator[Check]:
    """The checkpoint against its base model.

    Args:
        checkpoint: The checkpoint.
        base: The base.
        digests: Hash the base's weights of which digests are recorded; everything else is in the headers.
    """
    try:
        linears = checkpoint.linears(base)
    except VeraToolsError as error:
        yield Check("base.modules", "fail", str(error))
        return
    yield _class(checkpoint, base)
    missing = _not_adapted(checkpoint, base)
    if missing:
        message = f"the config adapts modules of the base for which there are no vectors: {some(missing)}"
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
        message = (
            f"the base gives {dimensions}, the projections have in_max {known.in_max} and out_max {known.out_max}: "
            "another base"
        )
        record = checkpoint.recorded
        if record is not None and record.assumed and not checkpoint.projections:
            message += (
                f", or the width was {record.origin} wrongly: if it was trained on this base, {_anew(checkpoint)}"
            )
        elif known.in_max >= follows[0] and known.out_max >= follows[1]:
            message += ", or PEFT saved this adapter beside a first, wider one, whose pair it then shares"
        yield Check("base.pair", "fail", message)
    elif known:
        yield Check("base.pair", "pass", f"{dimensions} follow from the base")
    else:
        yield Check("base.pair", "pass", f"the projections can be regenerated: {dimensions} follow from the base")
    yield from dtype(checkpoint, base)
    yield _parameters(checkpoint, base)
    yield from _recorded_base(checkpoint, base, digests=digests)


def _class(checkpoint: Checkpoint, base: BaseModel) -> Check:
    """What the base's tensors are to the class of models that PEFT adapted."""
    placement = checkpoint.placement(base)
    known, layout = placement.architecture, placement.layout
    if (lost := checkpoint.unfound(base)) is not None:  # also where modules had to be found by names alone
        return _unfound(lost, checkpoint)
    if not known.is_known:
        name = known.name or "the class of the base, which config.json does not name"
        message = f"nothing is known of {name}: modules are taken for what the names of its tensors say"
        return Check("base.class", "warn", message)
    who = f"{known.name} ({known.origin})"
    unexpected, missing = layout.unexpected, layout.missing or ()
    if (unexpected or missing) and known.name == data.class_for(base.config):
        parts = [f"does not take {some(unexpected)}"] if unexpected else []
        parts += [f"does not find {some(missing)}"] if missing else []
        return Check("base.class", "warn", f"{who} {' and '.join(parts)}: this may be a base of another class")
    return Check("base.class", "pass", f"{who} takes {len(base.tensors) - len(unexpected)} tensors of the base")


def _unfound(lost: Unfound, checkpoint: Checkpoint) -> Check:
    who, what = f"{lost.model_class} ({lost.origin})", some(lost.modules)
    if lost.bare is not None:
        message = (
            f"the adapter has the names of {lost.bare}: around the {who} that task_type {checkpoint.config.task_type} "
            f"is for, PEFT drops the vectors of {what}"
        )
        return Check("base.class", "warn", message)
    message = (
        f"{who} has no {what}, so PEFT drops their vectors in silence: these are names of a wrapped model, of another "
        "class, or of an older transformers"
    )
    return Check("base.class", "fail", message)


def dtype(checkpoint: Checkpoint, base: BaseModel) -> Iterator[Check]:
    """The base's dtype against a recipe that was stated or assumed, which nothing else can contradict.

    A recipe that was taken from the pair itself is not asked: what was trained on one dtype may be loaded on another.
    """
    record = checkpoint.recorded
    if record is None or record.recipe is None or not record.assumed:
        return
    dtypes = {linear.info.dtype for linear in checkpoint.linears(base)}
    try:
        through = rounds_through(dtypes)
    except CheckFailedError as error:
        yield Check("base.dtype", "fail", str(error))
        return
    if through is None and not dtypes <= set(FLOATS):
        message = "a quantised base does not say which dtype the adapter was trained on"
        yield Check("base.dtype", "skip", message)
        return
    recipe = record.recipe
    # What was drawn in a half type already is not changed by a cast to it.
    if recipe.rounded_through == through or (recipe.rounded_through is None and recipe.drawn_dtype == through):
        yield Check("base.dtype", "pass", f"{recipe.name} is what was {record.origin}, and the base's dtype fits it")
        return
    then = f"rounded through {recipe.rounded_through}" if recipe.rounded_through else "not rounded"
    message = (
        f"{recipe.name} was {record.origin}, whose projections are {then}, while this base is "
        f"{' and '.join(sorted(dtypes))}: if it was trained on this base, {_anew(checkpoint)}"
    )
    yield Check("base.dtype", "fail", message)


def _anew(checkpoint: Checkpoint) -> str:
    if checkpoint.embedded is not None:
        return "record it anew where it was trained, since the weights file itself holds this record"
    return f"delete {MANIFEST_NAME} and record it anew with --base"


def _not_adapted(checkpoint: Checkpoint, base: BaseModel) -> list[str]:
    """Modules of the base that the config would adapt and the checkpoint does not."""
    config, placement = checkpoint.config, checkpoint.placement(base)
    known, layout = placement.architecture, placement.layout
    everything = config.target_modules == "all-linear"
    targeting = checkpoint.targeting_on(base)
    if targeting is None or (everything and not known.is_known):
        return []
    adapted = {placement.module(module) for module in checkpoint.layers}
    missing = []
    linear = {module: placement.name_in_adapter(module) for module in _linear_modules(placement)}
    targeting.prepare(linear.values())
    for module, theirs in linear.items():
        if known.is_known and placement.renaming is not None and not module.startswith(placement.renaming.add):
            continue  # the adapter is on a part of the class, which has no such module
        wanted = layout.is_linear_target(module, task_type=config.task_type) if everything else True
        if module not in adapted and wanted and targeting.adapts(theirs):
            missing.append(module)
    return sorted(missing)


def _linear_modules(placement: Placement) -> list[str]:
    """The base's linear modules; of a class that is not known, those that its files may hold."""
    layout = placement.layout
    found = []
    for name in layout.names:
        module, _, last = name.rpartition(".")
        if last != "weight":
            continue
        if layout.architecture.is_known:
            if layout.kind(module) in LINEAR:
                found.append(module)
        elif len(placement.base.shapes[name]) == 2 and not is_embedding(name):
            found.append(module)
    return found


def _parameters(checkpoint: Checkpoint, base: BaseModel) -> Check:
    """Biases and saved modules against the base's parameters: none missing, none too many, each of the same shape."""
    placement = checkpoint.placement(base)
    heads = TASK_HEADS.get(checkpoint.config.task_type or "", ())
    resized: list[str] = []
    wrong: list[str] = []
    held = set()
    for name, info in checkpoint.other_tensors.items():
        if checkpoint.is_copy(name):
            continue
        parameter = name.removeprefix(MODULES)
        path = parameter.replace(".base_layer.", ".")
        place = placement.parameter(path)
        held.add(place)
        parts = placement.parts(place)
        free = is_embedding(parameter) or placement.architecture.is_table(place)
        free = free or any(lies_in_saved(parameter, head) for head in heads)
        if not parts:
            # A base saved without its head has none.
            free = free or (placement.architecture.is_known and placement.architecture.stores(place))
            wrong += [] if free else [f"{parameter} is none of the base's"]
        elif info.dtype not in FLOATS and all(part.info.dtype in FLOATS for part in parts):
            wrong.append(f"{parameter} is {info.dtype}, the base's {parts[0].info.dtype}")
        elif (there := shape_of(parts)) != info.shape:
            fits_otherwise = free and there[1:] == info.shape[1:]
            text = f"{parameter} {list(info.shape)}, the base has {list(there)}"
            (resized if fits_otherwise else wrong).append(text)
    missing = sorted(_trained_parameters(checkpoint, placement) - held)
    if missing or wrong:
        parts_of = [f"trained, but not in the file: {some(missing)}"] if missing else []
        return Check("base.parameters", "fail", "; ".join([*parts_of, *([some(wrong)] if wrong else [])]))
    if resized:
        return Check("base.parameters", "warn", f"resize the base before loading: {some(resized)}")
    return Check("base.parameters", "pass", f"{len(checkpoint.other_tensors)} biases and saved parameters fit")


def _trained_parameters(checkpoint: Checkpoint, placement: Placement) -> set[str]:
    """The base's parameters that this config trains and saves besides the vectors."""
    config, layout = checkpoint.config, placement.layout
    adapted = {placement.module(module) for module in checkpoint.layers}
    names = set()
    for name in layout.names:
        module, _, kind = name.rpartition(".")
        theirs = placement.name_in_adapter(name)
        trained = config.bias == "all" or (module in adapted and config.bias != "none")
        if checkpoint.targeting.saves(theirs):
            names.add(name)
        elif kind == "bias" and trained and len(shape_of(placement.parts(name))) == 1:
            names.add(name)  # GPT-2's old files hold its causal mask as attn.bias, in four dimensions
    return names


def _pair_shape_of(checkpoint: Checkpoint, base: BaseModel) -> tuple[int, int]:
    linears = checkpoint.linears(base)
    if not linears:
        raise CheckFailedError("nothing is adapted", where=checkpoint.label)
    return max(linear.in_features for linear in linears), max(linear.out_features for linear in linears)


def _recorded_base(checkpoint: Checkpoint, base: BaseModel, *, digests: bool) -> Iterator[Check]:
    recorded = RecordedBase.of(checkpoint, base)
    if recorded is None:
        return
    if recorded.unlike:
        message = f"not the base that was recorded: {some(recorded.unlike)} are missing, or of another shape or dtype"
        yield Check("base.recorded", "warn", message)
    else:
        message = f"{recorded.count} adapted weights have the recorded shapes and dtypes"
        yield Check("base.recorded", "pass", message)
    yield _digests(recorded, base, digests=digests)


def _digests(recorded: RecordedBase, base: BaseModel, *, digests: bool) -> Check:
    if not recorded.digests:
        message = "no digests of the base's weights are recorded: another base of these shapes would look the same"
        return Check("base.digests", "skip", message)
    if not recorded.sha256:
        return Check(
            "base.digests", "skip", "no recorded digest is of a weight that this base has in its shape and dtype"
        )
    if not digests:
        size = sum(base.tensors[name][1].nbytes for name in recorded.sha256)
        message = f"not compared: --base-digests reads {size} bytes of the base, without it another one looks the same"
        return Check("base.digests", "skip", message)
    other = [name for name, sha256 in recorded.sha256.items() if base.sha256(name) != sha256]
    if other:
        message = f"{len(other)} of {len(recorded.sha256)} weights are other ones than were recorded: {some(other)}"
        return Check("base.digests", "fail", f"{message}: this is another base, or another state of it")
    message = f"{len(recorded.sha256)} of {recorded.count} adapted weights have the recorded digests"
    return Check("base.digests", "pass", message)
