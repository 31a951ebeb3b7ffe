"""What is kept of each of many checkpoints: little, and nothing of it is lost or changes places."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from xml.etree import ElementTree

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY
from vera_tools.errors import FormatError
from vera_tools.texts import Texts
from vera_tools.verifying import registry, runs
from vera_tools.verifying.gathering import Gathered
from vera_tools.verifying.report import Failed, Skipped, named

NAMES = ["", "b", "a", "ä", "checkpoint-10", "checkpoint-9", "not utf-8 \udcff", "🦙", "two\nlines", "\0"]


def test_texts_are_a_list_of_texts():
    texts = Texts(NAMES)
    assert (len(texts), list(texts), texts[3], texts[-1]) == (len(NAMES), NAMES, NAMES[3], NAMES[-1])
    assert texts[2:-1] == NAMES[2:-1]
    assert texts[::-1] == NAMES[::-1]
    with pytest.raises(IndexError):
        texts[len(NAMES)]
    assert list(Texts()) == list(Texts().sorted()) == []


@pytest.mark.parametrize("key", [None, lambda text: (len(text), text)])
def test_they_are_sorted_as_a_list_is(key):
    many = [f"{n * 7919 % 10007}{NAMES[n % 9]}" for n in range(9000)]
    assert list(Texts(many).sorted(key)) == sorted(many, key=key)


@pytest.mark.parametrize("names", [[], ["one"], NAMES, [None, True, "x"]])
def test_a_digest_over_names_is_that_of_their_list(names):
    assert runs.digest(iter(names)) == hashlib.sha256(json.dumps(names).encode()).hexdigest()


@pytest.fixture(scope="module")
def outcomes():
    kept, seed = (vera_tools.verify(CHECKPOINTS / name).checkpoints[0] for name in (KEPT, SEED_ONLY))
    error = FormatError("it is gone", where="gone")
    return [kept, seed, Skipped("other", "LORA"), Failed("gone", error), named(seed, "\udcff"), Skipped("loha", "LOHA")]


def test_each_is_what_it_was_in_its_place(outcomes):
    gathered = Gathered("reproducible", (), None)
    order = [4, 2, 0, 5, 1, 3]
    assert [gathered.add(n, outcomes[n]) for n in order] == [1, 2, 3, 4, 5, 6]
    report = gathered.report()
    kept, seed, other, gone, odd, loha = outcomes
    for found, expected in (
        (report.checkpoints, (kept, seed, odd)),
        (report.skipped, (other, loha)),
        (report.failed, (gone,)),
    ):
        assert found == expected == tuple(found)
        assert (hash(found), repr(found), len(found)) == (hash(expected), repr(expected), len(expected))
        assert (found[0], found[-1], found[1:]) == (expected[0], expected[-1], expected[1:])
        assert found != expected[:-1]
        assert found != (*expected[:-1], "another")
    assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()


def test_several_of_one_place_stay_together(outcomes):
    """As the adapters of one repository do."""
    gathered = Gathered("reproducible", (), None)
    kept, seed, *_ = outcomes
    assert [gathered.add(1, kept), gathered.add(1, seed), gathered.add(0, seed)] == [1, 1, 2]
    assert gathered.report().checkpoints == (seed, kept, seed)
    paths = [f"{n}" for n in range(300)]
    for n, path in enumerate(paths):
        gathered.add(9 - n // 100, named(kept, path))
    assert [one.path for one in gathered.report().checkpoints[3:]] == paths[200:] + paths[100:200] + paths[:100]


def test_each_takes_little_room(outcomes):
    paths = [f"/somewhere/registry/{n // 100:04}/{n:06}" for n in range(10_000)]
    gathered, kept = Gathered("reproducible", (), None), outcomes[0]
    gathered.add(0, named(kept, "first"))
    tracemalloc.start()
    try:
        wanted = registry.items(((path, path) for path in paths), None)
        for n, path in enumerate(paths):
            gathered.add(n + 1, named(kept, path))
        report = gathered.report()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(wanted.items), len(report.checkpoints)) == (10_000, 10_001)
    assert held / 10_000 < 150  # bytes: the path twice, and four numbers


@pytest.fixture(scope="module")
def report(outcomes):
    gathered = Gathered("reproducible", ("peft>=0.21",), None)
    for n, outcome in enumerate([*outcomes, *(named(outcomes[0], f"\x1b{n}") for n in range(200))]):
        gathered.add(n, outcome)
    return gathered.report(partial=True)


def test_the_document_is_one_text_however_it_is_written(report, outcomes):
    for one in (report, vera_tools.inspect(CHECKPOINTS / KEPT), Gathered("drift", (), None).report()):
        assert one.to_json() == json.dumps(one.to_dict(), indent=2)
    assert json.loads(report.to_json())["checkpoints"][1]["path"] == outcomes[1].path
    defaults = (vera_tools.verify(CHECKPOINTS / KEPT).checkpoints[0].checks[0],)
    assert json.loads(report.to_json(defaults=defaults))["defaults"] == [defaults[0].to_dict()]


def test_junit_sums_up_what_comes_after(report):
    root = ElementTree.fromstring(report.to_junit())
    assert len(root) == 205
    for key in ("tests", "failures", "errors", "skipped"):
        assert int(root.get(key)) == sum(int(suite.get(key)) for suite in root)
    assert int(root.get("tests")) == len(root.findall("testsuite/testcase"))
    assert int(root.get("failures")) == len(root.findall("testsuite/testcase/failure")) > 0
    assert (int(root.get("errors")), root[-1].get("name"), root[4].get("name")) == (2, "interrupted", "\\x1b1")
    ElementTree.indent(root)
    assert ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n" == report.to_junit()
    empty = Gathered("drift", (), None).report().to_junit()
    assert (len(ElementTree.fromstring(empty)), empty[-3:]) == (0, "/>\n")


@pytest.mark.parametrize("form", ["json_pieces", "junit_pieces"])
def test_what_is_written_is_made_piece_by_piece(report, form):
    length = len("".join(getattr(report, form)()))
    tracemalloc.start()
    try:
        for _ in getattr(report, form)():
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < length / 2
