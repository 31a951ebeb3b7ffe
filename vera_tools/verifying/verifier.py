"""One checkpoint's verdict and checks.

The verdict is about the projections alone; the checks are about everything else. Each distinct pair of projections is
computed once by a `Verifier`, however many checkpoints share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import ROOT, Checkpoint, Place
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import ASSUMED, MANIFEST_NAME, ProjectionRecord
from vera_tools.checkpoints.resolution import most_claimed, refuse_size, stored_pair
from vera_tools.dtypes import HALVES, np_dtype
from vera_tools.errors import FormatError, NotVeraError, UsageError, VeraToolsError, escaped
from vera_tools.files import local
from vera_tools.memo import Memo
from vera_tools.projections.identification import Match, identify_pair, same_bits, with_digests
from vera_tools.projections.key import same_key
from vera_tools.projections.pair import PROJECTIONS, Pair, PairShape
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying import acceptance, checks, fit, recorded
from vera_tools.verifying.checks import Scan
from vera_tools.verifying.findings import BROKEN, DAMAGE, MATCH, Check, Verdict
from vera_tools.verifying.loads import BASE_DTYPES, ROUNDINGS, Trained, redrawn
from vera_tools.verifying.report import ABSENT, CheckpointReport, Failed, FileDigest, Skipped

#: The checks that fail where the pair has another size than PEFT makes room for.
_SIZES = frozenset({"tensors.out_max", "base.pair"})

#: So many results are remembered: of a registry in which every adapter has a key of its own, none is of use again.
_MOST_REMEMBERED = 512

Result = TypeVar("Result")


class Structure(NamedTuple):
    """What config and header say, before any tensor is read: the checks, and the obstacles and doubts of loaders."""

    checks: tuple[Check, ...]
    obstacles: Mapping[str, str]
    doubts: Mapping[str, str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: BaseModel | None) -> Structure:
        """Look at a checkpoint, and at the type of its base where that is at hand.

        Raises:
            FormatError: a regular expression takes too long.
        """
        found = (*acceptance.accepted(checkpoint, base), *checks.structure(checkpoint, base))
        return cls(found, acceptance.obstacles(checkpoint, base), acceptance.doubts(checkpoint, base))

    @property
    def is_certain(self) -> bool:
        """Whether another look would find the same; the library may refuse a file for want of memory."""
        return not _failed(self.checks, {"tensors.official"})


class Verifier:
    """Verifies one checkpoint after another, and computes nothing twice that several of them share."""

    def __init__(
        self,
        *,
        base: BaseModel | None = None,
        base_digests: bool | None = None,
        allow_pickle: bool = False,
        skip_others: bool = False,
        file_digests: bool = False,
    ) -> None:
        on_disk = base is not None and isinstance(base.folder, local.LocalFolder)
        #: Whether the base's weights are hashed where a manifest has digests of them. Default: where it lies on disk.
        self.base_digests = on_disk if base_digests is None else base_digests
        self._base = base
        self._allow_pickle, self._skip_others, self._file_digests = allow_pickle, skip_others, file_digests
        self._memory, self._looks = Memo(_MOST_REMEMBERED), Memo(_MOST_REMEMBERED)

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
                config = place.read_config(self._looks)
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
                report = self._verify(path, checkpoint)
                return replace(report, files=_digests_of_files(checkpoint)) if self._file_digests else report
        except FormatError as error:
            return _invalid(path, "tensors.file", error)

    def _verify(self, path: str, checkpoint: Checkpoint) -> CheckpointReport:
        structure = self._structure(checkpoint)
        found = list(structure.checks)
        if len(checkpoint.projections) == 1 or not checkpoint.layers or _failed(found, BROKEN):
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
            found += fit.against_base(checkpoint, self._base, digests=self.base_digests)
        else:
            found += recorded.width(checkpoint)
        pair = stored_pair(checkpoint)
        if pair:
            return self._stored(path, checkpoint, pair, scans, found, structure)
        return self._seed_only(path, checkpoint, found, structure)

    def _structure(self, checkpoint: Checkpoint) -> Structure:
        """It follows from the config, the header, the file's size, the recorded shape and key, and the base alone."""
        if checkpoint.keys.odd:  # which of them are equal decides, too
            return Structure.of(checkpoint, self._base)
        text, record = checkpoint.config_text, checkpoint.recorded
        key = (
            "structure",
            checkpoint.weights.parsed.sha256,
            checkpoint.weights.size,
            None if text is None else hashlib.sha256(text.encode()).digest(),
            record and (record.shape, record.recipe),
        )
        return self._looks(key, lambda: Structure.of(checkpoint, self._base), keep=lambda found: found.is_certain)

    def _stored(
        self,
        path: str,
        checkpoint: Checkpoint,
        pair: Pair,
        scans: dict[str, Scan],
        found: list[Check],
        structure: Structure,
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
        found += [*recorded.recipe(checkpoint, identified), checks.match(identified, key, origin)]
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
            obstacles=structure.obstacles,
            doubts=structure.doubts,
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

    def _seed_only(
        self, path: str, checkpoint: Checkpoint, found: list[Check], structure: Structure
    ) -> CheckpointReport:
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
            verdict, check, regenerated = self._regenerate(record.recipe, record, key, most=most_claimed(checkpoint))
            found.append(check)
            if verdict != "unproven":
                recipes = self._same(record.recipe, record.shape, record.dtype) if check.status != "fail" else ()
            projections = (
                Match(record.shape.vera_A, record.dtype, regenerated.get("vera_A"), "absent"),
                Match(record.shape.vera_B, record.dtype, regenerated.get("vera_B"), "absent"),
            )
        dtype = record.dtype if record else "float32"
        guessed = record is not None and record.assumed and bool(recipes)
        obstacles = {**structure.obstacles, **acceptance.refused_record(checkpoint)}
        fits = not _failed(found, _SIZES)
        trained = Trained(
            stored=False,
            save_projection=config.save_projection,
            prng_key=key,
            recipes=recipes,
            dtype=dtype,
            fits=fits,
            assumed=guessed,
            whole=not _failed(found, DAMAGE),
            obstacles=obstacles,
            doubts=structure.doubts,
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

    def _regenerate(
        self, recipe: Recipe, record: ProjectionRecord, key: int, *, most: int
    ) -> tuple[Verdict, Check, dict[str, str]]:
        shape, dtype = record.shape, record.dtype
        try:
            refuse_size(shape, dtype, most=most)
        except UsageError as error:
            return "unproven", Check(MATCH, "fail", f"not regenerated: {error}"), {}
        got = self._memory(("digests", recipe, shape, dtype), lambda: digests(recipe, shape, stored_dtype=dtype))
        wrong = [name for name in PROJECTIONS if got[name] != record.sha256[name]]
        if wrong:
            what = "has another digest" if len(wrong) == 1 else "have other digests"
            message = f"regenerated under {recipe.name}, {' and '.join(wrong)} {what} than was recorded"
            return "drift", Check(MATCH, "fail", message), got
        if not same_key(recipe.prng_key, key):
            made = f"the recorded vera_A and vera_B were made with {checks.drawn_with(recipe)}"
            return "drift", Check(MATCH, "warn", f"{made}; the config says key {key}"), got
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


def _digests_of_files(checkpoint: Checkpoint) -> tuple[FileDigest, ...]:
    """What the verdict was read from, as it was: the checkpoint is still open, and says if it was changed meanwhile."""
    names = [CONFIG_NAME] * (checkpoint.config_text is not None) + [Path(checkpoint.weights.label).name]
    names += [MANIFEST_NAME] * (checkpoint.manifest is not None or checkpoint.manifest_error is not None)
    found = []
    for name in names:
        with contextlib.closing(checkpoint.folder.open(name)) as source:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
            for start in range(0, source.size, len(buffer)):
                piece = buffer[: min(len(buffer), source.size - start)]
                source.read_into(piece, start)
                digest.update(piece)
        found.append(FileDigest(name, digest.hexdigest()))
    return tuple(found)


def _invalid(path: str, check: str, error: VeraToolsError) -> CheckpointReport:
    return CheckpointReport(path, "invalid", (Check(check, "fail", str(error)),))


def _failed(found: Iterable[Check], ids: Collection[str]) -> bool:
    return any(check.status == "fail" and check.id in ids for check in found)


def _scope(checkpoint: Checkpoint, found: list[Check], verdict: Verdict) -> str:
    """The limits of the proof, in words."""
    covered = _covered(checkpoint, found)
    if verdict == "assumed" and checkpoint.recorded:
        return f"{covered}; that these are the trained projections was {checkpoint.recorded.origin}, not proven"
    return covered


def _covered(checkpoint: Checkpoint, found: list[Check]) -> str:
    if checkpoint.manifest and not any(c.status == "fail" and c.id.startswith("manifest.") for c in found):
        covered = "projections, vectors and config are covered"
        covered += "" if checkpoint.manifest.covered else "; the manifest, which has no digest, is not"
        return covered + _width(found)
    if checkpoint.manifest:
        return "the manifest does not hold for this checkpoint (see the failed checks)"
    if checkpoint.manifest_error:
        return "vectors not covered: the manifest cannot be used (see the failed checks)"
    if checkpoint.projections or checkpoint.recorded:
        return "vectors not covered: no manifest" + _width(found)
    return "nothing is covered: run `record` where it was trained, so that it can be proven from then on"


def _width(found: list[Check]) -> str:
    """What is to be said where nothing tells whether the pair is as wide as the layers, for which PEFT makes room."""
    return "" if any(check.id == "base.pair" for check in found) else "; in_max not checked against a base"


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
