"""Gates on loaders: does a serving stack compute with exactly the trained projections, and what does a move change?

A SPEC names loaders, and what they run on: ``peft>=0.21``, ``peft>=0.21:bfloat16``,
``peft>=0.21:bfloat16:windows-x86_64``, ``peft>=0.21:bfloat16:macos-arm64:torch==2.1``. A part that is left out means
every value, and a loader has its default options unless one is named (``low_cpu_mem_usage=True``). What is not known
of a stack does not pass its gate.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vera_tools.errors import UsageError
from vera_tools.platforms import rows
from vera_tools.platforms.names import ENDED, PLATFORMS
from vera_tools.platforms.rows import Minor
from vera_tools.report import Document
from vera_tools.verifying.loads import BASE_DTYPES, BASE_KINDS, OLD_PEFT, OPTIONS, PEFT, VERA_TOOLS, Load

#: The releases of PEFT that a loader of the table stands for: from the first, and below the second.
_RELEASES = {OLD_PEFT: ((0, 11, 0), (0, 21, 0)), PEFT: ((0, 21, 0), None)}
_OPTIONS = {f"{name}={value}".lower(): {name: value} for options in OPTIONS for name, value in options.items()}
_VALID = (
    "LOADER[:DTYPE][:PLATFORM][:torch==VERSION], where LOADER is vera-tools or peft with versions (peft>=0.21, "
    f"peft==0.20.0); DTYPE of the base {', '.join(BASE_DTYPES)}; PLATFORM {', '.join(PLATFORMS)}"
)
_CLAUSE = re.compile(r"(==|>=|<=|<|>)(\d+(?:\.\d+){0,2})")

Version = tuple[int, int, int]


@dataclass(frozen=True)
class Stack:
    """One place where an adapter may be loaded.

    Attributes:
        loader: Of the loader table.
        base_dtype: Dtype of the base's adapted weights.
        platform: Of `PLATFORMS`.
        torch: A minor release, or None for every one.
    """

    loader: str
    base_dtype: str
    platform: str
    torch: Minor | None

    @property
    def roundings(self) -> tuple[str, ...]:
        """How draws may round there: both ways where nobody has looked at such a build."""
        spans = [span for span in rows.spans() if span.platform == self.platform]
        known = {span.rounding for span in spans if self.torch is None or self.torch in span.minors}
        return tuple(rounding for rounding in rows.ROUNDINGS if rounding in known) or rows.ROUNDINGS

    def __str__(self) -> str:
        torch = "" if self.torch is None else f" with torch {self.torch[0]}.{self.torch[1]}"
        return f"{self.loader} on a {BASE_KINDS[self.base_dtype]} base, {self.platform}{torch}"


@dataclass(frozen=True)
class LoadSpec:
    """What a SPEC says; None where a part is left out.

    Attributes:
        text: The SPEC as it was given.
        loaders: Of the loader table.
        options: The loader's options that differ from its defaults.
        base_dtype: Dtype of the base's adapted weights.
        platform: Of `PLATFORMS`.
        torch: A minor release.
    """

    text: str
    loaders: tuple[str, ...]
    options: tuple[tuple[str, bool], ...] = ()
    base_dtype: str | None = None
    platform: str | None = None
    torch: Minor | None = None

    @classmethod
    def parse(cls, text: str) -> LoadSpec:
        """What `text` says.

        Raises:
            UsageError: no such loader, dtype, platform or version; the message names what there is.
        """
        loader, *parts = text.replace(" ", "").lower().split(":")
        spec: dict[str, object] = {}
        for part in filter(None, parts):
            name, value = _part(part, text)
            if name in spec:
                raise UsageError(f"two parts say {name.replace('_', ' ')}", where=text, expected=_VALID)
            spec[name] = value
        loaders = _loaders(loader, text)
        if "options" in spec and PEFT not in loaders:
            raise UsageError("these options are of PEFT 0.21 and newer", where=text)
        return cls(text, loaders, **spec)  # type: ignore[arg-type]

    def options_of(self, loader: str) -> tuple[tuple[str, bool], ...]:
        """The options that are meant of a loader: those of PEFT 0.21 are no other's."""
        return self.options if loader == PEFT else ()

    def stacks(self) -> Iterator[Stack]:
        """Every place that is meant; of platforms that are not named, those that have such a torch."""
        dtypes = (self.base_dtype,) if self.base_dtype else BASE_DTYPES
        torch = self.torch or (0, 0)
        there = tuple(name for name in PLATFORMS if name not in ENDED or torch <= ENDED[name])
        platforms = (self.platform,) if self.platform else there
        for loader, dtype, platform in itertools.product(self.loaders, dtypes, platforms):
            yield Stack(loader, dtype, platform, self.torch)


@dataclass(frozen=True)
class Answer(Document):
    """Whether a gate lets a checkpoint pass.

    Attributes:
        spec: The SPEC.
        exact: Whether every such loader computes with exactly the trained projections; None where that is not known.
        where: The first of them that does not, in words; "" where all do.
        why: The reason; "" where all do.
    """

    spec: str
    exact: bool | None
    where: str = ""
    why: str = ""


@dataclass(frozen=True)
class Change(Document):
    """What moving from one stack to another does to a checkpoint.

    Attributes:
        before: The SPEC moved from.
        after: The SPEC moved to.
        changes: Whether other projections would be computed with; None where that is not known.
        where: The first place where they would, in words.
        why: What happens there, before and after.
    """

    before: str
    after: str
    changes: bool | None
    where: str = ""
    why: str = ""


