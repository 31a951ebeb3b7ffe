"""push, to a real server through the official client, over LFS and Xet; and what was pushed, loaded by PEFT."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, WEIGHTS, base_of, files_of, flip
from tests.command import run_json, run_process
from tests.hub.server import without_xet
from tests.peers import base_model, distance, load_peft
from vera_tools import schema
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    FormatError,
    HubError,
    LoadingWarning,
    UnprovenError,
    UnrecordedWarning,
    UsageError,
)
from vera_tools.hub import card

# The client passes raw bytes as `data`, which its HTTP library advises against.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

OWN = ("adapter_config.json", "adapter_model.safetensors", "expected_logits.json")


@pytest.fixture
def ann(hub, monkeypatch):
    """The Hub, with ann signed in."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    return hub


def contents(commit):
    return {path: blob.path.read_bytes() for path, blob in commit.files.items() if path != ".gitattributes"}


def drifted(folder):
    """Change one bit of its projections."""
    flip(folder / WEIGHTS, -5000)
    return folder


def test_push_then_pull_gives_identical_bytes(ann, tmp_path, transport, checkpoint):
    folder = checkpoint(KEPT)
    before = files_of(folder)
    report = vera_tools.push(folder, "ann/x")
    assert files_of(folder) == before  # nothing local is touched
    assert (ann.cas.exists(), ann.count("PUT /upload/") == 1) == (transport == "xet", transport == "lfs")
    repo = ann.repos["ann/x"]
    assert report.commit == repo.head.oid
    assert report.commit_url == f"{ann.url}/ann/x/commit/{repo.head.oid}"
    pushed = contents(repo.head)
    assert {name: pushed[name] for name in OWN} == before
    assert set(pushed) == {*OWN, "vera_manifest.json", "README.md"}
    vera_tools.pull("ann/x", tmp_path / "out")
    pulled = files_of(tmp_path / "out")
    del pulled["vera_provenance.json"]
    assert pulled == pushed
    (found,) = vera_tools.verify(tmp_path / "out").checkpoints
    assert found.scope.startswith("projections, vectors and config are covered; ")
    schema.validate(report.to_dict(), "push.v1", where="report")


