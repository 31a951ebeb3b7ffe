"""A file system that lies: about bytes, sizes, names and times. What a command makes of it is right, or an error."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys

import pytest

from tests import swap_loop
from tests.adapters import MANIFEST, files_of
from tests.swapping import outcomes, rewrite, write
from vera_tools.errors import VeraToolsError
from vera_tools.files.local import LocalFile, LocalFolder, Stamp

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")

each_command = pytest.mark.parametrize("command", swap_loop.COMMANDS)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    return swap_loop.make_states(tmp_path_factory.mktemp("states"))


@pytest.fixture
def prepared(states, tmp_path):
    """A command's inputs put in place; hands out what runs it, and what puts them there again."""

    def prepare(command):
        kind, call = swap_loop.COMMANDS[command]
        at = swap_loop.Places(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")

        def put():
            write(at.adapter, states[f"{kind} one"])
            write(at.base, states["base one"])

        def run():
            try:
                return call(at)
            except VeraToolsError as error:
                assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
                return error

        put()
        return run, put

    return prepare


def each_read(monkeypatch, run, put, lie, *, step=1):
    """What a command ends with where one of its reads, each in turn, is what `lie` makes of it."""
    read_at, number = LocalFile._read_at, 0
    while True:
        put()
        count = 0

        def lying(self, view, start, number=number):
            nonlocal count
            count += 1
            done = read_at(self, view, start)
            return lie(view, done, self.path) if count - 1 == number else done

        with monkeypatch.context() as patch:
            patch.setattr(LocalFile, "_read_at", lying)
            found = run()
        if count <= number:
            return
        number += step
        yield found


@pytest.mark.parametrize("command", [name for name in swap_loop.COMMANDS if not name.endswith("plain")])
def test_a_read_of_an_adapter_that_gives_other_bytes_once(prepared, command, monkeypatch, tmp_path):
    """One bit of it, each read in turn: what is read a second time was checked the first time."""
    run, put = prepared(command)
    sound, damaged = run(), 0

    def flip(view, done, path):
        if path.parent == tmp_path / "adapter":
            view[done // 2] ^= 0x10
        return done

    for found in each_read(monkeypatch, run, put, flip):
        if isinstance(found, VeraToolsError):
            damaged += 1
        elif isinstance(found, str):
            damaged += found != sound
            assert found == sound or json.loads(found)[0] in (1, 4)
        elif command == "record":  # a manifest of a config that is not there: it does not hold
            at = swap_loop.Places(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
            assert json.loads(swap_loop.COMMANDS["verify"][1](at))[0] == (0 if found == sound else 1)
            tensors = [json.loads(files[MANIFEST])["tensors"] for files in (found, sound)]
            assert tensors[0] == tensors[1]
        else:
            assert found == sound
    assert damaged > 4


@pytest.mark.skipif(sys.platform != "linux", reason="calls of Linux's")
@each_command
def test_a_disk_that_does_little_at_a_time(prepared, command, monkeypatch):
    run, put = prepared(command)
    sound = run()
    put()
    preadv, pwrite, copy = os.preadv, os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:61]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:61], at))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, count, *at: copy(a, b, min(count, 61), *at))
    assert run() == sound


@each_command
def test_a_disk_that_fails_at_a_read(prepared, command, monkeypatch):
    run, put = prepared(command)

    def fail(view, done, path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sound = run()
    for found in each_read(monkeypatch, run, put, fail, step=3):
        if isinstance(found, dict):
            assert command == "record"  # which puts a new manifest in the place of one that cannot be read
            assert found == sound
        else:
            assert isinstance(found, VeraToolsError) or json.loads(found)[0] > 1


@pytest.mark.parametrize("wrong", [-8, 8, 1 << 40], ids=["too small", "too large", "far too large"])
@each_command
def test_a_size_that_is_not_the_files(prepared, command, wrong, monkeypatch):
    run, _ = prepared(command)
    of = Stamp.of
    monkeypatch.setattr(Stamp, "of", lambda status: dataclasses.replace(of(status), size=status.st_size + wrong))
    found = run()
    assert isinstance(found, VeraToolsError) or json.loads(found)[0] > 1


@each_command
def test_a_listing_that_names_what_is_not_there_and_what_is_there_twice(prepared, command, monkeypatch):
    run, put = prepared(command)
    sound, names = run(), LocalFolder.names
    put()
    monkeypatch.setattr(LocalFolder, "names", lambda self: sorted([*names(self), *names(self), "ghost.txt"]))
    found = run()
    assert isinstance(found, VeraToolsError) or found == sound


@pytest.mark.parametrize(("kind", "back"), [("kept", False), ("kept", True), ("seeds", False)])
def test_times_that_never_change(states, tmp_path, kind, back, monkeypatch):
    """Then nothing gives a change away but the bytes, and each part of an answer may be of another state."""
    monkeypatch.setattr(Stamp, "of", lambda status: Stamp(0, 0, status.st_size, 1, 0))
    at = swap_loop.Places(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    write(at.base, states["base one"])
    call = swap_loop.COMMANDS["verify"][1]
    one, two = states[f"{kind} one"], states["kept edited" if kind == "kept" else "seeds two"]
    sound = []
    for state in (one, two):
        write(at.adapter, state)
        sound.append(call(at))
    for moment, found in outcomes(at.adapter, one, two, rewrite, lambda: call(at), back=back):
        assert isinstance(found, VeraToolsError) or found in sound or json.loads(found)[0] != 0, moment
    assert files_of(at.adapter) in (one, two)
