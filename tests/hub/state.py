"""What the Hub of `tests.hub.server` holds: users, files, commits, repositories, and what is to go wrong."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class User:
    """Whom a token stands for: ``role`` is "read" or "write"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Blob:
    """A file's content, on disk."""

    path: Path
    size: int
    sha256: str
    large: bool
    xet_hash: str | None = None

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """git's name for it: of the pointer where it is a large file."""
        return git_sha1(self.pointer if self.large else self.path.read_bytes())

    def read(self, start: int, stop: int) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    author: str
    files: dict[str, Blob]


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    ref: str


@dataclass
class Repo:
    """``gated_for`` is None for an open repository, else the users whose access was granted."""

    id: str
    private: bool = False
    gated_for: set[str] | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: list[PullRequest] = field(default_factory=list)

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["refs/heads/main"]]

    def resolve(self, revision: str) -> Commit:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        oid = next((self.refs[name] for name in names if name in self.refs), revision)
        if oid not in self.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return self.commits[oid]


@dataclass
class Fault:
    """What goes wrong with the requests that ``match`` (a regular expression over "METHOD /path?query") is found in.

    Attributes:
        match: Which requests.
        status: Answer with this status, and nothing is done.
        headers: Further headers of that answer.
        delay: Seconds to wait first.
        drop: Close the connection without an answer.
        lose: Do as asked, then close the connection without an answer.
        truncate: Send only so many bytes of the body, then close the connection.
        corrupt: Flip the lowest bit of this byte of the file (an offset into the file, not into the answer).
        rewrite: Turns the JSON that would be answered into what is answered: the lie.
        times: How many requests it hits.
        skip: How many matching requests it lets pass first.
    """

    match: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    lose: bool = False
    truncate: int | None = None
    corrupt: int | None = None
    rewrite: Callable[[Any], Any] | None = None
    times: float = 1
    skip: int = 0


@dataclass(frozen=True)
class Request:
    """One request that was answered: what was asked, by whom, and what went back."""

    method: str
    path: str
    headers: dict[str, str]
    user: str | None
    status: int
    sent: int


class RefusedError(Exception):
    """An answer that is an error, in the Hub's convention: its class is in a header."""

    def __init__(self, status: int, message: str, *, code: str | None = None, body: dict[str, Any] | None = None):
        self.status, self.message, self.code, self.body = status, message, code, body or {}
        super().__init__(message)


def git_sha1(content: bytes) -> str:
    """git's name for a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def files_of_shard(path: Path) -> Iterator[tuple[str, str]]:
    """(sha256, Xet hash) of the files that a shard describes, from its binary layout: rows of 48 bytes each."""
    data, position = path.read_bytes(), 48
    while (row := data[position : position + 48])[:32] != b"\xff" * 32:
        flags, entries = struct.unpack_from("<II", row, 32)
        position += 48 * (1 + entries * (2 if flags & 0x80000000 else 1))
        if flags & 0x40000000:
            yield _xet_hex(data[position : position + 32]), _xet_hex(row[:32])
            position += 48


def _xet_hex(raw: bytes) -> str:
    """Xet writes a hash as four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
