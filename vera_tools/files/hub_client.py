"""The Hub: how it is called, and what its failures mean.

Every request goes through the huggingface_hub client: its session, token, cache, endpoint and environment variables
are the user's own. `call` adds the retries that the client leaves out for some of its requests, and `errors` turns
whatever the client raises into one `HubError` that says what to do, without a token or a signed URL in it.

The client is imported on first use only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vera_tools._version import __version__
from vera_tools.errors import HubError, VeraToolsError
from vera_tools.files import secrets
from vera_tools.files.hub_answers import RemoteFile, check_answer, commit_of, remote_file, told_to_wait
from vera_tools.files.hub_reference import Reference

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Result = TypeVar("Result")

# How hf_xet, which is written in Rust, quotes an error of the system.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")

#: Statuses after which the same request may succeed.
TRANSIENT = (408, 429, 500, 502, 503, 504)
#: What the system says where a disk, a quota or the largest size of a file is used up.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ATTEMPTS = 5
FEW_ATTEMPTS = 2

log = logging.getLogger(__name__)


def git_sha1(content: bytes) -> str:
    """Git's name for a file with this content, which the Hub lists for files that are not large."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def client() -> HfApi:
    """The official client, for the endpoint and token that the user's environment names."""
    from huggingface_hub import HfApi

    return HfApi(library_name="vera-tools", library_version=__version__)


def headers() -> dict[str, str]:
    """Headers of a request for a file's bytes as they are: the user's token, and who asks."""
    from huggingface_hub.utils import build_hf_headers

    named = build_hf_headers(library_name="vera-tools", library_version=__version__)
    return {**named, "Accept-Encoding": "identity"}


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def resolve(api: HfApi, reference: Reference) -> str:
    """The commit that the reference's revision stands for now.

    Raises:
        HubError: no such repository or revision, no access, or the Hub cannot be reached.
    """
    with errors(str(reference)):
        info = call(api.model_info, reference.repo, revision=reference.revision)
        return commit_of(info.sha, where=str(reference))


def listing(api: HfApi, reference: Reference, commit: str, *, recursive: bool = False) -> dict[str, RemoteFile]:
    """The files of the reference's folder at `commit`, by path in the repository.

    Raises:
        HubError: no such folder, or the Hub cannot be reached.
    """
    from huggingface_hub.hf_api import RepoFile

    def read() -> dict[str, RemoteFile]:
        rows = api.list_repo_tree(
            reference.repo, path_in_repo=reference.subfolder or None, recursive=recursive, revision=commit
        )
        files = (
            remote_file(row, folder=reference.subfolder, recursive=recursive, where=str(reference))
            for row in rows
            if isinstance(row, RepoFile)
        )
        return {file.path: file for file in files}

    with errors(str(reference)):
        return call(read, few=True)


def call(function: Callable[..., Result], *args: Any, few: bool = False, unsafe: bool = False, **kwargs: Any) -> Result:
    """Call the client, and call it again where it gave up on something that passes.

    A rate limit is waited out as the Hub tells; failures of server and network are tried again after 1, 2, 4, ...
    seconds. `few` is for what the client makes of many requests and mostly tries again by itself; `unsafe` is for what
    must not be done twice: there, only a refusal (429) is followed by another try.
    """
    attempts = FEW_ATTEMPTS if few else ATTEMPTS
    for attempt in range(1, attempts + 1):
        watch_answers()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            root = _root(error)
            status = _status(root)
            passes = status == 429 or (not unsafe and (status in TRANSIENT or _is_transport(root)))
            if not passes or attempt == attempts:
                raise
            wait = _wait_of(root) if status == 429 else None
            seconds = 2.0 ** (attempt - 1) if wait is None else wait + 1.0
            reason = "rate limited by the Hub" if status == 429 else f"the Hub failed ({status or 'network'})"
            log.warning("%s: trying again in %g s (%d of %d)", reason, seconds, attempt, attempts - 1)
        time.sleep(seconds)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def errors(where: str) -> Iterator[None]:
    """Turn whatever the client raises inside into a `HubError` at `where`, and keep secrets out of its logs."""
    from huggingface_hub.errors import HTTPError

    with secrets.discreet_logs("huggingface_hub", shown=_redact):
        try:
            yield
        except VeraToolsError:
            raise
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise _explain(error, where) from secrets.without_secrets(error, _redact)
        except (LookupError, TypeError, AttributeError, AssertionError) as error:
            # What the client raises where an answer lacks a member, or holds one of another type.
            what = f"the Hub's answer is not what its client can read: {type(error).__name__}: {_first_line(error)}"
            raise HubError(what, where=where, hint="check HF_ENDPOINT") from secrets.without_secrets(error, _redact)


