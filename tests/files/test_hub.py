"""Reading from the Hub by ranges, through the official client, from a real server."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, base_of, files_of
from tests.command import run_json
from tests.hub.state import git_sha1
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import FormatError, HubError, UsageError
from vera_tools.files import hub as hub_source
from vera_tools.files import hub_client as hub_module
from vera_tools.files import local, ranges
from vera_tools.files.hub_reference import Reference


def data_requests(hub):
    """The requests that moved a file's bytes."""
    return [r for r in hub.requests if r.method == "GET" and ("/blob/" in r.path or "/resolve-cache/" in r.path)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://ann/x", Reference("ann/x")),
        ("ann/x", Reference("ann/x")),
        ("hf://models/ann/x", Reference("ann/x")),
        ("hf://ann/x/", Reference("ann/x")),
        ("hf://ann/x@v1.0", Reference("ann/x", "v1.0")),
        ("hf://ann/x@v1.0/a/b", Reference("ann/x", "v1.0", "a/b")),
        ("hf://ann/x@refs/pr/3/a", Reference("ann/x", "refs/pr/3", "a")),
        ("hf://ann/x@topic%2Fone/a", Reference("ann/x", "topic/one", "a")),
    ],
)
def test_references(text, expected):
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text", ["hf://", "hf://ann", "hf://ann/x@", "hf://ann/x/../y", "hf://a b/c", "hf://ann/x/a//y", "/etc/passwd", ""]
)
def test_wrong_references(text):
    with pytest.raises(UsageError, match="owner/name"):
        Reference.parse(text)


def test_git_sha1_is_gits_own_name():
    assert hub_module.git_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert git_sha1(b"hello\n") == hub_module.git_sha1(b"hello\n")


def test_a_checkpoint_reads_the_same_from_the_hub(hub):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with Checkpoint.open("hf://ann/x") as remote, Checkpoint.open(CHECKPOINTS / KEPT) as local:
        assert remote.config == local.config
        assert remote.weights.header == local.weights.header
        for name in local.weights.tensors:
            assert remote.weights.sha256(name) == local.weights.sha256(name)
        assert remote.weights.file_sha256() == local.weights.file_sha256()


def test_subfolder_and_revision(hub):
    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "adapters/en/"))
    old = repo.head.oid
    hub.commit(repo, "refs/heads/main", old, {}, "remove all", "ann")
    with pytest.raises(HubError, match="no such file or folder"):
        hub_source.folder("hf://ann/x/adapters/en").names()
    repo.refs["refs/tags/v1"] = old
    for revision in ("v1", old, old[:40]):
        with Checkpoint.open(f"hf://ann/x@{revision}/adapters/en") as checkpoint:
            assert checkpoint.folder.names() == sorted(path.name for path in (CHECKPOINTS / KEPT).iterdir())


def test_the_revision_is_pinned_when_the_folder_is_opened(hub):
    repo = hub.add_repo("ann/x", {"config.json": b'{"a": 1}'})
    folder = hub_source.folder("hf://ann/x")
    hub.commit(repo, "refs/heads/main", repo.head.oid, {"config.json": hub.store(b"{}", large=False)}, "later", "ann")
    assert local.read_text(folder, "config.json") == '{"a": 1}'


def test_private_files_are_read_with_the_token_and_the_storage_never_sees_it(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann", role="read"))
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT), private=True)
    with Checkpoint.open("hf://ann/x") as checkpoint:
        checkpoint.weights.file_sha256()
    assert {r.user for r in hub.requests if r.path.startswith("/api/models/ann/x")} == {"ann"}
    assert all("Authorization" not in r.headers for r in hub.requests if "/blob/" in r.path)


