"""Regular expressions that come from files, evaluated in bounded time.

Python's `re` backtracks, holds the interpreter while it does, and cannot be told to give up. What may take long is
therefore left to a process of its own, which can be ended; the rest (nearly all that adapters hold) is evaluated here.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable

from vera_tools.errors import FormatError

#: Seconds that one expression may take, over all names that it is held against at once.
LIMIT = 2.0
#: Seconds that all expressions of one config may take.
BUDGET = 10.0
_KEPT = 1 << 17  # answers that are remembered
_STEPS = 1e7  # about a tenth of a second
_EVALUATE = """
import json, re, sys
expression, texts, whole = json.load(sys.stdin)
method = re.fullmatch if whole else re.match
found = [method(expression, text) for text in texts]
print(json.dumps([one and one.groupdict() for one in found]))
"""
Groups = dict[str, "str | None"]
_answers: dict[tuple[str, str, bool], Groups | None] = {}


@functools.lru_cache(1 << 12)
def match(expression: str, text: str, *, where: str, whole: bool = False) -> dict[str, str | None] | None:
    """What `re.match`, or where `whole` `re.fullmatch`, finds: the named groups; None where it does not match.

    Args:
        expression: The regular expression; it must compile.
        text: What it is held against.
        where: The file and key that it stands in.
        whole: It must match all of the text.

    Raises:
        FormatError: it takes too long.
    """
    if not _may_take_long(expression, text):
        found = (re.fullmatch if whole else re.match)(expression, text)
        return None if found is None else found.groupdict()
    key = (expression, text, whole)
    if key not in _answers:
        prepare(expression, [text], where=where, whole=whole)
    return _answers[key]


def prepare(expression: str, texts: Iterable[str], *, where: str, whole: bool = False) -> None:
    """Find at once, in one process, what `match` will be asked of these texts, as far as it may take long.

    Args:
        expression: The regular expression; it must compile.
        texts: What it is held against.
        where: The file and key that it stands in.
        whole: It must match all of the text.

    Raises:
        FormatError: it takes too long.
    """
    slow = [text for text in texts if (expression, text, whole) not in _answers and _may_take_long(expression, text)]
    if not slow:
        return
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _EVALUATE],
            input=json.dumps([expression, slow, whole]),
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise too_long(where, expression, f"an answer within {LIMIT:g} s for {slow[0][:60]!r}") from error
    if len(_answers) > _KEPT:
        _answers.clear()
    found: list[Groups | None] = json.loads(answer.stdout)
    _answers.update(((expression, text, whole), groups) for text, groups in zip(slow, found, strict=True))


def too_long(where: str, expression: str, expected: str) -> FormatError:
    """The error for an expression that takes too long."""
    return FormatError(
        "the regular expression takes too long",
        where=where,
        expected=expected,
        found=expression if len(expression) <= 60 else f"{expression[:57]}...",
        hint="PEFT would hang on it too: write it without repeats inside of repeats",
    )


def _may_take_long(expression: str, text: str) -> bool:
    """A bound on the ways in which it may be tried, on the safe side: a repeated group has no bound."""
    if "#" in expression or re.search(r"\)\s*[*+{]", expression):
        return True
    repeats = sum(map(expression.count, "*+{"))
    choices = sum(map(expression.count, "|?"))
    return repeats * math.log(len(text) + 1) + choices * math.log(2) > math.log(_STEPS)
