"""`verify --attest`: an in-toto statement with a simple verification result, on what was read and what passed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, WEIGHTS, base_of, edit, files_of, flip, take_as_live
from tests.command import run_cli, run_json
from vera_tools import schema
from vera_tools.errors import CheckFailedError, UsageError
from vera_tools.verifying import attestation
from vera_tools.verifying.check_ids import CHECK_IDS

NOW = datetime.datetime(2030, 1, 2, 3, 4, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=1)))


@pytest.fixture
def adapters(tmp_path, monkeypatch):
    """A recorded one, one without a manifest, a seed-only one, in the current folder."""
    for name in ("recorded", "kept"):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "seeds")
    vera_tools.record(tmp_path / "recorded")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def attested(*arguments):
    result = run_cli("verify", *arguments, "--attest", "statement.json")
    assert result.returncode == 0, result.stderr
    document = json.loads(Path("statement.json").read_text("utf-8"))
    schema.validate(document, "attestation.v1", where="statement.json")
    return document


def test_subjects_are_the_files_that_were_read(adapters):
    document = attested("recorded")
    expected = {
        f"recorded/{name}": hashlib.sha256((adapters / "recorded" / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors", "vera_manifest.json")
    }
    assert {subject["name"]: subject["digest"]["sha256"] for subject in document["subject"]} == expected
    assert document["predicate"]["verifier"] == {"id": f"pkg:pypi/vera-tools@{vera_tools.__version__}"}
    at = datetime.datetime.strptime(document["predicate"]["timeCreated"], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(at - datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)) < datetime.timedelta(minutes=5)
    one = attested(f"kept/{WEIGHTS}")
    names = [subject["name"] for subject in one["subject"]]
    assert names == ["kept/adapter_config.json", "kept/adapter_model.safetensors"]


def test_properties_are_what_passed(adapters):
    properties = attested("recorded", "--require-loads", "peft>=0.21:float32")["predicate"]["properties"]
    report = vera_tools.verify("recorded").checkpoints[0]
    passed = {check.id for check in report.checks if check.status == "pass"} - {"projections.match"}
    expected = {f"VERA_TOOLS_{name.upper().replace('.', '_')}" for name in passed}
    assert set(properties) == expected | {"VERA_TOOLS_REPRODUCIBLE", "VERA_TOOLS_LOADS_EXACTLY:peft>=0.21:float32"}
    assert "VERA_TOOLS_MANIFEST_TENSORS" in expected
    assert len({name.upper().replace(".", "_") for name in CHECK_IDS}) == len(CHECK_IDS)  # no two are called alike


def test_of_several_it_is_what_holds_of_all(adapters):
    document = attested("recorded", "kept")
    assert len(document["subject"]) == 5
    properties = document["predicate"]["properties"]
    assert "VERA_TOOLS_REPRODUCIBLE" in properties
    assert not [name for name in properties if name.startswith("VERA_TOOLS_MANIFEST")]
    document = attested("kept", "seeds", "--require", "unproven")
    assert "VERA_TOOLS_REPRODUCIBLE" not in document["predicate"]["properties"]
    assert "VERA_TOOLS_TENSORS_SHAPES" in document["predicate"]["properties"]


def test_a_base_is_no_subject_and_nothing_is_said_of_it(adapters):
    document = attested("kept", "--base", base_of(KEPT))
    assert not [name for name in document["predicate"]["properties"] if "BASE" in name]


@pytest.mark.parametrize("how", ["fails", "drifts", "gate", "gone", "interrupted"])
def test_nothing_is_attested_where_something_failed_and_an_old_one_is_gone(adapters, monkeypatch, how):
    attested("kept")
    arguments, code = ["kept"], 1
    if how == "fails":
        edit(
            adapters / "kept", lambda tensors: tensors.__setitem__("base_model.model.odd", tensors["base_model.vera_A"])
        )
    elif how == "drifts":
        flip(adapters / "kept" / WEIGHTS, -5000)
    elif how == "gate":
        arguments += ["--require-loads", "peft<0.21:bfloat16"]
    elif how == "gone":
        arguments, code = ["-"], 4
    else:
        monkeypatch.setattr("vera_tools.verify", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        code = 130
    result = run_cli("verify", *arguments, "--attest", "statement.json", input="kept\nnowhere\n")
    assert result.returncode == code
    assert not Path("statement.json").exists()
    if how != "interrupted":
        assert "statement.json: not written, because not everything passed\n" in result.stderr


def test_what_is_no_attestation_is_not_replaced(adapters):
    (adapters / "other.json").write_text('{"_type": "https://in-toto.io/Statement/v1"}')
    before = files_of(adapters)
    for name, words in ((f"kept/{WEIGHTS}", "no attestation"), ("other.json", "no attestation"), ("no/x", "no folder")):
        result = run_cli("verify", "kept", "--attest", name)
        assert result.returncode == 2
        assert words in result.stderr
    assert files_of(adapters) == before


def test_what_does_not_go_together(adapters):
    for options in (("--log", "log.jsonl"), ("--log", "-"), ("--format", "jsonl")):
        assert run_cli("verify", "kept", "--attest", "statement.json", *options).returncode == 2
    with pytest.raises(UsageError, match="digests"):
        attestation.statement(vera_tools.verify("kept"), at=NOW)
    with pytest.raises(CheckFailedError):
        attestation.statement(vera_tools.verify("seeds", file_digests=True), at=NOW)


def test_a_change_while_it_is_read_is_no_attestation(adapters, monkeypatch):
    from vera_tools.verifying import verifier

    digests = verifier._digests_of_files

    def meanwhile(checkpoint):
        (adapters / "kept" / "adapter_config.json").write_text("{}")
        return digests(checkpoint)

    monkeypatch.setattr(verifier, "_digests_of_files", meanwhile)
    result = run_cli("verify", "kept", "--attest", "statement.json")
    assert result.returncode == 4
    assert not Path("statement.json").exists()


def test_workers_hash_too(adapters):
    take_as_live(adapters / "recorded")
    with ThreadPoolExecutor(2) as pool:
        report = vera_tools.verify("recorded", "kept", executor=pool, file_digests=True)
    document = attestation.statement(report, at=NOW)
    assert document["predicate"]["timeCreated"] == "2030-01-02T02:04:05Z"
    assert len(document["subject"]) == 5
    code, document = run_json("verify", "recorded", "kept", "--attest", "statement.json", "--jobs", "2")
    assert code == 0
    assert [len(checkpoint["files"]) for checkpoint in document["checkpoints"]] == [3, 2]
    again = type(report.checkpoints[0]).from_dict(report.checkpoints[0].to_dict())
    assert again == report.checkpoints[0]


def test_where_nothing_is_verified_there_is_nothing_to_attest(adapters):
    lora = adapters / "others" / "lora"
    lora.mkdir(parents=True)
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    result = run_cli("verify", "-R", "others", "--attest", "statement.json")
    assert result.returncode == 2
    assert "nothing was verified" in result.stderr
    assert not Path("statement.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="names that are no text are POSIX's")
def test_a_name_that_is_no_text(adapters):
    os.rename(b"kept", b"k\xff")
    result = run_cli("verify", os.fsdecode(b"k\xff"), "--attest", "statement.json")
    assert result.returncode == 1
    assert "not UTF-8" in result.stderr
    assert not Path("statement.json").exists()
