"""Windows and macOS, as far as Linux can tell: what they lack is done without, or said in one line not to be had.

Each run is a process of its own (`tests.systems`). None of this shows what those systems really do.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import errno
import io
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PureWindowsPath

import pytest

from tests import ROOT, systems
from tests.adapters import CHECKPOINTS, KEPT
from tests.hub.server import HubServer
from vera_tools import verify
from vera_tools.cli import main
from vera_tools.cli.shared import CLOSED
from vera_tools.files import locking
from vera_tools.files.local import LocalFile
from vera_tools.merging.copying import OutputFile
from vera_tools.verifying import registry

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes away from Linux what other systems lack")

STORED = CHECKPOINTS / KEPT
#: What Linux is asked for in an ordinary run, so that to take it away makes a difference.
ASKED_FOR = ("preadv", "pwrite", "copy_file_range", "fallocate", "renameat2", "link", "chown")
#: Lacks under which the commands for the Hub are run too.
WITH_HUB = ("preadv", "fcntl", "symbolic links", "moving open files", "renaming over", "binary by default")

IN_PLACE = {
    "in place": r"own: this system cannot replace a folder in one step; write to another folder with -o instead"
}
OFFLINE = {"hub offline": r"snapshots/\w+/README.md: the cache keeps no digest of it; pull it while online"}
#: What is not to be had: the steps that say so, and what they say.
REFUSED = {
    "renameat2": IN_PLACE,
    "moving open files": IN_PLACE,
    "a C library": IN_PLACE,
    "symbolic links": OFFLINE,
    "windows": IN_PLACE | OFFLINE,
}
#: What such a system refuses, or has in the place of what it lacks: the run has to meet it.
MET = {
    "hard links": "link",
    "flushing what is read": "fsync of what is read",
    "opening folders": "open of a folder",
    "moving open files": "open file",
    "windows": "LockFileEx",
    "macos": "renameatx_np",
}
UNLOCKED = "there are no file locks here, so a second merge into it would not be refused"


@contextlib.contextmanager
def a_hub(folder: Path) -> Iterator[dict[str, str]]:
    """A Hub with one repository, and the environment of a process that is to use it."""
    with HubServer(folder / "hub") as server:
        server.add_repo("ann/many", {f"one/{path.name}": path.read_bytes() for path in STORED.iterdir()})
        yield {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(folder / "home"),
            "HF_TOKEN": server.add_user("ann"),
            "HF_HUB_DISABLE_XET": "1",
        }
        assert server.failures == []


def run(folder: Path, *names: str, hub: bool) -> tuple[dict, dict]:
    """Run the series on such a system: what was asked of it, and the results."""
    work = folder / "work"
    work.mkdir()
    command = [sys.executable, str(ROOT / "tests" / "systems.py"), str(folder / "report.json"), *names]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with a_hub(folder) if hub else contextlib.nullcontext({}) as more:
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "report.json").read_text().replace(str(work), "WORK"))
    return report["used"], report["results"]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    return run(tmp_path_factory.mktemp("ordinary"), hub=True)


def test_an_ordinary_run_asks_for_what_is_taken_away(ordinary):
    used, results = ordinary
    assert all(used.get(name, 0) > 0 for name in ASKED_FOR), used
    said = [line for step in results.values() for line in step["said"]]
    assert {line for line in said if line.startswith("  exit ")} == {"  exit 0", "  exit 1", "  exit 2", "  exit 130"}
    assert not [line for line in said if "internal error" in line or "Traceback" in line]
    assert sum(bool(step["left"]) for step in results.values()) >= 12
    assert not [path for step in results.values() for path in step["left"] if "/." in path or path.startswith(".")]


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in systems.LACKS), *systems.SYSTEMS]
)
def test_a_system_without(name, ordinary, tmp_path):
    hub = name in WITH_HUB or name in systems.SYSTEMS
    used, results = run(tmp_path, name, hub=hub)
    assert name not in MET or used.get(MET[name], 0) > 0
    refused = REFUSED.get(name, {})
    for step, expected in ordinary[1].items():
        if (step.startswith("hub") and not hub) or (step, name) == ("merge twice at once", "fcntl"):
            continue
        if name == "fcntl" and step.startswith("merge"):
            assert any(UNLOCKED in line for line in results[step]["said"])
            results[step]["said"] = [line for line in results[step]["said"] if UNLOCKED not in line]
        if step not in refused:
            assert results[step] == expected, step
            continue
        said = results[step]["said"]
        (line,) = [line for line in said if line.startswith("!")]
        assert re.search(refused[step], line), line
        assert {line for line in said if line.startswith("  exit")} <= {"  exit 2", "  exit 5"}
        assert (results[step]["left"], results[step]["gone"]) == ([], [])
    assert not list(tmp_path.rglob("*.incomplete"))


def at_once(work, count=8):
    """Run `work` with the numbers 0 to `count` - 1, each in a thread, and raise what they raise."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


