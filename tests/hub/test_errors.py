"""What goes wrong with the Hub: one clear line with what to do, exit code 5, nothing half-written, no token shown."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, base_of, files_of
from tests.command import run_cli, run_process
from tests.hub.server import without_xet
from vera_tools import schema
from vera_tools.errors import HubError, VeraToolsError
from vera_tools.files import hub_client as hub_module

# The client passes raw bytes as `data`, which its HTTP library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def leftovers(folder):
    """What a failed pull left beside its output: nothing, not even hidden."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("hf-home", "hub-storage"))


@pytest.fixture
def quick(monkeypatch):
    """Retries without the waits between them."""
    without = type("time", (), {"sleep": staticmethod(lambda seconds: None)})
    for module in ("vera_tools.files.hub_client", "huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", without)


def failure(arguments, *, env=None):
    """Run a command that must fail because of the Hub: its one line of error, checked for form and secrets."""
    result = run_process(*arguments, env=env)
    assert result.returncode == 5, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert result.stderr.splitlines()[-1] == lines[0]
    assert "Traceback" not in result.stderr
    assert "hf_" not in result.stderr
    assert "X-Signature" not in result.stderr
    return lines[0]


# -- tokens and access, on both ways, by the command line


def test_access(hub, tmp_path, monkeypatch):
    hub.add_repo("ann/private", files_of(CHECKPOINTS / KEPT), private=True)
    hub.add_repo("ann/gated", files_of(CHECKPOINTS / KEPT), gated_for=set())
    hub.add_repo("ann/open", files_of(CHECKPOINTS / KEPT))
    bob, reader = {"HF_TOKEN": hub.add_user("bob")}, {"HF_TOKEN": hub.add_user("ann", role="read")}
    wrong = {"HF_TOKEN": "hf_" + "w" * 34}
    out = tmp_path / "out"
    folder = CHECKPOINTS / KEPT
    cases = [
        (("pull", "ann/none", "-o", out), {}, "hf://ann/none: no such repository, or it is private; ", "hf auth login"),
        (("pull", "ann/private", "-o", out), {}, "no such repository, or it is private", "HF_TOKEN"),
        (("pull", "ann/private", "-o", out), bob, "no such repository, or this token may not see it", "whose token"),
        (("pull", "ann/gated", "-o", out), {}, "is gated, and access was not granted", "ask for access"),
        (("pull", "ann/gated", "-o", out), bob, "is gated, and access was not granted to this token", "ask for access"),
        (("pull", "ann/open", "-o", out), wrong, "the Hub does not accept the token", "hf auth login"),
        (("verify", "hf://ann/private"), {}, "no such repository, or it is private", "hf auth login"),
        (("verify", "hf://ann/gated"), bob, "is gated", "ask for access"),
        (("pull", "ann/open@none", "-o", out), {}, "hf://ann/open@none: no such revision", "a branch, a tag"),
        (("pull", "ann/open/sub", "-o", out), {}, "no such file or folder", "check the path"),
        (("push", folder, "ann/open"), {}, "authentication required", "hf auth login"),
        (("push", folder, "ann/new"), {}, "authentication required", "hf auth login"),
        (("push", folder, "ann/open"), wrong, "the Hub does not accept the token", "hf auth login"),
        (("push", folder, "ann/open"), bob, "no right to do this", "--create-pr"),
        (("push", folder, "ann/open"), reader, 'no right to do this: "you must use a write token', "write access"),
        (("push", folder, "bob/new"), reader, "no right to do this", "write access"),
        (("push", folder, "ann/none", "--no-create"), bob, "no such repository, or this token", "check the name"),
    ]
    functions = {"pull": vera_tools.pull, "push": vera_tools.push, "verify": vera_tools.verify}
    for number, ((command, *arguments), env, what, hint) in enumerate(cases):
        monkeypatch.setenv("HF_TOKEN", env.get("HF_TOKEN", ""))
        options = {"create": False} if "--no-create" in arguments else {}
        with pytest.raises(HubError) as caught:
            functions[command](*(a for a in arguments if str(a) not in ("-o", "--no-create")), **options)
        lines = [str(caught.value)]
        if number % 5 == 0:
            lines.append(failure((command, *arguments), env=env))
        for line in lines:
            assert what in line
            assert hint in line
            assert "hf_" not in line
    assert leftovers(tmp_path) == []
    assert set(hub.repos) == {"ann/private", "ann/gated", "ann/open"}


