"""One request to the Hub of `tests.hub.server`, and its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.state import RefusedError, Repo, User

if TYPE_CHECKING:
    from tests.hub.server import HubServer

WRITE_ROLES = ("write", "fineGrained")


@dataclass
class Answer:
    """`body` is JSON-able, bytes, or a blob that is served by ranges."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Call:
    """One request under way: its parts, and who asks."""

    def __init__(self, hub: HubServer, handler: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(handler.path)
        self.hub, self.method = hub, handler.command
        self.segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        self.headers = handler.headers
        length = int(handler.headers.get("Content-Length") or 0)
        if handler.headers.get("Transfer-Encoding") == "chunked":
            self.body = _read_chunked(handler)
        else:
            self.body = handler.rfile.read(length)
        self.user: User | None = None

    def authenticate(self) -> None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme:
            if token not in self.hub.users:
                raise RefusedError(401, "Invalid credentials in Authorization header")
            self.user = self.hub.users[token]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def create_pr(self) -> bool:
        """Whether it is about a pull request, which anybody with a write token may open and push to."""
        return self.query.get("create_pr") == "1" or any(part.startswith("refs/pr/") for part in self.segments)

    def owns(self, namespace: str) -> bool:
        return self.user is not None and namespace in (self.user.name, *self.user.orgs)

    def repo(self, owner: str, name: str, *, files: bool = False, write: bool = False) -> Repo:
        """The repository, if this user may see it, read its files, or write to it."""
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and not self.owns(owner)):
            if self.user is None:
                raise RefusedError(401, "Invalid username or password.", code="RepoNotFound")
            raise RefusedError(404, "Repository not found", code="RepoNotFound")
        if files and repo.gated_for is not None and not self.owns(owner):
            if self.user is None:
                message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
                raise RefusedError(401, message, code="GatedRepo")
            if self.user.name not in repo.gated_for:
                message = f"Access to model {repo.id} is restricted and you are not in the authorized list."
                raise RefusedError(403, message, code="GatedRepo")
        if write:
            self.may_write(owner)
        return repo

    def may_write(self, owner: str) -> None:
        if self.user is None:
            raise RefusedError(401, "Invalid username or password.")
        if self.user.role not in WRITE_ROLES:
            raise RefusedError(403, "you must use a write token to upload to a repository")
        if not self.owns(owner) and not self.create_pr:
            raise RefusedError(403, f'you don\'t have the rights to write under the namespace "{owner}"')

    def default_ref(self, revision: str) -> str:
        return revision if revision.startswith("refs/") else f"refs/heads/{revision}"


def _read_chunked(handler: BaseHTTPRequestHandler) -> bytes:
    pieces = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        pieces.append(handler.rfile.read(size))
        handler.rfile.readline()
    handler.rfile.readline()
    return b"".join(pieces)
