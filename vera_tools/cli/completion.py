"""Arguments that are paths: a shell completes them as files and folders. What they mean is the library's to say."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


class _Reference(click.ParamType[str]):
    """A path or a reference such as hf://owner/name, taken as it is given."""

    name = "text"

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        """Leave it to the shell, which knows its own rules for quoting."""
        return [CompletionItem(incomplete, type=self._kind)]


#: A checkpoint or a base: a folder or a file.
REFERENCE = _Reference("file")
#: A folder to write.
FOLDER = _Reference("dir")
