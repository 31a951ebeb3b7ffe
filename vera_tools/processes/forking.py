"""Copies of this process that work for it. On Linux one is there at once, where a new process has all to import anew.

What is copied is one thread alone. A lock that another one holds would never be released in the copy, so that a process
with several threads is not copied.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import IO

#: Seconds between two looks at whether a process has ended.
_LOOK = 0.002
#: Seconds in which a thread that has ended, and was joined, is gone from the kernel's list too.
_PATIENCE = 0.02
# prctl(2): the signal that a process gets when the one that made it dies.
_PR_SET_PDEATHSIG = 1


def is_safe() -> bool:
    """Whether this process has one thread, whoever started others, and its standard streams are open."""
    if sys.platform != "linux":  # macOS' own libraries do not survive it
        return False
    if None in (sys.__stdin__, sys.__stdout__, sys.__stderr__):  # some other file has that one's number, or will have
        return False
    try:
        for stream in range(3):
            os.fstat(stream)
        until = time.monotonic() + _PATIENCE
        while len(os.listdir("/proc/self/task")) > 1:
            if threading.active_count() > 1 or time.monotonic() > until:
                return False
            time.sleep(_LOOK)
    except OSError:
        return False
    return True


class Fork:
    """A copy of this process, with as much of a `subprocess.Popen` as is needed to talk to it and to end it."""

    def __init__(self, serve: Callable[[IO[bytes], IO[bytes]], None], siblings: Iterable[Fork] = ()) -> None:
        """Copy this process.

        Args:
            serve: What the copy does: it reads from the first stream and writes to the second.
            siblings: Earlier copies, whose streams this one is not to hold open.

        Raises:
            OSError: the system refuses.
        """
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):  # whoever writes next is told
                stream.flush()
        questions, asking = os.pipe()
        answering, answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(asking, "wb"), os.fdopen(answering, "rb")
        self.returncode: int | None = None
        # A signal is for this process, until the copy has shed what this one does with it.
        held, maker = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()), os.getpid()
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._work(serve, questions, answers, siblings, held, maker)
        except OSError:
            self.stdin.close()
            self.stdout.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            os.close(questions)
            os.close(answers)

    def _work(
        self,
        serve: Callable[[IO[bytes], IO[bytes]], None],
        questions: int,
        answers: int,
        siblings: Iterable[Fork],
        held: Iterable[int],
        maker: int,
    ) -> None:
        """Be the copy, which never goes back to what this process was at."""
        code = 1
        try:
            _end_with(maker)
            signal.set_wakeup_fd(-1)
            for number in signal.valid_signals():
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            for one in (self, *siblings):
                one.stdin.close()
                one.stdout.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)  # whatever prints, prints there
            sys.stdout = sys.stderr
            with os.fdopen(questions, "rb") as asked, os.fdopen(answers, "wb") as answered:
                serve(asked, answered)
            code = 0
        finally:
            os._exit(code)  # what else this process had to do at its end is not the copy's to do

    def poll(self) -> int | None:
        """How it ended, as `Popen` has it; None where it has not."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has waited for it
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended, and say how.

        Raises:
            subprocess.TimeoutExpired: it has not, after so many seconds.
        """
        started = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - started > timeout:
                raise subprocess.TimeoutExpired([], timeout)
            time.sleep(_LOOK)
        return code

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _end_with(maker: int) -> None:
    """Have the system end this copy when the process that made it dies, whatever it is at then."""
    with contextlib.suppress(AttributeError, OSError):  # then it ends when it is asked no more
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != maker:
        os._exit(1)
