"""A Hub that lies: in listings, commits, digests, headers and waits. Nothing outside of the cache is touched."""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, files_of
from tests.command import run_process
from tests.hub.server import without_xet
from tests.hub.state import git_sha1
from vera_tools.errors import HubError, VeraToolsError

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

TREE, INFO = r"GET /api/models/ann/x/tree/", r"GET /api/models/ann/x($|/revision)"


@pytest.fixture
def victim(tmp_path):
    """A file of the user's own, which no answer of a Hub may have read, copied, changed or removed."""
    path = tmp_path / "home" / "secret.json"
    path.parent.mkdir()
    path.write_text('{"secret": 1}')
    return path


def row(path, content=b"{}", **changes):
    return {"type": "file", "oid": git_sha1(content), "size": len(content), "path": path, **changes}


def with_row(added, rows):
    return [*rows, added]


def state_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pull(out, hub):
    """What a pull ends with, and how often the Hub was asked for a file's bytes."""
    before = hub.count("/resolve")
    try:
        vera_tools.pull("ann/x", out)
    except VeraToolsError as error:
        return error, hub.count("/resolve") - before
    return None, hub.count("/resolve") - before


@pytest.mark.parametrize("same", [True, False], ids=["its own digest", "another digest"])
@pytest.mark.parametrize("times", [1, 99], ids=["the first listing", "every listing"])
@pytest.mark.parametrize("kind", ["absolute", "upwards", "backslash", "NUL", "drive"])
def test_a_path_that_leaves_is_refused_before_anything_is_touched(hub, tmp_path, victim, kind, times, same):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    cache = tmp_path / "hf-home" / "hub" / "models--ann--x" / "snapshots" / ("0" * 40)
    up = "/".join([".."] * len(cache.parts))
    path = {
        "absolute": str(victim),
        "upwards": up + str(victim),
        "backslash": "..\\secret.json",
        "NUL": "se\0cret.json",
        "drive": "C:/secret.json",
    }[kind]
    lie = functools.partial(with_row, row(path, victim.read_bytes() if same else b"{}"))
    with hub.fault(TREE, rewrite=lie, times=times):
        error, fetched = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "a file's path" in str(error)
    assert fetched == 0
    assert state_of(victim.parent) == {"secret.json": b'{"secret": 1}'}
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_cache_that_leads_out_is_neither_copied_nor_removed(hub, tmp_path, victim, monkeypatch):
    from huggingface_hub import snapshot_download

    without_xet(monkeypatch)
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT) | {"notes.txt": victim.read_bytes(), "LICENSE": b"other"})
    for name in ("notes.txt", "LICENSE"):  # as the Hub lists it, and otherwise
        cached = Path(snapshot_download("ann/x")) / name
        whole = cached.readlink()
        cached.unlink()
        cached.symlink_to(victim)
        error, _ = pull(tmp_path / "out", hub)
        assert isinstance(error, HubError)
        assert "does not lie in the client's cache" in str(error)
        assert victim.read_bytes() == b'{"secret": 1}'
        assert not (tmp_path / "out").exists()
        cached.unlink()
        cached.symlink_to(whole)
    assert pull(tmp_path / "out", hub)[0] is None


def test_a_link_that_is_turned_while_it_is_copied_removes_nothing(hub, tmp_path, victim, monkeypatch):
    from vera_tools.hub import pull as pulling

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    copy = pulling.shutil.copyfile

    def turn(cached, target):
        copy(victim, target)
        cached.unlink()
        cached.symlink_to(victim)

    monkeypatch.setattr(pulling.shutil, "copyfile", turn)
    error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "not the ones on the Hub" in str(error)
    assert victim.read_bytes() == b'{"secret": 1}'


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag", "X-Repo-Commit"])
def test_a_header_does_not_choose_where_the_client_writes(hub, tmp_path, header, monkeypatch):
    """The client names blobs and snapshots after them."""
    from tests.hub import server

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    honest = server.answer_call

    def lying(call, routes, path):
        answer = honest(call, routes, path)
        if "/resolve" in path:
            answer.headers[header] = '"../../../../../escaped"'
        return answer

    monkeypatch.setattr(server, "answer_call", lying)
    error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "names what is not a digest" in str(error)
    assert list(tmp_path.rglob("*escaped*")) == []


@pytest.mark.parametrize("skip", [0, 1], ids=["asked by us", "asked by the client"])
@pytest.mark.parametrize("sha", [None, 7, ["a"], "", "../../../../escaped", "/escaped", "0" * 39, "0" * 40 + "\n"])
def test_a_commit_that_is_none(hub, tmp_path, sha, skip):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault(INFO, rewrite=lambda said: {**said, "sha": sha}, skip=skip, times=99):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError), error
    assert list(tmp_path.rglob("*escaped*")) == []
    assert not (tmp_path / "out").exists()


