"""Many checkpoints, wherever they are: found, verified side by side, logged as they are done, and taken up again.

One that cannot be reached does not stop the others, and a second run verifies only what is new, has changed, or could
not be reached (see `log`). What lies on disk is verified by processes (see `work`), what lies on the Hub or in a store
by threads.
"""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from vera_tools import parts
from vera_tools.checkpoints.presence import WEIGHTS_NAME, sign_of
from vera_tools.errors import FormatError, HubError, RemoteError, UsageError, VeraToolsError
from vera_tools.files import hub_client as hub
from vera_tools.files import hub_reference, opening, store
from vera_tools.files.hub_reference import Reference
from vera_tools.files.local import ByteSource
from vera_tools.parts import Part
from vera_tools.processes.workers import Workers
from vera_tools.texts import Texts
from vera_tools.verifying import runs, work
from vera_tools.verifying.log import Log, Result
from vera_tools.verifying.report import Failed, Skipped, named
from vera_tools.verifying.verifier import Verifier

#: The kind of a repository that holds no adapter.
NO_ADAPTER = "no adapter"

#: Seconds that what is left has to take in this process for others to be started, which takes about as long.
PATIENCE = 0.5
#: Seconds that a process is given work for at a time, and the most checkpoints: what it dies of is looked for in these.
_SPELL, _MOST = 0.1, 32


class Item(NamedTuple):
    """One thing to verify: a checkpoint, or a repository that a pattern stands for."""

    place: int
    path: str
    pattern: str | None = None


def is_pattern(path: str) -> bool:
    """Whether this stands for many: ``hf://owner/*``."""
    return opening.is_on_hub(path) and any(character in path for character in "*?[")


class Items:
    """Things to verify, in little room."""

    def __init__(self) -> None:
        self._paths = Texts()
        self._patterns: dict[int, str] = {}

    def add(self, path: str, pattern: str | None) -> None:
        """Take one on."""
        if pattern is not None:
            self._patterns[len(self)] = pattern
        self._paths.append(path)

    def __len__(self) -> int:
        return len(self._paths)

    def __iter__(self) -> Iterator[Item]:
        return (Item(n, path, self._patterns.get(n)) for n, path in enumerate(self._paths))


class Wanted(NamedTuple):
    """What is to be verified.

    Attributes:
        items: The things of this part, in the order asked for.
        patterns: Patterns among what was asked for.
        bare: Those of them that stand for no repository at all.
        whole: A digest over the names of what all parts together hold.
    """

    items: Items
    patterns: set[str]
    bare: set[str]
    whole: str


def items(named: Iterable[tuple[str, str]], part: Part | None) -> Wanted:
    """What is to be verified.

    Args:
        named: Checkpoints and patterns, each with the name that decides which part it is of.
        part: The part that is wanted.

    Raises:
        HubError: a pattern's owner cannot be listed.
    """
    wanted, names = Items(), Texts()
    patterns, bare = set(), set()
    for path, name in named:
        if not is_pattern(path):
            found, pattern = [(path, name)], None
        else:
            found, pattern = [(repo, repo) for repo in matching(path)], path
            patterns.add(path)
            if not found:
                bare.add(path)
        for one, its_name in found:
            names.append(its_name)
            if parts.belongs(its_name, part):
                wanted.add(one, pattern)
    return Wanted(wanted, patterns, bare, runs.digest(names.sorted()))


@dataclass
class Registry:
    """Verifies many.

    Attributes:
        verifier: Verifies here.
        job: The same, for other processes.
        jobs: How many at a time.
        log: Where results are written and taken from.
        executor: Who verifies what lies on disk; None for processes of our own.
        whole: Whether every repository of a pattern is among the items, so that no adapter in any of them is an error.
    """

    verifier: Verifier
    job: work.Job
    jobs: int
    log: Log
    executor: Executor | None = None
    whole: bool = True

    def run(self, wanted: Wanted) -> Iterator[tuple[int, Result]]:
        """Verify all, and hand out each as it is done, with its place in the order asked for.

        Raises:
            FormatError: a pattern stands for no adapter, which is told after the others.
        """
        empty: set[str] = set()
        with ExitStack() as stack:
            crew = _Crew(self, stack, len(wanted.items))
            for item in wanted.items:
                empty.update([item.pattern] if item.pattern else [])
                for done, results in crew.add(item):
                    yield from self._handed_out(done, results, empty)
            for done, results in crew.finish():
                yield from self._handed_out(done, results, empty)
        nothing = {*wanted.bare, *(empty if self.whole else ())}
        if nothing:  # a mistyped owner must not pass for one whose every adapter is sound
            where = ", ".join(sorted(nothing))
            raise FormatError("no adapter in any repository that this stands for", where=where)

    def _handed_out(self, item: Item, results: list[Result], empty: set[str]) -> Iterator[tuple[int, Result]]:
        self.log.write(results)
        for result in results:
            if item.pattern and not (isinstance(result.outcome, Skipped) and result.outcome.kind == NO_ADAPTER):
                empty.discard(item.pattern)
            yield item.place, result


