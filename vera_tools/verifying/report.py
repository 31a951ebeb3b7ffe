"""What `verify` reports: a verdict and checks for each checkpoint, what was skipped, and what could not be reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple
from xml.etree.ElementTree import Element, SubElement

from vera_tools.errors import FormatError, RemoteError, VeraToolsError
from vera_tools.platforms import rows
from vera_tools.projections.identification import Match
from vera_tools.projections.key import same_key
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Document, Report, plain, worst
from vera_tools.verifying import advice, gates, junit
from vera_tools.verifying.advice import Step
from vera_tools.verifying.findings import MATCH, VERDICTS, Check, Verdict, required
from vera_tools.verifying.gates import Answer, Change, LoadSpec
from vera_tools.verifying.loads import Load, Trained, loader_table

_EXIT_CODES = {"reproducible": 0, "assumed": 3, "unproven": 3, "drift": 1, "invalid": 4}
#: The exit code of a run that was interrupted, as shells have it.
INTERRUPTED = 130
#: A projection that is not in the file, and of which nothing is recorded.
ABSENT = Match(None, None, None, "absent")


class Skipped(NamedTuple):
    """An adapter of another kind, where only VeRA's are meant."""

    path: str
    kind: str


class Failed(NamedTuple):
    """A checkpoint that could not be reached, or is not there any more, and why."""

    path: str
    error: VeraToolsError

    @property
    def exit_code(self) -> int:
        """5 where the network, the Hub or a store refused, 4 for what is gone."""
        return RemoteError.exit_code if isinstance(self.error, RemoteError) else FormatError.exit_code


@dataclass(frozen=True)
class FileDigest(Document):
    """A file that a verdict was read from.

    Attributes:
        name: Its name in the checkpoint's folder.
        sha256: Of its content.
    """

    name: str
    sha256: str