LISTINGS = {
    "a row without a path": lambda rows: [{k: v for k, v in row.items() if k != "path"} for row in rows],
    "a row without a size": lambda rows: [{k: v for k, v in row.items() if k != "size"} for row in rows],
    "a size of text": lambda rows: [{**row, "size": "8"} for row in rows],
    "a size below zero": lambda rows: [{**row, "size": -1} for row in rows],
    "a path of numbers": lambda rows: [{**row, "path": [1]} for row in rows],
    "no digest": lambda rows: [{**row, "oid": None} for row in rows],
    "a sha256 that leads out": lambda rows: [
        {**row, "lfs": {"oid": "../../x", "size": 1, "pointerSize": 1}} for row in rows
    ],
    "lfs of text": lambda rows: [{**row, "lfs": "x"} for row in rows],
    "an object": lambda rows: {"files": rows},
    "null": lambda rows: None,
    "text": lambda rows: "files",
    "a number": lambda rows: 1,
    "rows of text": lambda rows: ["a", "b"],
    "rows of null": lambda rows: [None],
}


@pytest.mark.parametrize("skip", [0, 1], ids=["asked by us", "asked by the client"])
@pytest.mark.parametrize("lie", LISTINGS)
def test_a_listing_that_is_none(hub, tmp_path, lie, skip):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault(TREE, rewrite=LISTINGS[lie], skip=skip, times=99):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError), error
    assert not (tmp_path / "out").exists()
    assert vera_tools.pull("ann/x", tmp_path / "out").verification.ok  # and nothing of the lie is remembered


def test_a_file_of_another_folder_does_not_pass_for_one_of_this(hub, tmp_path):
    content = (CHECKPOINTS / KEPT / "adapter_config.json").read_bytes()
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault(TREE, rewrite=functools.partial(with_row, row("old/adapter_config.json", content))):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "another folder" in str(error)


@pytest.mark.parametrize("command", ["verify", "inspect", "pull", "push"])
def test_every_command_ends_with_5(hub, tmp_path, command):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    from huggingface_hub import constants

    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True, exist_ok=True)
    Path(constants.HF_TOKEN_PATH).write_text(hub.add_user("ann"))
    arguments = {
        "pull": ("pull", "ann/x", "-o", tmp_path / "out"),
        "push": ("push", CHECKPOINTS / KEPT, "ann/x"),
    }.get(command, (command, "hf://ann/x"))
    with hub.fault(TREE, rewrite=lambda rows: [{"type": "file"} for _ in rows], times=99):
        result = run_process(*arguments)
    assert result.returncode == 5, result.stderr
    assert "Traceback" not in result.stderr
    assert "internal error" not in result.stderr


@pytest.mark.parametrize("name", ["ann/../../x", "ann/x/y", "ann/x\n", "ann/", "ann/x y"])
def test_an_owners_list_of_what_are_no_repositories(hub, name):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with (
        hub.fault("GET /api/models[?]", rewrite=lambda said: [{**said[0], "id": name}]),
        pytest.raises(HubError, match="lists what is no repository"),
    ):
        vera_tools.verify("hf://ann/*")


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "86400"},
        {"Retry-After": "9" * 400},
        {"RateLimit": '"api";r=0;t=86400'},
        {"RateLimit": f'"api";r=0;t={"9" * 5000}'},
    ],
    ids=["a day", "400 digits", "a rate limit of a day", "5,000 digits"],
)
@pytest.mark.parametrize("request_", [INFO, TREE, "GET /blob/|GET /ann/x/resolve|GET /api/resolve-cache"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_long_wait_is_not_waited(hub, tmp_path, headers, request_, status):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    started = time.monotonic()
    with hub.fault(request_, status=status, headers=headers, times=99):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "tells us to wait" in str(error)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ["²", "-1", "1e9", "Wed, 21 Oct 2037 07:28:00 GMT", ""])
def test_a_wait_that_is_no_number(hub, tmp_path, text, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault(INFO, status=429, headers={"Retry-After": text.encode("utf-8").decode("latin-1")}, times=99):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)


def test_a_range_that_is_shorter_than_asked_for(hub, monkeypatch):
    from vera_tools.files.hub import HubFile

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    get = HubFile._get

    def short(self, headers):
        answer = get(self, headers)
        if "Range" not in headers:
            return answer
        return SimpleNamespace(content=answer.content[:-1], status_code=answer.status_code)

    monkeypatch.setattr(HubFile, "_get", short)
    with pytest.raises(HubError, match="sent another range than asked for"):
        vera_tools.verify("hf://ann/x")


def test_the_bytes_are_compared_whatever_the_listings_say(hub, tmp_path, victim):
    """Two listings that contradict each other: what was named first is what must arrive."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    other = hashlib.sha256(victim.read_bytes()).hexdigest()
    lie = lambda rows: [{**r, "lfs": {**r["lfs"], "oid": other}} if r.get("lfs") else r for r in rows]  # noqa: E731
    with hub.fault(TREE, rewrite=lie):
        error, _ = pull(tmp_path / "out", hub)
    assert isinstance(error, HubError)
    assert "not the ones on the Hub" in str(error)
    assert not (tmp_path / "out").exists()
