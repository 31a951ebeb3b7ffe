"""Workers that are copies of the process: they answer as others do, and keep nothing of what the process was at.

Each test runs a process of its own, because that of the tests has several threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.adapters import KEPT, SEED_ONLY
from tests.command import is_running
from tests.verifying.registries import mixed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is copied")

#: What the scripts share: functions that workers call.
PREAMBLE = """
import os, signal, sys, threading, time
from vera_tools import blas
blas.start_alone()
from vera_tools.processes import forking
from vera_tools.processes.workers import WorkerDiedError, Workers

def tell():
    print("a worker's word")
    sys.stdout.flush()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return os.getpid(), handlers, os.environ.get("OPENBLAS_NUM_THREADS"), os.read(0, 1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    raise SystemExit(3)

def fail():
    raise ValueError("no good")
"""


def script(body, *arguments, environment=None, **options):
    kept = {k: v for k, v in os.environ.items() if "_NUM_THREADS" not in k} | (environment or {})
    return subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + body, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=kept,
        **options,
    )


def output(body, *arguments, **options):
    process = script(body, *arguments, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


def test_copies_answer_and_shed_what_they_were_copied_from(tmp_path):
    out, err = output(
        """
sys.stdout.write("written once;")
signal.signal(signal.SIGTERM, lambda *_: print("not the worker's to do"))
assert forking.is_safe()
with Workers(2) as workers:
    forks = list(workers._ready)
    pid, handlers, blas_threads, read = workers.submit(tell).result()
    assert pid in [fork.pid for fork in forks] and pid != os.getpid(), pid
    assert handlers == [signal.SIG_IGN, signal.SIG_DFL], handlers
    assert (blas_threads, read) == ("1", b"")
    try:
        workers.submit(fail).result()
    except ValueError as error:
        print(error, end=";")
    for fatal in (die, leave):
        try:
            workers.submit(fatal).result()
        except WorkerDiedError as error:
            print(str(error).partition("ended ")[2], end=";")
    assert workers.submit(os.getpid).result() not in [fork.pid for fork in forks]  # who died is replaced
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert all(fork.poll() is not None for fork in forks)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("none is left")
""",
        stdin=subprocess.PIPE,
    )
    assert out == "written once;no good;by signal 9;with exit code 1;none is left\n"
    assert err == "a worker's word\n"


@pytest.mark.parametrize(
    "several",
    [
        "threading.Thread(target=time.sleep, args=[5], daemon=True).start()",
        "os.close(0)",
        "sys.platform = 'darwin'",
    ],
)
def test_no_copy_is_made_of_what_cannot_be_copied(several):
    out, _ = output(
        f"""
{several}
assert not forking.is_safe()
with Workers(1) as workers:
    assert not workers._ready
    print(workers.submit(os.getppid).result() == os.getpid())
"""
    )
    assert out == "True\n"


@pytest.mark.parametrize("stream", [0, 1])
def test_no_copy_is_made_where_a_file_has_the_number_of_a_stream_that_was_closed(stream):
    """A copy has streams of its own, and would have them in the place of that file."""
    process = script(
        f"""
with open(sys.executable, "rb") as file:
    assert file.fileno() == {stream}, file.fileno()
    assert not forking.is_safe()
""",
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: os.close(stream),
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_copies_end_with_the_process_that_was_killed():
    process = script(
        """
workers = Workers(2)
print(*[fork.pid for fork in workers._ready], flush=True)
time.sleep(60)
"""
    )
    pids = process.stdout.readline().split()
    assert len(pids) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


VERIFY = """
from vera_tools.cli import main
from vera_tools.verifying import registry, work
registry.PATIENCE = 0.0
known = os.getpid()
def verify_some(job, paths, verify=work.verify_some):
    os.write(2, b"here" if os.getpid() == known else b".")
    if any(path.endswith(sys.argv[1]) for path in paths):
        time.sleep(60)
    return verify(job, paths)
verify_some.__module__, verify_some.__qualname__ = "vera_tools.verifying.work", "verify_some"
work.verify_some = verify_some
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    adapters = [(str(n), KEPT if n == 1 else SEED_ONLY) for n in range(6)]
    return mixed(tmp_path_factory.mktemp("registry"), adapters, drift="1", cut="3")


def test_a_registry_is_verified_by_copies(root, tmp_path):
    log = tmp_path / "log"
    process = script(VERIFY, "none", "verify", "-R", root, "--jobs", "2", "--log", log)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, set(err)) == (4, {"."})
    alone = subprocess.run(
        [sys.executable, "-m", "vera_tools", "verify", "-R", root, "--jobs", "1"], text=True, capture_output=True
    )
    assert out == alone.stdout


def test_an_interrupt_is_for_the_process_alone(root, tmp_path):
    """As a terminal sends it: to all of them."""
    log = tmp_path / "log"
    command = VERIFY.replace("main(", "signal.signal(signal.SIGINT, signal.default_int_handler)\nmain(")
    process = script(command, "5", "verify", "-R", root, "--jobs", "2", "--log", log, "-q", start_new_session=True)
    while not (log.exists() and "verify-line" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.lstrip(".")) == (130, "", "interrupted\n")


def test_copies_have_what_the_process_has_and_tell_before_they_answer():
    out, err = output(
        """
from vera_tools.processes.workers import Copies
held, told = {"lock": 1}, []
def perform(task, tell):
    tell((task, held["lock"]))
    if task == "die":
        os._exit(3)
    if task == "fail":
        raise ValueError("no good")
    return (lambda: task) if task == "what cannot be sent" else [task, held]
copies = Copies(1, perform, told.append, begin=lambda: held.update(lock=0))
print(*[copies.call(lambda ask, task=task: ask(task)).result() for task in ("one", "two")], told, held)
for task in ("fail", "what cannot be sent", "die", "three"):
    try:
        copies.call(lambda ask: ask(task)).result()
    except Exception as error:
        print(type(error).__name__ if task != "what cannot be sent" else str(error)[:5])
copies.shutdown()
"""
    )
    assert out.splitlines() == [
        "['one', {'lock': 0}] ['two', {'lock': 0}] [('one', 0), ('two', 0)] {'lock': 1}",
        "ValueError",
        "Can't",
        "WorkerDiedError",
        "WorkerDiedError",
    ]
    assert err == ""


def test_a_copy_ends_with_its_process_whatever_it_is_at():
    process = script(
        """
from vera_tools.processes.workers import Copies
copies = Copies(1, lambda task, tell: time.sleep(60), print)
copies.call(lambda ask: ask(1))
time.sleep(0.2)
print(copies._ready, *[fork.pid for fork in copies._running], flush=True)
time.sleep(60)
"""
    )
    *_, pid = process.stdout.readline().split()
    assert is_running(pid)
    process.kill()
    process.wait()  # and not for its streams, which the copy has too
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.communicate()
