"""Other processes in the same folder: what comes meanwhile, who is first, what the killed leave, whose it stays."""

# ruff: noqa: PT012, PT031 - what is raised or warned of comes at the end of the block

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

import vera_tools
from tests.merging.models import make_adapter
from vera_tools.errors import LeftoverWarning, UsageError
from vera_tools.files import atomic

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step")


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_comes_while_a_folder_is_replaced_is_carried_over(tmp_path):
    """Before the exchange, seen by nobody, and through the old folder's name until the last moment."""
    folder = tmp_path / "x"
    (folder / "runs").mkdir(parents=True)
    for name in ("weights", "notes", "runs/log"):
        (folder / name).write_text("old")

    def come(at):
        (at / "new").write_text("new")
        (at / "runs" / "new").write_text("new")
        (at / "more").mkdir(exist_ok=True)
        (at / "more" / "new").write_text("new")
        (at / ".notes").write_text("new")
        (at / ".notes").replace(at / "notes")  # another file in its place

    with atomic.replacement(folder, check=come) as temporary:
        (temporary / "weights").write_text("ours")
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == {
        "weights": "ours",
        "notes": "new",
        "new": "new",
        "runs/log": "old",
        "runs/new": "new",
        "more/new": "new",
    }
    assert hidden(tmp_path) == []


def test_files_that_appear_during_a_real_conversion(tmp_path):
    for number in range(10):
        source, stop, made = make_adapter(tmp_path / str(number)), threading.Event(), []

        def appear(source=source, stop=stop, made=made):
            while not stop.is_set():
                path = source / f"file{len(made)}"
                try:
                    path.write_text("x")
                except FileNotFoundError:
                    continue
                made.append(path.name)

        thread = threading.Thread(target=appear)
        thread.start()
        vera_tools.strip_projections(source, in_place=True)
        stop.set()
        thread.join()
        assert set(made) <= {path.name for path in source.iterdir()}


def test_of_two_that_write_to_one_output_one_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="already exists"), atomic.folder(out) as second:
        with atomic.folder(out) as first:
            (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert (out / "a").read_text() == "first"
    with pytest.raises(UsageError, match="already exists"), atomic.file(tmp_path / "f", overwrite=False) as second:
        (tmp_path / "f").write_text("first")
        second.write_text("second")
    assert (tmp_path / "f").read_text() == "first"
    assert hidden(tmp_path) == []


def kill_within(out):
    program = f"""
        import os, pathlib
        from vera_tools.files import atomic
        with atomic.folder(pathlib.Path({str(out)!r})) as temporary:
            (temporary / "a").write_bytes(b"half")
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 9


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    kill_within(tmp_path / "out")
    kill_within(tmp_path / "other")
    assert len(hidden(tmp_path)) == 2
    with (
        pytest.warns(LeftoverWarning, match=r"\.out\..*removed what a run that was killed"),
        atomic.folder(tmp_path / "out"),
    ):
        pass
    (left,) = hidden(tmp_path)
    assert left.startswith(".other.")


def test_what_somebody_works_in_or_made_otherwise_stays(tmp_path):
    foreign = tmp_path / ".out.abcdefgh.tmp"
    foreign.mkdir()
    (foreign / "lock").write_text("another program's")
    os.utime(foreign, (0, 0))
    with pytest.warns(LeftoverWarning, match="delete it where none is"), atomic.folder(tmp_path / "out") as first:
        with pytest.warns(LeftoverWarning, match="abcdefgh"), atomic.folder(tmp_path / "out", overwrite=True) as second:
            assert first.exists()
            (second / "a").touch()
        assert first.exists()
        (tmp_path / "out" / "a").unlink()
        (tmp_path / "out").rmdir()
    assert foreign.exists()


def test_a_shared_folders_group_stays(tmp_path):
    folder = tmp_path / "x"
    make_adapter(folder)
    folder.chmod(0o2770)
    (folder / "adapter_config.json").chmod(0o664)
    try:
        os.setxattr(folder / "adapter_config.json", "user.origin", b"ann")
    except OSError:
        pytest.skip("no extended attributes here")
    if os.geteuid() == 0:
        for path in (folder, *folder.iterdir()):
            os.chown(path, 12345, 23456)
        folder.chmod(0o2770)
    vera_tools.strip_projections(folder, in_place=True)
    vera_tools.record(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
    config = folder / "adapter_config.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o664
    assert os.getxattr(config, "user.origin") == b"ann"
    if os.geteuid() == 0:
        assert {p.stat().st_gid for p in (folder, *folder.iterdir())} == {23456}
        assert folder.stat().st_uid == 12345
