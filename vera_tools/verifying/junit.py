"""JUnit XML of many suites, made one after the other: a report on many takes no more room than one on few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from vera_tools.report import printable

_COUNTED = ("tests", "failures", "errors", "skipped")


def pieces(name: str, suites: Callable[[], Iterator[Element]]) -> Iterator[str]:
    """The text, piece by piece. The suites are made twice: their sums stand before the first."""
    sums: Counter[str] = Counter()
    for suite in suites():
        sums.update({key: int(suite.get(key, "0")) for key in _COUNTED})
    root = Element("testsuites", {"name": name, **{key: str(sums[key]) for key in _COUNTED}})
    root.text = "\n" if sums["tests"] else None
    head, end, _ = ElementTree.tostring(root, encoding="unicode", xml_declaration=True).partition("</testsuites>")
    yield head
    for suite in suites():
        for element in suite.iter():  # XML 1.0 has no way at all to write most control characters
            element.attrib.update({key: printable(value) for key, value in element.attrib.items()})
            element.text = element.text and printable(element.text)
        ElementTree.indent(suite, level=1)
        suite.tail = "\n"
        yield "  " + ElementTree.tostring(suite, encoding="unicode")
    yield end + "\n"


def counted(suite: Element) -> Element:
    """The suite, and in its attributes how many cases it has and how many of them failed or were skipped."""
    sums = (len(suite), len(suite.findall("testcase/failure")), 0, len(suite.findall("testcase/skipped")))
    suite.attrib.update({key: str(count) for key, count in zip(_COUNTED, sums, strict=True)})
    return suite


def error(suite: str, case: str, message: str) -> Element:
    """A suite of one case, which could not be looked at."""
    found = Element("testsuite", {"name": suite, "tests": "1", "failures": "0", "errors": "1", "skipped": "0"})
    SubElement(SubElement(found, "testcase", classname=suite, name=case), "error", message=message)
    return found
