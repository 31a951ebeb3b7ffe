"""The bounded cache: what goes first, what stays, and what processes do to each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vera_tools.errors import UsageError, VeraToolsError
from vera_tools.serving.cache import Cache

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files in use cannot be removed on Windows")


def keep(cache, key, size=100):
    with cache.alone() as work:
        (work / "made").mkdir()
        (work / "made" / "file").write_bytes(b"x" * size)
        return cache.keep(key, work / "made")


def find(cache, key):
    with cache.alone():
        return cache.find(key)


def kept(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_one_that_was_not_used_for_longest_goes_first(tmp_path):
    for key in ("a", "b", "c"):
        keep(Cache(tmp_path, 300), key)
    assert find(Cache(tmp_path, 300), "a") == tmp_path / "a"
    keep(Cache(tmp_path, 300), "d", 150)
    assert kept(tmp_path) == ["a", "d"]
    assert sorted(path.name for path in tmp_path.glob("*.entry")) == ["a.entry", "d.entry"]


def test_what_is_in_use_stays(tmp_path):
    serving = Cache(tmp_path, 200)
    keep(serving, "a")
    keep(Cache(tmp_path, 200), "b")
    keep(Cache(tmp_path, 200), "c")
    assert kept(tmp_path) == ["a", "c"]
    keep(serving, "d")
    with pytest.raises(VeraToolsError, match="no room for it") as caught:
        keep(Cache(tmp_path, 200), "e")
    assert "expected at most 200 bytes" in str(caught.value)
    assert kept(tmp_path) == ["a", "d"]
    del serving
    keep(Cache(tmp_path, 200), "e")
    assert "e" in kept(tmp_path)


def test_what_is_made_anew_is_still_in_use(tmp_path):
    """Damaged on disk, while a process serves from it: who replaces it must not let a third one remove it."""
    serving = Cache(tmp_path, 200)
    keep(serving, "a")
    (tmp_path / "a" / "file").write_bytes(b"y" * 100)
    other = Cache(tmp_path, 200)
    assert find(other, "a") is None
    keep(other, "a")
    del other
    with pytest.raises(VeraToolsError, match="no room for it"):
        keep(Cache(tmp_path, 200), "b", 150)
    assert find(serving, "a") == tmp_path / "a"


def test_what_is_larger_than_all_removes_nothing(tmp_path):
    keep(Cache(tmp_path, 200), "a")
    with pytest.raises(VeraToolsError, match="no room for it"):
        keep(Cache(tmp_path, 200), "b", 201)
    assert kept(tmp_path) == ["a"]


def test_what_is_not_whole_is_not_found_and_goes_first(tmp_path):
    for key in ("a", "b"):
        keep(Cache(tmp_path, 200), key)
    (tmp_path / "b.entry").unlink()
    assert find(Cache(tmp_path, 200), "b") is None
    keep(Cache(tmp_path, 200), "c")
    assert kept(tmp_path) == ["a", "c"]
    (tmp_path / "a" / "more").touch()
    assert find(Cache(tmp_path, 200), "a") is None


def test_another_process_keeps_what_it_serves_from_until_it_ends(tmp_path):
    program = (
        "import sys, pathlib; from vera_tools.serving.cache import Cache\n"
        "cache = Cache(pathlib.Path(sys.argv[1]), 100)\n"
        "with cache.alone() as work:\n"
        "    (work / 'made').mkdir(); (work / 'made' / 'file').write_bytes(b'x' * 100)\n"
        "    cache.keep('a', work / 'made')\n"
        "print('kept', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "kept\n"
        with pytest.raises(VeraToolsError, match="no room for it"):
            keep(Cache(tmp_path, 100), "b")
        other.send_signal(signal.SIGKILL)
    keep(Cache(tmp_path, 100), "b")
    assert kept(tmp_path) == ["b"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "work" / "lora").mkdir(parents=True)
    (tmp_path / "work" / "lora" / "half").write_bytes(b"x" * 1000)
    with Cache(tmp_path, 100).alone() as work:
        assert list(work.iterdir()) == []
    assert not work.exists()


def test_it_is_nobody_elses(tmp_path):
    keep(Cache(tmp_path / "new", 100), "a")
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0
    (tmp_path / "new").chmod(0o777)
    with pytest.raises(UsageError, match="somebody else could put other weights here"):
        find(Cache(tmp_path / "new", 100), "a")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VeraToolsError, match="the cache cannot be used"):
        find(Cache(tmp_path / "file", 100), "a")
