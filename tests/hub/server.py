"""A Hub on loopback: a real HTTP server that speaks as much of the Hub's API as its official client uses for models.

Two origins, as on the Hub: the API and regular files on one port, the large files' signed URLs on another. Repositories
hold commits, branches, tags and pull requests; large files go through LFS (checked against their sha256) or through
hf_xet's own ``local://`` store, whose shards the server reads to learn which Xet file has which sha256. Faults - a
status, a delay, a dropped connection, a truncated or corrupted body - are injected by request.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import secrets
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub.call import Answer, Call
from tests.hub.routes import API, CDN, Route, answer_call
from tests.hub.state import Blob, Commit, Fault, RefusedError, Repo, Request, User, files_of_shard
from tests.hub.transfers import LARGE_SUFFIXES


def point_client(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client talk to this server, in this process and in those it starts, with nothing cached below `home`."""
    from huggingface_hub import constants, hf_api

    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_HUB_DISABLE_XET", "HF_XET_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_XET_CACHE", str(home / "xet"))
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


def without_xet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client move large files by LFS, in this process and in those it starts."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")


class HubServer:
    """The server. Use it as a context manager; everything in it may be read and changed by the test meanwhile.

    Attributes:
        url: Where the API is: the client's HF_ENDPOINT.
        users: Token to user.
        repos: "owner/name" to repository.
        faults: What goes wrong; first match wins.
        requests: Every request that was answered.
        failures: Tracebacks of errors in this server itself.
        xet: Offer Xet storage.
        page_size: Rows of a tree listing in one answer.
        multipart_size: Larger uploads through LFS go in parts of this size.
    """

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.failures: list[str] = []
        self.xet = True
        self.page_size = 1000
        self.multipart_size = 1 << 40
        self.lock = threading.RLock()
        self._counter = itertools.count()
        self._uploads: dict[str, bytes] = {}
        (storage / "blobs").mkdir(parents=True)
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, routes)) for routes in (API, CDN)]
        # Another host, not only another port, for clients that tell origins apart by the host's name.
        self.url, self.cdn_url = (
            f"http://{host}:{server.server_port}"
            for host, server in zip(("127.0.0.1", "localhost"), self._servers, strict=True)
        )

    def __enter__(self) -> HubServer:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # -- what tests set up and look at

    def add_user(self, name: str, *, role: str = "write", orgs: tuple[str, ...] = ()) -> str:
        """A new token of this user's."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = User(name, role, orgs)
        return token

    def add_repo(self, repo_id: str, files: dict[str, bytes | Path] | None = None, **options: Any) -> Repo:
        """A new repository with one commit that holds `files` (contents, or paths of files that hold them)."""
        repo = self.repos[repo_id] = Repo(repo_id, **options)
        blobs = {".gitattributes": self.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)}
        for path, content in (files or {}).items():
            blobs[path] = self.store(content, large=path.endswith(LARGE_SUFFIXES))
        self.commit(repo, "refs/heads/main", None, blobs, "initial commit", repo_id.split("/")[0])
        return repo

    def store(self, content: bytes | Path, *, large: bool, sha256: str | None = None, xet: str | None = None) -> Blob:
        """Keep a content. `sha256` may be given for a file too large to be read."""
        if isinstance(content, Path):
            digest = sha256 or hashlib.sha256(content.read_bytes()).hexdigest()
            return Blob(content, content.stat().st_size, digest, large, xet)
        digest = hashlib.sha256(content).hexdigest()
        path = self.storage / "blobs" / digest
        path.write_bytes(content)
        return Blob(path, len(content), digest, large, xet)

    def commit(
        self, repo: Repo, ref: str, parent: str | None, files: dict[str, Blob], title: str, author: str
    ) -> Commit:
        """Put a commit on a branch."""
        text = f"{next(self._counter)} {repo.id} {parent} {title} {sorted((p, b.sha256) for p, b in files.items())}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), parent, title, author, dict(files))
        repo.commits[commit.oid] = commit
        repo.refs[ref] = commit.oid
        return commit

    def count(self, pattern: str) -> int:
        """How many answered requests match."""
        return sum(bool(re.search(pattern, f"{r.method} {r.path}")) for r in self.requests)

    @contextlib.contextmanager
    def fault(self, match: str, **what: Any) -> Iterator[Fault]:
        """Let something go wrong for a while."""
        fault = Fault(match, **what)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    # -- what handlers use

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.match, request):
                    if fault.skip > 0:
                        fault.skip -= 1
                    elif fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    @property
    def cas(self) -> Path:
        return self.storage / "cas"

    def xet_blob(self, sha256: str, size: int) -> Blob | None:
        """The large file with this sha256 that was uploaded through Xet, put together from the store's chunks."""
        hashes = dict(itertools.chain.from_iterable(map(files_of_shard, self.cas.rglob("shards/*.mdb"))))
        if sha256 not in hashes:
            return None
        import hf_xet

        path = self.storage / "blobs" / sha256
        with tempfile.TemporaryDirectory() as copy:  # the client's process still has the store's database open
            shutil.copytree(self.cas, copy, dirs_exist_ok=True)
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                group.start_download_file(hf_xet.XetFileInfo(hashes[sha256], size), str(path))
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise RefusedError(400, "the Xet file does not have its sha256")
        return Blob(path, size, sha256, True, hashes[sha256])


