"""Regular expressions that come from files, compiled and evaluated in bounded time.

Python's `re` backtracks, holds the interpreter while it does, and cannot be told to give up; what ignores case can take
a minute to compile. What may take long is therefore left to a process of its own, which can be ended; the rest (nearly
all that adapters hold) is evaluated here.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from vera_tools.errors import FormatError, cut

#: Seconds of a processor that the expressions of one file may take together, over all names that they are held against.
LIMIT = 1.0
#: Seconds on the clock after which the process is ended in any case.
PATIENCE = 15.0
#: Expressions of one file, and their characters together.
MOST, MOST_CHARACTERS = 1000, 1 << 16
#: How often the expressions of one file may be held against a name.
MOST_TRIES = 1_000_000
_KEPT = 1 << 18  # answers that are remembered
_STEPS = 1e7  # about a tenth of a second
# The limit is the system's own: whatever the process is about to do, it ends.
_EVALUATE = """
import json, re, signal, sys
limit, expressions, texts = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
for expression, whole in expressions:
    try:
        compiled = re.compile(expression)
    except Exception as error:
        print(json.dumps(str(error)), flush=True)
        continue
    method = compiled.fullmatch if whole else compiled.match
    found = {n: match.groupdict() for n, text in enumerate(texts) if (match := method(text)) is not None}
    print(json.dumps(found), flush=True)
"""
Groups = dict[str, "str | None"]
_answers: dict[tuple[str, bool], dict[str, Groups | None]] = {}


@dataclass(frozen=True)
class Expression:
    """One regular expression.

    Attributes:
        text: What is compiled.
        where: The file and key that it stands in.
        whole: It must match all of a name.
        written: What the file holds of it; the rest is put around it.
    """

    text: str
    where: str
    whole: bool = False
    written: str = ""

    @property
    def shown(self) -> str:
        """What the file holds of it, cut short."""
        return cut(self.written or self.text)


def check(expressions: Sequence[Expression]) -> None:
    """Refuse what is no regular expression, and more of them than a file has.

    Raises:
        FormatError: names the first.
    """
    characters = sum(len(expression.text) for expression in expressions)
    for found, most, what in (
        (len(expressions), MOST, "regular expressions"),
        (characters, MOST_CHARACTERS, "characters in regular expressions"),
    ):
        if found > most:
            where = expressions[-1].where
            raise FormatError(f"too many {what}", where=where, expected=f"at most {most:,}", found=f"{found:,}")
    for expression in expressions:
        if not _compiles_slowly(expression.text):
            try:
                with warnings.catch_warnings():  # Python 3.10 only warns of what later ones refuse, and PEFT with them
                    warnings.simplefilter("error", DeprecationWarning)
                    _compiled(expression.text)
            except (re.error, OverflowError, RecursionError, DeprecationWarning) as error:
                raise _none(expression, str(error)) from error
    slow = [expression for expression in expressions if _compiles_slowly(expression.text)]
    for expression, answer in zip(slow, _ask(slow, ()), strict=True):
        if isinstance(answer, str):
            raise _none(expression, answer)


def match(expression: Expression, text: str) -> Groups | None:
    """What `re.match`, or where `whole` `re.fullmatch`, finds: the named groups; None where it does not match.

    Raises:
        FormatError: it takes too long.
    """
    known = _answers.get((expression.text, expression.whole), {})
    if text in known:
        return known[text]
    if _may_take_long(expression.text, [text]):
        prepare([expression], [text])
        return _answers[expression.text, expression.whole][text]
    compiled = _compiled(expression.text)
    found = compiled.fullmatch(text) if expression.whole else compiled.match(text)
    return None if found is None else found.groupdict()


def prepare(expressions: Sequence[Expression], texts: Collection[str]) -> None:
    """Find at once, in one process, what `match` will be asked of these texts, as far as it may take long.

    Args:
        expressions: They must compile.
        texts: What they are held against.

    Raises:
        FormatError: they take too long.
    """
    refuse_tries(len(expressions) * len(texts), where=expressions[0].where if expressions else "")
    slow = [
        expression
        for expression in expressions
        if _may_take_long(expression.text, texts)
        and not _answers.get((expression.text, expression.whole), {}).keys() >= set(texts)
    ]
    if not slow:
        return
    texts = list(texts)
    if sum(map(len, _answers.values())) > _KEPT:
        _answers.clear()
    for expression, found in zip(slow, _ask(slow, texts), strict=True):
        if isinstance(found, str):
            raise _none(expression, found)
        known = _answers.setdefault((expression.text, expression.whole), {})
        known.update((text, found.get(str(n))) for n, text in enumerate(texts))


def refuse_tries(tries: int, *, where: str) -> None:
    """Refuse to hold so many expressions against so many names.

    Raises:
        FormatError: it would take too long.
    """
    if tries > MOST_TRIES:
        raise FormatError(
            "too many expressions for so many modules",
            where=where,
            expected=f"at most {MOST_TRIES:,} of one with the other",
            found=f"{tries:,}",
        )


def _ask(expressions: Sequence[Expression], texts: Sequence[str]) -> list[dict[str, Groups] | str]:
    """What a process of its own says of each expression: the texts that match by number, or why it is no expression."""
    if not expressions:
        return []
    request = json.dumps([LIMIT, [(expression.text, expression.whole) for expression in expressions], texts])
    command = [sys.executable, "-I", "-S", "-W", "error::DeprecationWarning", "-c", _EVALUATE]
    limit = PATIENCE if sys.platform != "win32" else LIMIT  # Windows counts no processor time for this
    try:
        said = subprocess.run(command, input=request.encode(), capture_output=True, check=False, timeout=limit).stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
    lines = [line for line in said.split(b"\n")[:-1] if line]
    if len(lines) < len(expressions):
        slow = expressions[len(lines)]
        raise FormatError(
            "the regular expression takes too long",
            where=slow.where,
            expected=f"an answer within {LIMIT:g} s for all names together",
            found=slow.shown,
            hint="PEFT would hang on it too: write it without repeats inside of repeats",
        )
    return [json.loads(line) for line in lines]


def _none(expression: Expression, why: str) -> FormatError:
    return FormatError(
        "is not a regular expression", where=expression.where, expected=f"one ({why})", found=repr(expression.shown)
    )


_compiled = functools.lru_cache(4 * MOST)(re.compile)


def _compiles_slowly(expression: str) -> bool:
    """Whether it may ignore case in a range of characters, each of which is then looked at."""
    return "[" in expression and re.search(r"\(\?[a-zA-Z]*i", expression) is not None


def _may_take_long(expression: str, texts: Iterable[str]) -> bool:
    """A bound on the ways in which it may be tried, on the safe side: a repeated group has no bound."""
    if "#" in expression or re.search(r"\)\s*[*+{]", expression) or _compiles_slowly(expression):
        return True
    repeats = sum(map(expression.count, "*+{"))
    choices = sum(map(expression.count, "|?"))
    lengths = [len(text) for text in texts]
    longest, characters = max(lengths, default=0), max(sum(lengths), 1)
    ways = repeats * math.log(longest + 1) + choices * math.log(2)
    return min(ways, 700.0) + math.log(characters / max(longest, 1)) > math.log(_STEPS)
