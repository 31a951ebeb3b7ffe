"""What a CHECKPOINT or BASE argument means: a folder or a file on disk, the Hub, or a place in a store."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from vera_tools.errors import FormatError, UsageError
from vera_tools.files import hub, hub_reference, secrets, store, store_client
from vera_tools.files.hub_reference import Reference
from vera_tools.files.local import Folder, LocalFolder, is_folder, not_a_file
from vera_tools.files.store_client import Address, scheme_of

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Addresses of files on this disk.
_LOCAL = ("file", "local")
_WEB = ("http", "https")
_HUB = "hf"


def spelled(reference: str | os.PathLike[str]) -> str:
    """A reference in the one form in which everything else knows it, and reports repeat it.

    That is a path, ``hf://``, or the address of a store. The address of a page of the Hub becomes ``hf://``, and that
    of a file on this disk its path.

    Raises:
        UsageError: the address of a file on another machine, or one that holds a password, a signature or another.
    """
    text = os.fspath(reference)
    scheme = scheme_of(text)
    if scheme in _LOCAL:
        return _path_of(text)
    page = hub_reference.from_page(text) if scheme is None or scheme in _WEB else None
    if page and (scheme or not os.path.lexists(text)):
        return page
    if scheme is None or scheme == _HUB:
        return text
    if scheme not in _WEB and store_client.is_known(scheme):
        return str(Address.parse(text))
    return text if os.path.lexists(text) else secrets.redact(text)


def shown(reference: str | os.PathLike[str]) -> str:
    """The same, of whatever reference; one that is refused for a secret in it is refused in this form too."""
    try:
        return spelled(reference)
    except UsageError:
        return secrets.redact(os.fspath(reference))


def is_on_hub(reference: str | os.PathLike[str]) -> bool:
    """Whether the argument names a model on the Hub."""
    return scheme_of(shown(reference)) == _HUB


def is_remote(reference: str | os.PathLike[str]) -> bool:
    """Whether the argument names something that is not on this disk: on the Hub, or in a store."""
    scheme = scheme_of(shown(reference))
    return scheme is not None and scheme not in _WEB and (scheme == _HUB or store_client.is_known(scheme))


def in_store(reference: str | os.PathLike[str]) -> Address | None:
    """The place in a store that the argument names; None where it names none.

    Raises:
        UsageError: it does, and holds a password, a signature or another address.
    """
    scheme = scheme_of(text := spelled(reference))
    if scheme is None or scheme in (_HUB, *_WEB) or not store_client.is_known(scheme):
        return None
    return Address.parse(text)


def local_path(reference: str | os.PathLike[str]) -> Path | None:
    """The path that the argument names; None where it is not on this disk."""
    return None if is_remote(reference) else Path(spelled(reference))


def locate(reference: str | os.PathLike[str]) -> tuple[Folder, str | None]:
    """The folder that a CHECKPOINT or BASE argument stands for, and the file in it that was named, if one was.

    Args:
        reference: A folder, a file, ``hf://owner/name[@revision][/subfolder]``, or an address in a store.

    Raises:
        FormatError: something else is there, or it may not be looked at.
        UsageError: nothing is there, the name is empty, its scheme is unknown, or its store's client not installed.
        RemoteError: the Hub or the store does not have it, refuses, or cannot be reached.
    """
    refuse_empty(reference)
    text = spelled(reference)
    if is_on_hub(text):
        return hub.locate(text)
    if address := in_store(text):
        return store.locate(address)
    path = Path(text)
    if is_folder(path):
        return LocalFolder(path), None
    if path.is_file():
        return LocalFolder(path.parent), path.name
    if kind := not_a_file(path):
        raise FormatError(f"this is {kind}, not a file or a folder", where=path)
    raise _absent(text)


def require(reference: str | os.PathLike[str]) -> None:
    """Refuse an argument that stands for nothing before any work is done. Neither Hub nor store is asked.

    Raises:
        UsageError: nothing is there, the name is empty, its scheme is unknown, it is no reference to the Hub or no
            address, or the client of its store is not installed.
    """
    refuse_empty(reference)
    text = spelled(reference)
    if is_on_hub(text):
        Reference.parse(text)
    elif address := in_store(text):
        store_client.require(address)
    elif not os.path.lexists(text) and _is_absent(text):
        raise _absent(text)


def _path_of(text: str) -> str:
    """The path that the address of a file on this disk means."""
    from urllib.request import url2pathname  # which brings an HTTP client

    address = urlsplit(text)
    if address.netloc not in ("", "localhost") or not address.path.startswith("/"):
        raise UsageError("not the address of a file on this machine", where=text, expected="file:///path")
    return url2pathname(address.path)


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
    scheme = scheme_of(text)
    if scheme in _WEB:
        what = "name it with hf:// or another scheme, or download it first"
        return UsageError("a web address is no checkpoint", where=text, expected="hf://owner/name", hint=what)
    if scheme:
        expected = "a folder, a file, hf://owner/name[@revision][/subfolder], or an address that fsspec knows"
        return UsageError(f"unknown scheme {scheme}://", where=text, expected=expected)
    hint = f"if it is on the Hub, write hf://{text}" if _REPO.fullmatch(text) else None
    return UsageError("no such file or folder", where=text, hint=hint)


def refuse_empty(reference: str | os.PathLike[str]) -> None:
    """Raise UsageError for an empty name: a variable that was not set, which `Path` would take for this folder."""
    if not os.fspath(reference):
        raise UsageError("the name is empty", expected="a folder or a file")
