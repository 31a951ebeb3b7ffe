"""The projections that a checkpoint was trained with: stored, or regenerated and proven, or (said aloud) assumed.

This is the one place that applies the rule for seed-only checkpoints with nothing recorded: PEFT's recipe is assumed,
float32 drawn with a fused multiply-add and rounded through the base weights' dtype where a base is at hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vera_tools.checkpoints.base import BaseModel, rounds_through
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint, assumed_rounding
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Origin, ProjectionRecord
from vera_tools.dtypes import FLOATS, Array, np_dtype
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    FormatError,
    UnprovenError,
    UsageError,
    VeraToolsError,
    VeraToolsWarning,
)
from vera_tools.projections.identification import Identification, identify_pair, with_digests
from vera_tools.projections.key import same_key
from vera_tools.projections.pair import PROJECTIONS, Pair, PairShape
from vera_tools.projections.prng import digests, generate
from vera_tools.projections.recipe import Method, Recipe

#: Bytes of the largest pair that is drawn for who names its size, which is far more than any model's.
MOST_BYTES = 64 << 30
#: Bytes of the largest pair that is drawn because a record claims it: these, or so many times the file that claims it.
#: A damaged record may name any size. With r = 256, no layer of a model needs a third of the first.
MOST_CLAIMED, CLAIMED_TIMES = 512 << 20, 64


@dataclass(frozen=True)
class Resolved:
    """Which projections a checkpoint has, and how that is known.

    Attributes:
        record: Recipe (None where no known recipe makes the stored pair), shapes, stored dtype and digests.
        origin: "stored" in the file; "recorded", then regenerated and proven by digest; or "assumed".
        identification: What was found out about a stored pair; None where nothing is stored.
    """

    record: ProjectionRecord
    origin: Literal["stored", "recorded", "assumed"]
    identification: Identification | None = None


def stored_pair(checkpoint: Checkpoint) -> Pair | None:
    """The stored pair, readable by ranges; None where the checkpoint is seed-only.

    Raises:
        FormatError: only one of the two is there, or they do not fit each other.
    """
    infos = checkpoint.projections
    if not infos:
        return None
    found = [f"{name} {info.dtype}" for name, info in infos.items()]
    if len(infos) == 1:
        (present,), (missing,) = infos, set(PROJECTIONS) - set(infos)
        raise FormatError(f"{present} is stored and {missing} is not", where=checkpoint.weights.label)
    if len({info.dtype for info in infos.values()}) > 1 or infos["vera_A"].dtype not in FLOATS:
        raise FormatError(
            "the projections have no dtype that VeRA computes in, or not the same one",
            where=checkpoint.weights.label,
            expected=f"both {' or '.join(FLOATS)}",
            found=" and ".join(found),
        )
    shape = checkpoint.pair_shape()
    if shape is None:
        return None
    return Pair(shape, infos["vera_A"].dtype, lambda name, a, b: checkpoint.weights.read_elements(infos[name], a, b))


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a caller knows, or allows to be assumed, of a pair that a checkpoint neither holds nor records.

    Attributes:
        base: The open base model, for in_max and for the dtype that PEFT rounds through.
        in_features: in_max, where no base is at hand as files.
        weight_dtypes: The adapted weights' dtypes, where the base is in memory; they do for `base` in what is assumed.
        method: How the pair was drawn. None: PEFT's way is assumed.
        stored_dtype: The dtype that the pair would be stored in.
        strict: Assume nothing, and take nothing that was assumed or stated when it was recorded.
    """

    base: BaseModel | None = None
    in_features: int | None = None
    weight_dtypes: frozenset[str] = frozenset()
    method: Method | None = None
    stored_dtype: str = "float32"
    strict: bool = False

    @classmethod
    def stated(
        cls,
        base: BaseModel | None = None,
        *,
        in_features: int | None = None,
        recipe: str | None = None,
        stored_dtype: str = "float32",
        strict: bool = False,
    ) -> Assumptions:
        """The same, from what the library's functions take: `recipe` is a method's name, or None.

        Raises:
            UsageError: there is no such name.
        """
        method = None if recipe is None else Method.named(recipe)
        return cls(base=base, in_features=in_features, method=method, stored_dtype=stored_dtype, strict=strict)