def watch_answers() -> None:
    """Have the client's session look at answers before it acts on them; it makes a new session after some errors."""
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks["response"]
    if check_answer not in hooks:
        hooks.append(check_answer)


@contextlib.contextmanager
def room(where: str | os.PathLike[str], *, hint: str) -> Iterator[None]:
    """Say of a local disk that is full at `where`, whoever noticed it, what a full cache is said to be: a `HubError`.

    What is at fault is not always the cache, which `errors` takes a full disk for; put this inside of it.
    """
    try:
        yield
    except (OSError, VeraToolsError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, HubError) or not isinstance(cause, OSError) or cause.errno not in _FULL:
            raise
        raise HubError("the disk is full", where=where, hint=hint) from cause


def _explain(error: BaseException, where: str) -> HubError:
    root = _root(error)
    for explain in (_explain_named, _explain_status, _explain_transport, _explain_disk):
        if found := explain(root, where):
            return found
    return HubError(
        _first_line(root),
        where=where,
        hint="try again; VERA_TOOLS_DEBUG=1 shows where the Hub's client raised it",
    )


def _explain_named(root: BaseException, where: str) -> HubError | None:
    """What the client has an exception class of its own for."""
    from huggingface_hub import errors as hub

    if isinstance(root, hub.OfflineModeIsEnabled):
        what, hint = "offline mode is on", "unset HF_HUB_OFFLINE, or fetch it while online: then the cache is enough"
    elif isinstance(root, hub.LocalEntryNotFoundError):
        what, hint = "not in the local cache, and the Hub cannot be reached", "go online, or unset HF_HUB_OFFLINE"
    elif isinstance(root, hub.GatedRepoError):
        what = "the repository is gated, and access was not granted to " + ("this token" if _token() else "anyone")
        hint = f"ask for access on its page, then {_SIGN_IN}"
    elif isinstance(root, hub.RepositoryNotFoundError):
        if _token():
            what, hint = "no such repository, or this token may not see it", "check the name, and whose token is used"
        else:
            what, hint = "no such repository, or it is private", f"check the name; to see private ones, {_SIGN_IN}"
    elif isinstance(root, hub.RevisionNotFoundError):
        what, hint = "no such revision", "name a branch, a tag, a commit or refs/pr/N that exists"
    elif isinstance(root, hub.EntryNotFoundError):
        what, hint = "no such file or folder in the repository", "check the path and the revision"
    elif isinstance(root, hub.LocalTokenNotFoundError):
        what, hint = "no token", _SIGN_IN
    elif isinstance(root, hub.HFValidationError):
        what, hint = _first_line(root), "a repository is called owner/name"
    else:
        return None
    return HubError(what, where=where, hint=hint)


_SIGN_IN = "sign in with `hf auth login`, or set HF_TOKEN"


