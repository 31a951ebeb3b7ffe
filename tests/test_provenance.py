"""docs/provenance.md: its commands with the real model-signing and a local key; in-toto reads the statement."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, flip
from tests.command import run_cli

PAGE = (ROOT / "docs" / "provenance.md").read_text("utf-8")


@pytest.fixture
def place(tmp_path):
    """A folder with an adapter in it, and the environment in which the page's commands run."""
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "my-adapter")
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vera-tools"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_tools "$@"\n', "utf-8")
    program.chmod(0o755)
    return tmp_path


def run(place, script):
    environment = {**os.environ, "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-eux", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_signing_before_and_after_strip(place):
    for tool in ("model_signing", "openssl"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    (script,) = re.findall(r"<!-- with model-signing -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    result = run(place, script)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Verification succeeded") == 3
    assert re.search(r"left out +model\.sig", result.stdout)
    # and it is the signatures that say so: none holds for another folder, or after a change
    verify = "model_signing verify key {} --public_key key.pub --signature {} --ignore_unsigned_files"
    assert run(place, verify.format("small", "my-adapter/model.sig")).returncode != 0
    flip(place / "back" / "adapter_model.safetensors", -1)
    assert run(place, verify.format("back", "back.sig")).returncode != 0


@pytest.mark.slow
def test_in_totos_library_reads_a_statement(place, monkeypatch):
    statements = pytest.importorskip("in_toto_attestation.v1.statement")
    messages = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    formats = pytest.importorskip("google.protobuf.json_format")
    monkeypatch.chdir(place)
    assert run_cli("verify", "my-adapter", "--attest", "statement.json").returncode == 0
    message = formats.Parse((place / "statement.json").read_text("utf-8"), messages.Statement())
    statement = statements.Statement.copy_from_pb(message)
    statement.validate()
    assert statement.pb.predicate_type == "https://in-toto.io/attestation/svr/v0.1"
    assert "VERA_TOOLS_REPRODUCIBLE" in list(statement.pb.predicate["properties"])


def test_what_the_page_tells_people_to_copy_is_what_the_action_takes():
    import yaml

    (steps,) = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    action = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
    assert set(steps[0]["with"]) <= set(action["inputs"])
    assert steps[0]["with"]["attest"] == "statement.json"
    assert steps[2]["with"]["predicate-path"] == "predicate.json"
    (types,) = {*re.findall(r"https://in-toto\.io/attestation/svr/v[\d.]+\d", PAGE)}
    from vera_tools.verifying.attestation import PREDICATE

    assert types == PREDICATE
