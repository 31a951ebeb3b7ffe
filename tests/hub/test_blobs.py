"""Large files over HTTP: what an earlier process had of one is gone on with, and nothing else is taken for it."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import vera_tools
from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, files_of
from tests.command import run_process
from tests.hub.server import without_xet
from vera_tools.errors import HubError


@pytest.fixture(autouse=True)
def over_lfs(monkeypatch):
    from huggingface_hub import constants

    without_xet(monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # of 10 MiB


def ranges(hub):
    return [request.headers.get("Range") for request in hub.requests if "/blob/" in request.path]


def partials(repo):
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
    return list(blobs.glob("*.vera-tools.incomplete"))


def partial_of(repo):
    (path,) = partials(repo)
    return path


def test_a_later_process_goes_on_where_an_earlier_one_was_cut_off(hub, tmp_path):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    broken, refused = hub.fault("GET /blob/", truncate=6_000), hub.fault("GET /blob/", status=403, times=99)
    with broken, refused, pytest.raises(HubError):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert partial_of("ann/x").stat().st_size == 6_000
    assert not (tmp_path / "out").exists()
    hub.requests.clear()
    assert run_process("pull", "ann/x", "-o", tmp_path / "out").returncode == 0
    assert ranges(hub) == ["bytes=6000-"]
    content = {name: data for name, data in files_of(tmp_path / "out").items() if name != "vera_provenance.json"}
    assert content == files_of(CHECKPOINTS / KEPT)


def test_the_token_goes_to_the_hub_alone_and_every_request_says_who_asks(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann", role="read"))
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT), private=True)
    hub.add_repo("ann/gated", files_of(CHECKPOINTS / KEPT), gated_for={"ann"})
    for repo in ("ann/x", "ann/gated"):
        vera_tools.pull(repo, tmp_path / repo)
        vera_tools.verify(f"hf://{repo}")
    asked = [request for request in hub.requests if "/ann/" in request.path]
    assert {"Authorization" in request.headers for request in asked if "/blob/" in request.path} == {False}
    assert {"Authorization" in request.headers for request in asked if "/blob/" not in request.path} == {True}
    assert all(f"vera-tools/{vera_tools.__version__};" in request.headers["User-Agent"] for request in asked)


@pytest.mark.parametrize("damage", ["flipped", "too long", "whole and flipped"])
def test_a_damaged_beginning_is_fetched_again(hub, tmp_path, damage):
    files = files_of(CHECKPOINTS / KEPT)
    repo = hub.add_repo("ann/x", files)
    with hub.fault("GET /blob/", status=403, times=99), pytest.raises(HubError):
        vera_tools.pull("ann/x", tmp_path / "out")
    whole = bytearray(files["adapter_model.safetensors"])
    whole[500] ^= 1
    partial_of("ann/x").write_bytes(
        {"flipped": whole[:6000], "too long": whole * 2, "whole and flipped": whole}[damage]
    )
    hub.requests.clear()
    assert vera_tools.pull("ann/x", tmp_path / "out").commit == repo.head.oid
    assert ranges(hub) == {"flipped": ["bytes=6000-", None], "too long": [None], "whole and flipped": [None]}[damage]
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]


@pytest.mark.parametrize("place", [0, 5_999, 6_000, 10_000])
def test_a_byte_that_is_flipped_before_or_after_the_cut_is_caught(hub, tmp_path, place):
    files = files_of(CHECKPOINTS / KEPT)
    hub.add_repo("ann/x", files)
    with (
        hub.fault("GET /blob/", truncate=6_000, corrupt=place),
        hub.fault("GET /blob/", status=403),
        pytest.raises(HubError, match="no right"),
    ):
        vera_tools.pull("ann/x", tmp_path / "out")
    with hub.fault("GET /blob/", corrupt=place, times=99), pytest.raises(HubError, match="not the ones on the Hub"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    vera_tools.pull("ann/x", tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == files["adapter_model.safetensors"]


SMALL_CHUNKS = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000
from vera_tools.cli import main
main(sys.argv[1:])
"""


def test_processes_that_are_killed_one_after_the_other(hub, tmp_path):
    """The connection breaks after every 20 kB, and the client waits a second before it goes on: there SIGKILL falls."""
    content = random.Random(0).randbytes(100_000)
    files = files_of(CHECKPOINTS / KEPT) | {"a.safetensors": content, "empty.safetensors": b""}
    hub.add_repo("ann/x", files)
    arguments = ["pull", "ann/x", "--include", "*.safetensors", "-o", str(tmp_path / "out")]
    expected = []
    for wanted in (20_000, 40_000, 60_000):
        with hub.fault("GET /blob/", truncate=20_000, times=99):
            process = subprocess.Popen(
                [sys.executable, "-c", SMALL_CHUNKS, *arguments], cwd=ROOT, stderr=subprocess.PIPE
            )
            while process.poll() is None and sum(path.stat().st_size for path in partials("ann/x")) < wanted:
                time.sleep(0.02)
            process.kill()
        assert b"Traceback" not in process.communicate()[1]
        assert process.returncode == -signal.SIGKILL
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "hub-storage"]
        expected.append(f"bytes={partial_of('ann/x').stat().st_size}-")
    assert run_process(*arguments).returncode == 0
    assert {**files, "vera_provenance.json": b""} == {**files_of(tmp_path / "out"), "vera_provenance.json": b""}
    large = [request for request in hub.requests if hashlib.sha256(content).hexdigest() in request.path]
    assert large[-1].headers.get("Range") == expected[-1]
    assert set(expected) <= {request.headers.get("Range") for request in large}
    assert sum(request.sent for request in large) < len(content) + 3 * 20_000
    assert partials("ann/x") == []


def test_a_file_that_another_process_fetches_is_left_to_the_client(hub, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault("GET /blob/", status=403, times=99), pytest.raises(HubError):
        vera_tools.pull("ann/x", tmp_path / "out")
    with partial_of("ann/x").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        vera_tools.pull("ann/x", tmp_path / "out")
        assert partial_of("ann/x").stat().st_size == 0