def _explain_status(root: BaseException, where: str) -> HubError | None:
    status = _status(root)
    if status is None:
        return None
    said = _redact(str(getattr(root, "server_message", None) or "")).split("\n")[0].rstrip(".")
    quoted = f': "{said}"' if said else ""
    if status == 401:
        what = "the Hub does not accept the token" if _token() else "authentication required"
        return HubError(what + quoted, where=where, hint=_SIGN_IN)
    if status == 403:
        hint = "use a token with write access to this namespace, or propose the change with --create-pr"
        if _method(root) in ("GET", "HEAD"):
            hint = "use a token that may read this repository; a fine-grained one needs that permission too"
        return HubError("no right to do this" + quoted, where=where, hint=hint)
    if status == 409:
        return HubError("it conflicts with what is there" + quoted, where=where, hint="look at the repository first")
    if status == 412:
        hint = "look at what changed, then push again"
        return HubError("somebody else pushed to it meanwhile", where=where, hint=hint)
    if status == 416:
        return HubError("the file on the Hub is shorter than its listing says", where=where, hint="try again")
    if status == 429:
        wait = _wait_of(root)
        hint = f"wait {wait} seconds and try again" if wait is not None else "wait a while and try again"
        return HubError("too many requests, even after waiting", where=where, hint=hint)
    if status >= 500:
        hint = "try again later; https://status.huggingface.co says more"
        return HubError(f"the Hub failed with status {status}{quoted}", where=where, hint=hint)
    return HubError(f"the Hub refused with status {status}{quoted}", where=where, hint="check what was asked for")


def _explain_transport(root: BaseException, where: str) -> HubError | None:
    from huggingface_hub.errors import HTTPError

    name, text = type(root).__name__, _first_line(root)
    if "Consistency check failed" in text:
        return HubError("the transfer was cut short", where=where, hint="try again")
    if name == "ProxyError":
        return HubError(f"the proxy refused: {text}", where=where, hint="check HTTPS_PROXY and NO_PROXY")
    if "Timeout" in name:
        hint = "check the network, or allow more with HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT"
        return HubError("the Hub did not answer in time", where=where, hint=hint)
    if name in ("ConnectError", "UnsupportedProtocol", "InvalidURL"):
        hint = "check the network, the proxy and HF_ENDPOINT"
        return HubError(f"the Hub cannot be reached: {text}", where=where, hint=hint)
    if isinstance(root, HTTPError):
        return HubError("the connection broke off", where=where, hint="check the network and try again")
    if isinstance(root, ConnectionError | RuntimeError) or name.startswith("Xet"):  # hf_xet has few classes of its own
        if (system := _OS_ERROR.search(str(root))) and int(system[1]) in _FULL:
            return _explain_disk(OSError(int(system[1]), ""), where)
        hint = "try again, or with HF_HUB_DISABLE_XET=1 to transfer over plain HTTP"
        return HubError(f"the transfer through Xet failed: {text}", where=where, hint=hint)
    return None


def _explain_disk(root: BaseException, where: str) -> HubError | None:
    if not isinstance(root, OSError) or root.errno is None:
        return None
    full = root.errno in _FULL
    what = "the disk is full" if full else f"could not be stored: {root.strerror}"
    if isinstance(root.filename, str):
        where = f"{where}: {root.filename}"
    hint = "make room, or move the cache with HF_HOME" if full else "check the output folder and the cache (HF_HOME)"
    return HubError(what, where=where, hint=hint)


def _root(error: BaseException) -> BaseException:
    """The failure itself: the client hides some behind a cache miss, and uploads behind a RuntimeError."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _method(error: BaseException) -> str | None:
    request = getattr(getattr(error, "response", None), "request", None)
    return getattr(request, "method", None)


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    return isinstance(error, HTTPError | ConnectionError) and _status(error) is None


def _wait_of(error: BaseException) -> int | None:
    """Seconds that the answer behind an error tells us to wait."""
    return told_to_wait(getattr(getattr(error, "response", None), "headers", {}))


def _token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def _first_line(error: BaseException) -> str:
    return secrets.first_line(error, _redact)


def _redact(text: str) -> str:
    """`text` without secrets, whichever token the client may use."""
    return secrets.redact(text, _secrets())


def _secrets() -> list[str]:
    """Every token that the client may use, as it is written down and as the client cleans it; the longest first."""
    from huggingface_hub import constants

    found = [os.environ.get("HF_TOKEN", ""), os.environ.get("HUGGING_FACE_HUB_TOKEN", "")]
    with contextlib.suppress(OSError, ValueError):
        found.append(Path(constants.HF_TOKEN_PATH).read_text("utf-8"))
    forms = {form for token in found for form in (token, token.strip(), "".join(token.splitlines()).strip())}
    return sorted((form for form in forms if form.strip()), key=len, reverse=True)
