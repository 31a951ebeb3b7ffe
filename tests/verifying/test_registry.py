"""Verifying a registry: patterns and lists, side by side, logged as they are done, taken up again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, files_of
from tests.command import run_cli, run_json
from vera_tools import schema
from vera_tools.errors import FormatError, HubError, UsageError
from vera_tools.verifying.report import Skipped
from vera_tools.verifying.verifier import Verifier


@pytest.fixture
def registry(hub):
    """What an owner may have: adapters at the root and below it, other kinds, broken ones, and plain models."""
    hub.add_repo("ann/good", files_of(CHECKPOINTS / KEPT))
    hub.add_repo("ann/seeds", files_of(CHECKPOINTS / SEED_ONLY))
    hub.add_repo("ann/both", files_of(CHECKPOINTS / KEPT, "en/") | files_of(CHECKPOINTS / KEPT, "de/"))
    hub.add_repo("ann/lora", {"adapter_config.json": b'{"peft_type": "LORA", "r": 8}'})
    hub.add_repo("ann/broken", {"adapter_config.json": b"{"})
    hub.add_repo("ann/model", {"config.json": b"{}"})
    hub.add_repo("bob/other", files_of(CHECKPOINTS / KEPT))
    return hub


EXPECTED = {
    "hf://ann/both/de": "reproducible",
    "hf://ann/both/en": "reproducible",
    "hf://ann/broken": "invalid",
    "hf://ann/good": "reproducible",
    "hf://ann/seeds": "unproven",
}


def lines_of(text):
    """The lines on checkpoints. The last may be on the run alone, where nothing was left to say of it."""
    lines = [json.loads(line) for line in text.splitlines()]
    if "path" not in lines[-1]:
        schema.validate(lines.pop(), "verify-run.v1", where="line")
    for line in lines:
        schema.validate(line, "verify-line.v1", where="line")
    return lines


def test_an_owner(registry):
    registry.page_size = 2
    report = vera_tools.verify("hf://ann/*", jobs=3)
    assert {found.path: found.verdict for found in report.checkpoints} == EXPECTED
    assert [found.path for found in report.checkpoints] == sorted(EXPECTED)
    assert dict(report.skipped) == {"hf://ann/lora": "LORA", "hf://ann/model": "no adapter"}
    assert report.exit_code == 4
    schema.validate(report.to_dict(), "verify.v1", where="report")
    assert [found.path for found in vera_tools.verify("hf://ann/g*").checkpoints] == ["hf://ann/good"]
    for wrong in ("hf://*", "hf://*/good", "hf://ann/*/en", "hf://ann/*@main"):
        with pytest.raises(UsageError, match="a wildcard stands for repositories of one owner"):
            vera_tools.verify(wrong)


def test_a_pattern_without_an_adapter_does_not_pass(registry, tmp_path):
    for pattern in ("hf://nobody/*", "hf://ann/none*", "hf://ann/model*"):  # the last holds a model and no adapter
        with pytest.raises(FormatError, match="no adapter") as caught:
            vera_tools.verify(pattern)
        assert caught.value.where == pattern
    result = run_cli("verify", "hf://nobody/*")
    assert result.returncode == 4
    assert "hf://nobody/*: no adapter" in result.stderr
    # beside patterns that hold something, whose every result is in the log all the same, and on the next run too
    log = tmp_path / "log.jsonl"
    for _ in range(2):
        with pytest.raises(FormatError, match=r"hf://ann/mod\*, hf://nobody/\*: no adapter"):
            vera_tools.verify("hf://nobody/*", "hf://ann/mod*", "hf://ann/g*", log=log)
        assert {line["path"] for line in lines_of(log.read_text())} == {"hf://ann/model", "hf://ann/good"}
    # adapters of other kinds are counted as skipped, as in a search of folders
    assert vera_tools.verify("hf://ann/lora*").skipped == (("hf://ann/lora", "LORA"),)


def test_one_that_cannot_be_reached_does_not_stop_the_others(registry):
    registry.add_repo("ann/gated", files_of(CHECKPOINTS / KEPT), gated_for=set())
    report = vera_tools.verify("hf://ann/*")
    assert {found.path for found in report.checkpoints} == set(EXPECTED)
    ((path, error),) = report.failed
    assert path == "hf://ann/gated"
    assert "is gated" in str(error)
    code, document = run_json("verify", "hf://ann/good", "hf://ann/none", CHECKPOINTS / KEPT)
    assert code == 5
    assert [found["path"] for found in document["checkpoints"]] == ["hf://ann/good", str(CHECKPOINTS / KEPT)]
    assert document["failed"][0]["error"]["exit_code"] == 5
    (suite,) = (s for s in ElementTree.fromstring(report.to_junit()) if s.get("name") == "hf://ann/gated")
    assert (suite.get("errors"), suite.get("tests")) == ("1", "1")
    assert "is gated" in suite.find("testcase/error").get("message")
    with pytest.raises(HubError):
        vera_tools.verify("hf://ann/none")
    with registry.fault("GET /api/models", status=403), pytest.raises(HubError, match="no right"):
        vera_tools.verify("hf://ann/*")


def test_a_list_on_standard_input(registry):
    listed = f"hf://ann/good\n\n{CHECKPOINTS / KEPT}\nhf://bob/*\n"
    code, document = run_json("verify", "-", input=listed)
    assert code == 0
    found = [checkpoint["path"] for checkpoint in document["checkpoints"]]
    assert found == ["hf://ann/good", str(CHECKPOINTS / KEPT), "hf://bob/other"]
    result = run_cli("verify", "-", "--log", "-", input=listed)
    assert result.returncode == 0
    assert {line["path"] for line in lines_of(result.stdout)} == set(found)
    assert run_cli("verify", "-", input="").returncode == 2
    assert run_cli("verify", "-", "--log", "-", "--json", input=listed).returncode == 2


def test_the_log_is_written_as_it_goes_and_taken_up_again(registry, tmp_path):
    log = tmp_path / "log.jsonl"
    first = vera_tools.verify("hf://ann/*", log=log)
    lines = lines_of(log.read_text())
    assert len(lines) == 7
    assert {line["status"] for line in lines} == {"verified", "skipped"}
    moved = sum(request.sent for request in registry.requests if "/blob/" in request.path)
    again = vera_tools.verify("hf://ann/*", log=log)
    assert again == first  # every field of every report comes back
    assert (first.from_log, again.from_log) == (0, 7)
    assert again.to_dict() == {**first.to_dict(), "from_log": 7}
    assert sum(request.sent for request in registry.requests if "/blob/" in request.path) == moved
    assert len(lines_of(log.read_text())) == 7
    # a new commit is verified again, and a crash in the middle of a line loses that line only
    repo = registry.repos["ann/good"]
    registry.commit(repo, "refs/heads/main", repo.head.oid, repo.head.files, "again", "ann")
    log.write_text("".join(sorted(log.read_text().splitlines(keepends=True), key=lambda line: "ann/good" not in line)))
    log.write_bytes(log.read_bytes()[:-20])
    assert vera_tools.verify("hf://ann/*", log=log) == first
    lines = lines_of(log.read_text())
    assert len(lines) == 8
    assert [line["path"] for line in lines].count("hf://ann/good") == 2
    # what was checked against another base does not count
    vera_tools.verify("hf://ann/good", "hf://ann/seeds", base=base_of(KEPT), log=log)
    assert len(lines_of(log.read_text())) == 10
    log.write_text("{}\n")
    with pytest.raises(FormatError, match="line 1"):
        vera_tools.verify("hf://ann/*", log=log)


def test_what_failed_is_tried_again(registry, tmp_path):
    log = tmp_path / "log.jsonl"
    repo = registry.add_repo("ann/gated", files_of(CHECKPOINTS / KEPT), gated_for=set())
    assert len(vera_tools.verify("hf://ann/*", log=log).failed) == 1
    repo.gated_for = None
    assert vera_tools.verify("hf://ann/*", log=log).failed == ()
    assert [line["status"] for line in lines_of(log.read_text()) if line["path"] == "hf://ann/gated"] == [
        "failed",
        "verified",
    ]


def test_a_run_that_is_killed_has_logged_what_it_did(registry, tmp_path):
    log = tmp_path / "log.jsonl"
    with registry.fault("/api/models/ann/seeds", delay=60, times=1000):
        process = subprocess.Popen(
            [sys.executable, "-m", "vera_tools", "verify", "hf://ann/*", "--log", str(log), "--jobs", "2"],
            stdout=subprocess.DEVNULL,
        )
        while len(log.read_text().splitlines() if log.exists() else ()) < 6:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert "hf://ann/seeds" not in log.read_text()
    registry.requests.clear()
    vera_tools.verify("hf://ann/*", log=log)
    assert {r.path.split("/")[3] for r in registry.requests if "/blob/" in r.path} <= {"seeds"}


def test_no_more_than_jobs_at_a_time(registry, monkeypatch):
    for n in range(6):
        registry.add_repo(f"eve/{n}", files_of(CHECKPOINTS / SEED_ONLY))
    running, most, lock = [0], [0], threading.Lock()

    def verify(self, path, *, skip_others=False):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.05)
        with lock:
            running[0] -= 1
        return Skipped(path, "LORA")

    monkeypatch.setattr(Verifier, "verify", verify)
    report = vera_tools.verify("hf://eve/*", jobs=3)
    assert most[0] == 3
    assert report.skipped == tuple((f"hf://eve/{n}", "LORA") for n in range(6))
