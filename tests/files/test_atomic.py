"""A file or folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
import pathlib
import stat
import subprocess
import sys
import textwrap

import pytest

from tests.adapters import CHECKPOINTS, KEPT
from tests.command import run_cli
from vera_tools.checkpoints import destination
from vera_tools.errors import UsageError, VeraToolsError
from vera_tools.files import atomic, renaming


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_file_appears_with_what_was_written(tmp_path):
    atomic.write_bytes(tmp_path / "a", b"one")
    atomic.write_bytes(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert listing(tmp_path) == ["a"]


def test_a_new_file_has_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    atomic.write_bytes(tmp_path / "new", b"")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    atomic.write_bytes(tmp_path / "new", b"x")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "a").write_bytes(b"old")

    def write():
        with atomic.file(tmp_path / "a") as temporary:
            temporary.write_bytes(b"half")
            raise error

    expected = VeraToolsError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert listing(tmp_path) == ["a"]


def test_what_the_file_system_refuses_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VeraToolsError, match=r"could not be made: Not a directory; nothing was left half-written"):
        atomic.write_bytes(tmp_path / "file" / "b" / "a", b"")
    with pytest.raises(
        VeraToolsError, match=r"could not be written: File name too long.*nothing was left half-written"
    ):
        atomic.write_bytes(tmp_path / ("a" * 250), b"")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
@pytest.mark.parametrize("name", ["pipe", "stdout"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path, name):
    """Root's ``--junit /dev/null`` made /dev/null an ordinary file for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1" if sys.platform == "linux" else tmp_path / "pipe")
    before = os.lstat(tmp_path / name)
    for write in (
        lambda: atomic.write_bytes(tmp_path / name, b"x"),
        lambda: atomic.refuse_unwritable(tmp_path / name, atomic.JUNIT),
    ):
        with pytest.raises(UsageError, match="and a file is to be written"):
            write()
    assert os.lstat(tmp_path / name).st_ino == before.st_ino
    assert listing(tmp_path) == ["pipe", "stdout"]


def test_the_folder_of_a_file_is_made_as_that_of_a_folder_is(tmp_path):
    atomic.write_bytes(tmp_path / "reports" / "today" / "a", b"new")
    assert (tmp_path / "reports" / "today" / "a").read_bytes() == b"new"


def fill(path, **options):
    with atomic.folder(path, **options) as temporary:
        assert not any(temporary.iterdir())
        assert temporary.parent.parent == path.parent
        (temporary / "a").write_bytes(b"new")
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_bytes(b"new")


