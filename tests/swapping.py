"""Inputs that are changed at a chosen moment while a command reads them: before each of its reads in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.adapters import files_of
from vera_tools.errors import VeraToolsError
from vera_tools.files.local import LocalFile

State = dict[str, bytes]
#: Of a command with more reads, every second or third is taken.
MOST = 24
#: Puts a state into a folder that has another.
Swap = Callable[[Path, State], None]


def rewrite(folder: Path, state: State) -> None:
    """Write into the files that are there, and set their times back, as if nothing had been written."""
    for name, content in state.items():
        before = (folder / name).stat()
        with (folder / name).open("r+b") as stream:
            stream.write(content)
            stream.truncate()
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(folder: Path, state: State) -> None:
    """Put other files in their place, of the same times."""
    for name, content in state.items():
        before = (folder / name).stat()
        new = folder / f".{name}.new"
        new.write_bytes(content)
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        new.replace(folder / name)


def exchange(folder: Path, state: State) -> None:
    """Put another folder in its place."""
    new, old = folder.with_name("new"), folder.with_name("old")
    write(new, {**files_of(folder), **state})
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old)


SWAPS: dict[str, Swap] = {"rewritten": rewrite, "replaced": replace, "exchanged": exchange}


def write(folder: Path, state: State) -> None:
    """A folder with this content and no other."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@dataclass
class Moments:
    """Counts the reads, and does what is planned before some of them."""

    plan: dict[int, Callable[[], None]]
    count: int = 0

    def pass_by(self) -> None:
        with _lock:
            action = self.plan.get(self.count)
            self.count += 1
            if action:
                action()


_lock = threading.RLock()


@contextlib.contextmanager
def moments(plan: dict[int, Callable[[], None]]) -> Iterator[Moments]:
    """Within the block, every opening and every read of a local file is a moment, numbered from 0."""
    passed = Moments(plan)
    with pytest.MonkeyPatch.context() as patch:
        open_, read_at = LocalFile.__init__, LocalFile._read_at

        def opening(self: LocalFile, path: Path) -> None:
            passed.pass_by()
            open_(self, path)

        def reading(self: LocalFile, view: memoryview, start: int) -> int:
            passed.pass_by()
            return read_at(self, view, start)

        patch.setattr(LocalFile, "__init__", opening)
        patch.setattr(LocalFile, "_read_at", reading)
        if hasattr(os, "copy_file_range"):
            copy = os.copy_file_range

            def copying(*arguments: int) -> int:
                passed.pass_by()
                return copy(*arguments)

            patch.setattr(os, "copy_file_range", copying)
        yield passed


def outcomes(
    folder: Path, before: State, after: State, swap: Swap, run: Callable[[], object], *, back: bool = False
) -> Iterator[tuple[int, object]]:
    """What `run` ends with for each moment at which `folder` turns from `before` to `after`.

    Args:
        folder: The input.
        before: Its files.
        after: Those of them that are others then.
        swap: How they come there.
        run: The command; what it returns is compared, an error of ours is an end too.
        back: One moment later they are again what they were.
    """
    write(folder, before)
    with moments({}) as passed:
        run()
    assert passed.count > 3
    for moment in range(0, passed.count, -(-passed.count // MOST)):
        write(folder, before)
        plan = {moment: lambda: swap(folder, after)}
        if back:
            plan[moment + 1] = lambda: swap(folder, {name: before[name] for name in after})
        with moments(plan):
            try:
                yield moment, run()
            except VeraToolsError as error:
                yield moment, error
