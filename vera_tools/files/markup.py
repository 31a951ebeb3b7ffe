"""What comes from a file, as it may stand in Markdown, in Python and in YAML, where it is text and nothing else."""

from __future__ import annotations

import re
from typing import Any

from vera_tools.errors import FormatError
from vera_tools.report import printable

#: A card's metadata: characters, and how deep it may nest. The Hub's own have some thousand, and four levels.
MOST_METADATA, MOST_LEVELS = 1 << 18, 32

# What begins or ends a construct of Markdown, or of the HTML that may stand in it.
_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&])")
_PLAIN = re.compile(r"[A-Za-z0-9._/:@ -]*")


def markdown(text: str) -> str:
    """The text on one line of Markdown, in a table too."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """The text as code within a line of Markdown, in a table too; it may hold backticks."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    edge = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{edge}{shown}{edge}{fence}".replace("|", r"\|")  # a bar would end the cell, even in code


def code_block(text: str, language: str = "") -> str:
    """The text as a block of code, each of its lines as it is but for what would steer a terminal."""
    shown = "\n".join(map(printable, text.split("\n")))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence}{language}\n{shown}\n{fence}"


def python(text: str) -> str:
    """The text as a literal of Python, on one line and of ASCII."""
    return f'"{text}"' if _PLAIN.fullmatch(text) else ascii(text)


def yaml(text: str, *, where: str, first: int = 1) -> Any:
    """What a YAML document says: no tags but YAML's own, no aliases, and bounded in length and depth.

    Args:
        text: The document.
        where: Its file.
        first: The number of its first line in the file.

    Raises:
        FormatError: not such a document.
    """
    import yaml as library

    if len(text) > MOST_METADATA:
        found = f"{len(text)}"
        raise FormatError("too long for metadata", where=where, expected=f"at most {MOST_METADATA}", found=found)
    level = 0
    try:
        # An alias repeats what it names: a few lines of them are gigabytes.
        for event in library.parse(text, library.SafeLoader):
            level += isinstance(event, library.CollectionStartEvent)
            level -= isinstance(event, library.CollectionEndEvent)
            if isinstance(event, library.AliasEvent):
                found = f"*{printable(event.anchor)}"[:40]
                raise FormatError("an alias of YAML", where=where, expected="the value itself", found=found)
            if level > MOST_LEVELS:
                raise FormatError("nested too deeply", where=where, expected=f"at most {MOST_LEVELS} levels")
        return library.safe_load(text)
    except library.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = where if line is None else f"{where}: line {line + first}"
        raise FormatError(f"not YAML: {printable(str(getattr(error, 'problem', error)))}", where=place) from error
    except (ValueError, OverflowError, RecursionError) as error:  # a day of month 13, a number of 5,000 digits
        raise FormatError(f"not YAML: {printable(str(error))[:80]}", where=where) from error
