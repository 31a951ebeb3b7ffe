"""A report of `verify` as JUnit XML: a suite for each checkpoint, a case for its verdict and for each check.

One suite is made after the other, so that a report on many takes no more room than one on few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from vera_tools.report import printable
from vera_tools.verifying.findings import MATCH, VERDICTS

if TYPE_CHECKING:
    from vera_tools.verifying.report import CheckpointReport, VerifyReport

_COUNTED = ("tests", "failures", "errors", "skipped")


def pieces(report: VerifyReport) -> Iterator[str]:
    """The text, piece by piece. The suites are made twice: their sums stand before the first."""
    sums: Counter[str] = Counter()
    for suite in _suites(report):
        sums.update({key: int(suite.get(key, "0")) for key in _COUNTED})
    root = Element("testsuites", name="vera-tools verify", **{key: str(sums[key]) for key in _COUNTED})
    root.text = "\n" if sums["tests"] else None
    whole = ElementTree.tostring(root, encoding="unicode", xml_declaration=True)
    head, end, _ = whole.partition("</testsuites>")
    yield head
    for suite in _suites(report):
        for element in suite.iter():  # XML 1.0 has no way at all to write most control characters
            element.attrib.update({key: printable(value) for key, value in element.attrib.items()})
            element.text = element.text and printable(element.text)
        ElementTree.indent(suite, level=1)
        suite.tail = "\n"
        yield "  " + ElementTree.tostring(suite, encoding="unicode")
    yield end + "\n"


def _suites(report: VerifyReport) -> Iterator[Element]:
    for checkpoint in report.checkpoints:
        yield _suite(report, checkpoint)
    for path, error in report.failed:
        yield _error(path, "verdict", str(error))
    if report.partial:
        yield _error("interrupted", "interrupted", "interrupted before all were verified")


def _suite(report: VerifyReport, checkpoint: CheckpointReport) -> Element:
    suite = Element("testsuite", name=checkpoint.path)
    case = SubElement(suite, "testcase", classname=checkpoint.path, name="verdict")
    said = {check.id: check.status for check in checkpoint.checks}
    if said.get(MATCH) == "fail" or VERDICTS.index(checkpoint.verdict) > VERDICTS.index(report.require):
        failure = SubElement(case, "failure", message=f"{checkpoint.verdict}: {checkpoint.cause}")
        step = checkpoint.next_step
        failure.text = "\n".join(
            filter(None, [checkpoint.safety, f"next: {step.words}\n{step.command}" if step else ""])
        )
    for name, words in report.gates(checkpoint):
        case = SubElement(suite, "testcase", classname=checkpoint.path, name=f"loads: {name}")
        if words:
            SubElement(case, "failure", message=words)
    for check in checkpoint.checks:
        if check.id == MATCH:  # that is the verdict in words
            continue
        case = SubElement(suite, "testcase", classname=checkpoint.path, name=check.id)
        if check.status in ("fail", "skip"):
            SubElement(case, "failure" if check.status == "fail" else "skipped", message=check.message)
        elif check.status == "warn":
            SubElement(case, "system-out").text = f"warning: {check.message}"
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    return suite


def _error(path: str, name: str, message: str) -> Element:
    suite = Element("testsuite", name=path, tests="1", failures="0", errors="1", skipped="0")
    SubElement(SubElement(suite, "testcase", classname=path, name=name), "error", message=message)
    return suite
