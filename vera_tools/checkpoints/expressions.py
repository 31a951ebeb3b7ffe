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

from vera_tools.errors import FormatError

#: Seconds that one name may take.
LIMIT = 2.0
_STEPS = 1e7  # about a tenth of a second
_EVALUATE = """
import json, re, sys
expression, text, whole = json.load(sys.stdin)
found = (re.fullmatch if whole else re.match)(expression, text)
print(json.dumps(found and found.groupdict()))
"""


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
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", _EVALUATE],
            input=json.dumps([expression, text, whole]),
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired as error:
        raise FormatError(
            "the regular expression takes too long",
            where=where,
            expected=f"an answer within {LIMIT:g} s for {text[:60]!r}",
            found=expression if len(expression) <= 60 else f"{expression[:57]}...",
            hint="PEFT would hang on it too: write it without repeats inside of repeats",
        ) from error
    result: dict[str, str | None] | None = json.loads(answer.stdout)
    return result


def _may_take_long(expression: str, text: str) -> bool:
    """A bound on the ways in which it may be tried, on the safe side: a repeated group has no bound."""
    if "#" in expression or re.search(r"\)\s*[*+{]", expression):
        return True
    repeats = sum(map(expression.count, "*+{"))
    choices = sum(map(expression.count, "|?"))
    return repeats * math.log(len(text) + 1) + choices * math.log(2) > math.log(_STEPS)