def test_a_refusal_to_read_is_not_answered_with_advice_on_writing(hub, tmp_path, quick):
    """As a fine-grained token meets it that lacks the permission to read gated repositories."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    for where in ("GET /api/models/ann/x$", "GET /blob/", "HEAD /ann/x/resolve"):
        with hub.fault(where, status=403, times=99), pytest.raises(HubError) as caught:
            vera_tools.pull("ann/x", tmp_path / "out")
        assert "no right to do this" in str(caught.value)
        assert "use a token that may read this repository" in caught.value.hint


def test_a_json_error(hub, tmp_path):
    result = run_process("pull", "ann/none", "-o", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    schema.validate(document, "error.v1", where="error")
    assert (document["error"]["exit_code"], document["error"]["type"]) == (5, "HubError")
    assert document["error"]["hint"]


def test_a_malformed_token_is_not_shown(hub, tmp_path, monkeypatch):
    """An HTTP library quotes an illegal header in its message: the token with it."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    for token in ("hf_zebra\twith\x7fcontrol", "zebra\nquagga", os.fsdecode("zebra-qüagga".encode())):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError) as caught:
            vera_tools.pull("ann/x", tmp_path / "out")
        shown = str(caught.value) + "".join(traceback.format_exception(caught.value))
        assert "zebra" not in shown
        assert "agga" not in shown
    result = run_process("pull", "ann/x", "-o", tmp_path / "out", env={"VERA_TOOLS_DEBUG": "1"})
    assert "Traceback" in result.stderr
    assert "zebra" not in result.stderr


def test_a_token_that_is_kept_in_a_file_is_not_shown(hub, tmp_path):
    """Tokens of private Hubs do not begin with hf_; this one's server quotes it."""
    from huggingface_hub import constants

    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text("zebra-quagga\n")
    quote = {"X-Error-Message": "zebra-quagga has expired"}
    for debug in ("0", "1"):
        with hub.fault("GET /api/models/ann/x$", status=401, headers=quote):
            result = run_process("pull", "ann/x", "-v", "-o", tmp_path / "out", env={"VERA_TOOLS_DEBUG": debug})
        assert "quagga" not in result.stderr
        assert '"<token> has expired"' in result.stderr