@dataclass(frozen=True, repr=False)
class CheckpointReport(Document):
    """One checkpoint's verdict.

    Attributes:
        path: What the caller called it.
        verdict: reproducible, assumed, unproven, drift or invalid.
        checks: Everything that was looked at.
        save_projection: The config's; None where it could not be read.
        projections_stored: Whether both projections are in the file.
        recipe: What made the projections: exactly, or nearest (see `projections`), or None.
        also_matches: Other recipes that give the same bits.
        projections: "vera_A" and "vera_B" against `recipe`.
        trained: What the loader table follows from; None where nothing could be read.
        scope: What the verdict covers, in words.
        base: The base that it was checked against, or else the one that its config names.
        files: Digests of the files that were read, where they were asked for.
    """

    path: str
    verdict: Verdict
    checks: tuple[Check, ...]
    save_projection: bool | None = None
    projections_stored: bool | None = None
    recipe: Recipe | None = None
    also_matches: tuple[Recipe, ...] = ()
    projections: tuple[Match, Match] = (ABSENT, ABSENT)
    trained: Trained | None = None
    scope: str = "nothing was proven"
    base: str | None = None
    files: tuple[FileDigest, ...] = ()

    def __repr__(self) -> str:
        """One line: the checkpoint, its verdict, and what failed."""
        failed = "".join(f", FAILED {check.id}" for check in self.failed)
        return f"<CheckpointReport {self.path!r}: {self.verdict}{failed}>"

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "fail")

    @property
    def loads(self) -> tuple[Load, ...]:
        """The loader table; empty where nothing could be read."""
        return loader_table(self.trained) if self.trained else ()

    @property
    def cause(self) -> str:
        """Why the verdict is what it is, in words."""
        said = [check.message for check in self.checks if check.id == MATCH]
        return (said or [check.message for check in self.failed] or [self.scope])[0]

    @property
    def safety(self) -> str:
        """Where it is safe to load, in one plain sentence: loaders and platforms by the names that people know."""
        trained = self.trained
        stored, whole = bool(self.projections_stored), trained is None or trained.whole
        return advice.safety(self.verdict, self.loads, self.checks, stored=stored, whole=whole)

    @property
    def next_step(self) -> Step | None:
        """What to do where the verdict is not `reproducible` or a check failed; None where all is well."""
        return advice.next_step(
            self.path,
            self.verdict,
            self.checks,
            stored=bool(self.projections_stored),
            key=self._other_key,
            base=self.base,
        )

    @property
    def _other_key(self) -> int | None:
        """The key that exactly makes the stored pair in PEFT's order, where it is another one than the config's."""
        recipe, trained = self.recipe, self.trained
        if self.verdict != "drift" or recipe is None or trained is None or not trained.recipes:
            return None
        return recipe.prng_key if recipe.is_peft_order and not same_key(recipe.prng_key, trained.prng_key) else None

    def with_required(self) -> CheckpointReport:
        """The same, and the check that a manifest covers its tensors."""
        return replace(self, checks=(*self.checks, required(self.checks)))

    def exit_code(self, require: Verdict = "reproducible") -> int:
        """The exit code where `require` is the worst verdict that passes."""
        code = 0 if VERDICTS.index(self.verdict) <= VERDICTS.index(require) else _EXIT_CODES[self.verdict]
        return code if self.ok else worst([code, 1])

    def to_dict(self, *, table: bool = True) -> dict[str, Any]:
        """The checkpoint's entry in a verify/v1 document; without the loader `table`, that in a line of a log."""
        step = self.next_step
        return {
            "path": self.path,
            "verdict": self.verdict,
            "ok": self.ok,
            "save_projection": self.save_projection,
            "projections_stored": self.projections_stored,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "also_matches": [recipe.to_dict() for recipe in self.also_matches],
            "projections": {name: match.to_dict() for name, match in zip(PROJECTIONS, self.projections, strict=True)},
            **({"loads": [load.to_dict() for load in self.loads]} if table else {}),
            "trained": self.trained.to_dict() if self.trained else None,
            "checks": [check.to_dict() for check in self.checks],
            "scope": self.scope,
            "safety": self.safety,
            "next": step.to_dict() if step else None,
            "base": self.base,
            **({"files": plain(self.files)} if self.files else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CheckpointReport:
        """The inverse of `to_dict`, for data that a schema has passed."""
        one, two = (_match(data["projections"][name]) for name in PROJECTIONS)
        recipe = Recipe.from_dict(data["recipe"]) if data["recipe"] else None
        others = tuple(Recipe.from_dict(other) for other in data["also_matches"])
        made = (recipe, *others) if recipe else ()
        return cls(
            path=data["path"],
            verdict=data["verdict"],
            checks=tuple(Check(**check) for check in data["checks"]),
            save_projection=data["save_projection"],
            projections_stored=data["projections_stored"],
            recipe=recipe,
            also_matches=others,
            projections=(one, two),
            trained=Trained.from_dict(data["trained"], made) if data["trained"] else None,
            scope=data["scope"],
            base=data["base"],
            files=tuple(FileDigest(**file) for file in data.get("files", ())),
        )


def _match(data: dict[str, Any]) -> Match:
    shape = None if data["shape"] is None else tuple(data["shape"])
    return Match(**{**data, "shape": shape, "places": tuple((row, column) for row, column in data["places"])})


@dataclass(frozen=True, repr=False)
class VerifyReport(Report):
    """The result of one call.

    Attributes:
        checkpoints: One report each, in the order asked for.
        skipped: Adapters of other kinds that a recursive search met.
        failed: Those that could not be reached, or are not there any more, where there are several.
        require: The worst verdict that passes.
        require_loads: The loaders that have to be exact, or, with `against_loads`, the one moved from.
        against_loads: The loaders moved to: then it is asked which checkpoints the move changes.
        partial: The run was interrupted: there are more.
        from_log: How many were taken from a log, in which an earlier run told of them.
    """

    name: ClassVar[str] = "verify"

    checkpoints: Sequence[CheckpointReport]
    skipped: Sequence[Skipped] = ()
    require: Verdict = "reproducible"
    failed: Sequence[Failed] = ()
    require_loads: tuple[LoadSpec, ...] = ()
    against_loads: LoadSpec | None = None
    partial: bool = False
    from_log: int = field(default=0, compare=False)

    def __repr__(self) -> str:
        """One line: how many checkpoints have each verdict, and the exit code."""
        counts = ", ".join(f"{count} {name}" for name, count in self.summary.items() if count)
        return f"<VerifyReport: {counts or 'nothing'}; exit code {self.exit_code}>"

    def answers(self, checkpoint: CheckpointReport) -> tuple[Answer, ...]:
        """Whether a checkpoint passes each gate of `require_loads`."""
        if self.against_loads:
            return ()
        return tuple(gates.answer(spec, checkpoint.loads) for spec in self.require_loads)

    def change(self, checkpoint: CheckpointReport) -> Change | None:
        """What the move to `against_loads` does to a checkpoint; None where none was asked about."""
        if self.against_loads is None:
            return None
        return gates.change(self.require_loads[0], self.against_loads, checkpoint.loads)

    def next_of(self, checkpoint: CheckpointReport) -> Step | None:
        """What to do with a checkpoint that this call does not let pass; None where it does."""
        if checkpoint.exit_code(self.require) and (step := checkpoint.next_step) is not None:
            return step
        if not any(words for _, words in self.gates(checkpoint)):
            return None
        stored = bool(checkpoint.projections_stored)
        return advice.gate_step(checkpoint.path, checkpoint.loads, stored=stored, base=checkpoint.base)

    def exit_code_of(self, checkpoint: CheckpointReport) -> int:
        """One checkpoint's code, gates included."""
        change = self.change(checkpoint)
        passed = all(answer.exact for answer in self.answers(checkpoint)) and not (
            change and change.changes is not False
        )
        return worst([checkpoint.exit_code(self.require), 0 if passed else 1])

    @property
    def exit_code(self) -> int:
        """The most severe of the checkpoints' codes: 4, 1, 5, 3, 0; 130 where the run was interrupted."""
        if self.partial:
            return INTERRUPTED
        codes = [self.exit_code_of(report) for report in self.checkpoints]
        return worst([*codes, *(failed.exit_code for failed in self.failed)])

    @property
    def summary(self) -> dict[str, int]:
        """How many checkpoints have each verdict, how many were skipped, and of how many any check failed."""
        counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        for report in self.checkpoints:
            counts[report.verdict] += 1
        failed = sum(not report.ok for report in self.checkpoints)
        return {**counts, "skipped": len(self.skipped), "failed_checks": failed}

    @property
    def tally(self) -> str:
        """The summary in words, as every form has it: what failed leads, and verdicts count whatever else failed."""
        counts = self.summary
        total = len(self.checkpoints) + len(self.failed)
        leading = [f"{counts['failed_checks']:,} FAILED a check"] if counts["failed_checks"] else []
        leading += [f"{len(self.failed):,} NOT VERIFIED"] if self.failed else []
        verdicts = ", ".join(f"{counts[name]:,} {name}" for name in VERDICTS if counts[name])
        parts = [", ".join(leading), f"{'verdicts: ' * bool(leading)}{verdicts}" if verdicts else ""]
        parts.append(f"{counts['skipped']:,} skipped" if self.skipped else "")
        said = "; ".join(filter(None, parts)) or "none"
        return f"{total:,} checkpoint{'s' * (total != 1)}: {said}"

    def body(self) -> dict[str, Any]:
        """The verify/v1 document's own part."""
        return {
            "checkpoints": map(self._entry, self.checkpoints),
            "platforms": rows.to_document(),
            "summary": self.summary,
            "skipped": [{"path": path, "kind": kind} for path, kind in self.skipped],
            "failed": [{"path": path, "error": error.to_dict()} for path, error in self.failed],
            **({"partial": True} if self.partial else {}),
            **({"from_log": self.from_log} if self.from_log else {}),
        }

    def gates(self, checkpoint: CheckpointReport) -> list[tuple[str, str]]:
        """Each gate's name, and why it does not let the checkpoint pass; "" where it does."""
        found = [(answer.spec, _refusal(answer)) for answer in self.answers(checkpoint)]
        if change := self.change(checkpoint):
            found.append((f"a move from {change.before} to {change.after}", _refusal(change)))
        return found

    def _entry(self, checkpoint: CheckpointReport) -> dict[str, Any]:
        change = self.change(checkpoint)
        return {
            **checkpoint.to_dict(),
            "required_loads": [answer.to_dict() for answer in self.answers(checkpoint)],
            "change": change.to_dict() if change else None,
        }

    def junit_pieces(self) -> Iterator[str]:
        """JUnit XML, piece by piece: a suite for each checkpoint, a case for its verdict and for each check."""
        return junit.pieces("vera-tools verify", self._suites)

    def to_junit(self) -> str:
        """The same in one piece."""
        return "".join(self.junit_pieces())

    def _suites(self) -> Iterator[Element]:
        for checkpoint in self.checkpoints:
            yield self._suite(checkpoint)
        for path, error in self.failed:
            yield junit.error(path, "verdict", str(error))
        if self.partial:
            yield junit.error("interrupted", "interrupted", "interrupted before all were verified")

    def _suite(self, report: CheckpointReport) -> Element:
        suite = Element("testsuite", name=report.path)
        case = SubElement(suite, "testcase", classname=report.path, name="verdict")
        said = {check.id: check.status for check in report.checks}
        if said.get(MATCH) == "fail" or VERDICTS.index(report.verdict) > VERDICTS.index(self.require):
            failure = SubElement(case, "failure", message=f"{report.verdict}: {report.cause}")
            failure.text = "\n".join(filter(None, [report.safety, _next(report.next_step)]))
        for name, words in self.gates(report):
            case = SubElement(suite, "testcase", classname=report.path, name=f"loads: {name}")
            if words:
                SubElement(case, "failure", message=words)
        for check in report.checks:
            if check.id == MATCH:  # that is the verdict in words
                continue
            case = SubElement(suite, "testcase", classname=report.path, name=check.id)
            if check.status in ("fail", "skip"):
                SubElement(case, "failure" if check.status == "fail" else "skipped", message=check.message)
            elif check.status == "warn":
                SubElement(case, "system-out").text = f"warning: {check.message}"
        return junit.counted(suite)


def _refusal(answer: Answer | Change) -> str:
    """Why a gate does not let a checkpoint pass, in words; "" where it does."""
    if isinstance(answer, Answer):
        said = {True: "", False: "not exact", None: "not known"}[answer.exact]
    else:
        said = {False: "", True: "changes", None: "may change"}[answer.changes]
    place = f" ({answer.where})" if answer.where else ""
    return f"{said}{place}: {answer.why}" if said else ""


def _next(step: Step | None) -> str:
    return f"next: {step.words}\n{step.command}" if step else ""


#: What becomes of one checkpoint.
Outcome = CheckpointReport | Skipped | Failed


def named(outcome: Outcome, path: str) -> Outcome:
    """The same of a checkpoint that the caller calls otherwise."""
    return replace(outcome, path=path) if isinstance(outcome, CheckpointReport) else outcome._replace(path=path)


class Interrupted(KeyboardInterrupt):
    """An interrupt that came while many were verified. `report` holds what was done by then, marked as partial."""

    def __init__(self, report: VerifyReport) -> None:
        super().__init__(report)
        self.report = report
