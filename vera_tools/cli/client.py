"""How the Hub client's own output appears in commands: its progress bars on a terminal, its log lines unless quiet."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from vera_tools.cli.shared import Output


@contextlib.contextmanager
def client_output(output: Output) -> Iterator[None]:
    """Let the client show its bars on a terminal only, and nothing but errors where the command is quiet."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "vera_tools")]
    levels = [logger.level for logger in loggers]
    hide = (output.quiet or output.json or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    if output.quiet:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if hide:
            enable_progress_bars()
