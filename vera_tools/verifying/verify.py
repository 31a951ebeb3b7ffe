"""`verify`: does this checkpoint hold what its key regenerates, is it intact, and does it fit its base?

The verdict is about the projections alone; the checks are about everything else. Each distinct pair of projections is
computed once in a call, however many checkpoints share it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint, Place, find
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import ASSUMED, Origin, ProjectionRecord
from vera_tools.checkpoints.resolution import refuse_size, stored_pair
from vera_tools.dtypes import HALVES, np_dtype
from vera_tools.errors import FormatError, NotVeraError, UsageError, VeraToolsError, escaped
from vera_tools.files import opening
from vera_tools.projections.identification import Identification, Match, identify_pair, same_bits, with_digests
from vera_tools.projections.key import same_key
from vera_tools.projections.pair import PROJECTIONS, Pair, PairShape
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Progress
from vera_tools.verifying import acceptance, checks, fit, recorded, registry
from vera_tools.verifying.checks import Scan
from vera_tools.verifying.findings import DAMAGE, MATCH, VERDICTS, Check, Verdict
from vera_tools.verifying.gates import LoadSpec
from vera_tools.verifying.loads import BASE_DTYPES, ROUNDINGS, Trained, redrawn
from vera_tools.verifying.report import ABSENT, CheckpointReport, Failed, Skipped, VerifyReport

#: The checks that fail where the pair has another size than PEFT makes room for.
_SIZES = frozenset({"tensors.out_max", "base.pair"})

Result = TypeVar("Result")


def verify(
    *checkpoints: str | os.PathLike[str],
    recursive: bool = False,
    base: str | os.PathLike[str] | None = None,
    base_digests: bool | None = None,
    require: Verdict = "reproducible",
    require_loads: str | Sequence[str] = (),
    against_loads: str | None = None,
    jobs: int = 1,
    allow_pickle: bool = False,
    log: str | os.PathLike[str] | TextIO | None = None,
    progress: Progress | None = None,
    listed: Iterable[str | os.PathLike[str]] = (),
) -> VerifyReport:
    """Verify checkpoints.

    A checkpoint that cannot be read, or is not VeRA, is a verdict ("invalid"), not an exception.

    Args:
        checkpoints: Folders, adapter_model.safetensors files, or ``hf://owner/name[@revision][/subfolder]``;
            ``hf://owner/*`` stands for every adapter in an owner's repositories.
        recursive: Search the folders for checkpoints; adapters of other kinds are counted as skipped.
        base: A base model to check them against. It adds checks and never changes a verdict.
        base_digests: Hash its weights where a manifest has digests of them. Default: where it lies on disk.
        require: The worst verdict for which `VerifyReport.exit_code` is 0, where no check failed.
        require_loads: Loaders that have to compute with exactly the trained projections, each as ``peft>=0.21``,
            ``peft>=0.21:bfloat16`` or ``peft>=0.21:bfloat16:macos-arm64:torch==2.1`` (see `gates`): else the exit code
            is at least 1.
        against_loads: Loaders to move to from those of the one `require_loads`: the exit code is at least 1 where
            that changes a checkpoint's projections, or may change them.
        jobs: Checkpoints verified side by side. Reading and hashing run in parallel, Python code does not.
        allow_pickle: Read legacy adapter_model.bin files, by torch with weights_only.
        log: A file to append a JSON line to as each is done. What it says of a commit on the Hub is not verified again.
        progress: Called after each checkpoint.
        listed: Further checkpoints, from a list: one that is not there is reported as failed and stops nothing.

    Raises:
        FormatError: the base cannot be read, or a recursive search or a pattern finds no adapter.
        UsageError: no checkpoint given, or one that is not there or has no name; an unknown `require`,
            `require_loads` or `against_loads`.
        HubError: the only checkpoint, or the base, cannot be reached; of several, that one is reported as failed.
    """
    if require not in VERDICTS:
        raise UsageError("unknown verdict to require", expected=" or ".join(VERDICTS), found=str(require))
    for path in (*checkpoints, *([] if base is None else [base])):
        if not registry.is_pattern(os.fspath(path)):
            opening.require(path)
    checkpoints += tuple(listed)
    if not checkpoints:
        raise UsageError("no checkpoint given")
    specs = tuple(map(LoadSpec.parse, [require_loads] if isinstance(require_loads, str) else require_loads))
    against = LoadSpec.parse(against_loads) if against_loads is not None else None
    if against and len(specs) != 1:
        raise UsageError("`against_loads` goes with one `require_loads`, to move from", found=f"{len(specs)}")
    paths = list(_search(checkpoints)) if recursive else [os.fspath(path) for path in checkpoints]
    model = BaseModel.open(base) if base is not None else None
    hashed = base_digests if base_digests is not None else base is not None and not opening.is_remote(base)
    verifier = Verifier(base=model, base_digests=hashed, allow_pickle=allow_pickle, skip_others=recursive)
    many = len(paths) > 1 or log is not None or any(map(registry.is_pattern, paths))
    results: dict[int, list[registry.Result]] = {}
    try:
        if many:
            label = None if base is None else os.fspath(base)
            for place, result in registry.run(paths, verifier.verify, jobs=jobs, log=log, base=label):
                results.setdefault(place, []).append(result)
                if progress:
                    progress(len(results), max(len(paths), len(results)), result.path)
        else:
            results[0] = [registry.Result(paths[0], None, verifier.verify(paths[0]))]
        if model:
            model.check_unchanged()
    finally:
        if model:
            model.close()
    outcomes = [result.outcome for place in sorted(results) for result in results[place]]
    return VerifyReport(
        tuple(outcome for outcome in outcomes if isinstance(outcome, CheckpointReport)),
        tuple(outcome for outcome in outcomes if isinstance(outcome, Skipped)),
        require,
        tuple(outcome for outcome in outcomes if isinstance(outcome, Failed)),
        specs,
        against,
    )


class Verifier:
    """Verifies one checkpoint after another, and computes nothing twice that several of them share."""

    def __init__(
        self,
        *,
        base: BaseModel | None = None,
        base_digests: bool = False,
        allow_pickle: bool = False,
        skip_others: bool = False,
    ) -> None:
        self._base, self._base_digests = base, base_digests
        self._allow_pickle, self._skip_others = allow_pickle, skip_others
        self._memory = _Once()

    def verify(self, path: str, *, skip_others: bool = False) -> CheckpointReport | Skipped | Failed:
        """One checkpoint's report; that it is another kind of adapter, where those are skipped; or that it is gone.

        Whatever else a checkpoint's content brings up makes it invalid: it is one of many.
        """
        try:
            return self._verify_one(path, skip_others=skip_others)
        except VeraToolsError:
            raise
        except Exception as error:
            if os.environ.get("VERA_TOOLS_DEBUG") == "1":
                raise
            return _invalid(path, "tensors.file", escaped(error, where=path))

    def _verify_one(self, path: str, *, skip_others: bool) -> CheckpointReport | Skipped | Failed:
        try:
            place = Place.of(path)
            try:
                config = place.read_config()
            except NotVeraError:
                raise
            except FormatError as error:
                return _invalid(path, "config.schema", error)
            checkpoint = Checkpoint(place, config, allow_pickle=self._allow_pickle)
        except NotVeraError as error:
            skipped = skip_others or self._skip_others
            return Skipped(path, error.kind) if skipped else _invalid(path, "config.kind", error)
        except UsageError as error:
            return Failed(path, FormatError(error.what, where=error.where, expected=error.expected, hint=error.hint))
        except FormatError as error:
            return _invalid(path, "tensors.file", error)
        try:
            with checkpoint:  # which says at its end whether it was changed meanwhile
                return self._verify(path, checkpoint)
        except FormatError as error:
            return _invalid(path, "tensors.file", error)

    def _verify(self, path: str, checkpoint: Checkpoint) -> CheckpointReport:
        found = [*acceptance.accepted(checkpoint), *checks.structure(checkpoint)]
        broken = {"tensors.shapes", "tensors.dtypes"}
        if len(checkpoint.projections) == 1 or not checkpoint.layers or _failed(found, broken):
            return CheckpointReport(
                path,
                "invalid",
                tuple(found),
                save_projection=checkpoint.config.save_projection,
                projections_stored=len(checkpoint.projections) == 2,
                base=self._base_of(checkpoint),
            )
        scans = checks.scan(checkpoint)
        found += [*checks.values(checkpoint, scans), *recorded.against_manifest(checkpoint, scans)]
        if self._base:
            found += fit.against_base(checkpoint, self._base, digests=self._base_digests)
        pair = stored_pair(checkpoint)
        if pair:
            return self._stored(path, checkpoint, pair, scans, found)
        return self._seed_only(path, checkpoint, found)

    def _stored(
        self, path: str, checkpoint: Checkpoint, pair: Pair, scans: dict[str, Scan], found: list[Check]
    ) -> CheckpointReport:
        key = checkpoint.config.projection_prng_key
        sha256 = {name: scans[ROOT + name].sha256 for name in PROJECTIONS}
        identity = (pair.shape, pair.dtype, *sha256.values())

        def unchanged(result: Result) -> Result:
            """Nothing is remembered under a digest that was read of other bytes than the digest is of."""
            checkpoint.check_unchanged()
            return result

        identified = self._memory(("identify", key, *identity), lambda: unchanged(identify_pair(pair, prng_key=key)))
        identified = with_digests(identified, sha256)
        verdict: Verdict = "reproducible" if identified.made_by(key) else "drift"
        origin = checkpoint.origin_of(sha256)
        if verdict == "reproducible" and origin in ASSUMED:
            verdict = "assumed"
        found += [*recorded.recipe(checkpoint, identified), _projections_check(identified, key, origin)]
        fits = not _failed(found, _SIZES)
        trained = Trained(
            stored=True,
            save_projection=checkpoint.config.save_projection,
            prng_key=key,
            recipes=identified.all_recipes,
            dtype=pair.dtype,
            fits=fits,
            assumed=verdict == "assumed",
            whole=not _failed(found, DAMAGE),
            obstacles=acceptance.obstacles(checkpoint),
            unknown_before_14=checkpoint.reading.unknown_before_14,
            held_by=self._memory(("held", *identity), lambda: unchanged(_held_by(pair))),
        )
        return CheckpointReport(
            path,
            verdict,
            tuple(found),
            save_projection=checkpoint.config.save_projection,
            projections_stored=True,
            recipe=identified.recipe,
            also_matches=identified.also_matches,
            projections=(identified.matches["vera_A"], identified.matches["vera_B"]),
            trained=trained,
            scope=_scope(checkpoint, found, verdict),
            base=self._base_of(checkpoint),
        )

    def _seed_only(self, path: str, checkpoint: Checkpoint, found: list[Check]) -> CheckpointReport:
        config, record = checkpoint.config, checkpoint.recorded
        key = config.projection_prng_key
        verdict: Verdict = "unproven"
        recipes: tuple[Recipe, ...] | None = None
        projections = (ABSENT, ABSENT)
        if record is None:
            message = "vera_A and vera_B are not stored, and nothing records which recipe makes them"
            found.append(Check(MATCH, "skip", message))
        elif record.recipe is None:
            verdict, recipes = "drift", ()
            message = "vera_A and vera_B are not stored, and no known recipe makes the recorded ones: they are lost"
            found.append(Check(MATCH, "fail", message))
        else:
            verdict, check, regenerated = self._regenerate(record.recipe, record, key)
            found.append(check)
            if verdict != "unproven":
                recipes = self._same(record.recipe, record.shape, record.dtype) if verdict != "drift" else ()
            projections = (
                Match(record.shape.vera_A, record.dtype, regenerated.get("vera_A"), "absent"),
                Match(record.shape.vera_B, record.dtype, regenerated.get("vera_B"), "absent"),
            )
        dtype = record.dtype if record else "float32"
        fits = not _failed(found, _SIZES)
        trained = Trained(
            stored=False,
            save_projection=config.save_projection,
            prng_key=key,
            recipes=recipes,
            dtype=dtype,
            fits=fits,
            assumed=verdict == "assumed",
            whole=not _failed(found, DAMAGE),
            obstacles=acceptance.obstacles(checkpoint),
            unknown_before_14=checkpoint.reading.unknown_before_14,
        )
        return CheckpointReport(
            path,
            verdict,
            tuple(found),
            save_projection=config.save_projection,
            projections_stored=False,
            recipe=record.recipe if record else None,
            also_matches=tuple(recipe for recipe in recipes or () if record and recipe != record.recipe),
            projections=projections,
            trained=trained,
            scope=_scope(checkpoint, found, verdict),
            base=self._base_of(checkpoint),
        )

    def _base_of(self, checkpoint: Checkpoint) -> str | None:
        return self._base.label if self._base else checkpoint.config.base_model_name_or_path

    def _regenerate(self, recipe: Recipe, record: ProjectionRecord, key: int) -> tuple[Verdict, Check, dict[str, str]]:
        shape, dtype = record.shape, record.dtype
        try:
            refuse_size(shape, dtype)
        except UsageError as error:
            return "unproven", Check(MATCH, "fail", f"not regenerated: {error}"), {}
        got = self._memory(("digests", recipe, shape, dtype), lambda: digests(recipe, shape, stored_dtype=dtype))
        if not same_key(recipe.prng_key, key):
            message = f"the recorded recipe has key {recipe.prng_key}, the config {key}"
            return "drift", Check(MATCH, "fail", message), got
        wrong = [name for name in PROJECTIONS if got[name] != record.sha256[name]]
        if wrong:
            what = "has another digest" if len(wrong) == 1 else "have other digests"
            message = f"regenerated under {recipe.name}, {' and '.join(wrong)} {what} than was recorded"
            return "drift", Check(MATCH, "fail", message), got
        message = f"regenerated under {recipe.name}, both have the recorded digests"
        if record.assumed:
            message += f"; that it is the trained one was {record.origin}"
        return "assumed" if record.assumed else "reproducible", Check(MATCH, "pass", message), got

    def _same(self, recipe: Recipe, shape: PairShape, dtype: str) -> tuple[Recipe, ...]:
        """`recipe`, and what PEFT may draw that has the same bits."""

        def compute() -> tuple[Recipe, ...]:
            key = recipe.prng_key
            others = {redrawn(key, rounding, base) for rounding in ROUNDINGS for base in BASE_DTYPES} - {recipe}
            return (recipe, *sorted(same_bits(recipe, others, shape, dtype), key=lambda r: r.name))

        return self._memory(("same", recipe, shape, dtype), compute)


class _Once:
    """Remembers results by key; a second thread that asks for one under way waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._results: dict[Hashable, Future[Any]] = {}

    def __call__(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        with self._lock:
            future = self._results.get(key)
            mine = future is None
            if future is None:
                future = self._results[key] = Future()
        if mine:
            try:
                future.set_result(compute())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._results.pop(key, None)
        result: Result = future.result()
        return result


def _search(roots: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    seen: set[str] = set()
    for root in roots:
        if opening.is_remote(root):
            yield os.fspath(root)
            continue
        opening.refuse_empty(root)
        path, empty = Path(root), True
        if os.path.isfile(path):
            yield os.fspath(root)
            continue
        for folder in find(path):
            empty = False
            if (real := os.path.realpath(folder)) not in seen:
                seen.add(real)
                yield str(folder)
        if empty:
            raise FormatError(f"no {CONFIG_NAME} in this folder or below", where=path)


def _invalid(path: str, check: str, error: VeraToolsError) -> CheckpointReport:
    return CheckpointReport(path, "invalid", (Check(check, "fail", str(error)),))


def _failed(found: Iterable[Check], ids: Collection[str]) -> bool:
    return any(check.status == "fail" and check.id in ids for check in found)


def _projections_check(identified: Identification, key: int, origin: Origin) -> Check:
    recipe = identified.recipe
    if identified.made_by(key):
        message = f"vera_A and vera_B are bit-identical to what key {key} gives"
        if origin in ASSUMED:
            message += f"; that it is the trained pair was {origin}"
        return Check(MATCH, "pass", message)
    if identified.exact and recipe:
        how = f"key {recipe.prng_key}" + (
            "" if recipe.prng_key_B is None else f" and, for vera_B, key {recipe.prng_key_B}"
        )
        how += ", vera_B first" if recipe.b_first else ""
        return Check(MATCH, "warn", f"vera_A and vera_B were made with {how}; the config says key {key}")
    extents = {name: match.extent for name, match in identified.matches.items() if match.match != "identical"}
    if len(extents) == len(PROJECTIONS) and len(set(extents.values())) == 1:
        return Check(MATCH, "warn", f"{' and '.join(extents)} differ from what key {key} gives in {extents['vera_A']}")
    parts = [f"{name} differs from what key {key} gives in {extent}" for name, extent in extents.items()]
    return Check(MATCH, "warn", "; ".join(parts))


def _scope(checkpoint: Checkpoint, found: list[Check], verdict: Verdict) -> str:
    """The limits of the proof, in words."""
    covered = _covered(checkpoint, found)
    if verdict == "assumed" and checkpoint.recorded:
        return f"{covered}; that these are the trained projections was {checkpoint.recorded.origin}, not proven"
    return covered


def _covered(checkpoint: Checkpoint, found: list[Check]) -> str:
    if checkpoint.manifest and not any(c.status == "fail" and c.id.startswith("manifest.") for c in found):
        covered = "projections, vectors and config are covered"
        return covered if checkpoint.manifest.covered else f"{covered}; the manifest, which has no digest, is not"
    if checkpoint.manifest:
        return "the manifest does not hold for this checkpoint (see the failed checks)"
    if checkpoint.manifest_error:
        return "vectors not covered: the manifest cannot be used (see the failed checks)"
    if checkpoint.projections or checkpoint.recorded:
        return "vectors not covered: no manifest"
    return "nothing is covered: run `record` where it was trained, so that it can be proven from then on"


def _held_by(pair: Pair) -> frozenset[str]:
    """The dtypes that a loader may cast the stored pair to without changing a value."""
    narrower = [dtype for dtype in ("float32", *HALVES) if dtype != pair.dtype]
    return frozenset(dtype for dtype in narrower if _is_held_by(pair, dtype)) | {pair.dtype}


def _is_held_by(pair: Pair, dtype: str) -> bool:
    """Whether casting the stored values to `dtype` and back changes none of them."""
    step, narrow = 1 << 18, np_dtype(dtype)
    for name in PROJECTIONS:
        size = pair.shape.of(name)[0] * pair.shape.of(name)[1]
        for start in range(0, size, step):
            values = pair.read(name, start, min(start + step, size))
            with np.errstate(over="ignore"):
                back = values.astype(np.float32).astype(narrow).astype(values.dtype)
            if not np.array_equal(back, values):
                return False
    return True
