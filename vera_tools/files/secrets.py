"""What must not be repeated in a message, a report or a log: tokens, keys, passwords and signatures of addresses."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator

#: Tokens of the Hub, and what follows "Bearer"; passwords in URLs; their queries, which sign them. What is put in their
#: place reads the same again, and an address with it is refused as the one with the secret is.
_SECRETS = (
    (re.compile(r"hf_[A-Za-z0-9_]{6,}|(?i:bearer)\s+\S+"), "<hidden>"),
    (re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*@"), "<hidden>:<hidden>@"),
    (re.compile(r"(?<=\S)\?\S+"), "?<hidden>"),
)
#: Names of environment variables that hold such things, and the fewest characters of one.
_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSW|CONNECTION_STRING|SAS", re.IGNORECASE)
_SHORTEST = 8


def redact(text: str, known: Iterable[str] = ()) -> str:
    """`text` without secrets: those that are `known`, those of the environment, and what looks like one.

    Args:
        text: What is to be shown.
        known: Secrets as they are written down; the longest of them first.
    """
    for secret in known:
        text = text.replace(secret, "<token>")
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and is_secret(name):
            text = text.replace(value, "<hidden>")
    for form, instead in _SECRETS:
        text = form.sub(instead, text)
    return text


def is_secret(name: str) -> bool:
    """Whether what an option or a variable of this name holds is to be kept secret."""
    return _NAMES.search(name) is not None


def without_secrets(error: BaseException, shown: Callable[[str], str] = redact) -> BaseException | None:
    """`error` as a cause to show when debugging; None where it, or what led to it, holds a secret in its text."""
    chain, link = [str(error)], error.__cause__ or error.__context__
    while link is not None:
        chain.append(str(link))
        link = link.__cause__ or link.__context__
    return error if all(shown(text) == text for text in chain) else None


def first_line(error: BaseException, shown: Callable[[str], str] = redact) -> str:
    """The first line of what an error says, without secrets; the name of its class where it says nothing."""
    lines = [line.strip() for line in shown(str(error)).split("\n") if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


class _Discreet(logging.Filter):
    """Takes secrets out of what is logged."""

    def __init__(self, shown: Callable[[str], str]) -> None:
        super().__init__()
        self._shown = shown

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = self._shown(record.getMessage()), None
        return True


@contextlib.contextmanager
def discreet_logs(*names: str, shown: Callable[[str], str] = redact) -> Iterator[None]:
    """Within the block, the handlers of these loggers and of the root log without secrets."""
    discreet = _Discreet(shown)
    handlers = [handler for name in ("", *names) for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(discreet)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(discreet)
