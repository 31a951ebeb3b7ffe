"""`env`: what this machine is, for people and as a document, with and without torch."""

from __future__ import annotations

import json
import sys

from tests.command import run_cli
from vera_tools import schema


def test_text_and_document(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    result = run_cli("env", "--json")
    assert result.returncode == 0
    document = json.loads(result.stdout)
    schema.validate(document, "env.v1", where="env")
    assert document["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["packages"]["numpy"]
    text = run_cli("env").stdout
    assert f"numpy {document['packages']['numpy']}" in text
    assert f"  platform  {document['platform'] or 'none'}" in text
    if document["draws"]:
        assert f"  draws     {document['draws']['recipe']}, as torch " in text


def test_on_linux_without_avx2_it_says_so(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("vera_tools.installed.version", lambda name: "2.13.0" if name == "torch" else None)
    text = run_cli("env").stdout
    assert "kernels default (ATEN_CPU_CAPABILITY)" in text
    assert "  platform  linux-x86_64-without-avx2 (Linux without AVX2)" in text
    assert "  draws     mt19937-f32-separate, as torch 1.13 to 2.15 does here (drawn)" in text
    assert "missing   numpy, peft" in text


def test_without_torch(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("vera_tools.installed.version", lambda name: None)
    text = run_cli("env").stdout
    assert "  draws     no torch here" in text
    assert "            torch 1.13 to 2.1: separate (machine code)" in text
    assert "            torch 2.2 to 2.15: fused (machine code)" in text
