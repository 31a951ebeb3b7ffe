"""The order in which a merge's tasks are begun."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vera_tools.merging.turns import Turns


def is_copied(task):
    return task.startswith("copy")


class Begun:
    """Tasks that go on until they are told to end, and the order in which they were begun."""

    def __init__(self):
        self.turns = Turns(is_copied)
        self.order, self.ends = [], {}
        self.begun = threading.Condition()

    def add(self, *tasks):
        self.ends |= {task: threading.Event() for task in tasks}
        return [self.turns.add(task) for task in tasks]

    def work(self, pool):
        """Have another worker begin a task, and say which it is."""
        count = len(self.order)
        pool.submit(self.turns.do_next, self.do)
        with self.begun:
            assert self.begun.wait_for(lambda: len(self.order) > count, timeout=60)
        return self.order[-1]

    def do(self, task):
        with self.begun:
            self.order.append(task)
            self.begun.notify()
        assert self.ends[task].wait(60)
        if task.endswith("fails"):
            raise ValueError(task)
        return f"{task} done"


@pytest.fixture
def begun():
    tasks = Begun()
    yield tasks
    for end in tasks.ends.values():
        end.set()


def test_while_one_worker_copies_the_others_compute(begun):
    with ThreadPoolExecutor(4) as pool:
        futures = begun.add("copy 1", "copy 2", "compute 1", "copy 3", "compute 2", "compute 3")
        assert begun.work(pool) == "copy 1"
        assert begun.work(pool) == "compute 1"
        begun.ends["compute 1"].set()
        assert futures[2].result(60) == "compute 1 done"
        assert begun.work(pool) == "compute 2"
        begun.ends["copy 1"].set()
        assert futures[0].result(60) == "copy 1 done"
        assert begun.work(pool) == "copy 2"
        assert begun.work(pool) == "compute 3"
        assert begun.work(pool) == "copy 3"  # there is nothing else to do
        for end in begun.ends.values():
            end.set()
        assert [future.result(60) for future in futures[3:]] == ["copy 3 done", "compute 2 done", "compute 3 done"]


def test_whoever_hears_that_a_copy_has_ended_can_have_the_next_one_begun():
    turns, begun = Turns(is_copied), []
    first = turns.add("copy 1")
    for task in ("copy 2", "compute 1"):
        turns.add(task)
    first.add_done_callback(lambda _: turns.do_next(begun.append))
    turns.do_next(begun.append)
    assert begun == ["copy 1", "copy 2"]


@pytest.mark.parametrize("task", ["copy fails", "compute fails"])
def test_what_a_task_raises_is_its_own(task, begun):
    with ThreadPoolExecutor(1) as pool:
        futures = begun.add(task, "copy 1", "compute 1", "copy 2")
        for end in begun.ends.values():
            end.set()
        for _ in futures:
            begun.work(pool)
    with pytest.raises(ValueError, match=task):
        futures[0].result(60)
    assert [future.result(60) for future in futures[1:]] == ["copy 1 done", "compute 1 done", "copy 2 done"]
    kinds = [one.split()[0] for one in begun.order]
    assert kinds == sorted(kinds, key="copy compute".index), "a copy that has ended keeps none from beginning"
