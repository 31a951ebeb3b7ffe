"""Object stores: how they are called, how fsspec reaches them, and what their failures mean.

``s3://``, ``gs://``, ``az://``, ``memory://`` and whatever else fsspec knows. Credentials and endpoints are those of
each store's own client: its environment variables, its files, and fsspec's configuration. None stands in an address.

fsspec is imported on first use only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from vera_tools.errors import FormatError, StoreError, UsageError, VeraToolsError
from vera_tools.files import secrets
from vera_tools.files.relative import refuse_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

#: The extra that brings the client of a store.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
#: What changes with the content, as the stores call it; and what tells of every writing too, where it is there.
_TOKENS = ("ETag", "etag", "VersionId", "version_id", "generation", "md5Hash", "md5", "blob_id", "xet_hash", "sha")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


class AbsentError(StoreError):
    """Nothing of that name is in the store."""


@dataclass(frozen=True)
class Address:
    """A folder or a file in a store, ``scheme://path``.

    Attributes:
        scheme: As fsspec knows it.
        path: What follows, without slashes at its ends.
    """

    scheme: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `text` spells.

        Raises:
            UsageError: it is none, or holds a password, a signature, or another address.
        """
        scheme, _, rest = text.partition("://")
        if "::" in text:
            raise _strange("an address within another", text, "copy the inner one to a folder, or to a store")
        if "?" in rest or (re.match(r"[^/@]*:[^/@]*@", rest) and scheme != "github"):
            how = "give them to the store's own client: by its environment variables, its files, or fsspec's"
            raise _strange("an address with a password, a signature or a query", text, how)
        if "\0" in rest or any(part in (".", "..") for part in rest.split("/")):
            raise _strange("an address with . or .. or a NUL in it", text, "write it without")
        return cls(scheme.lower(), rest.strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str) -> Address:
        return Address(self.scheme, f"{self.path}/{name}" if self.path else name)


def scheme_of(text: str) -> str | None:
    """The scheme of an address, in small letters; None where there is none."""
    match = _SCHEME.match(text)
    return match[1].lower() if match else None


def is_known(scheme: str) -> bool:
    """Whether fsspec has a client for it, installed or not."""
    from fsspec.registry import known_implementations, registry

    return scheme in known_implementations or scheme in registry


def require(address: Address) -> None:
    """Find out before any work that a store's client is installed.

    Raises:
        UsageError: it is not.
    """
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(address.scheme)
    except (ImportError, ValueError) as error:
        what = f"{address.scheme}:// needs a package that is not installed"
        extra = EXTRAS.get(address.scheme)
        hint = f"pip install 'vera-tools[{extra}]'" if extra else secrets.first_line(error)
        raise UsageError(what, where=str(address), hint=hint) from error


def client(address: Address) -> AbstractFileSystem:
    """The file system of fsspec for an address; it remembers no listing.

    Raises:
        UsageError: its package is not installed.
        StoreError: it cannot be made.
    """
    from fsspec.core import url_to_fs

    require(address)
    with errors(str(address)):
        system: AbstractFileSystem = url_to_fs(str(address), use_listings_cache=False)[0]
        return system


@dataclass(frozen=True)
class Entry:
    """A file as the store's own listing describes it.

    Attributes:
        path: As the store's client calls it.
        size: Bytes.
        version: What is another where something else was written under its name.
        etag: The tag by which S3 can be told to hand out nothing else.
    """

    path: str
    size: int
    version: str
    etag: str | None


def listing(system: AbstractFileSystem, address: Address, *, recursive: bool = False) -> dict[str, Entry]:
    """The files of a folder, by their path in it; of a file, itself by the name "".

    Raises:
        AbsentError: nothing is there.
        StoreError: it cannot be reached, or it lists what is in no folder.
    """
    where, top = str(address), str(system._strip_protocol(str(address)))
    with errors(where, system):
        system.invalidate_cache(top)
        rows = list(system.find(top, detail=True).values()) if recursive else system.ls(top, detail=True)
    if not rows:
        raise _absent(where)
    entries = {}
    for row in rows:
        path = row.get("name")
        if row.get("type") != "file" or (isinstance(path, str) and path.endswith("/")):
            continue  # a folder, or what stands for one
        name = _inside(path, top, where=where)
        if "/" in name and not recursive:
            raise StoreError("the store lists a file of another folder", where=where, found=ascii(path)[:80])
        entries[name] = _entry(row, address / name if name else address)
    return entries


