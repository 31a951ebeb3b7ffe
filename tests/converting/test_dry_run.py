"""`strip-projections --dry-run`: what it says is what the command does then, and nothing is written."""

from __future__ import annotations

import shutil
import sys
import tempfile

import pytest

from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, WEIGHTS, files_of, flip
from tests.command import run_cli, run_json
from vera_tools import strip_projections
from vera_tools.errors import VeraToolsError

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """One that can be stripped, one that drifts, one that is stripped; and whatever is written, anywhere."""
    for name, source in (("good", KEPT), ("drift", KEPT), ("seeds", SEED_ONLY)):
        shutil.copytree(CHECKPOINTS / source, tmp_path / "r" / name)
    flip(tmp_path / "r" / "drift" / WEIGHTS, -5000)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", [("--out-dir", "out"), ("--in-place",)])
def test_a_registry(registry, where):
    if where == ("--in-place",) and sys.platform != "linux":
        pytest.skip("exchanging folders in one step is Linux's")
    before = files_of(registry)
    code, planned = run_json("strip-projections", "-R", "r", *where, "--dry-run")
    assert files_of(registry) == before
    assert planned["dry_run"] is True
    result = run_cli("strip-projections", "-R", "r", *where, "--dry-run")
    assert result.returncode == code == 1
    assert "r/good: would be converted, " in result.stdout
    assert "3 checkpoints: 1 converted, 1 unchanged, 1 failed; dry run, nothing was written\n" in result.stdout
    done_code, done = run_json("strip-projections", "-R", "r", *where)
    assert files_of(registry) != before
    del planned["dry_run"]
    for item in planned["checkpoints"]:
        if item["report"]:
            assert item["report"].pop("dry_run") is True
    assert (done, done_code) == (planned, code)  # to the byte counts


def test_one(registry):
    before = files_of(registry)
    result = run_cli("strip-projections", "r/good", "-o", "out/small", "--dry-run")
    assert result.returncode == 0
    assert "out/small: would be stripped; nothing was written\n" in result.stdout
    assert files_of(registry) == before
    assert not (registry / "out").exists()
    for arguments, code in (
        (("r/drift", "-o", "out"), 1),
        (("r/seeds", "-o", "out"), 2),
        (("r/good", "-o", "r"), 2),
        (("r/good", "-o", "r/good/x"), 2),
        (("gone", "-o", "out"), 2),
    ):
        for options in ((), ("--dry-run",)):
            assert run_cli("strip-projections", *arguments, *options).returncode == code
    assert files_of(registry) == before


def test_where_nothing_can_be_written(registry, monkeypatch):
    monkeypatch.setattr("vera_tools.files.atomic.os.access", lambda path, _: str(path) != str(registry))
    with pytest.raises(VeraToolsError, match=r"out: could not be written: Permission denied") as caught:
        strip_projections("r/good", "out", dry_run=True)
    assert caught.value.exit_code == 1


def test_a_change_meanwhile_is_found(registry, monkeypatch):
    from vera_tools.converting import strip

    write = strip.write_checkpoint

    def meanwhile(*args, **kwargs):
        flip(registry / "r" / "good" / WEIGHTS, -1)
        return write(*args, **kwargs)

    monkeypatch.setattr(strip, "write_checkpoint", meanwhile)
    with pytest.raises(VeraToolsError, match="changed while"):
        strip_projections("r/good", "out", dry_run=True)
