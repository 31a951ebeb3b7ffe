"""What a CHECKPOINT or BASE argument means: a folder or a file on disk, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vera_tools.errors import FormatError, UsageError
from vera_tools.files import hub
from vera_tools.files.hub_client import Reference
from vera_tools.files.local import Folder, LocalFolder, is_folder, not_a_file

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Where the Hub's own pages are.
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")


def is_remote(reference: str | os.PathLike[str]) -> bool:
    """Whether the argument names something on the Hub."""
    return os.fspath(reference).startswith("hf://")


def locate(reference: str | os.PathLike[str]) -> tuple[Folder, str | None]:
    """The folder that a CHECKPOINT or BASE argument stands for, and the file in it that was named, if one was.

    Args:
        reference: A folder, a file, or ``hf://owner/name[@revision][/subfolder]``.

    Raises:
        FormatError: something else is there, or it may not be looked at.
        UsageError: nothing is there, the name is empty, or its scheme is unknown.
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
    raise _absent(os.fspath(reference))


def require(reference: str | os.PathLike[str]) -> None:
    """Refuse an argument that stands for nothing before any work is done. The Hub is not asked.

    Raises:
        UsageError: nothing is there, the name is empty, its scheme is unknown, or it is no reference to the Hub.
    """
    refuse_empty(reference)
    text = os.fspath(reference)
    if is_remote(text):
        Reference.parse(text)
    elif not os.path.lexists(text) and _is_absent(text):
        raise _absent(text)


def _is_absent(path: str) -> bool:
    """Whether nothing is there; what the system does not let us look at may be something."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _absent(text: str) -> UsageError:
    """What to say of an argument that stands for nothing here: it may be meant for the Hub."""
    scheme = _SCHEME.match(text)
    if scheme and scheme[1].lower() in ("http", "https"):
        meant = _from_address(text)
        what = f"write {meant}" if meant else "download it first"
        return UsageError("a web address is no checkpoint", where=text, expected="hf://owner/name", hint=what)
    if scheme:
        expected = "a folder, a file, or hf://owner/name[@revision][/subfolder]"
        return UsageError(f"unknown scheme {scheme[1]}://", where=text, expected=expected)
    hint = f"if it is on the Hub, write hf://{text}" if _REPO.fullmatch(text) else None
    return UsageError("no such file or folder", where=text, hint=hint)


def _from_address(text: str) -> str | None:
    """The hf:// form of a page of the Hub, as it is copied from a browser; None where it is no page of a model."""
    address = urlsplit(text)
    parts = [unquote(part) for part in address.path.split("/") if part]
    if address.hostname not in _HOSTS or len(parts) < 2 or parts[0] in ("datasets", "spaces", "papers", "docs"):
        return None
    repo, rest = "/".join(parts[:2]), parts[2:]
    if rest[:1] and rest[0] in ("tree", "blob", "resolve") and len(rest) > 1:
        file = rest[0] != "tree"
        revision = None if rest[1] == "main" else rest[1]
        subfolder = "/".join(rest[2:-1] if file else rest[2:])
        return str(Reference(repo, revision, subfolder))
    return str(Reference(repo))


def refuse_empty(reference: str | os.PathLike[str]) -> None:
    """Raise UsageError for an empty name: a variable that was not set, which `Path` would take for this folder."""
    if not os.fspath(reference):
        raise UsageError("the name is empty", expected="a folder or a file")
