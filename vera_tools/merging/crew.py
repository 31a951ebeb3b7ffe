"""Who does a merge's work: copies of this process, where it can be copied and it is worth it, else threads.

Threads that compute with numpy pass Python's lock from one to the other at every call, a hundred thousand times in a
merge, and wait for it: with two of them that was a twentieth of the time, with more it is more. Copies have no lock in
common. They have open what this process has open, so that a task is a few numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from vera_tools.errors import VeraToolsError
from vera_tools.files.local import LocalFile, MemoryFile
from vera_tools.merging.entries import Copied
from vera_tools.merging.plan import Plan, Shard
from vera_tools.merging.turns import Turns
from vera_tools.processes import forking
from vera_tools.processes.workers import Copies, WorkerDiedError

Task = TypeVar("Task")
Result = TypeVar("Result")
#: Told of so many more bytes that are done, and of what.
Tell: TypeAlias = Callable[[int, str], None]

#: Bytes to be computed that are worth copies. With fewer, threads lose less time than these take to be made and ended.
#: Threads that copy or hash do not wait for each other.
WORTH = 400 << 20
#: What a tensor counts as at least: the smallest one takes as many of numpy's calls.
LEAST = 1 << 20


@contextlib.contextmanager
def crew(
    perform: Callable[[Task, Tell], Result],
    plan: Plan,
    shards: Sequence[Shard],
    *,
    jobs: int,
    tell: Tell,
    begin: Callable[[], None] = lambda: None,
    alone: Callable[[Task], bool] = lambda task: False,
) -> Iterator[Callable[[Task], Future[Result]]]:
    """Hand out a function that has a task performed by one of several workers.

    All work is done when this ends; at an error or an interrupt, what is under way is given up.

    Args:
        perform: What is done with a task, which may be done in another process. Tasks and results can be pickled.
        plan: What it reads.
        shards: What it goes through.
        jobs: Number of workers.
        tell: Told by `perform`, in several threads.
        begin: What a copy does first, to let go of what is this process's alone.
        alone: Of which tasks one is under way at a time, as long as there are others to begin.

    Raises:
        VeraToolsError: a worker was ended, from outside or for want of memory.
    """
    pool: ThreadPoolExecutor | Copies[Task, Result] | None = None
    if jobs > 1 and _to_be_computed(shards) >= WORTH and _is_at_hand(plan) and forking.is_safe():

        def in_a_copy(task: Task, tell: Callable[[tuple[int, str]], None]) -> Result:
            return perform(task, lambda count, what: tell((count, what)))

        with contextlib.suppress(OSError):
            pool = Copies(jobs, in_a_copy, lambda told: tell(*told), begin)
    pool = pool or ThreadPoolExecutor(jobs)
    turns = Turns[Task, Result](alone)

    def give(task: Task) -> Future[Result]:
        future = turns.add(task)
        if isinstance(pool, Copies):
            pool.call(turns.do_next)
        else:
            pool.submit(turns.do_next, lambda task: perform(task, tell))
        return future

    try:
        yield give
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        if isinstance(error, WorkerDiedError):
            hint = "was it too little memory? --jobs 1 needs the least"
            raise VeraToolsError(f"not merged: {error}", where=plan.base.label, hint=hint) from error
        raise
    pool.shutdown()


def _to_be_computed(shards: Sequence[Shard]) -> int:
    entries = (entry for shard in shards for entry in shard.entries if not isinstance(entry, Copied))
    return sum(max(entry.info.nbytes, LEAST) for entry in entries)


def _is_at_hand(plan: Plan) -> bool:
    """Whether all that is read lies here: two processes must not read from one connection."""
    files = [*plan.base.files.values(), *(adapter.checkpoint.weights for adapter in plan.adapters)]
    return all(isinstance(file.source, LocalFile | MemoryFile) for file in files)
