"""What `verify` shows and writes where names, paths and terminals are not what one would wish."""

from __future__ import annotations

import shutil

import pytest

from tests.conftest import CHECKPOINTS, run_json
from vera_tools import verify
from vera_tools.errors import FormatError

KEPT = CHECKPOINTS / "peft-0.21.2-llama-f32-kept"


def test_a_recursive_search_counts_each_real_folder_once(tmp_path):
    registry = tmp_path / "registry"
    shutil.copytree(KEPT, registry / "own")
    shutil.copytree(KEPT, tmp_path / "real")
    (registry / "x").symlink_to(tmp_path / "real", target_is_directory=True)
    (registry / "y").symlink_to(tmp_path / "real", target_is_directory=True)
    code, document = run_json("verify", "-R", registry, registry, tmp_path / "real")
    assert code == 0
    assert [found["path"] for found in document["checkpoints"]] == [str(registry / "own"), str(registry / "x")]
    assert len(verify(KEPT, KEPT).checkpoints) == 2


def test_a_recursive_search_names_a_config_that_leads_nowhere(tmp_path):
    shutil.copytree(KEPT, tmp_path / "good")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "adapter_config.json").symlink_to("/nowhere/at/all")
    code, document = run_json("verify", "-R", tmp_path)
    assert code == 4
    assert "broken link to /nowhere/at/all" in document["checkpoints"][0]["checks"][0]["message"]


def test_a_folder_without_any_is_said(tmp_path):
    with pytest.raises(FormatError, match=r"no adapter_config\.json"):
        verify(tmp_path, recursive=True)
