"""What is remembered, by what, for how long, and that no failure is."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vera_tools.memo import Memo


def test_each_key_is_computed_once():
    memo, calls = Memo(10), []
    for key in ("a", "b", "a"):
        assert memo(key, lambda key=key: calls.append(key) or key * 2) == key * 2
    assert calls == ["a", "b"]


def test_what_was_not_asked_for_the_longest_is_forgotten_first():
    memo, calls = Memo(10), []
    for key, weight in (("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4)):
        memo(key, lambda key=key: calls.append(key), weight=weight)
    assert calls == ["a", "b", "c", "b"]  # c had put b out
    assert memo("large", lambda: 1, weight=11) == memo("large", lambda: 1, weight=11) == 1
    memo("d", lambda: calls.append("d"), weight=4)
    memo("d", lambda: calls.append("d"), weight=4)
    assert calls[-1] == "d"
    assert calls.count("d") == 1


def test_no_failure_is_remembered_and_nothing_that_may_not_be():
    memo = Memo(10)
    for words in ("one", "two"):
        with pytest.raises(ValueError, match=words):
            memo("key", lambda words=words: int(words))
    assert memo("key", lambda: 1, keep=lambda result: result > 1) == 1
    assert memo("key", lambda: 2, keep=lambda result: result > 1) == 2
    assert memo("key", lambda: 3) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_waits_for_another_and_fails_in_its_own_words(fails):
    memo, begun, go_on = Memo(10), threading.Event(), threading.Event()
    found = {}

    def compute(name):
        begun.set()
        go_on.wait(10)
        if fails:
            raise ValueError(name)
        return name

    def ask(name):
        try:
            found[name] = memo("key", lambda: compute(name))
        except ValueError as error:
            found[name] = error.args[0]

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("one", "two")]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == ({"one": "one", "two": "two"} if fails else {"one": "one", "two": "one"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_does_not_wait_for_threads_that_it_does_not_have():
    memo, begun, go_on = Memo(10), threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: memo("key", lambda: (begun.set(), go_on.wait(10))))
    thread.start()
    assert begun.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if memo("key", lambda: "mine") == "mine" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    go_on.set()
    thread.join(10)