def test_large_files_go_in_parts(ann, monkeypatch, checkpoint):
    without_xet(monkeypatch)
    ann.multipart_size = 4000
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert ann.count("PUT /upload/") == 3
    digest = hashlib.sha256((CHECKPOINTS / KEPT / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert ann.repos["ann/x"].head.files["adapter_model.safetensors"].sha256 == digest


def test_pushing_the_same_again_makes_no_commit(ann, transport, tmp_path, monkeypatch):
    first = vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    asked = ann.count("POST /api/models/ann/x/(preupload|commit)")
    again = vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert (again.committed, again.commit, again.created) == (False, first.commit, False)
    assert again.commit_url == first.commit_url
    assert ann.count("POST /api/models/ann/x/(preupload|commit)") == asked
    assert {file.status for file in again.files} == {"unchanged"}
    # ... nor from a machine with another torch, whose manifest would say so
    monkeypatch.setattr("vera_tools.installed.version", lambda name: "9.9.9")
    assert not vera_tools.push(CHECKPOINTS / KEPT, "ann/x").committed
    # what came back by pull is the same content, too
    vera_tools.pull("ann/x", tmp_path / "out")
    assert not vera_tools.push(tmp_path / "out", "ann/x").committed
    assert len(ann.repos["ann/x"].commits) == 2


def test_only_what_changed_is_sent(ann, checkpoint):
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    folder = checkpoint(KEPT)
    (folder / "LICENSE").write_text("free")
    (folder / "notes.rst").write_text("notes")
    (folder / "optimizer.pt").write_bytes(b"\x80pickle")
    report = vera_tools.push(folder, "ann/x", message="Add a licence", include=["*.rst", "*.pt"])
    changed = {file.path: file.status for file in report.files if file.status != "unchanged"}
    assert changed == {"LICENSE": "added", "notes.rst": "added"}
    assert ann.repos["ann/x"].head.title == "Add a licence"
    assert "optimizer.pt" not in ann.repos["ann/x"].head.files


def test_the_command_line(ann, checkpoint):
    options = ("--private", "-m", "First", "--base", base_of(KEPT))
    code, document = run_json("push", CHECKPOINTS / KEPT, "ann/x", *options, run=run_process)
    assert code == 0
    assert (document["created"], document["private"], document["committed"]) == (True, True, True)
    assert ann.repos["ann/x"].private
    assert ann.repos["ann/x"].head.title == "First"
    manifest = json.loads(contents(ann.repos["ann/x"].head)["vera_manifest.json"])
    assert len(manifest["base"]["weights"]) == 4
    result = run_process("push", CHECKPOINTS / KEPT, "ann/y")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == f"{ann.url}/ann/y/commit/{ann.repos['ann/y'].head.oid}"
    result = run_process("push", drifted(checkpoint(KEPT)), "ann/z")
    assert result.returncode == 1
    assert "drift, so it is not pushed" in result.stderr
    assert "ann/z" not in ann.repos


def test_what_does_not_verify_is_refused(ann, checkpoint, tmp_path):
    folder = drifted(checkpoint(KEPT))
    with pytest.raises(CheckFailedError, match=r"drift, so it is not pushed: projections\.match: .*--force"):
        vera_tools.push(folder, "ann/x")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(FormatError, match="LORA"):
        vera_tools.push(lora, "ann/x")
    with pytest.raises(FormatError, match="no adapter here"):
        vera_tools.push(base_of(KEPT), "ann/x")
    assert ann.repos == {}
    assert ann.requests == []
    report = vera_tools.push(folder, "ann/x", force=True)
    assert report.verification.verdict == "drift"
    pushed = contents(ann.repos["ann/x"].head)
    assert pushed["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(pushed["vera_manifest.json"])["recipe"] is None
    assert "no known recipe makes them" in pushed["README.md"].decode()
    vera_tools.push(lora, "ann/lora", force=True)
    assert set(contents(ann.repos["ann/lora"].head)) == {"adapter_config.json"}  # as it is, nothing added


def test_seed_only(ann):
    with pytest.warns(UnrecordedWarning, match=f"{SEED_ONLY}: pushed without a manifest"):
        vera_tools.push(CHECKPOINTS / SEED_ONLY, "ann/x")
    assert "vera_manifest.json" not in ann.repos["ann/x"].head.files
    with pytest.raises(UnprovenError):
        vera_tools.push(CHECKPOINTS / SEED_ONLY, "ann/y", strict=True)
    with pytest.warns(AssumedRecipeWarning):
        report = vera_tools.push(CHECKPOINTS / SEED_ONLY, "ann/x", base=base_of(SEED_ONLY))
    assert report.record.assumed
    assert report.to_dict()["assumed"] is True
    assert json.loads(contents(ann.repos["ann/x"].head)["vera_manifest.json"])["assumed"] is True


def test_strip_and_embed_on_the_way(ann, checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(KEPT)
    (folder / "tokenizer.json").write_text("{}")
    before = files_of(folder)
    report = vera_tools.push(folder, "ann/x", strip=True)
    assert files_of(folder) == before
    pushed = contents(ann.repos["ann/x"].head)
    assert len(pushed["adapter_model.safetensors"]) < len(before["adapter_model.safetensors"]) / 2
    assert pushed["tokenizer.json"] == b"{}"
    assert report.verification.verdict == "reproducible"
    assert report.verification.projections_stored is False
    monkeypatch.setattr("vera_tools.installed.version", lambda name: "9.9.9")
    assert not vera_tools.push(folder, "ann/x", strip=True).committed
    # embedded again on the way down, the very file comes back
    vera_tools.pull("ann/x", tmp_path / "out", embed=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == before[name]
    with pytest.warns(AssumedRecipeWarning):
        report = vera_tools.push(CHECKPOINTS / SEED_ONLY, "ann/y", embed=True, base=base_of(SEED_ONLY))
    assert report.verification.projections_stored is True
    name = "peft-0.21.2-llama-bf16-kept"
    with pytest.warns(LoadingWarning, match=f"{CHECKPOINTS / name}: trained on a bfloat16 base"):
        vera_tools.push(CHECKPOINTS / name, "ann/bf16", strip=True)
    with pytest.raises(UsageError, match="contradict"):
        vera_tools.push(folder, "ann/z", strip=True, embed=True)


def test_branches_and_pull_requests(ann, transport, monkeypatch, checkpoint):
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    main = ann.repos["ann/x"].head.oid
    folder = checkpoint(KEPT)
    (folder / "LICENSE").write_text("free")
    report = vera_tools.push(folder, "ann/x", revision="topic/one")
    assert ann.repos["ann/x"].resolve("topic/one").oid == report.commit
    assert ann.repos["ann/x"].resolve("topic/one").parent == main
    assert ann.repos["ann/x"].head.oid == main
    report = vera_tools.push(folder, "ann/new", revision="dev")
    assert "adapter_config.json" not in ann.repos["ann/new"].head.files
    assert ann.repos["ann/new"].resolve("dev").oid == report.commit
    with pytest.raises(HubError, match="no such revision"):
        vera_tools.push(folder, "ann/x", revision="topic/two", create=False)
    with pytest.raises(HubError, match="no such repository"):
        vera_tools.push(folder, "ann/none", create=False)
    monkeypatch.setenv("HF_TOKEN", ann.add_user("bob"))
    report = vera_tools.push(folder, "ann/x", create_pr=True, message="A licence")
    assert report.pr_url == f"{ann.url}/ann/x/discussions/1"
    assert ann.repos["ann/x"].resolve("refs/pr/1").oid == report.commit
    assert ann.repos["ann/x"].pull_requests[0].author == "bob"
    assert ann.repos["ann/x"].head.oid == main
    (folder / "NOTICE").write_text("x")
    report = vera_tools.push(folder, "ann/x", revision="refs/pr/1")
    assert ann.repos["ann/x"].resolve("refs/pr/1").oid == report.commit
    with pytest.raises(UsageError, match="default branch"):
        vera_tools.push(folder, "ann/x", create_pr=True, revision="topic/one")
    with pytest.raises(UsageError, match="a commit cannot be pushed to"):
        vera_tools.push(folder, "ann/x", revision=main)


def test_subfolders(ann, tmp_path):
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x/en")
    vera_tools.push(CHECKPOINTS / KEPT, "hf://ann/x/de")
    assert {path.split("/")[0] for path in contents(ann.repos["ann/x"].head)} == {"en", "de"}
    text = contents(ann.repos["ann/x"].head)["en/README.md"].decode()
    assert 'PeftModel.from_pretrained(base, "ann/x", subfolder="en")' in text
    assert not vera_tools.push(CHECKPOINTS / KEPT, "ann/x/en").committed
    report = vera_tools.pull("ann/x/de", tmp_path / "out")
    assert report.verification.verdict == "reproducible"


def test_private_means_private(ann):
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    with pytest.raises(UsageError, match="is there, and public"):
        vera_tools.push(CHECKPOINTS / KEPT, "ann/x", private=True)


def test_an_existing_card_keeps_its_text(ann, checkpoint):
    own = "---\nlicense: mit\n# a comment\ntags: [mine]\n---\n\n# My adapter\n\nHand-written.  \n"
    folder = checkpoint(KEPT)
    (folder / "README.md").write_text(own)
    vera_tools.push(folder, "ann/x")
    text = contents(ann.repos["ann/x"].head)["README.md"].decode()
    metadata, body = card.split(text)
    assert metadata["license"] == "mit"
    assert metadata["tags"] == ["mine", "vera", "vera-tools"]
    assert "# My adapter\n\nHand-written." in body
    # edited on the Hub, before and after the section; the local file has another text
    repo = ann.repos["ann/x"]
    edited = text.replace("Hand-written.", "Edited.") + "\nLast words.\n"
    files = {**repo.head.files, "README.md": ann.store(edited.encode(), large=False)}
    ann.commit(repo, "refs/heads/main", repo.head.oid, files, "edit", "ann")
    assert not vera_tools.push(folder, "ann/x").committed
    vera_tools.push(folder, "ann/x", overwrite_card=True)
    assert "Hand-written." in contents(repo.head)["README.md"].decode()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("tags: vera", "tags"),
        ("base_model: ./local/path", "base_model"),
        ("license: [1]", "license"),
        ("- a list", "mapping"),
        ("a: [1", "not YAML"),
        ("model-index: [{}]", "metadata"),
    ],
)
def test_a_wrong_card_is_refused_before_anything_is_sent(ann, checkpoint, metadata, message):
    folder = checkpoint(KEPT)
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Title\n")
    with pytest.raises(FormatError, match=message) as caught:
        vera_tools.push(folder, "ann/x")
    assert "README.md" in str(caught.value)
    assert ann.repos == {}
    assert {request.method for request in ann.requests} == {"GET"}


def test_a_commit_in_between_is_a_conflict(ann, transport, checkpoint, monkeypatch):
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    repo = ann.repos["ann/x"]
    folder = checkpoint(KEPT)
    (folder / "LICENSE").write_text("free")
    with ann.fault("POST /api/models/ann/x/preupload", delay=0.0):
        from vera_tools.hub import push as pushing

        upload = pushing._upload

        def meanwhile(*args, **kwargs):
            files = {**repo.head.files, "other.txt": ann.store(b"other", large=False)}
            ann.commit(repo, "refs/heads/main", repo.head.oid, files, "meanwhile", "bob")
            return upload(*args, **kwargs)

        monkeypatch.setattr(pushing, "_upload", meanwhile)
        with pytest.raises(HubError, match="somebody else pushed"):
            vera_tools.push(folder, "ann/x")
    assert repo.head.title == "meanwhile"


def test_a_lost_answer_is_not_a_failure(ann, transport, checkpoint):
    """The commit is made, its answer never arrives: the second try finds it made."""
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    folder = checkpoint(KEPT)
    (folder / "LICENSE").write_text("free")
    with ann.fault("POST /api/models/ann/x/commit/main", lose=True):
        report = vera_tools.push(folder, "ann/x")
    repo = ann.repos["ann/x"]
    assert repo.head.oid == report.commit
    assert len(repo.commits) == 3
    assert repo.head.files["LICENSE"].path.read_bytes() == b"free"


@pytest.mark.parametrize("fault", [{"status": 500}, {"drop": True}], ids=["500", "dropped"])
@pytest.mark.parametrize("where", ["GET /api/models/ann/x$", "POST /api/repos/create", "/preupload/", "/commit/main"])
def test_what_passes_is_tried_again(ann, where, fault, transport):
    with ann.fault(where, **fault) as injected:
        report = vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert injected.times == 0
    assert report.commit == ann.repos["ann/x"].head.oid
    assert len(ann.repos["ann/x"].commits) == 2


def test_peft_loads_what_was_pushed(ann):
    """`PeftModel.from_pretrained` from that server computes the logits that the adapter was trained to."""
    vera_tools.push(CHECKPOINTS / KEPT, "ann/x")
    assert distance(load_peft(base_model(KEPT), "ann/x"), KEPT) <= 1e-5
    assert ann.count("HEAD /ann/x/resolve/main/adapter_config.json") >= 1


def test_a_local_folder_is_needed(ann, tmp_path):
    with pytest.raises(UsageError, match="only a local checkpoint"):
        vera_tools.push("hf://ann/x", "ann/y")
    for wrong in ("badname", "not a repository"):
        with pytest.raises(UsageError, match=r"not a model repository \(expected owner/name or hf://owner/name"):
            vera_tools.push(CHECKPOINTS / KEPT, wrong)
    single = tmp_path / "other.safetensors"
    shutil.copy(CHECKPOINTS / KEPT / "adapter_model.safetensors", single)
    with pytest.raises(UsageError, match="folder is pushed"):
        vera_tools.push(single, "ann/x")