def resolve(checkpoint: Checkpoint, assumptions: Assumptions | None = None) -> Resolved:
    """Find out which projections the checkpoint was trained with, without holding them in memory.

    Args:
        checkpoint: An open checkpoint.
        assumptions: What may be assumed of a pair that is neither stored nor recorded.

    Raises:
        CheckFailedError: the regenerated pair is not the recorded one, the record is an earlier adapter's or of a size
            that no adapter has, the manifest was changed, or the base does not fit.
        FormatError: the manifest cannot be read, and the pair is not stored.
        UnprovenError: nothing is recorded of a seed-only checkpoint, or what is was assumed or stated; and `strict`.
        UsageError: seed-only with nothing recorded, and nothing says in_max; the method contradicts the record;
            `in_features` contradicts what is stored, recorded or the base; or no adapter has a pair of this size.
    """
    given = assumptions or Assumptions()
    pair = stored_pair(checkpoint)
    if pair is None or given.strict:  # a stored pair speaks for itself, but for where it came from
        checkpoint.refuse_unusable_manifest()
    if pair is not None:
        hint = "leave it out: what is stored says it"
        _refuse_other_width(given.in_features, pair.shape, "the stored projections", where=checkpoint.label, hint=hint)
        if pair.shape.r != checkpoint.config.r:
            message = (
                f"the config's r is {checkpoint.config.r}, and the projections' {pair.shape.r}: PEFT cannot load it"
            )
            warnings.warn(f"{checkpoint.label}: {message}", VeraToolsWarning, stacklevel=2)
        sha256 = {name: checkpoint.weights.sha256(ROOT + name) for name in PROJECTIONS}
        found = with_digests(identify_pair(pair, prng_key=checkpoint.config.projection_prng_key), sha256)
        made_by = found.recipe if found.exact else None
        # A pair that was embedded on an assumption proves what it is, and still not that it was trained with.
        held = ProjectionRecord(made_by, checkpoint.origin_of(sha256), pair.shape, pair.dtype, sha256)
        _refuse_assumed(held, given, where=checkpoint.label)
        return Resolved(held, "stored", found)
    record = checkpoint.recorded
    if record is not None:
        if given.method is not None and (record.recipe is None or record.recipe.method != given.method):
            raise UsageError(
                "another recipe is recorded already",
                where=checkpoint.label,
                expected=record.recipe.name if record.recipe else "none",
                found=given.method.name,
                hint="delete the record if it is wrong",
            )
        hint = "leave it out; if the record is wrong, delete it, and record the checkpoint anew"
        _refuse_other_width(given.in_features, record.shape, "the record", where=checkpoint.label, hint=hint)
        if (error := stale(record, checkpoint)) is not None:
            raise error
        refuse_other_base(record, checkpoint, given.base)
        _refuse_assumed(record, given, where=checkpoint.label)
        most = most_claimed(checkpoint) if given.in_features is None else None
        return Resolved(_proven(record, most=most, where=checkpoint.label), "recorded")
    if given.strict and given.method is None:
        raise unproven(None, where=checkpoint.label)
    return Resolved(_assume(checkpoint, given), "assumed")


def refuse_size(
    shape: PairShape,
    dtype: str,
    *,
    where: str | None = None,
    most: int | None = None,
    error: type[VeraToolsError] = UsageError,
) -> None:
    """Refuse a pair that would be drawn for long, before it is begun.

    Args:
        shape: r, in_max and out_max.
        dtype: The dtype of both.
        where: Who says so.
        most: Bytes; None is `MOST_BYTES`.
        error: What to raise where it is not the user who named the size.

    Raises:
        UsageError: it is larger than `most`.
    """
    size, limit = shape.elements * np_dtype(dtype).itemsize, MOST_BYTES if most is None else most
    if size > limit:
        raise error(
            "no adapter has projections of this size",
            where=where,
            expected=f"at most {limit} bytes",
            found=f"{size} bytes for vera_A {list(shape.vera_A)} and vera_B {list(shape.vera_B)} in {dtype}",
            hint=None
            if most is None
            else f"where that is true, name the width: `vera-tools embed-projections --in-features {shape.in_max}`",
        )


