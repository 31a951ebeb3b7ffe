"""Processes that work for this one, each driven by a thread here that waits for its answer.

So the task that a process was at when it died is the only one that fails. `Workers` call functions that any process can
import: they are copies of this process where it can be copied (see `forking`), or new ones, which unlike those of
`multiprocessing` do not import the main module of the program: a script without `if __name__ == "__main__"` does not
survive that. `Copies` do what needs all that this process has opened and read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, Generic, TypeAlias, TypeVar

from vera_tools import blas
from vera_tools.processes import forking
from vera_tools.processes.forking import Fork

Process: TypeAlias = "subprocess.Popen[bytes] | Fork"
Task = TypeVar("Task")
Result = TypeVar("Result")
Answer = TypeVar("Answer")
#: What a process does with a task. It may tell whoever drives it something before it answers.
Perform: TypeAlias = Callable[[Any, Callable[[Any], None]], Any]

_PROGRAM = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from vera_tools.processes.workers import serve_standard_input
serve_standard_input()
"""


def cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerDiedError(BrokenExecutor):
    """A process ended before it answered."""


class _Driven:
    """Processes, each driven by a thread. Those in `ready` are there; a subclass says where others come from."""

    def __init__(self, count: int, ready: list[Fork], told: Callable[[Any], None] | None = None) -> None:
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="worker")
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._ready, self._told = ready, told
        self._running: set[Process] = set(ready)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: after what was submitted, or, with `cancel_futures`, at once."""
        self._threads.shutdown(wait=wait and not cancel_futures, cancel_futures=cancel_futures)
        with self._lock:
            running, self._running = self._running, set()
        for process in running:
            _close(process)
        for process in running:
            _end(process, kill=cancel_futures)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """End them, at once where something failed."""
        self.shutdown(cancel_futures=kind is not None)

    def _ask(self, task: Any) -> Any:
        process: Process = getattr(self._mine, "process", None) or self._start()
        good, answer = self._exchange(process, task)
        while good is None:
            assert self._told is not None
            self._told(answer)
            good, answer = self._exchange(process)
        if not good:
            raise answer
        return answer

    def _exchange(self, process: Process, *tasks: Any) -> tuple[bool | None, Any]:
        """Give a process what it is to do, if anything, and hear what it says next."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for task in tasks:
                pickle.dump(task, process.stdin)
                process.stdin.flush()
            said: tuple[bool | None, Any] = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            self._mine.process = None
            with self._lock:
                self._running.discard(process)
            raise WorkerDiedError(_how(_end(process, kill=True))) from error
        return said

    def _start(self) -> Process:
        with self._lock:
            ready = self._ready.pop() if self._ready else None
        process = ready or self._another()
        with self._lock:
            self._running.add(process)
        self._mine.process = process
        return process

    def _another(self) -> Process:
        raise NotImplementedError


class Workers(_Driven, Executor):
    """At most `count` processes: copies of this one are made at once, others are started when they are first needed."""

    def __init__(self, count: int, *, forks: bool = True) -> None:
        """Without `forks`, this process holds what a copy must not have, such as a connection."""
        super().__init__(count, _copies(count, _called) if forks and forking.is_safe() else [])

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Have a process call `fn`, which it must be able to import.

        The future raises WorkerDiedError where the process dies of it.
        """
        return self._threads.submit(self._ask, (fn, args, kwargs))

    def _another(self) -> Process:
        return _new()


class Copies(_Driven, Generic[Task, Result]):
    """As many as `count` copies of this process, of one thread, which `forking.is_safe`. Tasks and results are pickled.

    Args:
        count: How many.
        perform: What each does with a task; it finds what this process has. What it tells is passed to `told` here.
        told: Called in several threads.
        begin: What each does first.

    Raises:
        OSError: the system makes none.
    """

    def __init__(
        self,
        count: int,
        perform: Callable[[Task, Callable[[Any], None]], Result],
        told: Callable[[Any], None],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        copies = _copies(count, perform, begin)
        if not copies:
            raise OSError("no copy of this process can be made")
        super().__init__(len(copies), copies, told)

    def call(self, fn: Callable[[Callable[[Task], Result]], Answer]) -> Future[Answer]:
        """Call `fn` when a copy is free, with the function that has it perform a task.

        That raises WorkerDiedError where the copy dies of it.
        """
        return self._threads.submit(fn, self._ask)

    def _another(self) -> Process:
        raise WorkerDiedError("a process that worked for this one has ended")


def _called(task: tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], _: object) -> Any:
    fn, args, kwargs = task
    return fn(*args, **kwargs)


def _copies(count: int, perform: Perform, begin: Callable[[], None] = lambda: None) -> list[Fork]:
    """Copies of this process, before it has other threads; fewer where the system gives no more."""
    made: list[Fork] = []
    with contextlib.suppress(OSError):
        while len(made) < count:
            made.append(Fork(functools.partial(_serve_alone, perform, begin), made))
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


def _close(process: Process) -> None:
    """Ask a process nothing more, which it ends upon."""
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()


def _end(process: Process, *, kill: bool) -> int:
    """End a process, and say how it ended."""
    _close(process)
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
    return "the process that worked on it ended " + (f"by signal {-code}" if code < 0 else f"with exit code {code}")


def serve_standard_input() -> None:
    """Answer on stdout what stdin asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the process that asks, which ends this one
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints, prints there
        serve(_called, sys.stdin.buffer, answers)


def _serve_alone(perform: Perform, begin: Callable[[], None], questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer in a copy, whose BLAS is loaded."""
    begin()
    with blas.one_thread():
        os.environ.update(_one_thread())
        serve(perform, questions, answers)


def serve(perform: Perform, questions: IO[bytes], answers: IO[bytes]) -> None:
    """Answer what is asked until it ends.

    Each answer is (True, what was returned) or (False, what was raised); before it, (None, what was told).
    """

    def say(data: bytes) -> None:
        answers.write(data)
        answers.flush()

    while True:
        try:
            task = pickle.load(questions)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, perform(task, lambda told: say(pickle.dumps((None, told))))))
        except Exception as error:
            try:
                answer = pickle.dumps((False, error))
            except Exception:
                answer = pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}")))
        say(answer)
