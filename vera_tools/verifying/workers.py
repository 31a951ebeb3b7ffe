"""Processes that work for this one: an executor that knows which task a process died of.

Each process is driven by a thread here that waits for its answer. So the task that a process was at when it died is the
only one that fails, and the next one gets a new process. They are copies of this process where it can be copied (see
`forking`). Otherwise, unlike those of `multiprocessing`, they do not import the main module of the program, which a
script without `if __name__ == "__main__"` does not survive.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from typing import IO, Any, TypeAlias, TypeVar

from vera_tools import blas
from vera_tools.verifying import forking
from vera_tools.verifying.forking import Fork

Process: TypeAlias = "subprocess.Popen[bytes] | Fork"
Result = TypeVar("Result")

_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from vera_tools.verifying.workers import serve_standard_input
serve_standard_input()
"""


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerDiedError(BrokenExecutor):
    """A process ended before it answered."""


class Workers(Executor):
    """At most `count` processes: copies of this one are made at once, others are started when they are first needed."""

    def __init__(self, count: int, *, forks: bool = True) -> None:
        """Without `forks`, this process holds what a copy must not have, such as a connection."""
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._ready = _copies(count) if forks and forking.is_safe() else []
        self._running: set[Process] = set(self._ready)

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Have a process call `fn`, which it must be able to import.

        The future raises WorkerDiedError where the process dies of it.
        """
        return self._threads.submit(self._ask, fn, args, kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: after what was submitted, or, with `cancel_futures`, at once."""
        self._threads.shutdown(wait=wait and not cancel_futures, cancel_futures=cancel_futures)
        with self._lock:
            running, self._running = self._running, set()
        for process in running:
            _end(process, kill=cancel_futures)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """End them, at once where something failed."""
        self.shutdown(cancel_futures=kind is not None)

    def _ask(self, fn: Callable[..., Result], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Result:
        process: Process = getattr(self._mine, "process", None) or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((fn, args, kwargs), process.stdin)
            process.stdin.flush()
            good, answer = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            self._mine.process = None
            with self._lock:
                self._running.discard(process)
            raise WorkerDiedError(_how(_end(process, kill=True))) from error
        if not good:
            raise answer
        result: Result = answer
        return result

    def _start(self) -> Process:
        with self._lock:
            ready = self._ready.pop() if self._ready else None
        process = ready or _new()
        with self._lock:
            self._running.add(process)
        self._mine.process = process
        return process


def _copies(count: int) -> list[Fork]:
    """Copies of this process, before it has other threads; fewer where the system gives no more."""
    made: list[Fork] = []
    with contextlib.suppress(OSError):
        while len(made) < count:
            made.append(Fork(_serve_alone, made))
    return made


def _new() -> subprocess.Popen[bytes]:
    """A process that has nothing of this one but its path of modules."""
    # Isolated, it imports nothing from the folder that it is started in, where somebody's adapters may lie.
    command = [sys.executable, "-I", "-X", f"utf8={sys.flags.utf8_mode}", "-c", _PROGRAM]
    environment = os.environ | _one_thread()
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # one that is dead by now is noticed when it is asked
        pickle.dump([os.path.abspath(entry) for entry in sys.path], process.stdin)
    return process


def _one_thread() -> dict[str, str]:
    """What tells BLAS to compute on one thread; nothing where the user said on how many."""
    return {} if any(name in os.environ for name in blas.VARIABLES) else dict.fromkeys(blas.VARIABLES, "1")


def _end(process: Process, *, kill: bool) -> int:
    """End a process, and say how it ended."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()  # which it ends upon
    early = process.poll()
    if kill and early is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            early = process.wait(0.1)  # one that died of itself, and is not yet seen to have
    if kill and early is None:
        process.kill()
    code = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return code


def _how(code: int) -> str:
    how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    return f"not verified: the process that worked on it ended {how}"


def serve_standard_input() -> None:
    """Answer on stdout what stdin asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that asks, which ends this one
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints, prints there
        serve(sys.stdin.buffer, answers)


def _serve_alone(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer in a copy, whose BLAS is loaded."""
    with blas.one_thread():
        os.environ.update(_one_thread())
        serve(questions, answers)


def serve(questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer what is asked until it ends. Each answer is (True, what was returned) or (False, what was raised)."""
    while True:
        try:
            fn, args, kwargs = pickle.load(questions)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, fn(*args, **kwargs)))
        except Exception as error:
            try:
                answer = pickle.dumps((False, error))
            except Exception:
                answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        answers.write(answer)
        answers.flush()
