"""Lines of a log that tell the same: looked at once, held once, and never taken for one that tells something else."""

from __future__ import annotations

import copy
import json
import tracemalloc

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT
from vera_tools.errors import FormatError
from vera_tools.verifying.log import Conditions, Log, Reader
from vera_tools.verifying.runs import Run
from vera_tools.verifying.sharing import Shared


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A line on a sound adapter, parsed."""
    log = tmp_path_factory.mktemp("log") / "log"
    vera_tools.verify(CHECKPOINTS / KEPT, log=log)
    (found,) = map(json.loads, log.read_text().splitlines())
    return found


def read(reader, data):
    return reader.read(json.dumps(data).encode(), where="log")


def said(reader, data):
    """All that a line tells; errors are not equal to each other."""
    found = read(reader, data)
    return found.result.to_dict(found.conditions, found.run), found.tool, found.old, found.result.state


def another(line, path="another"):
    found = copy.deepcopy(line)
    found["path"] = found["checkpoint"]["path"] = path
    return found


def test_what_is_the_same_is_held_once(line):
    reader = Reader(Shared())
    one, two = read(reader, line), read(reader, another(line))
    alone = read(Reader(Shared()), another(line))
    assert (two, two.result.state) == (alone, alone.result.state)
    assert two.result.path == two.result.outcome.path == "another"
    assert two.result.path is two.result.outcome.path
    for name in ("checks", "projections", "trained", "scope", "recipe"):
        assert getattr(two.result.outcome, name) is getattr(one.result.outcome, name)
    assert two.conditions is one.conditions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["checkpoint"].update(ok=1), "ok"),
        (lambda data: data["checkpoint"].update(verdict="good"), "verdict"),
        (lambda data: data["checkpoint"]["checks"][0].update(status="passed"), "status"),
        (lambda data: data["checkpoint"]["checks"][-1].update(more=1), "more"),
        (lambda data: data["checkpoint"].pop("scope"), "scope"),
        (lambda data: data["checkpoint"].update(path=1), "path"),
        (lambda data: data["checkpoint"]["projections"]["vera_A"].update(shape=[16, True]), "shape"),
        (lambda data: data.update(checkpoint=None), "checkpoint is null"),
        (lambda data: data.update(status="fine"), "status"),
        (lambda data: data["files"][0].update(size="large"), "size"),
        (lambda data: data.update(more=1), "more"),
        (lambda data: data.pop("base"), "base"),
        (lambda data: data["run"].update(done=-1), "done"),
    ],
)
def test_a_line_that_is_nearly_as_a_good_one_is_refused(line, change, words):
    """In the words in which it is refused alone."""
    reader, bad = Reader(Shared()), another(line)
    read(reader, line)
    change(bad)
    with pytest.raises(FormatError, match=words) as alone:
        read(Reader(Shared()), bad)
    with pytest.raises(FormatError) as after:
        read(reader, bad)
    assert str(after.value) == str(alone.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["checkpoint"].update(verdict="drift"),
        lambda data: data["checkpoint"]["checks"][3].update(status="fail"),
        lambda data: data["checkpoint"]["checks"].pop(),
        lambda data: data["checkpoint"]["checks"].reverse(),
        lambda data: data["checkpoint"]["trained"].update(made=False),
        lambda data: data["checkpoint"].pop("trained"),
        lambda data: data["checkpoint"]["projections"]["vera_B"].update(sha256="0" * 64),
        lambda data: data["checkpoint"].update(path="elsewhere"),
        lambda data: data.update(status="skipped", kind="LORA"),
        lambda data: data.update(allow_pickle=True),
        lambda data: data["tool"].update(version="0.0.9"),
        lambda data: data.pop("run"),
    ],
)
def test_a_line_that_tells_something_else_tells_it(line, change):
    reader, other = Reader(Shared()), another(line)
    same = said(reader, line), said(reader, other)
    change(other)
    alone = said(Reader(Shared()), other)
    assert said(reader, other) == alone != same[1]
    assert said(reader, line) == same[0]


def test_a_log_takes_little_memory(line, tmp_path):
    """Of a hundred thousand lines, each one's path, state and place."""
    log, count = tmp_path / "log", 2000
    with log.open("w") as stream:
        for n in range(count):
            data = another(line, f"registry/{n}")
            data["run"].update(done=n + 1, written=n + 1, total=count, ended=n + 1 == count)
            stream.write(json.dumps(data) + "\n")
    tracemalloc.start()
    found = Log(log, Run("0" * 64))
    found.begin(Conditions(), total=count, whole="0" * 64)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.get("registry/7", None, skip_others=False).outcome.path == "registry/7"
    assert held < 2500 * count  # a line has 5,000 bytes, and as an object three times as many
