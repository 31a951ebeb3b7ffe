"""What the Hub answers, held against what it may say before anything follows from it.

A server that lies, or one between it and us, must not choose a file of ours to be read, copied or removed, have us wait
for days, or end a run with anything but a `HubError`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vera_tools.errors import HubError
from vera_tools.files.relative import fault_of, refuse_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from huggingface_hub.hf_api import RepoFile

#: Seconds that we wait at most when the Hub tells us to. Its own limits are counted over five minutes.
LONGEST_WAIT = 300

# What is asked of a model as a whole, and its listings.
_ABOUT_A_MODEL = re.compile(r"/api/models/[^/]+/[^/]+(?:$|/revision/|/(?P<listing>tree)/)")
_SHA256, _GIT = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub's own listing describes it.

    Attributes:
        path: Path in the repository.
        size: Bytes.
        git_sha1: git's name for it: of the content, or of the pointer where it is a large file.
        sha256: Of the content, for large files; the Hub has none for the others.
        xet: The Hub keeps it in Xet storage too.
    """

    path: str
    size: int
    git_sha1: str
    sha256: str | None
    xet: bool = False


def commit_of(value: Any, *, where: str) -> str:
    """A commit's name, which is going to be a folder's name in the cache and so must not be anything else.

    Raises:
        HubError: it is none.
    """
    return _digest(value, _GIT, "a commit", where=where)


def remote_file(row: RepoFile, *, folder: str, recursive: bool, where: str) -> RemoteFile:
    """One row of a listing of `folder`.

    Args:
        row: As the client read it.
        folder: Path in the repository, "" for its root.
        recursive: Files of inner folders are listed too.
        where: What was listed.

    Raises:
        HubError: its path leads out of the folder, or size or digests are none.
    """
    sha256 = row.lfs.sha256 if row.lfs else None
    file = _file(row.path, row.size, row.blob_id, sha256, xet=row.xet_hash is not None, where=where)
    parent = file.path.rpartition("/")[0]
    if parent != folder and not (recursive and (not folder or parent.startswith(f"{folder}/"))):
        raise HubError("the Hub lists a file of another folder", where=where, found=repr(file.path)[:80])
    return file


def _file(path: Any, size: Any, git: Any, sha256: Any, *, xet: bool, where: str) -> RemoteFile:
    path = refuse_path(path, where=where, error=HubError)
    where = f"{where}: {path}"
    if type(size) is not int or size < 0:
        raise _strange("a size", size, where=where, expected="a number of bytes")
    git = _digest(git, _GIT, "a git digest", where=where)
    sha256 = None if sha256 is None else _digest(sha256, _SHA256, "a sha256", where=where)
    return RemoteFile(path, size, git, sha256, xet)


def is_sha256(value: Any) -> bool:
    """Whether this is a sha256 as the Hub writes it."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_git_name(value: Any) -> bool:
    """Whether this is git's name for a commit or a content."""
    return isinstance(value, str) and _GIT.fullmatch(value) is not None


def told_to_wait(headers: Mapping[str, str]) -> int | None:
    """Seconds, from ``RateLimit: "api";r=0;t=N`` or ``Retry-After: N``; a number of many digits is cut to seven."""
    if match := re.search(r"r\s*=\s*0\s*;\s*t\s*=\s*([0-9]{1,7})", headers.get("ratelimit", "")):
        return int(match[1])
    match = re.match(r"\s*([0-9]{1,7})", headers.get("retry-after", ""))
    return int(match[1]) if match else None


def check_answer(response: Any) -> None:
    """A hook of the client's session: refuse an answer that its client would act on without looking.

    The client makes names of files and folders from what listings, commits and ETags say, and waits as long as it is
    told to.

    Args:
        response: The answer, its body not read yet.

    Raises:
        HubError: it tells us to wait longer than `LONGEST_WAIT`, or names what is no commit, path or digest.
    """
    where = f"{response.request.url.host}{response.request.url.path}"
    if response.status_code >= 400:
        seconds = told_to_wait(response.headers)
        if seconds is not None and seconds > LONGEST_WAIT:
            raise HubError(
                f"the Hub tells us to wait {seconds} seconds",
                where=response.request.url.host,
                expected=f"at most {LONGEST_WAIT}",
                hint="try again later",
            )
        return
    if response.request.method == "HEAD":
        for name in ("ETag", "X-Linked-Etag", "X-Repo-Commit"):
            value = response.headers.get(name, "").strip().removeprefix("W/").strip('"')
            if value and ("/" in value or fault_of(value)):
                raise _strange("a digest", value, where=f"{where}: {name}", expected="a name of digits and letters")
    elif response.request.method == "GET" and (asked := _ABOUT_A_MODEL.search(response.request.url.path)):
        response.read()
        try:
            document = response.json()
        except (ValueError, RecursionError):
            return  # the client says so
        if asked["listing"]:
            _check_rows(document, where=where)
        elif isinstance(document, dict) and document.get("sha") is not None:
            commit_of(document["sha"], where=where)


def _check_rows(rows: Any, *, where: str) -> None:
    if not isinstance(rows, list):
        raise _strange("a listing", rows, where=where, expected="a list")
    for row in rows:
        if not isinstance(row, dict) or not isinstance(lfs := row.get("lfs") or {}, dict):
            raise _strange("a file", row, where=where, expected="an object")
        if row.get("type") != "directory":
            _file(row.get("path"), row.get("size"), row.get("oid"), lfs.get("oid"), xet=False, where=where)


def _digest(value: Any, form: re.Pattern[str], what: str, *, where: str) -> str:
    if not isinstance(value, str) or form.fullmatch(value) is None:
        digits = "64" if form is _SHA256 else "40"
        raise _strange(what, value, where=where, expected=f"{digits} hexadecimal digits")
    return value


def _strange(what: str, value: Any, *, where: str, expected: str) -> HubError:
    found = ascii(value)
    found = found if len(found) <= 80 else f"{found[:77]}..."
    return HubError(f"the Hub names what is not {what}", where=where, expected=expected, found=found)
