"""pull, from a real server through the official client, in this process and by the command line."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, PICKLE, SEED_ONLY, WEIGHTS, base_of, config_of, files_of, flip, put_pickle
from tests.command import run_cli, run_json, run_process, run_terminal
from tests.hub.state import git_sha1
from vera_tools import schema
from vera_tools.errors import CheckFailedError, FormatError, HubError, UnprovenError, UsageError
from vera_tools.files.hub_answers import RemoteFile
from vera_tools.hub.transfer import check_arrived

# The client passes raw bytes as `data`, which its HTTP library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def provenance(out):
    document = json.loads((out / "vera_provenance.json").read_text())
    schema.validate(document, "provenance.v1", where="provenance")
    return document


def put(hub, repo_id, folder, *, private=False):
    """Upload a folder by the client's own machinery."""
    from huggingface_hub import HfApi

    api = HfApi(token=hub.add_user(repo_id.split("/")[0]))
    api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=folder).oid


def test_pull_gives_the_same_bytes_and_says_where_from(hub, tmp_path, transport):
    commit = put(hub, "ann/x", CHECKPOINTS / KEPT)
    assert (hub.cas.exists()) == (transport == "xet")
    out = tmp_path / "out"
    report = vera_tools.pull("ann/x", out)
    assert {**files_of(out), "vera_provenance.json": b""} == {
        **files_of(CHECKPOINTS / KEPT),
        "vera_provenance.json": b"",
    }
    assert report.commit == commit
    assert report.verification.verdict == "reproducible"
    document = provenance(out)
    assert document["commit"] == commit
    assert document["endpoint"] == hub.url
    assert {file["path"]: file["checked"] for file in document["files"]} == {
        "adapter_config.json": "git-sha1",
        "adapter_model.safetensors": "sha256",
        "expected_logits.json": "git-sha1",
    }
    schema.validate(report.to_dict(), "pull.v1", where="report")


def test_the_command_line(hub, tmp_path):
    commit = put(hub, "ann/x", CHECKPOINTS / KEPT)
    code, document = run_json("pull", "ann/x", "-o", tmp_path / "a", "--base", base_of(KEPT), run=run_process)
    assert code == 0
    assert document["commit"] == commit
    assert document["verification"]["verdict"] == "reproducible"
    result = run_process("pull", "hf://ann/x@main", "-o", tmp_path / "b")
    assert result.returncode == 0
    assert result.stderr == ""  # no progress where there is no terminal
    assert commit in result.stdout
    assert "REPRODUCIBLE" in result.stdout
    result = run_process("pull", "hf://ann/x@main", "-o", tmp_path / "b")
    assert result.returncode == 2
    assert "already exists" in result.stderr
    assert run_process("pull", "ann/x", "-q", "-o", tmp_path / "b", "--overwrite").stdout == ""


def test_revisions_and_subfolders(hub, tmp_path):
    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "en/"))
    first = repo.head
    repo.refs["refs/tags/v1"] = repo.refs["refs/heads/topic/one"] = repo.refs["refs/pr/7"] = first.oid
    hub.commit(repo, "refs/heads/main", first.oid, {}, "remove all", "ann")
    for number, (revision, name) in enumerate(
        [
            ("v1", "ann/x/en"),
            (None, "hf://ann/x@topic%2Fone/en"),
            ("refs/pr/7", "hf://ann/x/en"),
            (first.oid, "ann/x/en"),
        ]
    ):
        report = vera_tools.pull(name, tmp_path / str(number), revision=revision)
        assert report.commit == first.oid
        assert report.subfolder == "en"
        assert (tmp_path / str(number) / "adapter_config.json").exists()
    with pytest.raises(HubError, match="no such file or folder"):
        vera_tools.pull("ann/x/en", tmp_path / "new")
    with pytest.raises(HubError, match="no such revision"):
        vera_tools.pull("ann/x/en", tmp_path / "new", revision="v2")
    assert not (tmp_path / "new").exists()


