"""What may come of anything that is read: a value, or an error that says what is wrong; in bounded time and memory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vera_tools import schema
from vera_tools.architectures import witness
from vera_tools.cli import main
from vera_tools.errors import VeraToolsError
from vera_tools.files import local

#: Seconds of a processor that one input may take: ten thousand times the usual.
LIMIT = 10
CODES = frozenset({0, 1, 2, 3, 4, 5})
#: In memory where the system has such a place: an input may need a dozen files.
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class DefectError(AssertionError):
    """What must not happen."""


def prepare() -> None:
    """Whatever takes time and is no part of the question: other processes, and clocks that are waited for."""
    warnings.simplefilter("ignore")
    os.environ["VERA_TOOLS_DEBUG"] = "1"  # or else an unforeseen error would look like one that was meant
    witness.is_there = lambda: False  # type: ignore[assignment]
    local._TICKS = 0  # a file is written just before it is read, again and again


@contextlib.contextmanager
def bounded(name: str) -> Iterator[None]:
    """End what takes too long, and let through errors that say what is wrong."""

    def stop(*_: object) -> None:
        raise DefectError(f"{name}: no end within {LIMIT} s")

    posix = hasattr(signal, "setitimer")
    if posix:
        signal.signal(signal.SIGVTALRM, stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    except VeraToolsError as error:
        json.dumps(error.to_dict())
        if len(str(error)) > 20_000:
            raise DefectError(f"{name}: a message of {len(str(error))} characters") from error
    finally:
        if posix:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@contextlib.contextmanager
def sound(what: str) -> Iterator[None]:
    """Around what may not be refused: here an error that says what is wrong is a defect too."""
    try:
        yield
    except VeraToolsError as error:
        raise DefectError(f"{what}: {error}") from error


@contextlib.contextmanager
def folder(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder with these files, for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="vera-fuzz-", dir=PLACE) as path:
        put(Path(path), files)
        yield Path(path)


def put(path: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, and leave no others in it."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)


def command(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Run a command with --json in this process: its exit code and its document, which its schema must pass."""
    kept = sys.stdout, sys.stderr, os.environ.pop("VERA_TOOLS_DEBUG", None)
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    sys.stdout, sys.stderr = output, io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        main([*map(str, arguments), "--json"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        output.flush()
        text = output.buffer.getvalue().decode()  # type: ignore[attr-defined]
        sys.stdout, sys.stderr = kept[:2]
        os.environ["VERA_TOOLS_DEBUG"] = kept[2] or "1"
    if code not in CODES:
        raise DefectError(f"{arguments[0]}: exit code {code}")
    for words in ("internal error", "cannot be worked on"):
        if words in text:
            raise DefectError(f"{arguments[0]}: {text[text.index(words) :][:300]}")
    document: dict[str, Any] = json.loads(text)
    with sound("a document is not what its schema says"):
        schema.validate(document, f"{document['schema'].split('/')[1]}.v1", where=f"--json of {arguments[0]}")
    return code, document


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
