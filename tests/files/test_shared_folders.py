"""Other processes in the same folder: what comes meanwhile, who is first, what the killed leave, whose it stays."""

# ruff: noqa: PT012, PT031 - what is raised or warned of comes at the end of the block

from __future__ import annotations

import os
import pathlib
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading

import pytest

import vera_tools
from tests.adapters import files_of
from tests.merging.models import make_adapter
from vera_tools.checkpoints.writing import replaced_files
from vera_tools.errors import FormatError, LeftoverWarning, UsageError
from vera_tools.files import atomic, attributes

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
        assert (folder / "notes").exists()  # at every moment, before the exchange and after it
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


def test_what_is_written_in_the_last_moment_before_the_exchange_comes_back(tmp_path, monkeypatch):
    folder, exchange, calls = make_adapter(tmp_path / "x"), atomic.exchange, []
    before = files_of(folder)

    def exchanging(a, b):
        if not calls:
            (folder / "adapter_config.json").write_bytes(before["adapter_config.json"] + b" ")
        calls.append(a)
        exchange(a, b)

    monkeypatch.setattr(atomic, "exchange", exchanging)
    with pytest.raises(FormatError, match="was changed while it was read"):
        vera_tools.strip_projections(folder, in_place=True)
    assert len(calls) == 2
    assert files_of(folder) == {**before, "adapter_config.json": before["adapter_config.json"] + b" "}


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
    kill_within(tmp_path / "oth")  # as long a name
    assert len(hidden(tmp_path)) == 2
    with (
        pytest.warns(LeftoverWarning, match=r"\.out\..*removed what a run that was killed"),
        atomic.folder(tmp_path / "out"),
    ):
        pass
    (left,) = hidden(tmp_path)
    assert left.startswith(".oth.")


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


@pytest.fixture
def open_path():
    """A folder that other users can be let into: pytest's own lie in one that is closed to them."""
    with tempfile.TemporaryDirectory() as name:
        yield pathlib.Path(name)


def test_the_attributes_of_a_read_only_file_stay(open_path):
    """Whoever may not write to a file may not set its attributes: they come before the permissions."""
    old, new = open_path / "old", open_path / "new"
    for path in (old, new):
        path.touch()
    try:
        os.setxattr(old, "user.origin", b"ann")
    except OSError:
        pytest.skip("no extended attributes here")
    old.chmod(0o440)
    user = os.geteuid()
    if user == 0:  # who may do everything
        for path in (open_path, old, new):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
        if not os.access(old, os.R_OK, effective_ids=True):
            os.seteuid(user)
            pytest.skip("another user does not get here")
    try:
        attributes.keep(old, new)
    finally:
        os.seteuid(user)
    assert os.getxattr(new, "user.origin") == b"ann"
    assert stat.S_IMODE(new.stat().st_mode) == 0o440


@pytest.mark.parametrize("command", ["strip in place", "embed in place", "record", "save", "strip over it", "pull"])
def test_whatever_writes_keeps_what_a_folder_and_its_files_have(tmp_path, command, hub):
    folder, other = make_adapter(tmp_path / "x"), make_adapter(tmp_path / "other", seed=2)
    if command == "embed in place":
        vera_tools.strip_projections(folder, in_place=True)
    vera_tools.record(folder)
    replaced = command in ("strip over it", "pull")  # as a whole: what is in it is new
    names = [] if replaced else ["adapter_config.json", "adapter_model.safetensors", "vera_manifest.json"]
    root = os.geteuid() == 0
    try:
        for path in (folder, *(folder / name for name in names)):
            os.setxattr(path, "user.origin", b"ann")
            if root:
                os.chown(path, 12345, 23456)
            path.chmod(0o2770 if path == folder else 0o664)
    except OSError:
        pytest.skip("no extended attributes here")
    if command == "strip in place":
        vera_tools.strip_projections(folder, in_place=True)
    elif command == "embed in place":
        vera_tools.embed_projections(folder, in_place=True)
    elif command == "record":
        vera_tools.record(folder)
    elif command == "save":
        with replaced_files(folder) as scratch:
            vera_tools.strip_projections(other, scratch / "in")
            for path in (scratch / "in").iterdir():
                path.rename(scratch / path.name)
    elif command == "strip over it":
        vera_tools.strip_projections(other, folder, overwrite=True)
    else:
        hub.add_repo("ann/x", files_of(other))
        vera_tools.pull("ann/x", folder, overwrite=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2770
    for path in (folder, *(folder / name for name in names)):
        assert os.getxattr(path, "user.origin") == b"ann", path
        if path != folder:
            assert stat.S_IMODE(path.stat().st_mode) == 0o664, path
        if root:
            assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456), path
    if root:
        assert {path.stat().st_gid for path in folder.iterdir()} == {23456}
