"""Many checkpoints by several processes: the same report, whoever dies meanwhile, and whoever interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

import vera_tools
from tests.adapters import KEPT, SEED_ONLY, base_of
from tests.verifying.registries import mixed
from vera_tools import schema
from vera_tools.errors import FormatError, NotVeraError
from vera_tools.processes.workers import WorkerDiedError, Workers
from vera_tools.verifying import registry, work

posix = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    adapters = [(str(n), KEPT if n % 2 else SEED_ONLY) for n in range(9)]
    return mixed(tmp_path_factory.mktemp("registry"), adapters, drift="1", cut="3", other="other")


@pytest.fixture(scope="module")
def expected(root):
    return vera_tools.verify(root, recursive=True, jobs=1)


@pytest.fixture
def at_once(monkeypatch):
    """Processes are started for the first checkpoint."""
    monkeypatch.setattr(registry, "PATIENCE", 0.0)


def test_processes_find_what_one_finds(root, expected, at_once, tmp_path):
    log = tmp_path / "log"
    report = vera_tools.verify(root, recursive=True, jobs=2, log=log)
    assert report == expected
    assert report.to_dict() == expected.to_dict()
    assert vera_tools.summarize(log) == expected
    assert vera_tools.verify(root, recursive=True, log=log).from_log == 10
    based = {"base": base_of(KEPT), "jobs": 2}
    assert vera_tools.verify(root / "5", root / "7", **based) == vera_tools.verify(
        root / "5", root / "7", **based | {"jobs": 1}
    )


def test_few_are_verified_here(root, expected, monkeypatch):
    monkeypatch.setattr(registry, "Workers", lambda count: pytest.fail("a process was started"))
    monkeypatch.setattr(registry, "PATIENCE", 600)
    assert vera_tools.verify(root, recursive=True, jobs=2) == expected


@pytest.mark.parametrize(
    ("took", "left", "here"),
    [
        ([], 3000, True),
        ([0.2], 3000, True),  # which says little of the others
        ([0.2, 0.001], 3000, False),
        ([0.2, 0.001], 400, True),
        ([60], 2, False),
        ([60], 0, True),
    ],
)
def test_processes_are_started_for_what_takes_longer_than_their_start(took, left, here):
    crew = registry._Crew(SimpleNamespace(executor=None, jobs=2), ExitStack(), left)
    for seconds in took:
        crew._measure(seconds, 1)
    assert crew._works_here() == here


@pytest.mark.parametrize("kind", [pytest.param("processes", marks=pytest.mark.long), "threads"])
def test_an_executor_of_the_users(root, expected, kind, monkeypatch):
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn")) if kind == "processes" else ThreadPoolExecutor(2)
    monkeypatch.setattr(registry, "Workers", lambda count: pytest.fail("a process of our own was started"))
    with pool:
        assert vera_tools.verify(root, recursive=True, executor=pool) == expected


def test_a_process_that_stands_elsewhere(root, expected, monkeypatch, at_once):
    job = work.Job("run", None, False, False, True, False, str(root))
    _, found = work.verify_some(job, [f"{n}" for n in range(9)])
    assert [(done.outcome.path, done.outcome.verdict) for done in found] == [
        (os.path.basename(one.path), one.verdict) for one in expected.checkpoints
    ]


def test_a_process_imports_nothing_from_where_it_is_started(monkeypatch, tmp_path):
    """A registry that holds a pickle.py runs none of it."""
    for name in ("pickle.py", "json.py", "vera_tools.py", "sitecustomize.py"):
        (tmp_path / name).write_text("from pathlib import Path\nPath('it-ran').touch()\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with Workers(1) as workers:
        assert workers.submit(os.getcwd).result() == str(tmp_path)
    assert not (tmp_path / "it-ran").exists()


def die_of(victim, how):
    """What a process does for whom one checkpoint is fatal."""

    def verify_some(job, paths):
        if any(os.path.basename(path) == victim for path in paths):
            os.kill(os.getpid(), how)
        return work.verify_some(job, paths)

    return verify_some


def kill_at_5(job, paths):
    return die_of("5", signal.SIGKILL)(job, paths)


@posix
@pytest.mark.parametrize("users", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_a_process_dies_of_is_failed_and_nothing_else_is(root, expected, monkeypatch, at_once, users):
    monkeypatch.setattr(registry.work, "verify_some", kill_at_5)
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn")) if users else None
    report = vera_tools.verify(root, recursive=True, jobs=2, executor=pool)
    if pool:
        pool.shutdown()
    ((path, error),) = report.failed
    assert (path, report.failed[0].exit_code) == (str(root / "5"), 4)
    assert "signal 9" in str(error)
    assert report.checkpoints == tuple(one for one in expected.checkpoints if one.path != path)
    schema.validate(report.to_dict(), "verify.v1", where="report")


def refuse(kind):
    if kind == "ours":
        raise NotVeraError("this is LORA", kind="LORA")
    if kind == "gone":
        os._exit(3)
    return kind, os.environ.get("OPENBLAS_NUM_THREADS"), "__main__" in sys.modules and sys.modules["__main__"].__name__


def test_what_a_worker_answers(monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    with Workers(1) as workers:
        assert workers.submit(refuse, "a").result() == ("a", "1", "__main__")
        with pytest.raises(NotVeraError, match="LORA"):
            workers.submit(refuse, "ours").result()
        with pytest.raises(WorkerDiedError, match="exit code 3"):
            workers.submit(refuse, "gone").result()
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert workers.submit(refuse, "b").result()[1] in (None, "1")
    with Workers(1) as workers:
        assert workers.submit(refuse, "c").result()[1] is None


SCRIPT = """
import sys, vera_tools
from vera_tools.verifying import registry
registry.PATIENCE = 0.0
print(vera_tools.verify(sys.argv[1], recursive=True, jobs=2).exit_code)
"""


@pytest.mark.long
def test_a_script_without_a_guard_and_one_from_standard_input(root, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert subprocess.check_output([sys.executable, script, root], text=True) == "4\n"
    assert subprocess.check_output([sys.executable, "-", root], text=True, input=SCRIPT) == "4\n"


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background has ignored
from vera_tools.cli import main
from vera_tools.verifying import registry, work
from vera_tools.verifying.verifier import Verifier
verify = Verifier.verify
def slow(self, path, **options):
    time.sleep(60 if path.endswith("8") else 0)
    return verify(self, path, **options)
Verifier.verify = slow
registry.PATIENCE = 600
main(sys.argv[1:])
"""


