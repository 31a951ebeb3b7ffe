"""What a key means: torch's CPU generator is seeded with its low 32 bits, and with nothing else of it.

So keys 5 and 2**32 + 5 draw the same projections. Negative keys wrap modulo 2**64 first (-1 is 2**64 - 1), which leaves
their low 32 bits as they are.
"""

from __future__ import annotations

from vera_tools.errors import UsageError

KEY_MIN, KEY_MAX = -(2**63), 2**64 - 1


def check_key(key: object) -> int:
    """`key` itself where ``torch.Generator.manual_seed`` would take it.

    Raises:
        UsageError: not an int (a bool is none), or outside [-2**63, 2**64), which torch refuses too.
    """
    if isinstance(key, bool) or not isinstance(key, int):
        raise UsageError("not a PRNG key", expected="an integer", found=repr(key))
    if not KEY_MIN <= key <= KEY_MAX:
        raise UsageError("not a PRNG key", expected="an integer in [-2**63, 2**64)", found=str(key))
    return key


def seed(key: int) -> int:
    """What MT19937's ``init_genrand`` is called with for this key."""
    return key % 2**32


def same_key(a: int, b: int) -> bool:
    """Whether two keys seed the same generator."""
    return seed(a) == seed(b)
