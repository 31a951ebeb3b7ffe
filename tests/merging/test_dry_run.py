"""`merge --dry-run`: what it says is what the merge does then, what it refuses too; and nothing is written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import vera_tools
from tests.adapters import edit, files_of
from tests.command import run_cli, run_json
from tests.merging.models import make_adapter, make_base
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsError
from vera_tools.files import locking
from vera_tools.merging import staging

Q0 = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_base(tmp_path / "base", files=2)
    make_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(base, value):
    """Change one element of an adapted weight, in whichever file it lies."""
    for file in base.glob("*.safetensors"):
        edit(base, lambda tensors: [tensors[n].__setitem__((0, 0), value) for n in tensors if Q0 in n], file=file.name)


def test_it_tells_what_the_merge_does(place):
    before = files_of(place)
    code, planned = run_json("merge", "adapter", "--base", "base", "-o", "deep/er/out", "--dry-run")
    assert code == 0
    assert files_of(place) == before
    assert not (place / "deep").exists()
    result = run_cli("merge", "adapter", "--base", "base", "-o", "deep/er/out", "--dry-run")
    assert result.stdout.startswith("deep/er/out: would be merged; nothing was written\n")
    assert (
        f"to write  {planned['bytes']['total'] / 1000:.1f} kB of weights, {', '.join(planned['shards'])}\n"
        in result.stdout
    )
    code, done = run_json("merge", "adapter", "--base", "base", "-o", "deep/er/out")
    assert planned.pop("dry_run") is True
    assert (planned.pop("finished"), done.pop("finished")) == (False, True)
    assert planned["bytes"].pop("written") == 0
    assert done["bytes"].pop("written") == done["bytes"]["total"]
    del planned["seconds"], done["seconds"]
    assert planned == done


def test_what_the_merge_finds_while_it_computes(place):
    before = files_of(place)
    change(place / "base", np.nan)
    changed = files_of(place)
    assert changed != before
    for dry_run in (True, False):
        with pytest.raises(CheckFailedError, match="NaN or infinity"):
            vera_tools.merge("adapter", base="base", output="out", dry_run=dry_run)
    vera_tools.merge("adapter", base="base", output="out", dry_run=True, allow_nonfinite=True)
    assert files_of(place) == changed


def test_another_base_than_the_recorded_one(place):
    vera_tools.record("adapter", base="base")
    change(place / "base", 0.5)
    for dry_run in (True, False):
        with pytest.raises(CheckFailedError, match="recorded with"):
            vera_tools.merge("adapter", base="base", output="out", dry_run=dry_run)
    assert not (place / "out").exists()


def test_where_another_merge_is_at_work(place):
    folder = staging.place(place / "out")
    folder.mkdir()
    with (folder / "lock").open("wb") as lock:
        assert locking.take(lock.fileno())
        for dry_run in (True, False):
            with pytest.raises(UsageError, match="another merge is at work"):
                vera_tools.merge("adapter", base="base", output="out", dry_run=dry_run)
    (folder / "shared").touch()
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="have begun to fill this output"):
            vera_tools.merge("adapter", base="base", output="out", dry_run=dry_run)
    (folder / "plan").write_text("another")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="belongs to another merge"):
            vera_tools.merge("adapter", base="base", output="out", part=(1, 2), dry_run=dry_run)


def test_parts_room_and_rights(place, monkeypatch):
    parts = [vera_tools.merge("adapter", base="base", output="out", part=(n, 2), dry_run=True).shards for n in (1, 2)]
    assert sorted(name for part in parts for name in part) == sorted(
        path.name for path in (place / "base").glob("*.safetensors")
    )
    for options in ({"resume": True}, {"finish": True}):
        with pytest.raises(UsageError, match="goes on from nothing"):
            vera_tools.merge("adapter", base="base", output="out", dry_run=True, **options)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(VeraToolsError, match="too little room"):
            vera_tools.merge("adapter", base="base", output="out", dry_run=True)
    monkeypatch.setattr("vera_tools.files.atomic.os.access", lambda *_: False)
    with pytest.raises(VeraToolsError, match="Permission denied"):
        vera_tools.merge("adapter", base="base", output="out", dry_run=True)