def _inside(path: Any, top: str, *, where: str) -> str:
    """The path of a file below the folder that is listed; "" for the file that was listed itself."""
    if path == top:
        return ""
    if not isinstance(path, str) or (top and not path.startswith(f"{top}/")):
        raise StoreError("the store lists a file of another folder", where=where, found=ascii(path)[:80])
    return refuse_path(path[len(top) :].removeprefix("/"), where=where, error=StoreError)


def _entry(row: Mapping[str, Any], address: Address) -> Entry:
    size, etag = row.get("size"), row.get("ETag")
    if type(size) is not int or size < 0:
        raise StoreError("the store does not say how large it is", where=str(address), found=ascii(size)[:80])
    tokens = {name: str(row[name]) for name in (*_TOKENS, *_TIMES) if row.get(name) is not None}
    # Times go by a clock that ticks; that of the memory of this process is fine enough.
    if not any(name in tokens for name in _TOKENS) and address.scheme != "memory":
        raise StoreError(
            "the store does not say which version of a file it holds, so that a change could pass unseen",
            where=str(address),
            hint="copy it to a folder first",
        )
    return Entry(row["name"], size, repr((size, sorted(tokens.items()))), etag if isinstance(etag, str) else None)


def reader(system: AbstractFileSystem, entry: Entry, *, where: str) -> Callable[[int, int], bytes]:
    """What fetches a range of a file, of the version that was listed alone where its store can be told so.

    A tag of S3 comes back when the content does, so that comparing it at the end would not show what lay there for a
    while. Others give each writing a tag of its own.

    Raises:
        StoreError: it cannot be reached.
        FormatError: another version is there by now.
    """
    if entry.etag is None:
        return functools.partial(_cat, system, entry.path)
    with errors(where, system):
        file = system.open(entry.path, "rb", cache_type="none")
        if file.details.get("ETag", entry.etag) != entry.etag:
            raise changed(where)
    return functools.partial(_read, file, threading.Lock())


def _read(file: IO[bytes], position: threading.Lock, start: int, stop: int) -> bytes:
    with position:  # which is one for all threads
        file.seek(start)
        return file.read(stop - start)


def _cat(system: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    return bytes(system.cat_file(path, start=start, end=stop))


def changed(where: str) -> FormatError:
    """What is raised for a file that is another one than it was when it was listed."""
    return FormatError(
        "the file was changed while it was read",
        where=where,
        hint="something else writes to it: run this again when that is done",
    )


@contextlib.contextmanager
def errors(where: str, system: AbstractFileSystem | None = None) -> Iterator[None]:
    """Turn whatever a store's client raises inside into a `StoreError` at `where`, and keep secrets out of its logs."""
    known = sorted(_values(system.storage_options), key=len, reverse=True) if system is not None else []
    shown = functools.partial(secrets.redact, known=known)
    with secrets.discreet_logs(shown=shown):
        try:
            yield
        except VeraToolsError:
            raise
        except Exception as error:  # each client has classes of its own, and none that they share
            raise _explain(error, where, shown) from secrets.without_secrets(error, shown)


def _values(options: object) -> Iterator[str]:
    """What a file system was configured with that is secret."""
    pairs: Iterable[tuple[object, object]] = options.items() if isinstance(options, Mapping) else ()
    for name, value in pairs:
        if isinstance(value, Mapping):
            yield from _values(value)
        elif isinstance(value, str) and len(value) >= 4 and secrets.is_secret(str(name)):
            yield value


def _explain(error: Exception, where: str, shown: Callable[[str], str]) -> VeraToolsError:
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.EBUSY and name == "FileExpired":
        return changed(where)
    said = secrets.first_line(error, shown)
    if isinstance(error, FileNotFoundError):
        return _absent(where)
    if isinstance(error, PermissionError) or "Credential" in name or "Authenti" in name:
        hint = "check the credentials that the store's own client uses, and what they may do"
        return StoreError(f"no right to do this: {said}", where=where, hint=hint)
    if isinstance(error, FileExistsError):
        return StoreError("something is there already", where=where, hint="choose another name")
    if isinstance(error, TypeError | ValueError):
        return StoreError(f"the store cannot be asked: {name}: {said}", where=where, hint="check the address")
    if isinstance(error, TimeoutError | ConnectionError) or "Connect" in name or "Timeout" in name:
        hint = "check the network and the endpoint"
        return StoreError(f"the store cannot be reached: {said}", where=where, hint=hint)
    return StoreError(f"the store refused: {name}: {said}", where=where, hint="try again")


def _absent(where: str) -> AbsentError:
    return AbsentError("no such file or folder in the store", where=where, hint="check the name")


def _strange(what: str, text: str, hint: str) -> UsageError:
    return UsageError(f"{what} is not taken", where=secrets.redact(text), hint=hint)