def test_only_what_belongs_to_a_checkpoint_is_taken(hub, tmp_path):
    extra = {
        "tokenizer.json": b"{}",
        "LICENSE.txt": b"free",
        "training_args.bin": b"\x80pickle",
        "optimizer.pt": b"\x80pickle",
        "model.safetensors": b"large",
        "notes.rst": b"notes",
        "checkpoint-10/adapter_config.json": b"{}",
        "vera_provenance.json": b"{}",
    }
    hub.add_repo("ann/x", {**files_of(CHECKPOINTS / KEPT), **extra})
    vera_tools.pull("ann/x", tmp_path / "a")
    own = set(files_of(CHECKPOINTS / KEPT)) | {"vera_provenance.json"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == own | {"tokenizer.json", "LICENSE.txt"}
    assert provenance(tmp_path / "a")["repo"] == "ann/x"  # ours, not the repository's
    vera_tools.pull("ann/x", tmp_path / "b", include=["*.rst", "*.bin"])
    assert {path.name for path in (tmp_path / "b").iterdir()} == own | {"tokenizer.json", "LICENSE.txt", "notes.rst"}
    vera_tools.pull("ann/x", tmp_path / "c", include=["*.bin"], allow_pickle=True)
    assert (tmp_path / "c" / "training_args.bin").exists()
    fetched = " ".join(r.path for r in hub.requests)
    assert "optimizer.pt" not in fetched
    assert "checkpoint-10/adapter_config" not in fetched


def test_a_pickle_is_not_taken_unless_asked_for(hub, tmp_path, checkpoint):
    folder = checkpoint(KEPT)
    pickle = put_pickle(folder)
    hub.add_repo("ann/x", files_of(folder))
    with pytest.raises(FormatError, match="--allow-pickle"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert hub.count("adapter_model.bin") == 0
    report = vera_tools.pull("ann/x", tmp_path / "out", allow_pickle=True)
    assert report.verification.verdict == "reproducible"
    assert (tmp_path / "out" / PICKLE).read_bytes() == pickle.read_bytes()


def test_every_flipped_byte_is_caught(hub, tmp_path):
    """The client itself takes such files without a word; and what was cached badly is not used again."""
    import huggingface_hub
    from huggingface_hub import constants

    files = files_of(CHECKPOINTS / KEPT)
    hub.add_repo("ann/x", files)
    sizes = {name: len(content) for name, content in files.items()}
    places = [(name, random.Random(number).randrange(sizes[name])) for number, name in enumerate(sorted(sizes) * 5)]
    places += [(name, place) for name in sizes for place in (0, sizes[name] - 1)]
    data = 8 + int.from_bytes(files["adapter_model.safetensors"][:8], "little")
    places += [("adapter_model.safetensors", place) for place in (7, 8, data - 1, data)]  # length, header, tensors
    caught = 0
    for name, place in places:
        route = "blob/ann/x" if name.endswith(".safetensors") else f"resolve-cache/.*/{name}"
        with hub.fault(f"GET /.*{route}|GET /{route}", corrupt=place) as fault:
            with pytest.raises(HubError, match="not the ones on the Hub"):
                vera_tools.pull("ann/x", tmp_path / "out")
            caught += fault.times == 0
        shutil.rmtree(constants.HF_HUB_CACHE)
    assert caught == len(places) == 25
    assert not (tmp_path / "out").exists()
    assert vera_tools.pull("ann/x", tmp_path / "out").verification.verdict == "reproducible"
    with hub.fault("GET /blob/ann/x", corrupt=9_000):
        path = huggingface_hub.hf_hub_download("ann/x", "adapter_model.safetensors", cache_dir=tmp_path / "other")
    assert Path(path).read_bytes() != files["adapter_model.safetensors"]


def test_every_single_flipped_byte_changes_the_digest(tmp_path):
    """Every byte of a checkpoint in turn, by the check that every file goes through."""
    for name, large in (("adapter_model.safetensors", True), ("adapter_config.json", False)):
        content = (CHECKPOINTS / KEPT / name).read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        listed = RemoteFile(name, len(content), git_sha1(content), sha256 if large else None)
        path = tmp_path / name
        path.write_bytes(content)
        assert check_arrived(path, listed, where=name).sha256 == sha256
        with path.open("r+b") as stream:
            for place, byte in enumerate(content):
                stream.seek(place)
                stream.write(bytes([byte ^ 1 << place % 8]))
                stream.flush()
                with pytest.raises(HubError, match="not the ones on the Hub"):
                    check_arrived(path, listed, where=name)
                stream.seek(place)
                stream.write(bytes([byte]))
        assert path.read_bytes() == content


def test_flipped_bytes_in_xet_storage_are_caught(hub, tmp_path):
    """hf_xet does not look at them either. Bytes of the storage's own that no file consists of may change."""
    from huggingface_hub import constants

    put(hub, "ann/x", CHECKPOINTS / KEPT)
    (stored,) = hub.cas.rglob("xorbs/default.*[0-9a-f]")
    stored.chmod(0o644)
    whole, caught = stored.read_bytes(), 0
    for place in random.Random(0).sample(range(len(whole)), 12):
        stored.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            vera_tools.pull("ann/x", tmp_path / "out")
        except HubError as error:
            if not re.search("not the ones on the Hub|transfer through Xet failed", str(error)):
                raise
            assert not (tmp_path / "out").exists()
            caught += 1
            continue
        weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        assert weights == (CHECKPOINTS / KEPT / "adapter_model.safetensors").read_bytes()
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(constants.HF_HUB_CACHE)
    assert caught > 6, [f"{request.method} {request.path}" for request in hub.requests]


def test_a_bad_copy_in_the_cache_is_caught_and_removed(hub, tmp_path):
    from huggingface_hub import snapshot_download

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    cached = Path(snapshot_download("ann/x")) / "adapter_model.safetensors"
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)
    with pytest.raises(HubError, match="the bad copy was removed"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert vera_tools.pull("ann/x", tmp_path / "out").verification.ok


def test_offline_from_the_cache(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "en/") | {"config.json": b"{}"})
    repo.refs["refs/tags/v1"] = repo.head.oid
    vera_tools.pull("ann/x/en", tmp_path / "online")
    vera_tools.pull("ann/x/en", tmp_path / "tag", revision="v1")
    asked = len(hub.requests)
    code, document = run_json("pull", "ann/x/en", "-o", tmp_path / "cli", run=run_process, env={"HF_HUB_OFFLINE": "1"})
    assert (code, document["offline"], document["commit"]) == (0, True, repo.head.oid)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for number, revision in enumerate((None, "main", "v1", repo.head.oid)):
        out = tmp_path / f"offline-{number}"
        assert vera_tools.pull("ann/x/en", out, revision=revision).verification.verdict == "reproducible"
        content = {name: data for name, data in files_of(out).items() if name != "vera_provenance.json"}
        assert content == files_of(CHECKPOINTS / KEPT)
    for wrong in ("ann/y", "ann/x@v2/en"):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            vera_tools.pull(wrong, tmp_path / "out")
    assert len(hub.requests) == asked
    folder = Path(constants.HF_HUB_CACHE) / "models--ann--x" / "snapshots" / repo.head.oid / "en"
    (folder / "expected_logits.json").unlink()
    with pytest.raises(HubError, match=r"cache lacks expected_logits\.json"):
        vera_tools.pull("ann/x/en", tmp_path / "out")


@pytest.mark.parametrize("fault", [{"drop": True}, {"truncate": 6_000}, {"status": 503}, {"status": 429}])
def test_a_broken_download_goes_on(hub, tmp_path, fault, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # the client resumes at its chunks of 10 MiB
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    headers = {"headers": {"Retry-After": "0"}} if "status" in fault else {}
    with hub.fault("GET /blob/", **fault, **headers):
        assert vera_tools.pull("ann/x", tmp_path / "out").verification.ok
    if "truncate" in fault:
        again = [r.headers["Range"] for r in hub.requests if "/blob/" in r.path and "Range" in r.headers]
        assert again == ["bytes=6000-"]  # the rest, not the whole


def test_what_arrived_is_not_fetched_again(hub, tmp_path):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    with hub.fault("resolve-cache/.*adapter_config", status=403, times=99), pytest.raises(HubError):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert hub.count("GET /blob/") == 1
    hub.requests.clear()
    vera_tools.pull("ann/x", tmp_path / "out")
    assert hub.count("GET /blob/") == 0


def test_what_does_not_verify_is_not_written(hub, tmp_path, checkpoint):
    folder = checkpoint(KEPT)
    flip(folder / WEIGHTS, -5000)
    hub.add_repo("ann/x", files_of(folder))
    hub.add_repo("ann/lora", {"adapter_config.json": b'{"peft_type": "LORA", "r": 8}'})
    hub.add_repo("ann/none", {"config.json": b"{}"})
    out = tmp_path / "out"
    with pytest.raises(CheckFailedError, match=r"drift, so it is not pulled.*projections\.match"):
        vera_tools.pull("ann/x", out)
    with pytest.raises(FormatError, match="LORA"):
        vera_tools.pull("ann/lora", out)
    with pytest.raises(FormatError, match=r"no adapter here.*config\.json"):
        vera_tools.pull("ann/none", out)
    assert not out.exists()
    assert list(tmp_path.glob(".out*")) == []
    assert vera_tools.pull("ann/x", out, force=True).verification.verdict == "drift"
    assert out.exists()


def test_seed_only(hub, tmp_path):
    hub.add_repo("ann/x", files_of(CHECKPOINTS / SEED_ONLY))
    assert vera_tools.pull("ann/x", tmp_path / "a").verification.verdict == "unproven"
    assert run_cli("pull", "ann/x", "-o", tmp_path / "b").returncode == 0  # only `verify` exits 3
    with pytest.raises(UnprovenError):
        vera_tools.pull("ann/x", tmp_path / "c", strict=True)
    assert not (tmp_path / "c").exists()


def test_embed(hub, tmp_path):
    hub.add_repo("ann/base", files_of(base_of(SEED_ONLY)))
    hub.add_repo("ann/x", files_of(CHECKPOINTS / SEED_ONLY))
    with pytest.warns(vera_tools.errors.AssumedRecipeWarning):
        report = vera_tools.pull("ann/x", tmp_path / "out", embed=True, base="hf://ann/base")
    assert report.embedded
    assert report.verification.verdict == "assumed"
    default = [load for load in report.verification.loads if load.loader == "peft>=0.21" and not load.options]
    assert len(default) == 8
    assert {load.exact for load in default} == {None}
    assert provenance(tmp_path / "out")["embedded"] is True
    assert config_of(tmp_path / "out")["save_projection"] is True
    with pytest.raises(UsageError, match="the layer width is unknown"):
        vera_tools.pull("ann/x", tmp_path / "new", embed=True)
    assert not (tmp_path / "new").exists()


def test_the_revision_may_not_move_meanwhile(hub, tmp_path, monkeypatch):
    from vera_tools.files import hub_client as hub_module

    repo = hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    resolve, moves = hub_module.resolve, [1]

    def resolve_then_move(api, reference):
        commit = resolve(api, reference)
        if moves:
            hub.commit(repo, "refs/heads/main", repo.head.oid, repo.head.files, "again", "ann")
            moves.pop()
        return commit

    monkeypatch.setattr(hub_module, "resolve", resolve_then_move)
    assert vera_tools.pull("ann/x", tmp_path / "out").commit == repo.head.oid


def test_progress_is_the_clients_own_and_on_a_terminal_only(hub, tmp_path):
    """Its bars appear where stderr is a terminal; neither in a pipe (see above) nor where nobody asked for text."""
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT))
    code, shown = run_terminal("pull", "ann/x", "-o", tmp_path / "a", columns=100)
    assert (code, "Fetching 3 files" in shown) == (0, True)
    for quiet in ("-q", "--json"):
        code, shown = run_terminal("pull", "ann/x", "-o", tmp_path / quiet, quiet, columns=100)
        assert code == 0
        assert "Fetching" not in shown
        assert not shown.startswith("\r")
