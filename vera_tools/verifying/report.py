"""What `verify` reports: a verdict and checks for each checkpoint, what was skipped, and what could not be reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple
from xml.etree import ElementTree

from vera_tools.errors import HubError, VeraToolsError
from vera_tools.platforms import rows
from vera_tools.projections.identification import Match
from vera_tools.projections.pair import PROJECTIONS
from vera_tools.projections.recipe import Recipe
from vera_tools.report import Document, Report, printable, worst
from vera_tools.verifying.loads import Load

Status = Literal["pass", "fail", "warn", "skip"]
Verdict = Literal["reproducible", "assumed", "unproven", "drift", "invalid"]

#: From best to worst.
VERDICTS: tuple[Verdict, ...] = ("reproducible", "assumed", "unproven", "drift", "invalid")
_EXIT_CODES = {"reproducible": 0, "assumed": 3, "unproven": 3, "drift": 1, "invalid": 4}
#: A projection that is not in the file, and of which nothing is recorded.
ABSENT = Match(None, None, None, "absent")


@dataclass(frozen=True)
class Check(Document):
    """One thing that was looked at. `id` is "<what>.<which>", stable from release to release."""

    id: str
    status: Status
    message: str


class Skipped(NamedTuple):
    """An adapter of another kind, where only VeRA's are meant."""

    path: str
    kind: str


class Failed(NamedTuple):
    """A checkpoint that could not be reached, and why."""

    path: str
    error: VeraToolsError


@dataclass(frozen=True)
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
        loads: The loader table.
        scope: What the verdict covers, in words.
    """

    path: str
    verdict: Verdict
    checks: tuple[Check, ...]
    save_projection: bool | None = None
    projections_stored: bool | None = None
    recipe: Recipe | None = None
    also_matches: tuple[Recipe, ...] = ()
    projections: tuple[Match, Match] = (ABSENT, ABSENT)
    loads: tuple[Load, ...] = ()
    scope: str = "nothing was proven"

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not any(check.status == "fail" for check in self.checks)

    def exit_code(self, require: Verdict = "reproducible") -> int:
        """The exit code where `require` is the worst verdict that passes."""
        code = 0 if VERDICTS.index(self.verdict) <= VERDICTS.index(require) else _EXIT_CODES[self.verdict]
        return code if self.ok else worst([code, 1])

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's entry in a verify/v1 document."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "ok": self.ok,
            "save_projection": self.save_projection,
            "projections_stored": self.projections_stored,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "also_matches": [recipe.to_dict() for recipe in self.also_matches],
            "projections": {name: match.to_dict() for name, match in zip(PROJECTIONS, self.projections, strict=True)},
            "loads": [load.to_dict() for load in self.loads],
            "checks": [check.to_dict() for check in self.checks],
            "scope": self.scope,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CheckpointReport:
        """The inverse of `to_dict`, for data that a schema has passed."""
        one, two = (_match(data["projections"][name]) for name in PROJECTIONS)
        return cls(
            path=data["path"],
            verdict=data["verdict"],
            checks=tuple(Check(**check) for check in data["checks"]),
            save_projection=data["save_projection"],
            projections_stored=data["projections_stored"],
            recipe=Recipe.from_dict(data["recipe"]) if data["recipe"] else None,
            also_matches=tuple(Recipe.from_dict(recipe) for recipe in data["also_matches"]),
            projections=(one, two),
            loads=tuple(Load(**load) for load in data["loads"]),
            scope=data["scope"],
        )


def _match(data: dict[str, Any]) -> Match:
    shape = None if data["shape"] is None else tuple(data["shape"])
    return Match(**{**data, "shape": shape, "places": tuple((row, column) for row, column in data["places"])})


@dataclass(frozen=True)
class VerifyReport(Report):
    """The result of one call.

    Attributes:
        checkpoints: One report each, in the order asked for.
        skipped: Adapters of other kinds that a recursive search met.
        failed: Those on the Hub that could not be reached, where there are several.
        require: The worst verdict that passes.
    """

    name: ClassVar[str] = "verify"

    checkpoints: tuple[CheckpointReport, ...]
    skipped: tuple[Skipped, ...] = ()
    require: Verdict = "reproducible"
    failed: tuple[Failed, ...] = ()

    @property
    def exit_code(self) -> int:
        """The most severe of the checkpoints' codes: 4, 1, 5, 3, 0."""
        codes = [report.exit_code(self.require) for report in self.checkpoints]
        return worst([*codes, *([HubError.exit_code] if self.failed else [])])

    @property
    def summary(self) -> dict[str, int]:
        """How many checkpoints have each verdict, how many were skipped, and of how many any check failed."""
        counts: dict[str, int] = dict.fromkeys(VERDICTS, 0)
        for report in self.checkpoints:
            counts[report.verdict] += 1
        failed = sum(not report.ok for report in self.checkpoints)
        return {**counts, "skipped": len(self.skipped), "failed_checks": failed}

    def body(self) -> dict[str, Any]:
        """The verify/v1 document's own part."""
        return {
            "checkpoints": [report.to_dict() for report in self.checkpoints],
            "platforms": rows.to_document(),
            "summary": self.summary,
            "skipped": [{"path": path, "kind": kind} for path, kind in self.skipped],
            "failed": [{"path": path, "error": error.to_dict()} for path, error in self.failed],
        }

    def to_junit(self) -> str:
        """JUnit XML: a suite for each checkpoint, a case for its verdict and for each check."""
        root = ElementTree.Element("testsuites", name="vera-tools verify")
        for report in self.checkpoints:
            failed = report.exit_code(self.require) != 0 and report.ok
            suite = ElementTree.SubElement(root, "testsuite", name=report.path)
            case = ElementTree.SubElement(suite, "testcase", classname=report.path, name="verdict")
            if failed or VERDICTS.index(report.verdict) > VERDICTS.index(self.require):
                ElementTree.SubElement(case, "failure", message=f"{report.verdict}: {report.scope}")
            for check in report.checks:
                case = ElementTree.SubElement(suite, "testcase", classname=report.path, name=check.id)
                if check.status in ("fail", "skip"):
                    ElementTree.SubElement(
                        case, "failure" if check.status == "fail" else "skipped", message=check.message
                    )
                elif check.status == "warn":
                    ElementTree.SubElement(case, "system-out").text = f"warning: {check.message}"
            suite.set("tests", str(len(suite)))
            suite.set("failures", str(len(suite.findall("testcase/failure"))))
            suite.set("errors", "0")
            suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        for path, error in self.failed:
            suite = ElementTree.SubElement(
                root, "testsuite", name=path, tests="1", failures="0", errors="1", skipped="0"
            )
            case = ElementTree.SubElement(suite, "testcase", classname=path, name="verdict")
            ElementTree.SubElement(case, "error", message=str(error))
        for key in ("tests", "failures", "errors", "skipped"):
            root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
        for element in root.iter():  # XML 1.0 has no way at all to write most control characters
            element.attrib.update({key: printable(value) for key, value in element.attrib.items()})
            element.text = element.text and printable(element.text)
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


#: What becomes of one checkpoint.
Outcome = CheckpointReport | Skipped | Failed
