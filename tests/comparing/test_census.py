"""What many checkpoints are together."""

from __future__ import annotations

import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, edit
from tests.command import run_cli, run_json
from vera_tools import schema
from vera_tools.errors import FormatError, UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two copies, one that was trained on, one that was stripped, one of which nothing is recorded, and others."""
    root = tmp_path_factory.mktemp("registry")
    for name in ("one", "two", "moved", "cut"):
        shutil.copytree(CHECKPOINTS / KEPT, root / "in" / name)
    edit(root / "in" / "moved", lambda tensors: next(t for n, t in tensors.items() if n not in PAIR).__imul__(2))
    (root / "in" / "cut" / "adapter_model.safetensors").write_bytes(b"")
    vera_tools.strip_projections(root / "in" / "one", root / "stripped")
    shutil.copytree(CHECKPOINTS / SEED_ONLY, root / "seeds")
    (root / "other").mkdir()
    (root / "other" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    return root


def test_what_is_there(root):
    report = vera_tools.census(root, recursive=True)
    document = report.to_dict()
    schema.validate(document, "census.v1", where="report")
    of = {entry.path.rsplit("/")[-1]: entry for entry in report.checkpoints}
    assert {name: entry.pair for name, entry in of.items()} == {
        "one": "stored",
        "two": "stored",
        "moved": "stored",
        "stripped": "recorded",
        "seeds": "unrecorded",
    }
    assert document["duplicates"] == [[str(root / "in" / "one"), str(root / "in" / "two")]]  # not the one that moved
    assert of["one"].identity == of["stripped"].identity != of["seeds"].identity
    assert [count for _, count in report.pairs] == [4, 1]
    single = vera_tools.inspect(root / "in" / "one")
    assert of["one"].pair_bytes == single.projection_bytes
    assert (of["one"].vector_parameters, of["one"].file_bytes) == (single.vector_parameters, single.file_bytes)
    total = document["summary"]
    assert total["stripping_saves"] == 3 * single.projection_bytes
    assert total["bytes"] == sum(entry.file_bytes for entry in report.checkpoints)
    assert (total["checkpoints"], total["skipped"], total["failed"], total["duplicates"]) == (5, 1, 1, 1)
    assert dict(report.skipped) == {str(root / "other"): "LORA"}
    assert report.failed[0][0] == str(root / "in" / "cut")
    assert report.exit_code == 4
    assert vera_tools.census(root / "in" / "one", root / "in" / "two").exit_code == 0


def test_keys_that_seed_the_same_are_one(root, tmp_path):
    for name, key in (("a", "101"), ("b", str(101 + 2**32))):
        config = shutil.copytree(root / "in" / "one", tmp_path / name) / "adapter_config.json"
        text = config.read_text()
        assert '"projection_prng_key": 101' in text
        config.write_text(text.replace('"projection_prng_key": 101', f'"projection_prng_key": {key}'))
    assert len(vera_tools.census(tmp_path, recursive=True).pairs) == 1


def test_the_command(root, tmp_path):
    code, document = run_json("inspect", "-R", root)
    assert (code, document) == (4, vera_tools.census(root, recursive=True).to_dict())
    shown = run_cli("inspect", root / "in" / "one", root / "in" / "two").stdout
    assert "2 VeRA checkpoints" in shown
    assert "1 weights files are byte for byte another one's" in shown
    assert "key 101, 64 x 64, float32, stored" in run_cli("inspect", "-v", "-R", root).stdout
    assert run_cli("inspect", "-R", root, "--base", root).returncode == 2
    (tmp_path / "empty").mkdir()
    assert run_cli("inspect", "-R", tmp_path / "empty").returncode == 4
    with pytest.raises(FormatError, match="no adapter_config"):
        vera_tools.census(tmp_path / "empty", recursive=True)
    with pytest.raises(UsageError, match="no checkpoint given"):
        vera_tools.census()
