"""Ask the tests about a change of the code: those that ran the changed lines, the quickest first, and then the others,
of which some started processes or took from a cache what the lines had made.

Imported and used in the copy of the working tree that `tests.mutants` makes. Each run of pytest is a fork of this
process, which has imported other people's packages and none of ours: so it takes what its own tests take, and leaves
nothing for the next.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: What takes long to import, and does not know of us.
OTHERS = (
    "click.testing", "fsspec", "fsspec.implementations.memory", "huggingface_hub", "huggingface_hub.hf_api",
    "hypothesis", "jsonschema", "ml_dtypes", "numpy", "peft", "rich.console", "rich.markup", "rich.table",
    "safetensors.numpy", "safetensors.torch", "torch", "transformers", "xxhash", "yaml",
)  # fmt: skip
#: A change may ask for any amount of it.
MEMORY = 12 << 30


@dataclass
class Known:
    """What a run of all tests without a change has shown.

    Attributes:
        seconds: Of each test, by its id.
        ran: For each file of the code, by its path in the tree, and each of its lines: which tests ran it. One that
            ends with "::" stands for all of a file: what sets up one test may serve others.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    ran: dict[str, dict[int, list[str]]] = field(default_factory=dict)

    def concerned(self, file: str, lines: range, *, here: bool = False) -> list[str]:
        """The tests that ran one of these lines, quickest first; and but for `here`, all others.

        Without lines, of what is done on import, first come those that ran any line of the file.
        """
        of_lines = self.ran.get(file, {})
        names = {name for line in lines or of_lines for name in of_lines.get(line, ()) if name}
        files = tuple(name for name in names if name.endswith("::"))
        ran = {name: name in names or name.startswith(files) for name in self.seconds}
        asked = [name for name in ran if ran[name] or not here]
        return sorted(asked, key=lambda name: (not ran[name], self.seconds[name]))


class _Watch:
    """Part of pytest in the run without a change: who runs what, and how long."""

    def __init__(self, coverage: Any) -> None:
        self.coverage, self.seconds = coverage, defaultdict[str, float](float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid.split("::")[0] + "::")
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


class _Order:
    """Part of pytest in a run after a change: only these tests, in this order."""

    def __init__(self, names: list[str]) -> None:
        self.places = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted(
            (item for item in items if item.nodeid in self.places), key=lambda item: self.places[item.nodeid]
        )


class Asker:
    """Runs pytest in forks of this process."""

    def __init__(self) -> None:
        for name in OTHERS:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        assert not any(name.split(".")[0] == "vera_tools" for name in sys.modules), "then a change would not be read"

    def learn(self, tests: list[str]) -> Known:
        """Run all these files of tests as the code is.

        Raises:
            SystemExit: a test fails, or coverage is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder, "known.json")
            output = Path(folder, "output")
            if self._fork(lambda: _learn(tests, found), output=output) != 0:
                sys.exit(f"its tests fail before anything is changed:\n{output.read_text('utf-8')[-5000:]}")
            document = json.loads(found.read_bytes())
        ran = {file: {int(line): names for line, names in lines.items()} for file, lines in document["ran"].items()}
        return Known(document["seconds"], ran)

    def passes(self, names: list[str], known: Known) -> bool:
        """Whether the tests with these ids pass, asked in this order; none does that takes ten times its longest."""
        files = sorted({name.split("::")[0] for name in names})
        usual = [known.seconds[name] for name in names]
        limit = ["-o", f"faulthandler_timeout={10 + 10 * max(usual)}", "-o", "faulthandler_exit_on_timeout=true"]
        ended = self._fork(lambda: _pytest(["-x", *limit, *files], [_Order(names)]), within=60 + 10 * sum(usual))
        if ended in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.exit(f"pytest ended with {ended} where it was given {names}")
        return ended == 0

    def _fork(self, run: Callable[[], int], *, within: float | None = None, output: Path | None = None) -> int:
        """What `run` returns in a fork of this process; anything but 0 where it was killed or took too long."""
        child = os.fork()
        if not child:
            code = 1
            try:
                os.setsid()
                resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # a large sparse file may be mapped
                stream = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT)
                os.dup2(stream, 1)
                os.dup2(stream, 2)
                code = run()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        ends = None if within is None else time.monotonic() + within
        try:
            while True:
                done, status = os.waitpid(child, 0 if ends is None else os.WNOHANG)
                if done:
                    return os.waitstatus_to_exitcode(status)
                if ends is not None and time.monotonic() > ends:
                    os.killpg(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    return 1
                time.sleep(0.02)
        finally:
            with contextlib.suppress(OSError):  # what a test started, and did not end
                os.killpg(child, signal.SIGKILL)


def _pytest(arguments: list[str], plugins: list[object]) -> int:
    # Of some of `OTHERS` parts of pytest came along. They are not rewritten now, which is no matter.
    usual = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    return int(pytest.main([*usual, *arguments], plugins=plugins))


def _learn(tests: list[str], to: Path) -> int:
    import coverage

    here = Path.cwd()
    watched = coverage.Coverage(data_file=None, source=[str(here / "vera_tools")], config_file=False)
    watched.start()
    watch = _Watch(watched)
    ended = _pytest(tests, [watch])
    watched.stop()
    data = watched.get_data()
    ran = {Path(file).relative_to(here).as_posix(): data.contexts_by_lineno(file) for file in data.measured_files()}
    to.write_text(json.dumps({"seconds": watch.seconds, "ran": ran}), "utf-8")
    return ended