def test_a_folder_appears_whole(tmp_path):
    fill(tmp_path / "x" / "y" / "out")
    assert listing(tmp_path / "x" / "y") == ["out", "out/a", "out/b", "out/b/c"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "x" / "y" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_every_file_of_a_folder_is_flushed_before_it_appears(tmp_path, monkeypatch):
    out, flushed, fsync = tmp_path / "out", set(), os.fsync

    def noted(descriptor):
        if not out.exists():
            flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    fill(out)
    files = {path.stat().st_ino for path in out.rglob("*") if path.is_file()}
    assert files <= flushed
    assert len(files) == 2


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_exists_is_not_touched(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_bytes(b"old")
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"out: already exists; .*--overwrite"):
        fill(out)
    assert listing(tmp_path) == ["out"]
    assert out.is_symlink() == (kind == "dangling link")


def test_what_appears_meanwhile_is_not_touched(tmp_path):
    out = tmp_path / "out"

    def fill_while_another_does():
        with atomic.folder(out) as folder:
            (folder / "a").write_bytes(b"ours")
            out.mkdir()
            (out / "b").write_bytes(b"theirs")

    with pytest.raises(UsageError, match="already exists"):
        fill_while_another_does()
    assert listing(tmp_path) == ["out", "out/b"]


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_overwriting_replaces_the_whole_folder(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(renaming, "_function", lambda: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"old")
    fill(out, overwrite=True)
    assert listing(tmp_path) == ["out", "out/a", "out/b", "out/b/c"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_error_leaves_no_folder_or_the_old_one(tmp_path, overwrite):
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "old").write_bytes(b"old")

    def write():
        with atomic.folder(out, overwrite=overwrite) as temporary:
            (temporary / "a").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert listing(tmp_path) == (["out", "out/old"] if overwrite else [])


def test_a_failing_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(renaming, "_function", lambda: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"old")
    rename = type(out).rename

    def refuse(self, target):
        if self.parent.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(out), "rename", refuse)
    with pytest.raises(VeraToolsError, match="Input/output error"):
        fill(out, overwrite=True)
    assert listing(tmp_path) == ["out", "out/old"]


def test_a_killed_process_leaves_the_old_state_and_one_hidden_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    program = f"""
        import os, pathlib
        from vera_tools.files import atomic, renaming
        with atomic.folder(pathlib.Path({str(tmp_path / "out")!r}), overwrite=True) as temporary:
            (temporary / "a").write_bytes(b"half")
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 9
    assert (tmp_path / "out" / "old").read_bytes() == b"old"
    left = [path.name for path in tmp_path.iterdir() if path.name != "out"]
    assert len(left) == 1
    assert left[0].startswith(".out.")
    assert left[0].endswith(".tmp")


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders in one step is Linux's")
class TestReplacement:
    @pytest.fixture
    def old(self, tmp_path):
        folder = tmp_path / "ckpt"
        (folder / "runs").mkdir(parents=True)
        (folder / "runs" / "log").write_bytes(b"log")
        (folder / "weights").write_bytes(b"old")
        (folder / "README.md").write_bytes(b"card")
        (folder / "weights.bin").write_bytes(b"pickle")
        (folder / "link").symlink_to("README.md")
        (folder / "weights").chmod(0o604)
        (folder / "runs").chmod(0o750)
        folder.chmod(0o710)
        return folder

    def replace(self, path, **options):
        with atomic.replacement(path, **options) as temporary:
            (temporary / "weights").write_bytes(b"new")

    def test_new_files_replace_old_ones_and_the_rest_is_carried_over(self, old):
        card = (old / "README.md").stat().st_ino
        self.replace(old, drop=["weights.bin"])
        assert listing(old.parent) == [
            "ckpt",
            "ckpt/README.md",
            "ckpt/link",
            "ckpt/runs",
            "ckpt/runs/log",
            "ckpt/weights",
        ]
        assert (old / "weights").read_bytes() == b"new"
        assert (old / "README.md").stat().st_ino == card
        assert os.readlink(old / "link") == "README.md"
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (old, old / "weights", old / "runs")]
        assert modes == [0o710, 0o604, 0o750]

    def test_a_link_to_the_folder_stays_a_link(self, old, tmp_path):
        (tmp_path / "alias").symlink_to(old)
        self.replace(tmp_path / "alias")
        assert (tmp_path / "alias").is_symlink()
        assert (old / "weights").read_bytes() == b"new"

    def test_an_error_changes_nothing(self, old):
        before = listing(old.parent)

        def write():
            with atomic.replacement(old) as temporary:
                (temporary / "weights").write_bytes(b"half")
                raise RuntimeError

        with pytest.raises(RuntimeError):
            write()
        assert listing(old.parent) == before
        assert (old / "weights").read_bytes() == b"old"

    def test_a_system_without_the_exchange_is_told_so(self, old, monkeypatch):
        monkeypatch.setattr(renaming, "_function", lambda: None)
        with pytest.raises(UsageError, match=r"cannot replace a folder in one step; .* -o instead"):
            self.replace(old)
        assert (old / "weights").read_bytes() == b"old"
        assert [path.name for path in old.parent.iterdir()] == ["ckpt"]


class TestRefuseOutput:
    def test_an_empty_one(self):
        with pytest.raises(UsageError, match="the output is empty"):
            destination.refuse_output("", overwrite=True)

    def test_one_on_the_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="hf://ann/x: is on the Hub; name a local path"):
            destination.refuse_output("hf://ann/x", overwrite=True)
        assert run_cli("pull", "ann/x", "-o", "hf://ann/x").returncode == 2
        assert listing(tmp_path) == []

    def test_an_input_without_a_name_is_not_taken_for_this_folder(self, tmp_path):
        assert destination.refuse_output(tmp_path / "out", overwrite=False, inputs=("",)) == tmp_path / "out"

    @pytest.mark.parametrize("below", ["out", "a/b/out"])
    def test_below_a_file(self, below, tmp_path):
        (tmp_path / "f").write_text("x")
        with pytest.raises(UsageError, match=r"/f: is not a folder"):
            destination.refuse_output(tmp_path / "f" / below, overwrite=False)

    @pytest.mark.parametrize(
        ("output", "message"),
        [("in", "would replace"), (".", "would replace"), ("in/out", "lies inside"), ("in/a/out", "lies inside")],
    )
    def test_an_input(self, output, message, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "config.json").write_text("{}")
        inputs = (None, "hf://owner/name", tmp_path / "in")
        with pytest.raises(UsageError, match=message):
            destination.refuse_output(tmp_path / output, overwrite=True, inputs=inputs)
        (tmp_path / "link").symlink_to(tmp_path / "in")
        with pytest.raises(UsageError, match=message):
            destination.refuse_output(tmp_path / output, overwrite=True, inputs=(tmp_path / "link",))
        assert destination.refuse_output(tmp_path / "other", overwrite=False, inputs=inputs) == tmp_path / "other"

    @pytest.mark.parametrize("name", ["notes.txt", "deep/adapter_config.json"])
    def test_overwriting_what_no_tool_wrote(self, name, tmp_path):
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).write_text("x")
        with pytest.raises(UsageError, match="holds neither an adapter nor a model"):
            destination.refuse_output(tmp_path / "out", overwrite=True)

    @pytest.mark.parametrize("name", ["adapter_config.json", "config.json", "model-00001-of-00002.safetensors", None])
    def test_overwriting_what_a_tool_wrote_or_nothing(self, name, tmp_path):
        (tmp_path / "out").mkdir()
        if name:
            (tmp_path / "out" / name).write_text("x")
        assert destination.refuse_output(tmp_path / "out", overwrite=True) == tmp_path / "out"

    def test_a_file_by_a_folder_and_a_folder_by_a_file(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(UsageError, match="is a file, and a folder is to be written"):
            destination.refuse_output(tmp_path / "file", overwrite=True)
        with pytest.raises(UsageError, match="is a folder, and a file is to be written"):
            destination.refuse_output(tmp_path, overwrite=True, is_file=True)
        assert destination.refuse_output(tmp_path / "file", overwrite=True, is_file=True) == tmp_path / "file"


def test_a_parent_that_cannot_be_made_is_said_in_plain_words(tmp_path):
    with (
        pytest.raises(VeraToolsError, match=r"/sub: could not be made: "),
        atomic.folder(pathlib.Path("/proc/self/sub/out")),
    ):
        pass


EVERY_COMMAND = [
    ["strip-projections", "x"],
    ["embed-projections", "x"],
    ["convert", "--to", "lora", "x"],
    ["merge", "x", "--base", "x"],
    ["pull", "ann/x"],
    ["regenerate", "--checkpoint", "x"],
]


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda command: command[0])
def test_an_empty_output_is_named_by_every_command(command):
    kept = CHECKPOINTS / KEPT
    result = run_cli(*(kept if word == "x" else word for word in command), "-o", "")
    assert result.returncode == 2
    assert "the output is empty" in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="exchanging folders in one step is Linux's")
def test_what_lies_in_subfolders_is_there_from_the_moment_of_the_exchange(tmp_path):
    folder = tmp_path / "c"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "kept").write_text("x")
    seen = []
    with atomic.replacement(folder, check=lambda _: seen.append((folder / "a" / "b" / "kept").read_text())) as new:
        (new / "new").write_text("y")
    assert seen == ["x", "x"]  # before it, and after it