@posix
@pytest.mark.parametrize("form", ["--json", "-q"])
def test_an_interrupt_ends_with_what_was_done(root, tmp_path, form):
    junit, log = tmp_path / "junit.xml", tmp_path / "log"
    command = [sys.executable, "-c", SLOW, "verify", "-R", root, form, "--junit", junit, "--log", log]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while len(log.read_text().splitlines() if log.exists() else ()) < 8:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, err) == (130, "interrupted\n")
    suites = ElementTree.parse(junit).getroot()
    assert len(suites) == 9  # 8 checkpoints, and what says that there are more
    assert (suites.get("errors"), suites[-1].get("name")) == ("1", "interrupted")
    if form == "--json":
        document = json.loads(out)
        schema.validate(document, "verify.v1", where="stdout")
        assert (document["partial"], len(document["checkpoints"])) == (True, 8)


@posix
def test_an_interrupt_ends_the_processes(root, tmp_path, monkeypatch, at_once):
    started, start = [], Workers._start

    def noted(self):
        started.append(start(self))
        return started[-1]

    def interrupted(done, total, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workers, "_start", noted)
    with pytest.raises(KeyboardInterrupt) as caught:
        vera_tools.verify(root, recursive=True, jobs=2, progress=interrupted)
    assert caught.value.report.partial
    assert caught.value.report.exit_code == 130
    assert len(caught.value.report.checkpoints) == 1
    deadline = time.monotonic() + 10
    while any(process.poll() is None for process in started):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checkpoint_that_vanishes_is_no_death(root, at_once):
    report = vera_tools.verify(root / "0", listed=[root / "gone"], jobs=2)
    assert isinstance(report.failed[0].error, FormatError)
    assert "no such file" in str(report.failed[0].error)