class _Task(NamedTuple):
    items: list[Item]
    executor: Executor


class _Crew:
    """Who does the work, and what is under way: never much more than there are hands for."""

    def __init__(self, registry: Registry, stack: ExitStack, total: int) -> None:
        self._registry, self._stack = registry, stack
        self._executor = registry.executor
        self._threads: ThreadPoolExecutor | None = None
        self._alone: Workers | None = None
        self._left = total
        self._first, self._seconds, self._count = 0.0, 0.0, 0
        self._next: list[Item] = []
        self._pending: dict[Future[Any], _Task] = {}
        hands = registry.jobs if registry.executor is None else getattr(registry.executor, "_max_workers", 64)
        self._window = 2 * max(hands, registry.jobs)

    def add(self, item: Item) -> Iterator[tuple[Item, list[Result]]]:
        """Take one on, and hand out what is done by then."""
        registry = self._registry
        if opening.is_remote(item.path):
            if self._threads is None:
                self._threads = self._stack.enter_context(_Threads(registry.jobs))
            self._pending[self._threads.submit(_far_away, registry, item)] = _Task([item], self._threads)
        elif known := registry.log.local(item.path, skip_others=registry.job.skip_others):
            yield item, [known]
        elif self._works_here():
            started = time.monotonic()
            done = work.verify_one(registry.verifier, registry.job, item.path)
            self._measure(time.monotonic() - started, 1)
            yield item, [Result(item.path, None, *done)]
        else:
            self._next.append(item)
            if len(self._next) >= self._spell():
                self._send()
        self._left -= 1
        while len(self._pending) >= self._window:
            yield from self._collect()

    def finish(self) -> Iterator[tuple[Item, list[Result]]]:
        """Hand out what is left."""
        if self._next:
            self._send()
        while self._pending:
            yield from self._collect()

    def _works_here(self) -> bool:
        """Whether to work in this process: what little is left, starting others would take too."""
        if self._registry.executor is not None or self._executor is not None:
            return False
        return self._registry.jobs == 1 or self._left * self._each() < PATIENCE

    def _each(self) -> float:
        """Seconds that one takes: what the first takes counts only where it is not due to its being the first."""
        if self._seconds > PATIENCE:
            return self._seconds / self._count
        return (self._seconds - self._first) / (self._count - 1) if self._count > 1 else 0.0

    def _spell(self) -> int:
        """How many to give away at a time: few enough that their results come soon, and that one death costs little."""
        return max(1, min(_MOST, int(_SPELL * self._count / self._seconds))) if self._seconds else 1

    def _measure(self, seconds: float, count: int) -> None:
        self._first = self._first or seconds
        self._seconds, self._count = self._seconds + seconds, self._count + count

    def _send(self) -> None:
        some, self._next = self._next, []
        paths = [item.path for item in some]
        if self._executor is not None:
            with suppress(BrokenExecutor):  # then it is not ours, and is of no use any more
                self._pending[self._executor.submit(work.verify_some, self._registry.job, paths)] = _Task(
                    some, self._executor
                )
                return
        self._executor = self._stack.enter_context(self._workers(self._registry.jobs))
        self._pending[self._executor.submit(work.verify_some, self._registry.job, paths)] = _Task(some, self._executor)

    def _workers(self, count: int) -> Workers:
        base = self._registry.job.base  # which this process may hold a connection for
        return Workers(count, forks=base is None or not opening.is_remote(base))

    def _collect(self) -> Iterator[tuple[Item, list[Result]]]:
        for future in wait(self._pending, return_when=FIRST_COMPLETED).done:
            task = self._pending.pop(future)
            if task.executor is self._threads:
                yield task.items[0], future.result()
                continue
            try:
                seconds, done = future.result()
            except VeraToolsError:
                raise
            except Exception:  # whatever is wrong with a checkpoint is a result: this befell who worked on it
                yield from self._one_by_one(task.items)
                continue
            self._measure(seconds, len(done))
            for item, one in zip(task.items, done, strict=True):
                yield item, [Result(item.path, None, *one)]

    def _one_by_one(self, items: list[Item]) -> Iterator[tuple[Item, list[Result]]]:
        """Those on which a process died, in a process that has nothing else to die of."""
        self._alone = self._alone or self._stack.enter_context(self._workers(1))
        for item in items:
            try:
                _, (one,) = self._alone.submit(work.verify_some, self._registry.job, [item.path]).result()
            except BrokenExecutor as error:
                one = work.Done(
                    Failed(item.path, FormatError(f"not verified: {error}", where=item.path, hint=_DIED)), None
                )
            yield item, [Result(item.path, None, *one)]


