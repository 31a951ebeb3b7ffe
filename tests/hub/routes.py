"""What the Hub of `tests.hub.server` answers to each request of the official client; transfers aside."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote

from tests.hub import transfers
from tests.hub.call import Answer, Call
from tests.hub.state import Blob, Commit, PullRequest, RefusedError, Repo, git_sha1

if TYPE_CHECKING:
    from tests.hub.server import HubServer


def whoami(call: Call) -> Answer:
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": call.user.role}
    orgs = [{"name": name} for name in call.user.orgs]
    return Answer(
        {
            "type": "user",
            "name": call.user.name,
            "fullname": call.user.name,
            "orgs": orgs,
            "auth": {"accessToken": token},
        }
    )


def create_repo(call: Call) -> Answer:
    if call.user is None:
        raise RefusedError(401, "Invalid username or password.")
    owner = call.json.get("organization") or call.user.name
    call.may_write(owner)
    repo_id = f"{owner}/{call.json['name']}"
    url = {"url": f"{call.hub.url}/{repo_id}"}
    if repo_id in call.hub.repos:
        raise RefusedError(409, "You already created this model repo", body=url)
    call.hub.add_repo(repo_id, private=call.json.get("visibility") == "private")
    return Answer(url)


def model_info(call: Call, owner: str, name: str, revision: str = "main") -> Answer:
    repo = call.repo(owner, name)
    commit = repo.resolve(revision)
    siblings = []
    for path, blob in sorted(commit.files.items()):
        row: dict[str, Any] = {"rfilename": path}
        if call.query.get("blobs"):
            row |= {"size": blob.size, "blobId": blob.oid}
            if blob.large:
                row["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
        siblings.append(row)
    document = {
        "id": repo.id,
        "sha": commit.oid,
        "private": repo.private,
        "gated": "manual" if repo.gated_for is not None else False,
        "tags": [],
        "siblings": siblings,
        "lastModified": "2025-01-01T00:00:00.000Z",
        "createdAt": "2025-01-01T00:00:00.000Z",
    }
    return Answer(document)


def list_models(call: Call) -> Answer:
    found = [
        {"id": repo.id, "private": repo.private, "tags": [], "createdAt": "2025-01-01T00:00:00.000Z"}
        for repo in call.hub.repos.values()
        if (not repo.private or call.owns(repo.id.split("/")[0]))
        and repo.id.split("/")[0] == call.query.get("author", repo.id.split("/")[0])
        and call.query.get("search", "") in repo.id
    ]
    return _page(call, found)


def tree(call: Call, owner: str, name: str, revision: str, *folder: str) -> Answer:
    commit = call.repo(owner, name).resolve(revision)
    prefix = "/".join(folder)
    rows: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(commit.files.items()):
        if prefix and not path.startswith(f"{prefix}/"):
            continue
        inside = path[len(prefix) + 1 if prefix else 0 :]
        parents = inside.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            directory = "/".join([*folder, *parents[:depth]])
            if depth == 1 or call.query.get("recursive", "").lower() == "true":
                row = {"type": "directory", "oid": git_sha1(directory.encode()), "size": 0, "path": directory}
                rows.setdefault(directory, row)
        if not parents or call.query.get("recursive", "").lower() == "true":
            rows[path] = _row(path, blob)
    if prefix and not rows:
        raise RefusedError(404, f"{prefix} does not exist on {revision!r}", code="EntryNotFound")
    return _page(call, list(rows.values()))


def _row(path: str, blob: Blob) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path}
    if blob.large:
        row["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": len(blob.pointer)}
    if blob.xet_hash:
        row["xetHash"] = blob.xet_hash
    return row


def _page(call: Call, rows: list[dict[str, Any]]) -> Answer:
    start = int(call.query.get("cursor", 0))
    stop = start + call.hub.page_size
    headers = {}
    if stop < len(rows):
        query = "&".join(f"{key}={quote(value)}" for key, value in {**call.query, "cursor": str(stop)}.items())
        path = "/".join(quote(segment, safe="") for segment in call.segments)
        headers["Link"] = f'<{call.hub.url}/{path}?{query}>; rel="next"'
    return Answer(rows[start:stop], headers=headers)


def paths_info(call: Call, owner: str, name: str, revision: str) -> Answer:
    commit = call.repo(owner, name).resolve(revision)
    paths = parse_qs(call.body.decode()).get("paths", [])
    return Answer([_row(path, commit.files[path]) for path in paths if path in commit.files])


def refs(call: Call, owner: str, name: str) -> Answer:
    repo = call.repo(owner, name)

    def listed(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    return Answer(
        {
            "branches": listed("refs/heads/"),
            "tags": listed("refs/tags/"),
            "converts": [],
            "pullRequests": listed("refs/pr/"),
        }
    )


def commits(call: Call, owner: str, name: str, revision: str) -> Answer:
    repo = call.repo(owner, name)
    commit: Commit | None = repo.resolve(revision)
    rows = []
    while commit:
        rows.append(
            {
                "id": commit.oid,
                "title": commit.title,
                "message": "",
                "date": "2025-01-01T00:00:00.000Z",
                "authors": [{"user": commit.author}],
            }
        )
        commit = repo.commits[commit.parent] if commit.parent else None
    return Answer(rows)


def branch(call: Call, owner: str, name: str, branch: str) -> Answer:
    repo = call.repo(owner, name, write=True)
    if f"refs/heads/{branch}" in repo.refs:
        raise RefusedError(409, f"Reference already exists: {branch}")
    start = (call.json or {}).get("startingPoint") if call.body else None
    repo.refs[f"refs/heads/{branch}"] = repo.resolve(start or "main").oid
    return Answer({})


def tag(call: Call, owner: str, name: str, revision: str) -> Answer:
    repo = call.repo(owner, name, write=True)
    ref = f"refs/tags/{call.json['tag']}"
    if ref in repo.refs:
        raise RefusedError(409, f"Tag reference exists already: {call.json['tag']}")
    repo.refs[ref] = repo.resolve(revision).oid
    return Answer({})


def validate_yaml(call: Call) -> Answer:
    content = call.json["content"]
    match = re.match(r"\s*---\n(.*?)\n---", content, re.DOTALL)
    if match:
        import yaml

        try:
            yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            raise RefusedError(400, "invalid metadata", body={"errors": [{"message": str(error)}]}) from error
    return Answer({"errors": [], "warnings": []})


def commit(call: Call, owner: str, name: str, revision: str) -> Answer:
    hub = call.hub
    lines = [json.loads(line) for line in call.body.splitlines()]
    header = lines[0]["value"]
    opening = call.create_pr and not revision.startswith("refs/pr/")
    repo = call.repo(owner, name, write=True)
    assert call.user is not None
    parent = repo.resolve(revision)
    if header.get("parentCommit") and not parent.oid.startswith(header["parentCommit"]):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = hub.store(base64.b64decode(value["content"]), large=False)
        elif line["key"] == "lfsFile":
            files[value["path"]] = _large(hub, value["oid"], value.get("size"))
        elif line["key"] == "deletedFile":
            del files[value["path"]]
        elif line["key"] == "deletedFolder":
            files = {path: blob for path, blob in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
    ref, pull_request = call.default_ref(revision), None
    if opening:
        pull_request = _open(repo, header["summary"], header.get("description", ""), call.user.name)
        ref = pull_request.ref
    made = hub.commit(repo, ref, parent.oid, files, header["summary"], call.user.name)
    return Answer(
        {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{hub.url}/{repo.id}/commit/{made.oid}",
            "hookOutput": "",
            "pullRequestUrl": f"{hub.url}/{repo.id}/discussions/{pull_request.num}" if pull_request else None,
        }
    )


def _large(hub: HubServer, oid: str, size: int | None) -> Blob:
    path = hub.storage / "blobs" / oid
    if hub.xet and (found := hub.xet_blob(oid, size or 0)):
        return found
    if not path.exists():
        raise RefusedError(400, f"LFS pointer points to a file that does not exist: {oid}")
    return Blob(path, path.stat().st_size, oid, True)


def _open(repo: Repo, title: str, description: str, author: str) -> PullRequest:
    number = len(repo.pull_requests) + 1
    pull_request = PullRequest(number, title, description, author, f"refs/pr/{number}")
    repo.pull_requests.append(pull_request)
    repo.refs[pull_request.ref] = repo.head.oid
    return pull_request


def open_discussion(call: Call, owner: str, name: str) -> Answer:
    call.query["create_pr"] = "1"
    repo = call.repo(owner, name, write=True)
    assert call.user is not None
    return Answer({"num": _open(repo, call.json["title"], call.json.get("description", ""), call.user.name).num})


def discussion(call: Call, owner: str, name: str, number: str) -> Answer:
    repo = call.repo(owner, name)
    found = repo.pull_requests[int(number) - 1]
    document = {
        "num": found.num,
        "title": found.title,
        "author": {"name": found.author},
        "status": "draft",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "isPullRequest": True,
        "repo": {"name": repo.id, "type": "model"},
        "events": [],
        "changes": {"base": "refs/heads/main"},
        "filesWithConflicts": [],
        "diff": "",
    }
    return Answer(document)


MODEL = r"api/models/([^/]+)/([^/]+)"
REST = r"((?:/[^/]+)*)"
#: (method, pattern of the raw path, handler)
Route = tuple[str, str, Callable[..., "Answer"]]

API: list[Route] = [
    ("GET", "api/whoami-v2", whoami),
    ("POST", "api/repos/create", create_repo),
    ("POST", "api/validate-yaml", validate_yaml),
    ("POST", "api/complete_multipart", transfers.complete_multipart),
    ("GET", "api/models", list_models),
    ("GET", MODEL, model_info),
    ("GET", MODEL + r"/revision/([^/]+)", model_info),
    ("GET", MODEL + r"/tree/([^/]+)" + REST, tree),
    ("POST", MODEL + r"/paths-info/([^/]+)", paths_info),
    ("GET", MODEL + r"/refs", refs),
    ("GET", MODEL + r"/commits/([^/]+)", commits),
    ("POST", MODEL + r"/branch/([^/]+)", branch),
    ("POST", MODEL + r"/tag/([^/]+)", tag),
    ("POST", MODEL + r"/preupload/([^/]+)", transfers.preupload),
    ("POST", MODEL + r"/commit/([^/]+)", commit),
    ("POST", MODEL + r"/discussions", open_discussion),
    ("GET", MODEL + r"/discussions/(\d+)", discussion),
    ("GET", MODEL + r"/xet-(read|write)-token/([^/]+)", transfers.xet_token),
    ("GET", r"api/resolve-cache/models/([^/]+)/([^/]+)/([^/]+)" + REST, transfers.resolve_cache),
    ("GET", r"([^/]+)/([^/]+)/resolve/([^/]+)" + REST, transfers.resolve),
    ("POST", r"([^/]+)/([^/]+\.git)/info/lfs/objects/batch", transfers.lfs_batch),
    ("POST", r"([^/]+)/([^/]+\.git)/info/lfs/objects/verify", transfers.lfs_verify),
]
CDN: list[Route] = [
    ("PUT", r"upload/([0-9a-f]{64})", transfers.lfs_put),
    ("GET", r"blob/([^/]+)/([^/]+)/([0-9a-f]{64})", transfers.signed_blob),
]


def answer_call(call: Call, routes: list[Route], raw_path: str) -> Answer:
    method = "GET" if call.method == "HEAD" else call.method
    for verb, pattern, function in routes:
        match = re.fullmatch(pattern, raw_path.strip("/"))
        if match and verb == method:
            arguments = [part for group in match.groups() for part in _segments(group)]
            if routes is API:
                call.authenticate()
            with call.hub.lock:
                answer: Answer = function(call, *arguments)
            return answer
    raise RefusedError(404, f"no such route: {call.method} {raw_path}")


def _segments(group: str) -> list[str]:
    """One segment of a path, or the rest of it, each percent-decoded."""
    return [unquote(part) for part in group.split("/")[1:]] if group.startswith("/") or not group else [unquote(group)]