@pytest.fixture
def often_switching():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("often_switching")
def test_threads_read_one_file_without_preadv(tmp_path, monkeypatch):
    data = random.Random(0).randbytes(1 << 20)
    (tmp_path / "data").write_bytes(data)
    monkeypatch.delattr(os, "preadv")
    with LocalFile(tmp_path / "data") as file:

        def read(seed):
            places = random.Random(seed)
            buffer = memoryview(bytearray(256))
            for _ in range(2000):
                start = places.randrange(len(data) - 256)
                file.read_into(buffer, start)
                assert buffer == data[start : start + 256]

        at_once(read)


@pytest.mark.usefixtures("often_switching")
def test_threads_write_one_file_without_pwrite(tmp_path, monkeypatch):
    data = random.Random(0).randbytes(1 << 20)
    monkeypatch.delattr(os, "pwrite")
    with OutputFile(tmp_path / "data") as file:

        def write(number):
            for start in range(number * 16, len(data), 8 * 16):
                file.write_at(memoryview(data)[start : start + 16], start)

        at_once(write)
    assert (tmp_path / "data").read_bytes() == data


class TestLocks:
    @pytest.fixture(params=["flock", "LockFileEx"], autouse=True)
    def way(self, request, monkeypatch):
        if request.param == "LockFileEx":
            for name in ("fcntl", "msvcrt"):
                monkeypatch.setitem(sys.modules, name, None)
            for name in ("WinDLL", "get_last_error"):
                monkeypatch.setattr(ctypes, name, None, raising=False)
            systems.stand_in_for_windows()

    @pytest.fixture
    def two(self, tmp_path):
        with (tmp_path / "lock").open("ab") as a, (tmp_path / "lock").open("ab") as b:
            yield a.fileno(), b.fileno()

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("second", [False, True])
    def test_a_second_one_is_taken_only_where_both_are_shared(self, two, first, second):
        assert locking.take(two[0], shared=first) is True
        assert locking.take(two[1], shared=second) is (first and second)

    def test_closing_gives_it_back(self, two, tmp_path):
        with (tmp_path / "lock").open("ab") as third:
            assert locking.take(third.fileno()) is True
            assert locking.take(two[0]) is False
        assert locking.take(two[0]) is True


def test_a_disk_that_fails_is_not_taken_for_one_without_locks(tmp_path, monkeypatch):
    import fcntl

    for code, expected in (
        (errno.ENOLCK, None),
        (errno.EOPNOTSUPP, None),
        (errno.EWOULDBLOCK, False),
        (errno.EIO, OSError),
    ):

        def fail(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", fail)
        if expected is OSError:
            with pytest.raises(OSError, match="Input/output"):
                locking.take(0)
        else:
            assert locking.take(0) is expected


def test_a_pipe_that_nobody_reads_on_windows(monkeypatch, capfd):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(errno.EINVAL, "Invalid argument")

        def fileno(self):
            return os.dup(1)

    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(STORED), "--json"])
    assert stop.value.code == 1
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "stdout", Broken())
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(STORED), "--json"])
    assert stop.value.code == CLOSED
    assert capfd.readouterr().err == "error: the output could not be written: Invalid argument\n"


def test_a_path_in_a_repository_has_slashes_everywhere(hub, monkeypatch):
    hub.add_repo("ann/many", {f"a/one/{path.name}": path.read_bytes() for path in STORED.iterdir()})
    monkeypatch.setattr(registry, "Path", PureWindowsPath, raising=False)
    (checkpoint,) = verify("hf://ann/*").checkpoints
    assert checkpoint.path == "hf://ann/many/a/one"


def takes_text_as_it_comes(call: ast.Call) -> bool:
    """Whether a call leaves it to the system in which encoding text stands in a file, or with which line ends."""
    function, options = call.func, {keyword.arg for keyword in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name == "write_text":
        return not (len(call.args) > 1 or "encoding" in options) or "newline" not in options
    if name == "read_text" and isinstance(function, ast.Attribute) and ast.unparse(function.value) != "local":
        return not (call.args or "encoding" in options)
    if name != "open" or "os.devnull" in ast.unparse(call):
        return False
    texts = [node.value for part in call.args for node in ast.walk(part) if isinstance(node, ast.Constant)]
    modes = [text for text in texts if isinstance(text, str) and re.fullmatch(r"[rwax][bt+]*", text)]
    if not modes and isinstance(function, ast.Attribute):
        return False  # a checkpoint's, a folder's
    if any("b" in mode for mode in modes):
        return False
    written = any(set(mode) & set("wax+") for mode in modes)
    return "encoding" not in options or (written and "newline" not in options)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("p.write_text(t, 'utf-8')", True),
        ("p.write_text(t, 'utf-8', newline='\\n')", False),
        ("p.read_text()", True),
        ("local.read_text(folder, name)", False),
        ("open(p)", True),
        ("open(p, encoding='utf-8')", False),
        ("p.open('r+' if there else 'w', encoding='utf-8')", True),
        ("p.open('wb')", False),
    ],
)
def test_text_mode_is_recognised(call, expected):
    assert takes_text_as_it_comes(ast.parse(call, mode="eval").body) is expected


@pytest.mark.parametrize("path", sorted((ROOT / "vera_tools").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_the_same_bytes_everywhere(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if takes_text_as_it_comes(call)] == []
