"""`drift`: what every torch, CPU capability and device here really draws, and what that does to an adapter.

Every interpreter is probed in processes of its own: as it runs by itself, again under each weaker set of CPU kernels
that this machine can be made to use, and on each device. Only rows that run by themselves decide; the others inform.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint, assumed_rounding
from vera_tools.checkpoints.resolution import Assumptions, Resolved, arrays, resolve
from vera_tools.drifting import environments
from vera_tools.drifting.choices import DEVICES, TIMEOUT
from vera_tools.drifting.comparison import Comparison, compare_reports, load
from vera_tools.drifting.effect import Effect, logits_change, measure
from vera_tools.drifting.environments import (
    Answer,
    Interpreter,
    ask,
    this_interpreter,
    weaker_capabilities,
)
from vera_tools.dtypes import FLOATS, HALVES, Array, np_dtype
from vera_tools.errors import UsageError
from vera_tools.files import opening
from vera_tools.platforms import atlas
from vera_tools.platforms.streams import Draw, Environment, identify_stream
from vera_tools.projections.identification import Match, compare
from vera_tools.projections.pair import PROJECTIONS, Pair
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Progress, Report

#: What every environment draws. The first pair is large enough that fused and separate differ in the half types too,
#: where they differ at all; the second has a key that wraps and odd shapes.
STANDARD = (Draw(42, 64, 4096, 4096), Draw(-1, 4, 7, 5))
#: Rows and columns of a projection that are kept for a picture.
CORNER = 12, 48


@dataclass(frozen=True)
class Target:
    """What an environment is measured against.

    Attributes:
        recipe: What makes the wanted pair; None where no known recipe does.
        position: Which of the drawn pairs stands against it.
        dtype: The default dtype under which it is drawn.
        through: The dtype that PEFT then rounds it through on the base at hand.
        pair: vera_A and vera_B as they should come out, in float32 (float64 where they are stored so).
        checkpoint: The path of the adapter that it belongs to, or None.
        assumed: Nothing records the recipe.
    """

    recipe: Recipe | None
    position: int
    dtype: str
    through: str | None
    pair: tuple[Array, Array] = field(repr=False)
    checkpoint: str | None = None
    assumed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {
            "checkpoint": self.checkpoint,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "assumed": self.assumed,
            "drawn_dtype": self.dtype,
            "rounded_through": self.through,
        }


@dataclass(frozen=True)
class Sample:
    """Where and how much one row's projections differ, for a picture.

    Attributes:
        ulps: Differing float32 elements of both counted by the power of two of their distance: [1, 2), [2, 4), ...
        size: Elements in all.
        tensor: The one whose corner this is: vera_A, or vera_B where vera_A is the same throughout.
        corner: Signed differences of its first rows and columns, in units of float32's spacing at the bound.
    """

    ulps: tuple[int, ...]
    size: int
    tensor: str
    corner: Array


@dataclass(frozen=True, repr=False)
class DriftReport(Report):
    """What was drawn where.

    Attributes:
        draws: The pairs that every environment drew.
        target: What the rows are measured against.
        environments: One row for each interpreter, device and CPU capability tried.
        comparison: Against saved reports, where some were named.
        samples: Pictures' data, by row, where a row is not exact. Not in the document.
    """

    name: ClassVar[str] = "drift"

    draws: tuple[Draw, ...]
    target: Target
    environments: tuple[Environment, ...]
    comparison: Comparison | None = None
    samples: Mapping[int, Sample] = field(default_factory=dict, repr=False)

    @property
    def exit_code(self) -> int:
        """1 where a native row is not exact, or the reports do not agree."""
        drifted = any(row.native and row.exact is not True for row in self.environments)
        return int(drifted or (self.comparison is not None and not self.comparison.agree))

    def body(self) -> dict[str, Any]:
        """The drift/v1 document's own part."""
        return {
            "pairs": [draw.to_dict() for draw in self.draws],
            "target": self.target.to_dict(),
            "environments": [row.to_dict() for row in self.environments],
            "comparison": self.comparison.to_dict() if self.comparison else None,
        }