def most_claimed(checkpoint: Checkpoint) -> int:
    """Bytes of the largest pair that is drawn because this checkpoint's record claims it."""
    return max(MOST_CLAIMED, CLAIMED_TIMES * checkpoint.weights.size)


def arrays(checkpoint: Checkpoint, resolved: Resolved) -> tuple[Array, Array]:
    """vera_A (r, in_max) and vera_B (out_max, r) in their stored dtype."""
    record = resolved.record
    if resolved.origin == "stored" or record.recipe is None:
        return checkpoint.weights.read(ROOT + "vera_A"), checkpoint.weights.read(ROOT + "vera_B")
    return generate(record.recipe, record.shape, stored_dtype=record.dtype)


def rows(checkpoint: Checkpoint, resolved: Resolved) -> Callable[[str, int, int], Array]:
    """A reader of rows: (name, start, stop) -> ``vera_A[start:stop]`` or ``vera_B[start:stop]``, in the stored dtype.

    The pair is held: each layer asks for its rows again, and all of them get those that were checked.
    """
    held = dict(zip(PROJECTIONS, arrays(checkpoint, resolved), strict=True))
    return lambda name, start, stop: held[name][start:stop]


def refuse_other_base(record: ProjectionRecord, checkpoint: Checkpoint, base: BaseModel | None) -> None:
    """Refuse a base whose layers are wider than the pair; of a pair that nobody has seen, one of any other width too.

    A stored pair may be wider than its base's layers: PEFT saves one pair for all adapters of a model.

    Raises:
        CheckFailedError: it is, or it does not fit at all.
    """
    if base is None or base.quantisation:  # whose headers give no widths
        return
    widest = max((linear.in_features for linear in checkpoint.linears(base)), default=record.shape.in_max)
    if widest > record.shape.in_max or (record.assumed and widest != record.shape.in_max):
        guessed = f", or the width was {record.origin} wrongly: delete the record, and record the checkpoint anew"
        raise CheckFailedError(
            "the projections do not have the width of this base",
            where=checkpoint.label,
            expected=f"in_max {widest}, as {base.label} gives",
            found=str(record.shape.in_max),
            hint=f"this is another base than the adapter was trained on{guessed if record.assumed else ''}",
        )


def _refuse_other_width(in_features: int | None, shape: PairShape, what: str, *, where: str, hint: str) -> None:
    if in_features is not None and in_features != shape.in_max:
        raise UsageError(
            f"in_features contradicts {what}",
            where=where,
            expected=str(shape.in_max),
            found=str(in_features),
            hint=hint,
        )


def _refuse_assumed(record: ProjectionRecord, given: Assumptions, *, where: str) -> None:
    """With `strict`, refuse what somebody assumed or stated, unless the caller states the same recipe now."""
    same = record.recipe is not None and record.recipe.method == given.method
    if given.strict and record.assumed and not same:
        raise unproven(record.origin, where=where)


def unproven(origin: Origin | None, *, where: str) -> UnprovenError:
    """What `strict` refuses with: nothing is recorded (None), or what is recorded was stated or assumed."""
    if origin is None:
        return UnprovenError(
            "nothing records which recipe made the projections of this seed-only checkpoint",
            where=where,
            hint="run `vera-tools record` where it was trained, or do without --strict to assume PEFT's recipe",
        )
    return UnprovenError(
        f"the recipe of its projections was {origin} when it was recorded, and nothing proves it",
        where=where,
        hint="record it where the trained pair is, or do without --strict to take it as it is recorded",
    )


