"""What `verify` shows and writes where names, paths and terminals are not what one would wish."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.adapters import CHECKPOINTS, KEPT, edit
from tests.command import plain, run_cli, run_json, run_terminal
from vera_tools import verify
from vera_tools.errors import FormatError

SOURCE = CHECKPOINTS / KEPT


def test_a_recursive_search_counts_each_real_folder_once(tmp_path):
    registry = tmp_path / "registry"
    shutil.copytree(SOURCE, registry / "own")
    shutil.copytree(SOURCE, tmp_path / "real")
    (registry / "x").symlink_to(tmp_path / "real", target_is_directory=True)
    (registry / "y").symlink_to(tmp_path / "real", target_is_directory=True)
    code, document = run_json("verify", "-R", registry, registry, tmp_path / "real")
    assert code == 0
    assert [found["path"] for found in document["checkpoints"]] == [str(registry / "own"), str(registry / "x")]
    assert len(verify(SOURCE, SOURCE).checkpoints) == 2


def test_a_recursive_search_names_a_config_that_leads_nowhere(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "good")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "adapter_config.json").symlink_to("/nowhere/at/all")
    code, document = run_json("verify", "-R", tmp_path)
    assert code == 4
    assert "broken link to /nowhere/at/all" in document["checkpoints"][0]["checks"][0]["message"]


@pytest.mark.skipif(os.name != "posix", reason="paths have another limit")
def test_a_folder_that_cannot_be_listed_is_one_invalid_checkpoint(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "good")
    below = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # a path of more than 4096 bytes, which even root cannot open by its name
        os.mkdir("d" * 250, dir_fd=below)
        parent, below = below, os.open("d" * 250, os.O_RDONLY, dir_fd=below)
        os.close(parent)
    os.close(below)
    code, document = run_json("verify", "-R", tmp_path)
    closed, good = document["checkpoints"]
    assert (code, good["verdict"], closed["verdict"]) == (4, "reproducible", "invalid")
    assert "cannot be read: File name too long" in closed["checks"][0]["message"]
    code, document = run_json("strip-projections", "-R", tmp_path, "--out-dir", tmp_path.parent / "stripped")
    assert [item["status"] for item in document["checkpoints"]] == ["failed", "converted"]
    assert code == 4


def test_an_empty_name_is_refused(tmp_path):
    """An unset variable must not stand for the current folder, which may hold a sound checkpoint."""
    for arguments in (
        ["verify", ""],
        ["verify", "-R", ""],
        ["inspect", ""],
        ["strip-projections", "-R", "", "--out-dir", tmp_path / "o"],
    ):
        result = run_cli(*arguments, cwd=SOURCE)
        assert (result.returncode, "the name is empty" in result.stderr) == (2, True)


def test_a_folder_without_any_is_said(tmp_path):
    with pytest.raises(FormatError, match=r"no adapter_config\.json"):
        verify(tmp_path, recursive=True)


HOSTILE = "base_model.model.\x1b[2J\x00\ufffe\u202e\r\nx: REPRODUCIBLE"


@pytest.fixture
def hostile(checkpoint):
    """A checkpoint with a tensor whose name would steer a terminal, in a folder whose name is not UTF-8."""
    folder = checkpoint(KEPT)
    folder = folder.rename(folder.parent / os.fsdecode(b"b\xff\x01d"))
    edit(folder, lambda tensors: tensors.update({HOSTILE: np.zeros(1, np.float32)}))
    return folder


def test_junit_is_xml_whatever_the_names_are(hostile, tmp_path):
    result = run_cli("verify", hostile, "--junit", tmp_path / "junit.xml")
    assert "Traceback" not in result.stderr
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert suite.get("name").endswith("b\\udcff\\x01d")
    assert "\\x1b[2J\\x00\\ufffe\\u202e\\r\\n" in ElementTree.tostring(suite, encoding="unicode")


@pytest.mark.skipif(os.name != "posix", reason="no pipes of this kind")
def test_nobody_reading_on_is_not_drift():
    """`verify ... | head -1`: rich would exit with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vera_tools", "verify", str(SOURCE)]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.skipif(os.name != "posix", reason="no shell of this kind")
def test_a_closed_output_is_no_traceback():
    for streams in (">&-", ">&- 2>&-", ">&- --json"):
        command = f"{shlex.quote(sys.executable)} -m vera_tools verify {shlex.quote(str(SOURCE))} {streams}"
        result = subprocess.run(["sh", "-c", command], capture_output=True, check=False)
        assert (result.returncode, result.stderr) == (0, b"")


def test_names_steer_no_terminal(hostile):
    code, shown = run_terminal("verify", hostile, "-v", columns=300)
    assert code == 1
    assert "\\x1b[2J\\x00" in shown
    assert all(line.isprintable() for line in plain(shown).splitlines())
    assert not [line for line in shown.splitlines() if line.startswith("x: ")]


def test_a_log_takes_any_path(hostile, tmp_path):
    run_cli("verify", hostile, hostile, "--log", tmp_path / "log")
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == [str(hostile)] * 2


def test_on_a_narrow_terminal_each_loader_has_a_line_of_its_own():
    _, shown = run_terminal("verify", SOURCE, "-v", columns=40)
    text = " ".join(plain(shown).split())
    assert "vera-tools: float32 yes, bfloat16" in text
    _, wide = run_terminal("verify", SOURCE, "-v", columns=80)
    assert re.search(r"loads exactly, by dtype of the base +float32  bfloat16", plain(wide))