def test_headers_cost_kilobytes(hub, tmp_path):
    """A sharded base of 140 GB (sparse files): its shapes are known after a few dozen kilobytes."""
    shards, weight_map = {}, {}
    for number in range(1, 31):
        name, tensor = f"model-{number:05}-of-00030.safetensors", f"model.layers.{number - 1}.self_attn.q_proj.weight"
        size = 140_000_000_000 // 30 // 16384 * 16384
        header = json.dumps({tensor: {"dtype": "BF16", "shape": [size // 16384, 8192], "data_offsets": [0, size]}})
        path = tmp_path / name
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", len(header)) + header.encode())
            stream.truncate(8 + len(header) + size)
        shards[name] = hub.store(path, large=True, sha256=f"{number:064x}")
        weight_map[tensor] = name
    index = json.dumps({"metadata": {"total_size": 140_000_000_000}, "weight_map": weight_map}).encode()
    shards["model.safetensors.index.json"] = hub.store(index, large=False)
    repo = hub.add_repo("ann/large")
    hub.commit(repo, "refs/heads/main", None, shards, "weights", "ann")
    with BaseModel.open("hf://ann/large") as base:
        assert sum(file.size for file in base.files.values()) > 139_000_000_000
        assert len(base.tensors) == 30
    moved = sum(r.sent for r in data_requests(hub))
    assert moved < 600_000
    assert len(data_requests(hub)) <= 31


def test_streaming_takes_few_requests_and_little_memory(hub, monkeypatch):
    monkeypatch.setattr(ranges, "MOST", 1 << 20)
    content = bytes(range(256)) * (40 << 10)  # 10 MiB
    hub.add_repo("ann/x", {"model.safetensors": content})
    file = hub_source.folder("hf://ann/x").open("model.safetensors")
    got = bytearray()
    buffer = bytearray(64 << 10)
    while len(got) < file.size:
        file.read_into(memoryview(buffer), len(got))
        got += buffer
        assert len(file._window[1]) <= 1 << 20
    assert bytes(got) == content
    assert len(data_requests(hub)) <= 10 + 8  # it doubles up to a mebibyte, then takes mebibytes
    assert sum(r.sent for r in data_requests(hub)) == len(content)


def test_threads_may_share_a_file(hub, monkeypatch):
    monkeypatch.setattr(ranges, "WINDOW", 64)
    content = bytes(range(256)) * 64
    hub.add_repo("ann/x", {"model.safetensors": content})
    file = hub_source.folder("hf://ann/x").open("model.safetensors")

    def read(number):
        start = number * 977 % 15_000
        buffer = bytearray(100 + number)
        file.read_into(memoryview(buffer), start)
        return bytes(buffer) == content[start : start + len(buffer)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))


def test_a_read_larger_than_one_request_and_one_beyond_the_end(hub, monkeypatch):
    monkeypatch.setattr(ranges, "MOST", 1000)
    content = bytes(range(256)) * 50
    hub.add_repo("ann/x", {"model.safetensors": content})
    file = hub_source.folder("hf://ann/x").open("model.safetensors")
    buffer = bytearray(12_000)
    file.read_into(memoryview(buffer), 500)
    assert bytes(buffer) == content[500:12_500]
    with pytest.raises(HubError, match="ends too early"):
        file.read_into(memoryview(buffer), 1000)


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503},
        {"status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}},
        {"drop": True},
        {"truncate": 3000},
    ],
    ids=["503", "429", "dropped", "truncated"],
)
@pytest.mark.parametrize("where", [r"GET /api/models/ann/x/revision/main|GET /api/models/ann/x$", r"GET /blob/"])
def test_what_passes_is_tried_again(hub, fault, where):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with (
        hub.fault(where, **fault) as injected,
        Checkpoint.open("hf://ann/x") as remote,
        Checkpoint.open(CHECKPOINTS / KEPT) as local,
    ):
        assert remote.weights.file_sha256() == local.weights.file_sha256()
        assert injected.times == 0


@pytest.mark.parametrize("size", [0, 1, 5000])
def test_small_files_are_checked_against_gits_name(hub, size):
    hub.add_repo("ann/x", {"config.json": bytes(size)})
    folder = hub_source.folder("hf://ann/x")
    assert local.read_text(folder, "config.json") == "\0" * size
    if size:
        with hub.fault("resolve-cache", corrupt=size // 2), pytest.raises(HubError, match="not the ones on the Hub"):
            local.read_text(folder, "config.json")


@pytest.mark.parametrize("window", [512, 16 << 10])
@pytest.mark.parametrize("command", ["verify", "merge"])
def test_a_flipped_byte_of_an_adapter_is_caught_wherever_it_is_read(hub, tmp_path, monkeypatch, command, window):
    """Also in a header that was read by itself first, and in vectors that no manifest covers."""
    monkeypatch.setattr(ranges, "WINDOW", window)
    content = (CHECKPOINTS / KEPT / "adapter_model.safetensors").read_bytes()
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))

    def read():
        if command == "merge":
            vera_tools.merge("hf://ann/x", base=base_of(KEPT), output=tmp_path / "out")
        elif vera_tools.verify("hf://ann/x").checkpoints[0].verdict == "invalid":
            raise FormatError("a header that is no JSON any more")

    data = 8 + int.from_bytes(content[:8], "little")
    for place in (*range(0, data, 397), data - 1, *range(data, len(content), 1999), len(content) - 1):
        # Once is enough for a header; later requests are for all of the file.
        times = 1 if place < window else 99
        expected = (HubError, FormatError) if place < data else HubError
        with hub.fault("GET /blob/", corrupt=place, times=times), pytest.raises(expected):
            read()
    assert not (tmp_path / "out").exists()
    read()


