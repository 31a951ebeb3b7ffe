"""Results that are remembered by what they follow from, so that nothing is computed twice that many files share.

A key has to hold everything that the result depends on. Nothing that fails is remembered: what it says may name a file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Memo:
    """Remembers results by key. Whoever asks for one that is under way waits for it; the oldest are forgotten."""

    def __init__(self, most: int) -> None:
        """At most `most` results, or as many as weigh so much."""
        self._most = most
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock, self._weight = os.getpid(), threading.Lock(), 0
        self._results: dict[Hashable, tuple[Future[Any], int]] = {}

    def __call__(
        self,
        key: Hashable,
        compute: Callable[[], Result],
        *,
        weight: int = 1,
        keep: Callable[[Result], bool] | None = None,
    ) -> Result:
        """What `compute` gives, or gave for an equal key.

        Args:
            key: What the result follows from.
            compute: Is called where it is not known.
            weight: How much of the room it takes, its key included.
            keep: Whether a result may be remembered; all are where there is no such function.
        """
        if self._process != os.getpid():  # a fork: what other threads had under way there never ends here
            self._begin()
        with self._lock:
            known = self._results.pop(key, None)
            mine = known is None
            future, weight = known or (Future(), weight)
            self._results[key] = (future, weight)  # the last one asked for is the last one forgotten
            if mine:
                self._weight += weight
                while self._weight > self._most:
                    _, lighter = self._results.pop(next(iter(self._results)))
                    self._weight -= lighter
        if not mine:
            try:
                result: Result = future.result()
                return result
            except Exception:
                return compute()  # for a message of one's own
        try:
            result = compute()
        except BaseException as error:
            self._forget(key, future)
            future.set_exception(error)
            raise
        if keep is not None and not keep(result):
            self._forget(key, future)
        future.set_result(result)
        return result

    def _forget(self, key: Hashable, future: Future[Any]) -> None:
        with self._lock:
            known = self._results.get(key)
            if known is not None and known[0] is future:
                del self._results[key]
                self._weight -= known[1]
