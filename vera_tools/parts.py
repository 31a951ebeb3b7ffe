"""`--part I/N`: a share of the work, so that N machines do all of it between them without talking to each other."""

from __future__ import annotations

import hashlib
import re

from vera_tools.errors import UsageError, cut

#: (I, N): the I-th of N.
Part = tuple[int, int]
#: Parts that work can have. Nobody has so many machines, and in a part of a mistyped number nothing would be done.
MOST = 100_000


def parse(text: str) -> Part:
    """(I, N) from "I/N".

    Raises:
        UsageError: not of that form, or not 1 <= I <= N <= MOST.
    """
    match = re.fullmatch(r"(\d{1,20})/(\d{1,20})", text, re.ASCII)
    if match is None:
        raise UsageError("not a part", expected="I/N, for example 1/4", found=cut(text))
    part = int(match[1]), int(match[2])
    check(part)
    return part


def check(part: Part) -> None:
    """Refuse what is no part.

    Raises:
        UsageError: not 1 <= I <= N <= MOST.
    """
    if not 1 <= part[0] <= part[1] <= MOST:
        expected = f"I/N with 1 <= I <= N <= {MOST:,}"
        raise UsageError("no such part", expected=expected, found=cut(f"{part[0]}/{part[1]}"))


def belongs(name: str, part: Part | None) -> bool:
    """Whether what has this name is of this part; it is of exactly one of the N, whatever others there are.

    A digest decides, and not the place in a list: where machines do not see quite the same list, nothing that all of
    them see is left out.
    """
    if part is None:
        return True
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % part[1] == part[0] - 1