def answer(spec: LoadSpec, loads: Sequence[Load]) -> Answer:
    """Whether a checkpoint with this loader table passes a gate. One without a table is not known to."""
    if not loads:
        return Answer(spec.text, None, "", "nothing is known of an adapter that cannot be read")
    table = _table(loads)
    unknown = None
    for stack in spec.stacks():
        found = [table[stack.loader, spec.options_of(stack.loader), r, stack.base_dtype] for r in stack.roundings]
        wrong = next((load for load in found if load.exact is not True), None)
        if wrong is None:
            continue
        known = all(load.exact is False for load in found) or _looked_at(stack)
        exact = wrong.exact if known else None
        why = wrong.why if known else f"no such build of torch was looked at: it may be that it {wrong.why}"
        if exact is False:
            return Answer(spec.text, False, str(stack), why)
        unknown = unknown or Answer(spec.text, None, str(stack), why)
    return unknown or Answer(spec.text, True)


def change(before: LoadSpec, after: LoadSpec, loads: Sequence[Load]) -> Change:
    """What moving from one gate's stacks to another's changes. Parts that both leave out stay the same in the move."""
    if not loads:
        return Change(before.text, after.text, None, "", "nothing is known of an adapter that cannot be read")
    table = _table(loads)
    unknown = None
    for one, two in itertools.product(before.stacks(), after.stacks()):
        same = (
            before.loaders != after.loaders or one.loader == two.loader,
            before.base_dtype or after.base_dtype or one.base_dtype == two.base_dtype,
            before.platform or after.platform or one.platform == two.platform,
        )
        if not all(same):
            continue
        pairs = [
            (
                table[one.loader, before.options_of(one.loader), r, one.base_dtype],
                table[two.loader, after.options_of(two.loader), s, two.base_dtype],
            )
            for r, s in itertools.product(one.roundings, two.roundings)
            # Of one and the same machine only the loader changes, however its builds of torch may round.
            if r == s or (one.platform, one.torch) != (two.platform, two.torch)
        ]
        for first, second in pairs:
            changes = _changes(first, second)
            if changes is False:
                continue
            where, why = f"{one}; {two}", f"before, it {first.why}; after, it {second.why}"
            if changes and _looked_at(one) and _looked_at(two):
                return Change(before.text, after.text, True, where, why)
            unknown = unknown or Change(before.text, after.text, None, where, why)
    return unknown or Change(before.text, after.text, False)


def _changes(first: Load, second: Load) -> bool | None:
    """Whether two loads give different projections; None where that is not known."""
    if first.exact is True and second.exact is True:
        return False
    same_draw = (first.cites is None, first.rounding, first.base_dtype) == (
        second.cites is None,
        second.rounding,
        second.base_dtype,
    )
    if first.cites is not None and same_draw:
        return False  # both draw the pair again, in the same way on the same kind of base
    if (
        first.cites is None
        and second.cites is None
        and (first.loader, first.options, first.base_dtype)
        == (
            second.loader,
            second.options,
            second.base_dtype,
        )
    ):
        return False  # the same loader takes the stored pair in the same way, wherever it runs
    return True if True in (first.exact, second.exact) and False in (first.exact, second.exact) else None


def _looked_at(stack: Stack) -> bool:
    """Whether builds of this release on this platform are known, or every release is meant."""
    if stack.torch is None:
        return True
    return any(span.platform == stack.platform and stack.torch in span.minors for span in rows.spans())


_Key = tuple[str, tuple[tuple[str, bool], ...], str, str]


def _table(loads: Sequence[Load]) -> dict[_Key, Load]:
    return {(load.loader, tuple(load.options.items()), load.rounding, load.base_dtype): load for load in loads}


def _part(part: str, text: str) -> tuple[str, object]:
    if part in BASE_DTYPES:
        return "base_dtype", part
    if part in PLATFORMS:
        return "platform", part
    if part in _OPTIONS:
        return "options", tuple(_OPTIONS[part].items())
    match = re.fullmatch(r"torch==(\d+)\.(\d+)(?:\.\d+)?", part)
    if match:
        return "torch", (int(match[1]), int(match[2]))
    what = "a version of torch is written torch==2.1" if part.startswith("torch") else f"not a part of a SPEC: {part!r}"
    raise UsageError(what, where=text, expected=_VALID)


def _loaders(loader: str, text: str) -> tuple[str, ...]:
    """The loaders of the table that a requirement such as "peft>=0.11,<0.21" stands for."""
    if loader == VERA_TOOLS:
        return (VERA_TOOLS,)
    clauses = loader.removeprefix("peft")
    if clauses == loader:
        raise UsageError(f"not a loader: {loader!r}", where=text, expected=_VALID)
    low: tuple[Version, bool] = ((0, 11, 0), True)  # PEFT has VeRA from 0.11 on
    high: tuple[Version, bool] | None = None
    for clause in clauses.split(",") if clauses else ():
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise UsageError(f"not a version: {clause!r}", where=text, expected=_VALID)
        version = _version(match[2])
        if match[1] in ("==", ">=", ">"):
            low = max(low, (version, match[1] != ">"), key=lambda bound: (bound[0], not bound[1]))
        if match[1] in ("==", "<=", "<"):
            bound = (version, match[1] != "<")
            high = bound if high is None else min(high, bound)
    found = tuple(
        loader
        for loader, (first, end) in _RELEASES.items()
        if (end is None or low[0] < end)
        and (high is None or high[0] > max(first, low[0]) or (high[0] == max(first, low[0]) and high[1] and low[1]))
    )
    if not found:
        raise UsageError("no release of PEFT with VeRA (0.11 and newer) is meant", where=text, expected=_VALID)
    return found


def _version(text: str) -> Version:
    major, minor, patch = (*map(int, text.split(".")), 0, 0)[:3]
    return major, minor, patch