def drift(
    *,
    python: Sequence[str | os.PathLike[str]] = (),
    venv: Sequence[str | os.PathLike[str]] = (),
    torch: Sequence[str] = (),
    device: Sequence[str] = (),
    capability: Sequence[str] | None = None,
    dtype: Sequence[str] = FLOATS,
    checkpoint: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    strict: bool = False,
    against: Sequence[str | os.PathLike[str]] = (),
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> DriftReport:
    """Draw projections with every torch, CPU capability and device here, and say which recipe each result is.

    Args:
        python: Further interpreters, by path or name.
        venv: Virtual environments.
        torch: torch releases that uv fetches and runs.
        device: Devices to draw on; default: all that are there. A device that is named decides as the CPU does.
        capability: CPU capabilities to force; default: all that are weaker than the one torch chooses.
        dtype: torch's default dtypes to draw under.
        checkpoint: An adapter: rows are measured against its own projections, and what a difference does to it.
        base: Its base model, for in_max, the dtype that PEFT rounds through, and the logits.
        in_features: in_max of a seed-only adapter, where no base is at hand.
        strict: Refuse to assume a recipe for the adapter.
        against: Reports saved earlier, or elsewhere, to compare with.
        timeout: Seconds after which a probe counts as hung.
        progress: Called as probes end.

    Raises:
        UsageError: nothing to probe, an unknown device or dtype, or an interpreter that is not there.
        FormatError: the checkpoint, the base or a saved report is malformed.
        CheckFailedError: the base does not fit the checkpoint, or a record is wrong.
        UnprovenError: seed-only with nothing recorded, and `strict`.
    """
    _check("device", [name.split(":")[0] for name in device], DEVICES)
    _check("dtype", dtype, FLOATS)
    saved = [(os.fspath(file), load(file)) for file in against]
    interpreters = [
        *([this_interpreter()] if importlib.util.find_spec("torch") else []),
        *map(environments.python, python),
        *map(environments.venv, venv),
        *map(environments.torch_release, torch),
    ]
    if not interpreters:
        raise UsageError(
            "there is no torch to probe",
            hint="install torch beside vera-tools, or name an interpreter that has it with --python, --venv or --torch",
        )
    with contextlib.ExitStack() as stack:
        adapter = stack.enter_context(Checkpoint.open(checkpoint)) if checkpoint is not None else None
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        draws, target = _target(adapter, model, in_features=in_features, strict=strict)
        dtypes = tuple(dict.fromkeys([*dtype, target.dtype]))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vera-tools-")))
        probes = _Probes(draws, dtypes, folder, timeout, progress)
        judge = _Judge(draws, target, adapter, model, base, timeout)
        rows: list[Environment] = []
        samples: dict[int, Sample] = {}
        for run in probes.all(interpreters, device, capability):
            row, sample = judge.row(run)
            if sample is not None:
                samples[len(rows)] = sample
            rows.append(row)
    report = DriftReport(draws, target, tuple(rows), samples=samples)
    return replace(report, comparison=compare_reports(draws, rows, saved)) if saved else report


@dataclass(frozen=True)
class _Run:
    """One probe: where, and what it answered."""

    interpreter: Interpreter
    device: str
    native: bool
    capability: str | None
    answer: Answer
    values: Path


class _Probes:
    """Runs the probes, a few at a time."""

    def __init__(
        self,
        draws: tuple[Draw, ...],
        dtypes: tuple[str, ...],
        folder: Path,
        timeout: float,
        progress: Progress | None,
    ) -> None:
        self._pairs, self._dtypes = [draw.numbers for draw in draws], dtypes
        self._folder, self._timeout, self._progress = folder, timeout, progress
        self._started = self._ended = 0

    def all(
        self, interpreters: Sequence[Interpreter], devices: Sequence[str], capabilities: Sequence[str] | None
    ) -> Iterable[_Run]:
        """Each interpreter by itself first, which tells what else there is to try; then that. In a table's order."""
        first = devices[0] if devices else "cpu"
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            natives = [pool.submit(self._run, interpreter, first, None, True) for interpreter in interpreters]
            others = []
            for native in natives:
                run = native.result()
                tries = self._tries(run, first, devices, capabilities)
                others.append([pool.submit(self._run, run.interpreter, *one) for one in tries])
            for native, further in zip(natives, others, strict=True):
                yield native.result()
                for future in further:
                    yield future.result()

    @staticmethod
    def _tries(
        native: _Run, first: str, devices: Sequence[str], capabilities: Sequence[str] | None
    ) -> list[tuple[str, str | None, bool]]:
        """(device, capability, decides) of what is left to try with an interpreter."""
        if native.answer.status != "ok":
            return []
        facts = native.answer.facts
        forced = (
            weaker_capabilities(facts["machine"], facts["cpu_capability"]) if capabilities is None else capabilities
        )
        on_cpu = [("cpu", name, False) for name in forced] if "cpu" in (devices or ("cpu",)) else []
        return on_cpu + [(name, None, bool(devices)) for name in devices or native.answer.devices if name != first]

    def _run(self, interpreter: Interpreter, device: str, capability: str | None, native: bool) -> _Run:
        self._started += 1
        values = Path(tempfile.mkdtemp(dir=self._folder))
        answer = ask(
            interpreter,
            self._pairs,
            dtypes=self._dtypes,
            device=device,
            capability=capability,
            values=values,
            timeout=self._timeout,
        )
        self._ended += 1
        if self._progress:
            self._progress(self._ended, self._started, interpreter.label or "this interpreter")
        return _Run(interpreter, device, native, capability, answer, values)


class _Judge:
    """Turns answers into rows. Rows that drew the same bits are measured once."""

    def __init__(
        self,
        draws: tuple[Draw, ...],
        target: Target,
        adapter: Checkpoint | None,
        model: BaseModel | None,
        base: str | os.PathLike[str] | None,
        timeout: float,
    ) -> None:
        self._draws, self._target = draws, target
        self._adapter, self._model, self._base, self._timeout = adapter, model, base, timeout
        self._seen: dict[str, tuple[dict[str, Match] | None, Effect | None, Sample | None]] = {}

    def row(self, run: _Run) -> tuple[Environment, Sample | None]:
        facts = {key: value for key, value in run.answer.facts.items() if key != "device_threads"}
        row = Environment(
            interpreter=run.interpreter.label,
            device=run.device,
            native=run.native,
            status=run.answer.status,
            error=run.answer.error,
            **facts,
        )
        if run.answer.status != "ok":
            capability = row.cpu_capability or run.capability
            return replace(row, cpu_capability=capability, gets=f"unknown: {run.answer.error}"), None
        device = None if run.device == "cpu" else row.device_name or run.device
        threads = run.answer.facts["device_threads"]
        streams = {
            dtype: identify_stream(dtype, drawn, self._draws, device=device, threads=threads)
            for dtype, drawn in run.answer.streams.items()
        }
        row = replace(row, streams=streams)
        row = replace(row, known=atlas.look_up(row, self._draws))
        if streams[self._target.dtype].error:
            return replace(row, gets=f"unknown: {streams[self._target.dtype].error}"), None
        projections, effect, sample = self._measured(self._loaded(run.values))
        return replace(
            row,
            exact=projections is None,
            gets=_gets(projections, self._target),
            projections=projections,
            effect=effect.to_dict() if effect else None,
        ), sample

    def _loaded(self, values: Path) -> tuple[Array, Array]:
        """The pair as PEFT would hold it after loading: as drawn, cast to the base's dtype, and lifted again."""
        draw, target = self._draws[self._target.position], self._target
        pair = []
        for name in PROJECTIONS:
            file = values / f"{target.dtype}-{target.position}-{name}"
            array = np.fromfile(file, np_dtype(target.dtype)).reshape(draw.shape.of(name))
            if target.through is not None and target.through != target.dtype:
                # torch makes its half types from float32, never from float64.
                array = array.astype(np.float32).astype(np_dtype(target.through))
            pair.append(array.astype(target.pair[0].dtype))
        return pair[0], pair[1]

    def _measured(self, loaded: tuple[Array, Array]) -> tuple[dict[str, Match] | None, Effect | None, Sample | None]:
        key = hashlib.sha256(loaded[0].tobytes() + loaded[1].tobytes()).hexdigest()
        if key not in self._seen:
            self._seen[key] = self._measure(loaded)
        return self._seen[key]

    def _measure(self, loaded: tuple[Array, Array]) -> tuple[dict[str, Match] | None, Effect | None, Sample | None]:
        wanted = self._target.pair
        matches = compare(Pair.of(*loaded), Pair.of(*wanted))
        if all(match.match == "identical" for match in matches.values()):
            return None, None, None
        effect = None
        if self._adapter is not None:
            effect = measure(self._adapter, wanted, loaded, base=self._model)
            effect = replace(effect, **self._logits(loaded))
        return matches, effect, _sample(loaded, wanted)

    def _logits(self, loaded: tuple[Array, Array]) -> dict[str, Any]:
        assert self._adapter is not None
        if self._base is None:
            return {"logits_why_not": "no base model was named"}
        base = opening.local_path(self._base)
        if base is None or not base.is_dir():
            return {"logits_why_not": "the base is not a model's folder on this disk"}
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            return {"logits_why_not": f"{' and '.join(missing)} not installed beside vera-tools"}
        change, why_not = logits_change(
            self._adapter, os.fspath(base), self._target.pair, loaded, timeout=self._timeout
        )
        return {"logits": change, "logits_why_not": why_not}


def _target(
    adapter: Checkpoint | None, model: BaseModel | None, *, in_features: int | None, strict: bool
) -> tuple[tuple[Draw, ...], Target]:
    """What to draw, and what should come out."""
    if adapter is None:
        recipe = Recipe(prng_key=STANDARD[0].prng_key)
        return STANDARD, Target(recipe, 0, "float32", None, generate(recipe, STANDARD[0].shape))
    resolved: Resolved = resolve(adapter, Assumptions(base=model, in_features=in_features, strict=strict))
    record = resolved.record
    recipe_of = record.recipe
    own = Draw(adapter.config.projection_prng_key, record.shape.r, record.shape.in_max, record.shape.out_max)
    through = assumed_rounding(adapter, model) if model else recipe_of.rounded_through if recipe_of else None
    if through is None and record.dtype in HALVES and model is None:
        through = record.dtype  # PEFT 0.11 keeps the pair in the base's own dtype
    kind = np.float64 if record.dtype == "float64" else np.float32
    a, b = arrays(adapter, resolved)
    target = Target(
        recipe_of,
        len(STANDARD),
        recipe_of.drawn_dtype if recipe_of else "float32",
        through,
        (a.astype(kind), b.astype(kind)),
        adapter.label,
        record.assumed,
    )
    return (*STANDARD, own), target


def _gets(projections: Mapping[str, Match] | None, target: Target) -> str:
    """What a seed-only checkpoint gets in an environment."""
    if projections is None:
        kind = "PEFT's usual" if not target.checkpoint else "the assumed" if target.assumed else "the trained"
        return f"{kind} projections, bit for bit"
    matches = projections.values()
    share = 100 * max(match.differing for match in matches)
    if any(match.max_abs is None for match in matches):
        return f"other projections: {share:.1f} % of elements differ, some not finite"
    largest = max(match.max_abs or 0.0 for match in matches)
    norm = max(match.relative_norm or 0.0 for match in matches)
    kind = "unrelated" if any(match.match == "unrelated" for match in matches) else "other"
    return f"{kind} projections: {share:.1f} % of elements differ, by up to {largest:.1e} (relative norm {norm:.1e})"


def _sample(loaded: tuple[Array, Array], wanted: tuple[Array, Array]) -> Sample:
    new, old = ([array.astype(np.float32) for array in pair] for pair in (loaded, wanted))
    distance = np.concatenate([np.abs(_line(a) - _line(b)).reshape(-1) for a, b in zip(new, old, strict=True)])
    counts = np.bincount(np.log2(distance[distance > 0]).astype(int))
    which = 0 if np.any(new[0] != old[0]) else 1
    spacing = np.spacing(np.abs(old[which]).max())
    rows, columns = CORNER
    corner = (new[which][:rows, :columns].astype(np.float64) - old[which][:rows, :columns]) / spacing
    return Sample(tuple(int(count) for count in counts), distance.size, PROJECTIONS[which], corner)


def _line(values: Array) -> Array:
    """Floats as integers in the floats' own order, so that neighbours differ by 1."""
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _check(name: str, values: Sequence[str], choices: Sequence[str]) -> None:
    for value in values:
        if value not in choices:
            raise UsageError(f"unknown {name}", expected=" or ".join(choices), found=value)