def _handler(hub: HubServer, routes: list[Route]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body would wait for the acknowledgement of its headers: 40 ms an answer

        def handle_any(self) -> None:
            call = Call(hub, self)
            fault = hub.take_fault(f"{self.command} {self.path}") or Fault("")
            time.sleep(fault.delay)
            if fault.drop:
                self.close_connection = True
                return
            try:
                if fault.status is not None:
                    raise RefusedError(fault.status, f"injected {fault.status}")
                answer = answer_call(call, routes, urlsplit(self.path).path)
            except RefusedError as refused:
                headers = {"X-Error-Message": refused.message, **fault.headers}
                if refused.code:
                    headers["X-Error-Code"] = refused.code
                answer = Answer({"error": refused.message, **refused.body}, refused.status, headers)
            except Exception:
                hub.failures.append(traceback.format_exc())
                answer = Answer({"error": "the test's Hub has an error"}, 501)
            if fault.lose:
                self.close_connection = True
                return
            self.send(call, answer, fault)

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

        def send(self, call: Call, answer: Answer, fault: Fault) -> None:
            status, headers = answer.status, {"Date": formatdate(usegmt=True), **answer.headers}
            if isinstance(answer.body, Blob):
                start, stop = 0, answer.body.size
                if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    start = int(asked[1])
                    stop = min(int(asked[2]) + 1 if asked[2] else stop, stop)
                    if start >= answer.body.size:
                        status, stop = 416, start
                    else:
                        status = 206
                    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{answer.body.size}"
                body = b"" if self.command == "HEAD" else answer.body.read(start, stop)
                length = stop - start
                if fault.corrupt is not None and start <= fault.corrupt < stop and body:
                    place = fault.corrupt - start
                    body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
            else:
                said = answer.body if fault.rewrite is None else fault.rewrite(answer.body)
                body = b"" if said is None else json.dumps(said).encode()
                headers.setdefault("Content-Type", "application/json")
                length = len(body)
            if self.command == "HEAD":
                body = b""
            elif fault.truncate is not None:
                body, self.close_connection = body[: fault.truncate], True
            name = call.user.name if call.user else None
            asked_with = {key.title(): value for key, value in self.headers.items()}  # clients differ in the case
            # Noted before it is answered: whoever has the answer may look.
            hub.requests.append(Request(self.command, self.path, asked_with, name, status, len(body)))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(length)}.items():
                self.send_header(key, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
