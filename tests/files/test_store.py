"""Folders in object stores: which addresses there are, what is read of them, and what is refused."""

from __future__ import annotations

import json

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, SEED_ONLY, WEIGHTS, base_of, files_of
from tests.command import run_cli, run_json
from tests.stores import at_moments
from vera_tools.checkpoints.base import BaseModel
from vera_tools.errors import FormatError, StoreError, UsageError
from vera_tools.files import local, opening, ranges, secrets, store
from vera_tools.files.store import UNFINISHED
from vera_tools.files.store_client import Address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("s3://bucket/a/b", Address("s3", "bucket/a/b")),
        ("s3://bucket/a/b/", Address("s3", "bucket/a/b")),
        ("S3A://bucket", Address("s3a", "bucket")),
        ("gs://bucket/a b/ü", Address("gs", "bucket/a b/ü")),
        (
            "abfs://container@account.dfs.core.windows.net/a",
            Address("abfs", "container@account.dfs.core.windows.net/a"),
        ),
        ("memory:///a", Address("memory", "a")),
        ("github://org:repo@sha/a", Address("github", "org:repo@sha/a")),
    ],
)
def test_an_address_prints_back_to_itself(text, address):
    assert opening.in_store(text) == Address.parse(text) == address
    assert Address.parse(str(address)) == address
    assert opening.spelled(text) == opening.spelled(str(address)) == str(address)
    assert (opening.is_remote(text), opening.is_on_hub(text), opening.local_path(text)) == (True, False, None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ftp://me:hunter2x@host/a", "a password"),
        ("s3://bucket/a?X-Amz-Signature=hunter2x", "a query"),
        ("simplecache::s3://bucket/a", None),
        ("zip://a.safetensors::s3://bucket/hunter2x.zip", "an address within another"),
        ("s3://bucket/a/../b", "an address with . or .."),
        ("s3://bucket/a\0b", "a NUL"),
        ("http://me:hunter2x@host/a", "a web address is no checkpoint"),
        ("weird://me:hunter2x@host/a?sig=hunter2x", "unknown scheme weird://"),
        ("file://elsewhere/a", "not the address of a file on this machine"),
        ("s3://bucket/a", r"s3:// needs a package that is not installed; pip install 'vera-tools\[s3\]'"),
    ],
)
def test_what_is_no_address_is_refused_before_any_work(text, why, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    for refuse in (opening.require, opening.locate, vera_tools.verify):
        with pytest.raises(UsageError, match=why) as caught:
            refuse(text)
        assert "hunter2x" not in str(caught.value).replace("hunter2x.zip", "")
        assert caught.value.__cause__ is None or "hunter2x" not in str(caught.value.__cause__)


def test_a_secret_in_a_list_is_in_no_report_and_no_log(memory, tmp_path):
    good = memory.put("good", CHECKPOINTS / KEPT)
    paths = ["ftp://me:hunter2x@host/a", f"{good}?sig=hunter2x", "weird://hunter2x:x@host/a", good]
    out = run_cli("verify", "-", "--json", "--log", tmp_path / "log", input="\n".join(paths))
    report = json.loads(out.stdout)
    assert [entry["verdict"] for entry in report["checkpoints"]] == ["reproducible"]
    assert [entry["path"] for entry in report["failed"]] == [
        "ftp://<hidden>:<hidden>@host/a",
        f"{good}?<hidden>",
        "weird://<hidden>:<hidden>@host/a",
    ]
    assert out.returncode == 4
    assert "hunter2x" not in out.stdout + out.stderr + (tmp_path / "log").read_text()


def test_files_on_this_disk_have_addresses_too(checkpoint, tmp_path):
    path = checkpoint(KEPT)
    odd = path.rename(tmp_path / "a b%20")
    for text in (odd.as_uri(), odd.as_uri().replace("file:///", "file://localhost/")):
        assert opening.local_path(text) == odd
        assert vera_tools.verify(text).checkpoints[0].path == str(odd)
    assert vera_tools.record(odd.as_uri()).path == str(odd)
    assert vera_tools.verify(tmp_path.as_uri(), recursive=True).checkpoints[0].path == str(odd)
    with pytest.raises(UsageError, match="the output would replace an input"):
        vera_tools.strip_projections(odd, odd.as_uri(), overwrite=True)
    assert vera_tools.strip_projections(odd, (tmp_path / "out").as_uri()).output == str(tmp_path / "out")


def test_a_folder_and_a_file_of_it_are_read_as_on_disk(memory):
    address = memory.put("adapter", CHECKPOINTS / KEPT)
    base = memory.put("base", base_of(KEPT))
    code, there = run_json("verify", address, "--base", base)
    _, here = run_json("verify", CHECKPOINTS / KEPT, "--base", base_of(KEPT), "--no-base-digests")
    assert code == 0
    text = json.dumps(there).replace(base, str(base_of(KEPT))).replace(address, str(CHECKPOINTS / KEPT))
    assert json.loads(text) == here
    assert vera_tools.verify(f"{address}/{WEIGHTS}").checkpoints[0].verdict == "reproducible"
    assert vera_tools.inspect(address).path == address
    assert vera_tools.diff(address, CHECKPOINTS / KEPT).equal
    folder, name = opening.locate(f"{address}/{WEIGHTS}")
    assert (folder.label, name, folder.names()) == (address, WEIGHTS, sorted(files_of(CHECKPOINTS / KEPT)))
    assert folder.folder("nothing") is None
    assert opening.locate(memory.address)[0].folder("adapter").names() == folder.names()
    with pytest.raises(StoreError, match="no such file in the store"):
        folder.open("nothing")


def test_nothing_there_is_5_and_what_is_no_adapter_4(memory):
    memory.put("other", {"a": b"x"})
    assert run_cli("verify", memory / "nothing").returncode == 5
    assert run_cli("verify", memory / "other").returncode == 4
    assert run_cli("verify", "-R", memory / "nothing").returncode == 5
    assert run_cli("verify", "-R", memory / "other").returncode == 4
    assert run_cli("record", memory / "other").returncode == 2
    assert run_cli("push", memory / "other", "ann/x").returncode == 2
    assert run_cli("strip-projections", "-R", memory / "other", "--in-place").returncode == 2


def test_little_is_read_of_what_is_large(memory, monkeypatch):
    asked = []
    cat = MemoryFileSystem.cat_file

    def noted(self, path, start=None, end=None, **options):
        asked.append((path.rsplit("/", 1)[-1], start, end))
        return cat(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", noted)
    monkeypatch.setattr(ranges, "WINDOW", 4096)
    monkeypatch.setattr(ranges, "MOST", 8192)
    base = memory.put("base", base_of(KEPT))
    with BaseModel.open(base) as model:
        size = model.files["model.safetensors"].size
        assert [entry for entry in asked if entry[0] == "model.safetensors"] == [("model.safetensors", 0, 4096)]
        content = bytearray(size)
        model.files["model.safetensors"].source.read_into(memoryview(content), 0)
    assert content == (base_of(KEPT) / "model.safetensors").read_bytes()
    assert all(stop - start <= 8192 for name, start, stop in asked if name == "model.safetensors")


def test_whatever_changes_is_an_error_and_no_mixture(memory):
    """At each moment at which a store is asked, other files come to lie there."""

    def outcome(address):
        report = vera_tools.verify(address).checkpoints[0].to_dict()
        return json.dumps(report).replace(address, "ADDRESS")

    changed = 0
    for files in ((WEIGHTS,), (CONFIG,), (CONFIG, WEIGHTS)):
        other = {file: (CHECKPOINTS / SEED_ONLY / file).read_bytes() for file in files}
        before = outcome(memory.put("before", CHECKPOINTS / KEPT))
        memory.put("after", CHECKPOINTS / KEPT)
        after = outcome(memory.put("after", other))
        assert before != after
        for moment in range(7):
            address = memory.put("moving", CHECKPOINTS / KEPT)
            with at_moments(lambda n, moment=moment, other=other: memory.put("moving", other) if n == moment else None):
                found = outcome(address)
            told = "the file was changed while it was read" in found
            assert told or found in (before, after), (files, moment)
            changed += told
    assert changed >= 6


def test_a_file_that_is_gone_or_cut_off_was_changed(memory):
    for change in (
        lambda: memory.put(f"a/{WEIGHTS}", b"short"),
        lambda: memory.remove(f"a/{WEIGHTS}"),
        lambda: memory.put(f"a/{WEIGHTS}", (CHECKPOINTS / KEPT / WEIGHTS).read_bytes()),
    ):
        folder, _ = opening.locate(memory.put("a", CHECKPOINTS / KEPT))
        file = folder.open(WEIGHTS)
        change()

        def read(file=file, folder=folder):
            local.read_all(file, limit=1 << 30)
            folder.check_unchanged()

        with pytest.raises(FormatError, match=f"{WEIGHTS}: the file was changed while it was read"):
            read()
        folder.forget(WEIGHTS)
        folder.check_unchanged()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"name": "/{top}/../secret"}, "holds an empty part, . or .."),
        ({"name": "/etc/passwd"}, "a file of another folder"),
        ({"name": "/{top}//etc/passwd"}, "a file of another folder|an empty part|is absolute"),
        ({"name": "/{top}/a\0b"}, "holds a NUL"),
        ({"name": "/{top}/a\\b"}, "holds a backslash"),
        ({"name": "/{top}/C:x"}, "names a drive"),
        ({"name": "/{top}/below/x"}, "a file of another folder"),
        ({"name": None}, "a file of another folder"),
        ({"name": "/{top}/x", "size": -1}, "does not say how large it is"),
        ({"name": "/{top}/x", "size": None}, "does not say how large it is"),
        ({"name": "/{top}/x", "size": "1"}, "does not say how large it is"),
    ],
)
def test_listings_that_lie_are_refused(memory, monkeypatch, row, why):
    address = memory.put("a", CHECKPOINTS / KEPT)
    ls, top = MemoryFileSystem.ls, address.removeprefix("memory://")
    lie = {"size": 1, "type": "file", "created": 1.0} | row
    if row["name"]:
        lie["name"] = row["name"].replace("{top}", top)
    monkeypatch.setattr(MemoryFileSystem, "ls", lambda self, path, **options: [*ls(self, path), lie])
    monkeypatch.setattr(
        MemoryFileSystem, "find", lambda self, path, **options: {r["name"]: r for r in [*ls(self, path), lie]}
    )
    with pytest.raises(StoreError, match=why):
        vera_tools.verify(address)
    if row["name"] != "/{top}/below/x":
        with pytest.raises(StoreError, match=why):
            vera_tools.verify(address, recursive=True)


