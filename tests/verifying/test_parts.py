"""A registry that several machines verify in parts, and their logs as one report."""

from __future__ import annotations

import json
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, files_of
from tests.command import run_cli
from tests.verifying.registries import mixed
from vera_tools.errors import FormatError, UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Good ones, and one of each other fate, in folders that lie in folders."""
    good = [*((f"good/{n}", KEPT) for n in range(5)), ("good", KEPT), ("good-too", KEPT)]
    adapters = [*good, ("drift", KEPT), ("seeds", SEED_ONLY), ("cut", KEPT)]
    return mixed(tmp_path_factory.mktemp("registry"), adapters, drift="drift", cut="cut", other="other")


@pytest.fixture(scope="module")
def logs(root, tmp_path_factory):
    """The logs of the three parts."""
    folder = tmp_path_factory.mktemp("logs")
    for n in (1, 2, 3):
        vera_tools.verify(root, recursive=True, part=(n, 3), log=folder / f"{n}.jsonl")
    return sorted(folder.iterdir())


def paths_of(log):
    """Of an empty part there is a line on the run alone."""
    return {line["path"] for line in map(json.loads, log.read_text().splitlines()) if "path" in line}


def test_the_parts_are_the_whole(root, logs):
    whole = vera_tools.verify(root, recursive=True)
    shares = [paths_of(log) for log in logs]
    assert sum(map(len, shares)) == len(set.union(*shares)) == 11
    assert max(map(len, shares)) < 11
    for options in ({}, {"require": "drift"}, {"require_loads": "peft>=0.21:float32:windows-x86_64"}):
        whole = vera_tools.verify(root, recursive=True, **options)
        found = vera_tools.summarize(*logs, **options)
        assert found == whole
        assert found.to_dict() == whole.to_dict()
        assert (found.exit_code, found.summary, found.to_junit()) == (whole.exit_code, whole.summary, whole.to_junit())
    assert vera_tools.summarize(*reversed(logs)) == vera_tools.summarize(*logs)


@pytest.mark.parametrize(
    "form", [[], ["-v"], ["--json"], ["--format", "junit"], ["--format", "github"], ["--failed-only"]]
)
def test_the_command_says_what_one_verify_says(root, logs, form, tmp_path):
    gate = ["--require", "unproven", "--require-loads", "peft>=0.21:bfloat16", "--junit"]
    one = run_cli("verify", "-R", root, *form, *gate, tmp_path / "one.xml")
    two = run_cli("summarize", *logs, *form, *gate, tmp_path / "two.xml")
    assert (two.returncode, two.stdout) == (one.returncode, one.stdout)
    assert two.returncode == 4
    assert (tmp_path / "one.xml").read_text() == (tmp_path / "two.xml").read_text()


def test_what_is_of_which_part_depends_on_the_path_below_the_root_alone(root, logs, tmp_path):
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    shutil.rmtree(moved / "seeds")
    for n, log in enumerate(logs, start=1):
        found = vera_tools.verify(moved, recursive=True, part=(n, 3))
        names = {outcome.path for outcome in (*found.checkpoints, *found.skipped)}
        below = {path.replace(str(moved), "") for path in names}
        assert below == {path.replace(str(root), "") for path in paths_of(log)} - {"/seeds"}


def test_a_store_is_shared_out_as_its_copy_on_disk_is(memory, tmp_path):
    names = [f"team/{n}" for n in range(8)]
    for name in names:
        shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "disk" / name)
        memory.put(name, CHECKPOINTS / SEED_ONLY)
    shares = []
    for n in (1, 2):
        here, there = (vera_tools.verify(at, recursive=True, part=(n, 2)) for at in (tmp_path / "disk", memory.address))
        shares.append([one.path.removeprefix(f"{tmp_path / 'disk'}/") for one in here.checkpoints])
        assert [one.path.removeprefix(f"{memory.address}/") for one in there.checkpoints] == shares[-1]
    assert sorted(shares[0] + shares[1]) == names
    assert all(shares)


def test_parts_of_a_list_and_of_an_owner(root, hub):
    paths = [root / "good" / f"{n}" for n in range(5)]
    shares = [[found.path for found in vera_tools.verify(*paths, part=(n, 2)).checkpoints] for n in (1, 2)]
    assert sorted(shares[0] + shares[1]) == [str(path) for path in paths]
    for n in range(4):
        hub.add_repo(f"ann/{n}", files_of(CHECKPOINTS / SEED_ONLY))
    shares = [[found.path for found in vera_tools.verify("hf://ann/*", part=(n, 2)).checkpoints] for n in (1, 2)]
    assert sorted(shares[0] + shares[1]) == [f"hf://ann/{n}" for n in range(4)]
    with pytest.raises(FormatError, match="no adapter"):
        vera_tools.verify("hf://nobody/*", part=(1, 2))
    empty = next(n for n in range(1, 99) if not vera_tools.verify(paths[0], part=(n, 99)).checkpoints)
    assert vera_tools.verify(paths[0], part=(empty, 99)).exit_code == 0


def test_what_is_no_part(root):
    for part in ((0, 2), (3, 2)):
        with pytest.raises(UsageError, match="no such part"):
            vera_tools.verify(root, recursive=True, part=part)
    for text in ("0/2", "3/2", "1", "1/", "a/b"):
        assert run_cli("verify", "-R", root, "--part", text).returncode == 2
        assert run_cli("merge", root, "--base", root, "-o", root / "out", "--part", text).returncode == 2


def test_the_later_line_holds(root, tmp_path):
    adapter = shutil.copytree(root / "good" / "1", tmp_path / "adapter")
    before, after = tmp_path / "before", tmp_path / "after"
    vera_tools.verify(adapter, log=before)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    vera_tools.verify(adapter, log=after)
    assert vera_tools.summarize(before, after).exit_code == 4
    assert vera_tools.summarize(after, before).exit_code == 0
    both = tmp_path / "both"
    both.write_bytes(before.read_bytes() + after.read_bytes())
    assert vera_tools.summarize(both).exit_code == 4
    failed = vera_tools.verify(adapter, listed=[tmp_path / "gone"], log=after)
    assert vera_tools.summarize(after).to_dict()["failed"] == failed.to_dict()["failed"]


def test_a_log_that_says_less_than_it_seems_is_refused(logs, tmp_path):
    log = tmp_path / "log"
    for content, words in (
        (logs[0].read_bytes()[:-1], "cut off"),
        (b"", "nothing in it"),
        (b"{}\n", "line 1"),
    ):
        log.write_bytes(content)
        with pytest.raises(FormatError, match=words):
            vera_tools.summarize(log)
    with pytest.raises(UsageError, match="no such file"):
        vera_tools.summarize(tmp_path / "none", logs[0])
    line = next(data for data in map(json.loads, logs[0].read_text().splitlines()) if data["checkpoint"])
    line["run"].update(part=None, total=1, written=1, ended=True)
    for member, words in (("trained", "table of loaders follows from"), ("run", "there may be more")):
        older = json.loads(json.dumps(line))
        del (older["checkpoint"] if member == "trained" else older)[member]
        log.write_text(json.dumps(older) + "\n")
        with pytest.raises(FormatError, match=f"{words}.*verify it again"):
            vera_tools.summarize(log)