_DIED = "was it too little memory? --jobs 1 needs the least"


class _Threads(ThreadPoolExecutor):
    """Threads that begin nothing new once something else failed."""

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.shutdown(wait=True, cancel_futures=kind is not None)


def matching(pattern: str) -> list[str]:
    """The repositories that ``hf://owner/pattern`` stands for, as references, sorted.

    Raises:
        UsageError: a wildcard anywhere but in the repository's name.
        HubError: the Hub refused or cannot be reached.
    """
    owner, _, name = pattern.removeprefix(hub_reference.SCHEME).partition("/")
    if not owner or any(character in owner for character in "*?[") or "/" in name or "@" in name:
        raise UsageError("a wildcard stands for repositories of one owner", where=pattern, expected="hf://owner/*")
    api = hub.client()
    with hub.errors(pattern):
        models = hub.call(lambda: [model.id for model in api.list_models(author=owner)], few=True)
        repos = sorted(model for model in models if fnmatch.fnmatchcase(model, f"{owner}/{name}"))
    strange = [repo for repo in repos if not hub_reference.is_repository(repo)]
    if strange:
        raise HubError("the Hub lists what is no repository", where=pattern, found=ascii(strange[0])[:80])
    return [hub_reference.SCHEME + repo for repo in repos]


def _far_away(registry: Registry, item: Item) -> list[Result]:
    path = item.path
    try:
        if not opening.is_on_hub(path):
            return [_in_store(registry, path)]
        reference = Reference.parse(path)
        if item.pattern:
            return _repository(registry, path, reference)
        if hub.is_offline():
            return [Result(path, None, registry.verifier.verify(path))]
        return [_pinned(registry, path, reference, hub.resolve(hub.client(), reference))]
    except (RemoteError, UsageError) as error:
        return [Result(path, None, Failed(path, error))]


def _in_store(registry: Registry, path: str) -> Result:
    if not registry.log.is_file:
        return Result(path, None, registry.verifier.verify(path))
    before = _state_in_store(path)
    if before and (earlier := registry.log.get(path, before, skip_others=registry.job.skip_others)):
        return earlier
    outcome = registry.verifier.verify(path)
    return Result(path, before if before == _state_in_store(path) else None, outcome)


def _state_in_store(path: str) -> str | None:
    """None of a folder that cannot be read, of which the verifier says why."""
    try:
        return store.state_of(opening.locate(path)[0])
    except FormatError:
        return None


def _repository(registry: Registry, path: str, reference: Reference) -> list[Result]:
    """Every adapter in one repository, wherever in it."""
    api = hub.client()
    commit = hub.resolve(api, reference)
    files: dict[str, set[str]] = {}
    for file in map(PurePosixPath, hub.listing(api, reference, commit, recursive=True)):
        files.setdefault(str(file.parent), set()).add(file.name)
    folders = sorted(folder for folder, names in files.items() if sign_of(names, _weights(reference, commit, folder)))
    if not folders:
        known = registry.log.get(path, commit, skip_others=True)
        return [known or Result(path, commit, Skipped(path, NO_ADAPTER))]
    found = [_below(reference, folder) for folder in folders]
    results = []
    for inside in found:
        try:
            results.append(_pinned(registry, str(inside), inside, commit, skip_others=True))
        except HubError as error:
            results.append(Result(str(inside), commit, Failed(str(inside), error)))
    return results


def _below(reference: Reference, folder: str) -> Reference:
    return replace(reference, subfolder="" if folder == "." else folder)


def _weights(reference: Reference, commit: str, folder: str) -> Callable[[], ByteSource]:
    """Opens the weights in a folder of a repository."""
    where = str(_below(replace(reference, revision=commit), folder))
    return lambda: opening.locate(where)[0].open(WEIGHTS_NAME)


def _pinned(registry: Registry, path: str, reference: Reference, commit: str, *, skip_others: bool = False) -> Result:
    skips = skip_others or registry.job.skip_others
    if earlier := registry.log.get(path, commit, skip_others=skips):
        return earlier
    outcome = registry.verifier.verify(str(replace(reference, revision=commit)), skip_others=skip_others)
    return Result(path, commit, named(outcome, path))