def stale(record: ProjectionRecord, checkpoint: Checkpoint) -> CheckFailedError | None:
    """Why a record is not believed of a seed-only checkpoint: it is of another key, rank or width; None where it is.

    A folder that was saved into again keeps its manifest.
    """
    vectors = [(layer.lambda_b, layer.lambda_d) for layer in checkpoint.layers.values()]
    widest = max((lambda_b.size for lambda_b, _ in vectors if lambda_b), default=record.shape.out_max)
    ranks = {lambda_d.size for _, lambda_d in vectors if lambda_d} or {record.shape.r}
    wider = widest < record.shape.out_max and not _is_of_these_vectors(checkpoint)  # see `refuse_other_base`
    if wider or widest > record.shape.out_max or ranks != {record.shape.r}:
        return CheckFailedError(
            "the record does not fit the vectors",
            where=checkpoint.label,
            expected=f"r {record.shape.r} and out_max {record.shape.out_max}",
            found=f"r {' and '.join(map(str, sorted(ranks)))} and out_max {widest}",
            hint=f"it is an earlier adapter's: delete {MANIFEST_NAME}, and record the checkpoint anew",
        )
    then = checkpoint.manifest.config.get("projection_prng_key", 0) if checkpoint.manifest else None
    now = checkpoint.config.projection_prng_key
    made = record.recipe.prng_key if record.recipe is not None else None
    put_right = made is not None and same_key(made, now)  # after it was recorded: it is the recorded pair's own
    if isinstance(then, int) and not same_key(then, now) and not put_right:
        return CheckFailedError(
            "projection_prng_key is not what it was when the manifest was written",
            where=checkpoint.label,
            expected=str(then),
            found=str(now),
            hint=f"put {then if made is None else made} back into adapter_config.json; only if another adapter was "
            f"saved here, delete {MANIFEST_NAME} and record it anew, which gives up the proof of the recorded pair",
        )
    return None


def _is_of_these_vectors(checkpoint: Checkpoint) -> bool:
    """Whether the record was written for just these vectors: in their own file, or in a manifest that has them."""
    if checkpoint.manifest is None:
        return True
    found = {name: info.shape for name, info in checkpoint.vector_infos.items()}
    recorded = checkpoint.manifest.tensors.items()
    return found == {name: record.shape for name, record in recorded if name.endswith(("lambda_b", "lambda_d"))}


def _proven(record: ProjectionRecord, *, most: int | None, where: str) -> ProjectionRecord:
    if record.recipe is None:
        raise CheckFailedError(
            "the projections are not stored, and the record names no recipe that would make them",
            where=where,
            hint="they are lost unless the checkpoint they were stripped from still exists",
        )
    refuse_size(record.shape, record.dtype, where=where, most=most, error=CheckFailedError)
    found = digests(record.recipe, record.shape, stored_dtype=record.dtype)
    for name in PROJECTIONS:
        if found[name] != record.sha256[name]:
            raise CheckFailedError(
                f"the regenerated {name} is not the recorded one",
                where=where,
                expected=f"sha256 {record.sha256[name]}",
                found=found[name],
                hint=f"the record of {record.recipe.name} or its digests were changed",
            )
    return record


def _assume(checkpoint: Checkpoint, given: Assumptions) -> ProjectionRecord:
    base, in_features = given.base, given.in_features
    shape = checkpoint.pair_shape(base)
    if shape is None:
        if in_features is None:
            raise UsageError(
                "the layer width is unknown: pass --base",
                where=checkpoint.label,
                hint="a seed-only checkpoint does not hold it; --in-features N does too, the widest adapted layer's",
            )
        widths = [layer.lambda_b.size for layer in checkpoint.layers.values() if layer.lambda_b]
        if not widths:
            raise CheckFailedError("nothing is adapted", where=checkpoint.label, expected="a vera_lambda_b")
        shape = PairShape(checkpoint.config.r, in_features, max(widths))
    else:
        hint = "leave it out, or name the base that the adapter was trained on"
        _refuse_other_width(in_features, shape, "the base model", where=checkpoint.label, hint=hint)
    key = checkpoint.config.projection_prng_key
    if given.method is not None:
        recipe = given.method.with_key(key)
    else:
        through = rounds_through(given.weight_dtypes) if given.weight_dtypes else assumed_rounding(checkpoint, base)
        recipe = Recipe(prng_key=key, rounded_through=through)
        warnings.warn(
            f"{checkpoint.label}: nothing records which recipe made the projections; assuming {recipe.name}"
            + (
                ""
                if base or given.weight_dtypes
                else " (a half-precision base would have rounded them: name it with --base)"
            ),
            AssumedRecipeWarning,
            stacklevel=3,
        )
    refuse_size(shape, given.stored_dtype, where=checkpoint.label)
    sha256 = digests(recipe, shape, stored_dtype=given.stored_dtype)
    return ProjectionRecord(recipe, "stated" if given.method else "assumed", shape, given.stored_dtype, sha256)
