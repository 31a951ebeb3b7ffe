"""The order in which a merge's tasks are begun: while one worker copies, the others compute.

Two workers that copy at the same time wait for each other in the kernel, which has one lock for a file that is written
and one for the memory that it hands out: 2 GB took them a quarter more of its time than one of them alone. And two that
compute in one process wait for Python's lock.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Turns(Generic[Task, Result]):
    """Tasks that wait for a worker, each with its future. They may be added and begun by several threads.

    Args:
        alone: Of which tasks one is under way at a time, as long as there are others to begin.
    """

    def __init__(self, alone: Callable[[Task], bool]) -> None:
        self._is_alone = alone
        self._alone, self._others = deque[tuple[Task, Future[Result]]](), deque[tuple[Task, Future[Result]]]()
        self._alone_under_way = 0
        self._lock = threading.Lock()

    def add(self, task: Task) -> Future[Result]:
        """Another task, begun after those of its kind that were added before. `do_next` has to be called for it."""
        future = Future[Result]()
        with self._lock:
            (self._alone if self._is_alone(task) else self._others).append((task, future))
        return future

    def do_next(self, do: Callable[[Task], Result]) -> None:
        """Begin the task whose turn it is and do it. What it raises is its future's."""
        with self._lock:
            alone = bool(self._alone) and not (self._alone_under_way and self._others)
            task, future = (self._alone if alone else self._others).popleft()
            self._alone_under_way += alone
        try:
            try:
                result = do(task)
            finally:  # before anybody hears that it has ended
                with self._lock:
                    self._alone_under_way -= alone
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