def test_offline_reads_the_cache(hub, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    snapshot_download("ann/x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    with Checkpoint.open("hf://ann/x") as remote, Checkpoint.open(CHECKPOINTS / KEPT) as local:
        assert remote.weights.file_sha256() == local.weights.file_sha256()
        assert remote.folder.path_of("a").startswith("hf://ann/x")
    with pytest.raises(HubError, match="local cache does not have it"):
        Checkpoint.open("hf://ann/y")
    assert len(hub.requests) == asked


def test_verify_takes_checkpoint_and_base_from_the_hub(hub):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    hub.add_repo("ann/base", files_of(base_of(KEPT)))
    code, document = run_json("verify", "hf://ann/x", "--base", "hf://ann/base")
    _, local = run_json("verify", CHECKPOINTS / KEPT, "--base", base_of(KEPT))
    assert code == 0
    entry, expected = document["checkpoints"][0], local["checkpoints"][0]
    assert entry["path"] == "hf://ann/x"
    for key in ("verdict", "recipe", "projections", "loads"):
        assert entry[key] == expected[key]
    assert [(c["id"], c["status"]) for c in entry["checks"]] == [(c["id"], c["status"]) for c in expected["checks"]]
    size = (base_of(KEPT) / "model.safetensors").stat().st_size
    digest = next(b.sha256 for b in hub.repos["ann/base"].head.files.values() if b.large)
    assert sum(r.sent for r in hub.requests if digest in r.path) < size / 4


def weights_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_every_command_takes_checkpoint_and_base_from_the_hub(hub, tmp_path):
    """What they write from there is what they write from the same files on disk."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    hub.add_repo("ann/base", files_of(base_of(KEPT)))
    here, base = CHECKPOINTS / KEPT, base_of(KEPT)
    there, remote_base = "hf://ann/x", "hf://ann/base"
    vera_tools.merge(there, base=remote_base, output=tmp_path / "merged-there")
    vera_tools.merge(here, base=base, output=tmp_path / "merged-here")
    assert weights_of(tmp_path / "merged-there") == weights_of(tmp_path / "merged-here")
    assert weights_of(tmp_path / "merged-there") != weights_of(base)
    vera_tools.to_lora(there, tmp_path / "lora-there", base=remote_base)
    vera_tools.to_lora(here, tmp_path / "lora-here", base=base)
    assert weights_of(tmp_path / "lora-there") == weights_of(tmp_path / "lora-here")
    vera_tools.strip_projections(there, tmp_path / "stripped")
    hub.add_repo("ann/stripped", files_of(tmp_path / "stripped"))
    vera_tools.embed_projections("hf://ann/stripped", tmp_path / "embedded")
    assert weights_of(tmp_path / "embedded") == weights_of(here)
    assert vera_tools.diff(there, here).exit_code == 0
    assert vera_tools.regenerate(there).to_dict() == vera_tools.regenerate(here).to_dict()
    assert {**vera_tools.inspect(there).to_dict(), "path": ""} == {**vera_tools.inspect(here).to_dict(), "path": ""}
    with pytest.raises(UsageError, match="pull it first"):
        vera_tools.record(there)


def test_a_merge_streams_the_base(hub, tmp_path):
    """The base passes through once, in large pieces, and no request is for more than one of them."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    hub.add_repo("ann/base", files_of(base_of(KEPT)))
    vera_tools.merge("hf://ann/x", base="hf://ann/base", output=tmp_path / "merged")
    digest = next(blob.sha256 for blob in hub.repos["ann/base"].head.files.values() if blob.large)
    size = (base_of(KEPT) / "model.safetensors").stat().st_size
    requests = [request for request in hub.requests if digest in request.path]
    assert all("Range" in request.headers for request in requests)
    assert sum(request.sent for request in requests) < 1.5 * size


def test_what_lies_in_xet_storage_is_read_by_ranges_too(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert hub.repos["ann/x"].head.files["adapter_model.safetensors"].xet_hash
    assert vera_tools.verify("hf://ann/x").exit_code == 0