def test_a_listing_cannot_name_a_file_outside_of_the_cache(hub, tmp_path, monkeypatch):
    without_xet(monkeypatch)
    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    name = "adapter_model.safetensors"
    repo.head.files[name] = dataclasses.replace(repo.head.files[name], sha256="../../../../escaped")
    with pytest.raises(HubError, match="not a sha256"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert list(tmp_path.rglob("*escaped*")) == []


# -- servers and networks, in this process


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ({"status": 429, "headers": {"Retry-After": "0"}}, "too many requests, even after waiting.*wait 0 seconds"),
        ({"status": 500}, "the Hub failed with status 500.*try again later"),
        ({"status": 503}, "the Hub failed with status 503"),
        ({"status": 504}, "the Hub failed with status 504"),
        ({"status": 403}, "no right to do this"),
        ({"status": 409}, "conflicts with what is there"),
        ({"status": 418}, "refused with status 418"),
        ({"drop": True}, "the connection broke off.*check the network"),
        ({"truncate": 5}, "the connection broke off"),
    ],
    ids=lambda value: str(value).replace("'", "") if isinstance(value, dict) else "",
)
@pytest.mark.parametrize(
    "where", ["GET /api/models/ann/x$", "GET /api/models/ann/x/tree", "HEAD /ann/x/resolve", "GET /blob/"]
)
def test_a_failing_hub(hub, tmp_path, quick, where, fault, match):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    if where.startswith("HEAD") and "truncate" in fault:
        pytest.skip("an answer without a body")
    with hub.fault(where, times=1000, **fault), pytest.raises(HubError, match=match) as caught:
        vera_tools.pull("ann/x", tmp_path / "out")
    assert caught.value.hint
    assert "X-Signature" not in str(caught.value)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "where", ["POST /api/models/ann/x/preupload", "POST /api/models/ann/x/commit", "POST /ann/x.git"]
)
@pytest.mark.parametrize(
    ("fault", "match"),
    [({"status": 503}, "status 503"), ({"drop": True}, "broke off"), ({"status": 413}, "status 413")],
)
def test_a_failing_hub_on_the_way_up(hub, monkeypatch, quick, where, fault, match):
    without_xet(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    repo = hub.add_repo("ann/x")
    with hub.fault(where, times=1000, **fault), pytest.raises(HubError, match=match):
        vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert len(repo.commits) == 1


def test_a_rate_limit_is_waited_out_as_told(hub, tmp_path, caplog, monkeypatch):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    waited = []
    monkeypatch.setattr(hub_module.time, "sleep", waited.append)
    limit = {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    with hub.fault("GET /api/models/ann/x$", status=429, headers=limit, times=2), caplog.at_level(logging.WARNING):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert waited.count(8.0) == 2
    assert "rate limited by the Hub: trying again in 8 s (1 of 4)" in caplog.text


def test_rate_limits_are_told_on_stderr(hub, tmp_path):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault("GET /api/models/ann/x$", status=429, headers={"Retry-After": "0"}):
        result = run_process("pull", "ann/x", "-o", tmp_path / "a")
    assert result.returncode == 0
    assert result.stderr == "rate limited by the Hub: trying again in 1 s (1 of 4)\n"
    with hub.fault("GET /api/models/ann/x$", status=429, headers={"Retry-After": "0"}):
        assert run_process("pull", "ann/x", "-q", "-o", tmp_path / "b").stderr == ""


@pytest.mark.long
@pytest.mark.parametrize("command", ["merge", "inspect"])
def test_a_quiet_command_says_nothing_of_a_wait(hub, tmp_path, command):
    """Neither of one that we make ourselves, nor of the client's own."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    more = ("--base", base_of(KEPT), "-o", tmp_path / "out") if command == "merge" else ()
    limit = {"status": 429, "headers": {"Retry-After": "0"}}
    for option in ("-q", "--json"):
        with hub.fault("GET /api/models/ann/x$", **limit) as ours, hub.fault("GET /blob/", **limit) as theirs:
            result = run_process(command, "hf://ann/x", *more, option)
        assert (result.returncode, ours.times, theirs.times) == (0, 0, 0)
        if option == "-q":
            assert (result.stdout, result.stderr) == ("", "")
        else:
            assert "rate limited by the Hub" in result.stderr
            assert "Rate limited" in result.stderr
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_hub_that_does_not_answer(hub, tmp_path, quick, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault("GET /blob/", delay=0.6, times=1000), pytest.raises(HubError, match="did not answer in time"):
        vera_tools.pull("ann/x", tmp_path / "out")


def test_no_network(hub, tmp_path, quick, monkeypatch):
    from huggingface_hub import constants, hf_api

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    for call in (
        lambda: vera_tools.pull("ann/x", tmp_path / "out"),
        lambda: vera_tools.push(CHECKPOINTS / KEPT, "ann/x"),
        lambda: vera_tools.verify("hf://ann/x"),
    ):
        with pytest.raises(HubError, match=r"cannot be reached.*check the network, the proxy and HF_ENDPOINT"):
            call()
    assert leftovers(tmp_path) == []


def test_offline(hub, tmp_path):
    line = failure(("push", CHECKPOINTS / KEPT, "ann/x"), env={"HF_HUB_OFFLINE": "1"})
    assert line.endswith("offline mode is on; unset HF_HUB_OFFLINE")  # no cache helps a push
    line = failure(("pull", "ann/x", "-o", tmp_path / "out"), env={"HF_HUB_OFFLINE": "1"})
    assert "the local cache does not have it" in line


@pytest.mark.parametrize("xet", [True, False], ids=["xet", "http"])
def test_a_full_disk(hub, tmp_path, xet, monkeypatch):
    """No file may grow beyond 8 kB in that process, so that writing the weights fails in the middle."""
    resource = pytest.importorskip("resource")
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    if not xet:
        without_xet(monkeypatch)
    run_cli("push", CHECKPOINTS / KEPT, "ann/x")
    (name,) = (name for name in hub.repos["ann/x"].head.files if name == "adapter_model.safetensors")
    size = hub.repos["ann/x"].head.files[name].size
    result = subprocess.run(
        [sys.executable, "-m", "vera_tools", "pull", "ann/x", "-o", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size - 2000, size - 2000)),
        check=False,
    )
    assert result.returncode == 5, result.stderr
    if not xet:
        assert "the disk is full; make room, or move the cache with HF_HOME" in result.stderr
    assert "Traceback" not in result.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("full", "words"), [("HF_HOME", "move the cache with HF_HOME"), ("OUT", "name another output")]
)
@pytest.mark.parametrize("xet", [True, False], ids=["xet", "http"])
def test_a_disk_that_is_really_full_under_a_pull(hub, tmp_path, small_disk, monkeypatch, xet, full, words):
    """Full for the weights themselves, and for the very last of the files."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    if not xet:
        without_xet(monkeypatch)
    folder = shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "adapter")
    (folder / "big.txt").write_bytes(bytes(200_000))
    assert run_cli("push", folder, "ann/x").returncode == 0
    for room in (12 << 10, 200 << 10, 240 << 10 if full == "OUT" else 220 << 10):
        with small_disk(room) as disk:
            out = disk / "out" if full == "OUT" else tmp_path / "out"
            home = {"HF_HOME": str(disk), "HF_XET_CACHE": str(disk / "xet")} if full == "HF_HOME" else {}
            line = failure(("pull", "ann/x", "-o", out), env=home)
            assert f"the disk is full; make room{'' if home else ' there'}, or {words}" in line
            assert home or list(disk.iterdir()) == []
    assert leftovers(tmp_path) == ["adapter", "disk"]


def test_a_cache_that_is_full_for_weights_from_xet(hub, tmp_path, small_disk, monkeypatch):
    """hf_xet says so in its own way."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    weights = bytes(10) + os.urandom(2_000_000)
    folder = shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "adapter")
    (folder / "other.safetensors").write_bytes(weights)
    vera_tools.push(folder, "ann/x", include=["*.safetensors"])
    assert hub.repos["ann/x"].head.files["other.safetensors"].xet_hash
    with small_disk(1_500_000) as disk:
        env = {"HF_HOME": str(disk), "HF_XET_CACHE": str(tmp_path / "xet")}
        line = failure(("pull", "ann/x", "-o", tmp_path / "out", "--include", "*.safetensors"), env=env)
    assert "the disk is full; make room, or move the cache with HF_HOME" in line


@pytest.mark.long
def test_a_disk_that_is_really_full_under_a_push(hub, tmp_path, small_disk, monkeypatch):
    """Full for the copy itself, and for the manifest and the card that are added to it."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    for room in (8 << 10, 40 << 10, 44 << 10):
        with small_disk(room) as disk:
            line = failure(("push", CHECKPOINTS / KEPT, "ann/x"), env={"TMPDIR": str(disk)})
            assert line.startswith(
                f"error: {disk}: the disk is full; make room there, or name another folder with TMPD"
            )
            assert list(disk.iterdir()) == []
    assert hub.repos == {}
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(HubError, match="no folder for temporary files can be written to; make room, or name one"):
        vera_tools.push(CHECKPOINTS / KEPT, "ann/x")


def test_a_full_disk_in_words():
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(HubError, match="the disk is full; make room"), hub_module.errors("x"):
            raise OSError(number, os.strerror(number))
    with pytest.raises(HubError, match="could not be stored: Permission denied"), hub_module.errors("x"):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/cache")


def test_xet_that_fails(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    with hub.fault("xet-read-token", status=403, times=1000), pytest.raises(HubError, match="no right to do this"):
        vera_tools.pull("ann/x", tmp_path / "out")
    shutil.rmtree(hub.cas)
    monkeypatch.setattr(hub_module, "FEW_ATTEMPTS", 1)
    with pytest.raises(HubError, match=r"Xet.*HF_HUB_DISABLE_XET=1"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_the_client_hides_failures_behind_cache_misses(quick):
    """LocalEntryNotFoundError and RuntimeError are looked through; what is found decides."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for wrapped in (LocalEntryNotFoundError("not found"), RuntimeError("Error while uploading 'x' to the Hub.")):
        with pytest.raises(HubError, match="offline mode is on"), hub_module.errors("x"):
            raise wrapped from OfflineModeIsEnabled("offline")
    with pytest.raises(HubError, match="not in the local cache"), hub_module.errors("x"):
        raise LocalEntryNotFoundError("not found")
    with pytest.raises(HubError, match=r"through Xet failed: no; .*HF_HUB_DISABLE_XET=1"), hub_module.errors("x"):
        raise ConnectionError("no")


def test_secrets_are_taken_out_of_errors_and_logs(monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "tok en")
    secrets = "Bearer hf_abcdefgh12345678 tok en https://cdn.example.org/blob?X-Signature=secret&Expires=1"
    with hub_module.errors("x"):
        logging.getLogger("huggingface_hub").warning("asked %s", secrets)
    with pytest.raises(HubError) as caught, hub_module.errors("x"):
        raise ValueError(secrets)
    shown = str(caught.value) + caplog.text
    assert not any(word in shown for word in ("abcdefgh", "tok en", "secret", "Expires"))
    assert "https://cdn.example.org/blob" in shown
    assert caught.value.__cause__ is None  # its own text would show with VERA_TOOLS_DEBUG=1
    with pytest.raises(VeraToolsError), hub_module.errors("x"):
        raise vera_tools.errors.UsageError("ours stay as they are")
