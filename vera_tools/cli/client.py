"""How the Hub client's own progress bars appear in commands: on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from vera_tools.cli.shared import Output


@contextlib.contextmanager
def client_output(output: Output) -> Iterator[None]:
    """Let the client show its bars on a terminal only, and not where the command is quiet or prints JSON."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = (output.quiet or output.json or not sys.stderr.isatty()) and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()