def test_a_store_that_names_no_versions_is_refused(memory, monkeypatch):
    address = memory.put("a", CHECKPOINTS / KEPT)
    system = store.locate(Address.parse(address))[0]._system
    row = {"name": "ftp://x/a", "size": 1, "type": "file", "LastModified": "2026-01-01"}
    monkeypatch.setattr(type(system), "ls", lambda self, path, **options: [row])
    with pytest.raises(StoreError, match="does not say which version of a file it holds"):
        store.store_client.listing(system, Address("ftp", "x"))


def test_failures_of_a_client_are_one_line_without_secrets(memory, monkeypatch):
    address = memory.put("a", CHECKPOINTS / KEPT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    text = "GET https://me:hunter2x@host/a?sig=hunter2x with wJalrXUtnFEMI\nand more"
    for error, why in (
        (PermissionError(text), "no right to do this"),
        (ConnectionError(text), "cannot be reached"),
        (RuntimeError(text), "the store refused: RuntimeError"),
        (ValueError(text), "cannot be asked"),
    ):

        def fail(self, *_, error=error, **__):
            raise error

        monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
        out = run_cli("verify", address)
        assert (out.returncode, out.stderr.count("\n")) == (5, 1)
        assert why in out.stderr
        for word in ("hunter2x", "wJalrXUtnFEMI", "and more"):
            assert word not in out.stderr


def test_redacting_twice_is_redacting_once():
    for text in ("ftp://a:b@c/d?e=f", "Bearer abc hf_abcdefgh", "s3://a/b?c"):
        once = secrets.redact(text)
        assert once != text
        assert secrets.redact(once) == once


def test_a_registry_in_a_store_is_the_one_on_disk(memory, tmp_path):
    files = {}
    for name in ("checkpoint-1000", "checkpoint-200", "checkpoint-30"):
        files |= files_of(CHECKPOINTS / KEPT, f"run/{name}/")
    files |= files_of(CHECKPOINTS / SEED_ONLY, "seeds/") | files_of(CHECKPOINTS / KEPT, ".hidden/x/")
    files["lora/adapter_config.json"] = b'{"peft_type": "LORA", "r": 8}'
    files["broken/adapter_config.json"] = b"{"
    for path, content in files.items():
        (tmp_path / "r" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / path).write_bytes(content)
    address = memory.put("r", files)
    _, here = run_json("verify", "-R", tmp_path / "r")
    _, there = run_json("verify", "-R", address, "--log", tmp_path / "log")
    as_here = json.loads(json.dumps(there).replace(address, str(tmp_path / "r")))
    for entry in (*here["checkpoints"], *as_here["checkpoints"]):
        command = (entry.pop("next") or {}).get("command", "")
        assert tmp_path.name in command or "record COPY" in command or not command  # which is made by other means
    assert as_here == here
    order = [entry["path"].rsplit("/", 1)[-1] for entry in here["checkpoints"]]
    assert order == ["broken", "checkpoint-30", "checkpoint-200", "checkpoint-1000", "seeds"]
    twice = vera_tools.verify(address, f"{address}/run", recursive=True)
    assert len(twice.checkpoints) == len(there["checkpoints"])
    parts = [vera_tools.verify(address, recursive=True, part=(n, 2)) for n in (1, 2)]
    assert sorted(entry.path for part in parts for entry in part.checkpoints) == sorted(
        entry["path"] for entry in there["checkpoints"]
    )


def test_a_log_knows_what_did_not_change_in_a_store(memory, tmp_path):
    address = memory.put("r/a", CHECKPOINTS / KEPT)
    memory.put("r/b", CHECKPOINTS / KEPT)
    base = memory.put("base", base_of(KEPT))

    def from_log():
        report = vera_tools.verify(memory / "r", recursive=True, base=base, log=tmp_path / "log")
        return report.from_log, [entry.verdict for entry in report.checkpoints]

    assert from_log() == (0, ["reproducible"] * 2)
    assert from_log() == (2, ["reproducible"] * 2)
    memory.put(f"r/a/{WEIGHTS}", (CHECKPOINTS / SEED_ONLY / WEIGHTS).read_bytes())
    assert from_log()[0] == 1
    memory.put("base", base_of(KEPT))  # the same bytes, written again: it may as well be another
    assert from_log()[0] == 0
    assert address in (tmp_path / "log").read_text()
    memory.put(f"r/a/{UNFINISHED}", b"")
    assert from_log() == (1, ["invalid", "reproducible"])
