"""What a CHECKPOINT or BASE argument means: a folder or a file on disk, or a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from vera_tools.errors import FormatError, UsageError
from vera_tools.files import hub
from vera_tools.files.local import Folder, LocalFolder, is_folder, not_a_file


def is_remote(reference: str | os.PathLike[str]) -> bool:
    """Whether the argument names something on the Hub."""
    return os.fspath(reference).startswith("hf://")


def locate(reference: str | os.PathLike[str]) -> tuple[Folder, str | None]:
    """The folder that a CHECKPOINT or BASE argument stands for, and the file in it that was named, if one was.

    Args:
        reference: A folder, a file, or ``hf://owner/name[@revision][/subfolder]``.

    Raises:
        FormatError: nothing is there, or it may not be looked at.
        UsageError: the name is empty.
    """
    refuse_empty(reference)
    if is_remote(reference):
        return hub.folder(os.fspath(reference)), None
    path = Path(reference)
    if is_folder(path):
        return LocalFolder(path), None
    if path.is_file():
        return LocalFolder(path.parent), path.name
    if kind := not_a_file(path):
        raise FormatError(f"this is {kind}, not a file or a folder", where=path)
    raise FormatError("no such file or folder", where=path)


def refuse_empty(reference: str | os.PathLike[str]) -> None:
    """Raise UsageError for an empty name: a variable that was not set, which `Path` would take for this folder."""
    if not os.fspath(reference):
        raise UsageError("the name is empty", expected="a folder or a file")
