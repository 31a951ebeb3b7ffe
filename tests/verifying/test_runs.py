"""What is not complete does not look complete: a run that was killed anywhere, a part that nobody began, lost lines."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of
from tests.command import run_cli
from vera_tools import schema
from vera_tools.errors import FormatError, UsageError
from vera_tools.verifying import log as logs
from vera_tools.verifying.log import Log
from vera_tools.verifying.verifier import Verifier


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("registry")
    for n in range(4):
        shutil.copytree(CHECKPOINTS / (KEPT if n % 2 else SEED_ONLY), root / f"{n}")
    return root


class Killed(BaseException):
    """The process is gone: nothing is tidied up after it."""


@pytest.fixture
def killed_at(monkeypatch):
    """Runs `verify` until it begins with the checkpoint of this name, or is to say that all is done (None)."""
    verify, end = Verifier.verify, Log.end

    def at(name, *paths, **options):
        def die(self, path, **more):
            if os.path.basename(path) == name:
                raise Killed
            return verify(self, path, **more)

        def die_at_the_end(self):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Verifier, "verify", die)
            patch.setattr(Log, "give_up", lambda self: None)
            patch.setattr(Log, "end", end if name else die_at_the_end)
            with pytest.raises(Killed):
                vera_tools.verify(*paths, jobs=1, **options)

    return at


@pytest.mark.parametrize(
    ("name", "words"),
    [("0", "0 of 4 done, 4 missing"), ("1", "1 of 4 done, 3 missing"), ("3", "3 of 4"), (None, "3 of 4 done")],
)
def test_a_run_that_was_killed(root, tmp_path, killed_at, name, words):
    log = tmp_path / "log"
    killed_at(name, root, recursive=True, log=log)
    with pytest.raises(FormatError, match=f"the run did not end: {words}"):
        vera_tools.summarize(log, require="unproven")
    result = run_cli("summarize", log, "--require", "unproven")
    assert (result.returncode, result.stdout) == (4, "")
    assert "run verify again with the same --log" in result.stderr
    whole = vera_tools.verify(root, recursive=True, log=log)
    assert vera_tools.summarize(log) == whole
    paths = [line["path"] for line in lines_of(log) if "path" in line]
    assert paths == [str(root / f"{n}") for n in range(4)]


def lines_of(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        schema.validate(line, "verify-line.v1" if "path" in line else "verify-run.v1", where="line")
    return lines


def test_every_cut_between_two_lines(root, tmp_path):
    log, short = tmp_path / "log", tmp_path / "short"
    vera_tools.verify(root, recursive=True, log=log)
    lines = log.read_bytes().splitlines(keepends=True)
    for n in range(len(lines)):
        for left in (lines[:n], lines[:n] + lines[n + 1 :]):
            short.write_bytes(b"".join(left))
            with pytest.raises(FormatError, match=r"did not end|are not here"):
                vera_tools.summarize(short)
    assert len(vera_tools.summarize(log, log).checkpoints) == 4


def test_a_second_run_that_was_killed_before_its_first_line(root, tmp_path, killed_at):
    """The first one ended, and asked something else, or the same earlier."""
    log = tmp_path / "log"
    for before, then, words in (
        ([root / "0"], [root / "1", root / "2"], "0 of 2 done"),
        ([root / "1", root / "2"], [root / "1", root / "2"], "0 of 2 done"),
    ):
        log.unlink(missing_ok=True)
        vera_tools.verify(*before, log=log)
        (root / "1" / "adapter_config.json").touch()
        killed_at("1", *then, log=log)
        with pytest.raises(FormatError, match=words):
            vera_tools.summarize(log)
        vera_tools.verify(*then, log=log)
        assert {one.path for one in vera_tools.summarize(log).checkpoints} == {*map(str, before), *map(str, then)}


def test_one_that_fails_before_it_begins_or_after_all_were_verified(root, tmp_path, monkeypatch):
    log, base = tmp_path / "log", shutil.copytree(base_of(KEPT), tmp_path / "base")
    vera_tools.verify(root / "1", root / "3", base=base, log=log)
    first = log.read_bytes()
    (base / "config.json").write_text("[]")
    with pytest.raises(FormatError):
        vera_tools.verify(root / "1", root / "3", base=base, log=log)
    with pytest.raises(FormatError, match="the run did not begin to verify"):
        vera_tools.summarize(log)
    log.write_bytes(first)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError, match="no adapter_config"):
        vera_tools.verify(tmp_path / "empty", recursive=True, log=log)
    with pytest.raises(FormatError, match="the run did not begin to verify"):
        vera_tools.summarize(log)

    def changed(self):
        raise FormatError("changed while it was read")

    shutil.copytree(base_of(KEPT), base, dirs_exist_ok=True)
    log.unlink()
    monkeypatch.setattr("vera_tools.checkpoints.base.BaseModel.check_unchanged", changed)
    with pytest.raises(FormatError, match="changed while"):
        vera_tools.verify(root / "1", root / "3", base=base, log=log)
    assert len(lines_of(log)) == 2
    with pytest.raises(FormatError, match="2 of 2 done, then it failed"):
        vera_tools.summarize(log)


def test_what_a_run_took_from_lines_that_are_gone(root, tmp_path):
    log = tmp_path / "log"
    vera_tools.verify(root / "0", root / "1", log=log)
    vera_tools.verify(root / "0", root / "1", root / "2", log=log)
    vera_tools.summarize(log)
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    log.write_bytes(lines[2])
    with pytest.raises(FormatError, match="the run took 2 results from lines that are not here"):
        vera_tools.summarize(log)
    # all is taken, and the run that it is taken from asked something else
    log.write_bytes(b"".join(lines))
    vera_tools.verify(root / "0", root / "2", log=log)
    vera_tools.verify(root / "0", root / "2", log=log)
    assert [line.get("path") for line in lines_of(log)[3:]] == [None]
    vera_tools.summarize(log)


def test_what_the_last_run_did_not_find_any_more(tmp_path, monkeypatch):
    """An adapter that is gone is none of the report, and one that came back is, though nothing of it changed."""
    root, log = tmp_path / "r", tmp_path / "log"
    for name, source in (("a", KEPT), ("b", SEED_ONLY)):
        shutil.copytree(CHECKPOINTS / source, root / name)
    assert vera_tools.verify(root, recursive=True, log=log).exit_code
    (root / "b").rename(tmp_path / "aside")
    for _ in range(2):
        assert vera_tools.summarize(log).exit_code
        alone = vera_tools.verify(root, recursive=True, log=log)
        assert vera_tools.summarize(log) == alone
        assert (alone.exit_code, [one.path for one in alone.checkpoints]) == (0, [str(root / "a")])
        size = log.stat().st_size
        vera_tools.verify(root, recursive=True, log=log)
        assert log.stat().st_size == size
        (tmp_path / "aside").rename(root / "b")
        both = vera_tools.verify(root, recursive=True, log=log)
        assert (len(both.checkpoints), vera_tools.summarize(log)) == (2, both)
        (root / "b").rename(tmp_path / "aside")
    monkeypatch.setattr(logs, "_MOST_GONE", 1)
    (root / "a").rename(root / "c")
    vera_tools.verify(root, recursive=True, log=log)
    assert [line["gone"] for line in lines_of(log)[-2:]] == [[str(root / "a")], [str(root / "b")]]
    lines = log.read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").write_bytes(b"".join(lines[:-1]))
    with pytest.raises(FormatError, match="did not end"):
        vera_tools.summarize(tmp_path / "cut")


def test_what_others_found_is_not_gone(tmp_path, monkeypatch):
    """Other arguments, another folder, another part or another log: each run tells of its own."""
    log = tmp_path / "log"
    for name in ("x/r/a", "x/r/b", "y/r/c"):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    for folder in "xy":
        monkeypatch.chdir(tmp_path / folder)
        vera_tools.verify("r", recursive=True, log=log)
    monkeypatch.chdir(tmp_path / "x")
    vera_tools.verify("r/b", log=log)  # which it takes from the line of the search
    shutil.rmtree("r/b")
    vera_tools.verify("r", recursive=True, log=log)
    names = [os.path.join("r", name) for name in "abc"]
    assert [one.path for one in vera_tools.summarize(log).checkpoints] == [names[0], "r/b", names[2]]
    shutil.copytree("r/a", "r/b")
    parts = [tmp_path / "one", tmp_path / "two"]
    for _ in range(2):
        for number, part in enumerate(parts, start=1):
            vera_tools.verify("r", recursive=True, part=(number, 2), log=part)
        left = sorted(os.listdir("r"))
        found = [os.path.basename(one.path) for one in vera_tools.summarize(*parts).checkpoints]
        assert found == left
        shutil.rmtree("r/b", ignore_errors=True)


def test_a_part_that_nobody_began(root, tmp_path):
    for n in (1, 2, 3):
        vera_tools.verify(root, recursive=True, part=(n, 3), log=tmp_path / f"{n}")
    one, two, three = (tmp_path / f"{n}" for n in (1, 2, 3))
    assert vera_tools.summarize(one, two, three) == vera_tools.verify(root, recursive=True)
    for some, words in (((one, three), "part 2/3 was"), ((two,), "parts 1/3, 3/3 were")):
        with pytest.raises(FormatError, match=f"{words} never begun"):
            vera_tools.summarize(*some)
    # where machines have other names for it, what they find tells that it is the same
    moved = shutil.copytree(root, tmp_path / "moved")
    vera_tools.verify(moved, recursive=True, part=(2, 3), log=tmp_path / "two-moved")
    assert len(vera_tools.summarize(one, tmp_path / "two-moved", three).checkpoints) == 4
    # and the part of another whole is no substitute
    shutil.rmtree(moved / "3")
    vera_tools.verify(moved, recursive=True, part=(2, 3), log=tmp_path / "other")
    with pytest.raises(FormatError, match="never begun"):
        vera_tools.summarize(one, tmp_path / "other", three)


def test_a_run_of_the_whole_stands_for_its_parts(root, tmp_path, killed_at):
    part, whole = tmp_path / "part", tmp_path / "whole"
    vera_tools.verify(root, recursive=True, part=(1, 2), log=part)
    vera_tools.verify(root, recursive=True, log=whole)
    assert len(vera_tools.summarize(part, whole).checkpoints) == 4
    vera_tools.verify(root / "0", root / "1", log=whole)
    assert len(vera_tools.summarize(part, whole).checkpoints) == 4
    (root / "3" / "adapter_config.json").touch()
    killed_at("3", root, recursive=True, log=whole)
    with pytest.raises(FormatError, match="the run did not end: "):
        vera_tools.summarize(part, whole)
    vera_tools.verify(root, recursive=True, part=(1, 2), log=whole)  # a part does not stand for the whole
    with pytest.raises(FormatError, match="the run did not end: "):
        vera_tools.summarize(part, whole)


def test_a_missing_log_and_an_empty_one(root, tmp_path):
    vera_tools.verify(root / "1", log=tmp_path / "log")
    (tmp_path / "empty").touch()
    with pytest.raises(FormatError, match="nothing in it"):
        vera_tools.summarize(tmp_path / "log", tmp_path / "empty")
    with pytest.raises(UsageError, match="no such file"):
        vera_tools.summarize(tmp_path / "log", tmp_path / "none")


def test_what_an_older_version_wrote_is_written_anew(root, tmp_path):
    log = tmp_path / "log"
    whole = vera_tools.verify(root / "1", root / "3", log=log)
    older = [{key: value for key, value in line.items() if key != "run"} for line in lines_of(log)]
    log.write_text("".join(json.dumps(line) + "\n" for line in older))
    with pytest.raises(FormatError, match="does not say whether the run that wrote it ended"):
        vera_tools.summarize(log)
    again = vera_tools.verify(root / "1", root / "3", log=log)
    assert (again, again.from_log, len(lines_of(log))) == (whole, 2, 4)
    assert vera_tools.summarize(log) == whole


def test_lines_on_standard_output(root, tmp_path):
    stream = io.StringIO()
    vera_tools.verify(root, recursive=True, log=stream)
    (tmp_path / "log").write_text(stream.getvalue())
    assert ["path" in line for line in lines_of(tmp_path / "log")] == [True] * 4
    assert len(vera_tools.summarize(tmp_path / "log").checkpoints) == 4


def test_a_disk_that_takes_less_than_it_is_given(root, tmp_path, monkeypatch):
    """A write that is cut short goes on where it was cut."""

    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:100])

    monkeypatch.setattr(logs.io, "FileIO", Short)
    vera_tools.verify(root, recursive=True, log=tmp_path / "log")
    monkeypatch.undo()
    assert len(lines_of(tmp_path / "log")) == 4


def test_a_full_disk_is_the_logs(root, tmp_path, monkeypatch):
    """Nobody looks for it elsewhere, and what fits is taken up again."""
    log, room = tmp_path / "log", [1, 2000]

    class Full(io.FileIO):
        def write(self, data):
            if len(room) == 2:  # what a run notes at its beginning
                return super().write(data[: len(data) if len(data) < 1000 else room.pop()])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(logs.io, "FileIO", Full)
    result = run_cli("verify", "-R", root, "--jobs", "1", "--log", log)
    monkeypatch.undo()
    assert result.returncode == 1
    assert f"error: {log}: could not be written: No space left on device" in result.stderr
    assert vera_tools.verify(root, recursive=True, log=log) == vera_tools.summarize(log)


def test_a_run_that_ended_over_nothing_is_no_pass(tmp_path):
    (tmp_path / "empty").mkdir()
    log = tmp_path / "log.jsonl"
    with pytest.raises(FormatError, match=r"no adapter_config\.json"):
        vera_tools.verify(tmp_path / "empty", recursive=True, log=log)
    begun = json.loads(log.read_text())
    with log.open("a") as stream:
        stream.write(json.dumps({**begun, "run": {**begun["run"], "total": 0, "ended": True}}) + "\n")
    with pytest.raises(FormatError, match="no checkpoint was verified"):
        vera_tools.summarize(log)
    with pytest.raises(UsageError, match="no log given"):
        vera_tools.summarize()
