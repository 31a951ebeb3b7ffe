"""How files go up to the Hub of `tests.hub.server` and come down again: LFS, Xet, signed URLs and ranges."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tests.hub.call import Answer, Call
from tests.hub.state import RefusedError

if TYPE_CHECKING:
    from tests.hub.server import HubServer

LARGE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pkl", ".h5", ".gguf", ".npz")
LARGE_SIZE = 10 << 20


def preupload(call: Call, owner: str, name: str, revision: str) -> Answer:
    files = call.repo(owner, name, write=True).resolve(revision).files
    rows = []
    for row in call.json["files"]:
        path, sample = row["path"], base64.b64decode(row["sample"])
        large = path.endswith(LARGE_SUFFIXES) or row["size"] > LARGE_SIZE or b"\0" in sample
        mode = "lfs" if large else "regular"
        known = {"oid": files[path].sha256 if files[path].large else files[path].oid} if path in files else {}
        rows.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return Answer({"files": rows, "commitOid": call.repo(owner, name).resolve(revision).oid})


def lfs_batch(call: Call, owner: str, git_name: str) -> Answer:
    call.query.setdefault("create_pr", "1" if call.json.get("ref", {}).get("name", "").startswith("refs/pr/") else "0")
    call.repo(owner, git_name.removesuffix(".git"), write=True)
    objects = []
    for item in call.json["objects"]:
        oid, size = item["oid"], item["size"]
        if (call.hub.storage / "blobs" / oid).exists():
            objects.append(item)
            continue
        signed = f"{call.hub.cdn_url}/upload/{oid}?X-Signature={secrets.token_hex(8)}"
        upload: dict[str, Any] = {"href": signed}
        if size > call.hub.multipart_size:
            parts = -(-size // call.hub.multipart_size)
            urls = {str(number + 1): f"{signed}&part={number + 1}" for number in range(parts)}
            upload["href"] = f"{call.hub.url}/api/complete_multipart"
            upload["header"] = {"chunk_size": str(call.hub.multipart_size), **urls}
        verify = {"href": f"{call.hub.url}/{owner}/{git_name}/info/lfs/objects/verify"}
        objects.append({**item, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
    return Answer({"transfer": "basic", "objects": objects})


def lfs_put(call: Call, oid: str) -> Answer:
    if "Authorization" in call.headers:
        raise RefusedError(400, "only one authentication mechanism allowed")
    part = call.query.get("part")
    if part is None:
        _keep(call.hub, oid, call.body)
    else:
        call.hub._uploads[f"{oid}/{part}"] = call.body
    return Answer(headers={"ETag": hashlib.md5(call.body, usedforsecurity=False).hexdigest()})


def complete_multipart(call: Call) -> Answer:
    oid = call.json["oid"]
    _keep(call.hub, oid, b"".join(call.hub._uploads.pop(f"{oid}/{part['partNumber']}") for part in call.json["parts"]))
    return Answer({})


def _keep(hub: HubServer, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        raise RefusedError(400, "the content does not have the announced sha256")
    hub.store(content, large=True)


def lfs_verify(call: Call, owner: str, git_name: str) -> Answer:
    call.repo(owner, git_name.removesuffix(".git"))
    path = call.hub.storage / "blobs" / call.json["oid"]
    if not path.exists() or path.stat().st_size != call.json["size"]:
        raise RefusedError(404, "the object is not there")
    return Answer({})


def resolve(call: Call, owner: str, name: str, revision: str, *path: str) -> Answer:
    repo = call.repo(owner, name, files=True)
    found = repo.resolve(revision)
    blob = found.files.get("/".join(path))
    if blob is None:
        raise RefusedError(404, "Entry not found", code="EntryNotFound")
    headers = {"X-Repo-Commit": found.oid, "Accept-Ranges": "bytes"}
    if not blob.large:
        target = "/".join(quote(segment, safe="") for segment in path)
        headers |= {"ETag": f'"{blob.oid}"', "Location": f"/api/resolve-cache/models/{repo.id}/{found.oid}/{target}"}
        return Answer(status=307, headers=headers)
    headers |= {
        "X-Linked-Etag": f'"{blob.sha256}"',
        "X-Linked-Size": str(blob.size),
        "Location": f"{call.hub.cdn_url}/blob/{repo.id}/{blob.sha256}?X-Signature={secrets.token_hex(8)}",
    }
    if call.hub.xet and blob.xet_hash:
        token = f"{call.hub.url}/api/models/{repo.id}/xet-read-token/{found.oid}"
        headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
    return Answer(status=302, headers=headers)


def resolve_cache(call: Call, owner: str, name: str, oid: str, *path: str) -> Answer:
    blob = call.repo(owner, name, files=True).resolve(oid).files["/".join(path)]
    return Answer(blob, headers={"X-Repo-Commit": oid, "ETag": f'"{blob.oid}"'})


def signed_blob(call: Call, owner: str, name: str, sha256: str) -> Answer:
    if "Authorization" in call.headers:
        raise RefusedError(400, "only one authentication mechanism allowed")
    for found in call.hub.repos[f"{owner}/{name}"].commits.values():
        for blob in found.files.values():
            if blob.sha256 == sha256:
                return Answer(blob, headers={"ETag": f'"{sha256}"'})
    raise RefusedError(404, "no such blob")


def xet_token(call: Call, owner: str, name: str, kind: str, revision: str) -> Answer:
    call.repo(owner, name, files=True, write=kind == "write")
    expires, token = int(time.time()) + 3600, f"xet_{secrets.token_hex(8)}"
    headers = {
        "X-Xet-Cas-Url": f"local://{call.hub.cas}",
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return Answer({"casUrl": headers["X-Xet-Cas-Url"], "exp": expires, "accessToken": token}, headers=headers)
