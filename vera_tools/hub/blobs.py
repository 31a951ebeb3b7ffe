"""Large files over HTTP into the client's cache, going on where an earlier process was cut off.

The client gives its unfinished files random names, so that two processes never mix theirs, and removes them or forgets
them: what a process had of a file is lost with it. Here an unfinished file is named by its digest and locked, and it
becomes the client's own blob once it has that digest. What Xet transfers is left to the client.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from vera_tools.errors import HubError
from vera_tools.files import hub_client as hub
from vera_tools.files import locking
from vera_tools.files.hub_answers import RemoteFile
from vera_tools.files.hub_reference import Reference
from vera_tools.hub.transfer import check_arrived


def fetch(reference: Reference, commit: str, file: RemoteFile) -> None:
    """Put a large file's content into the cache, where the client looks for it by its digest.

    A small file, one that Xet transfers, and one that another process is fetching are left to the client.

    Raises:
        HubError: the Hub refused, cannot be reached, or sent other bytes than it lists; or the disk is full.
    """
    if file.sha256 is None or (file.xet and _xet_is_available()):
        return
    blob = _blobs(reference) / file.sha256
    if blob.exists():
        return
    where = f"{reference}: {file.path}"
    partial = blob.with_name(f"{blob.name}.vera-tools.incomplete")
    with hub.errors(where):
        blob.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as stream:
            taken = locking.take(stream.fileno())
            if not taken:
                if taken is None and not stream.tell():  # there are no locks here, so nobody will go on with it
                    partial.unlink(missing_ok=True)
                return
            if blob.exists():  # another process has just finished it
                return
            begun = stream.tell() > 0
            try:
                _complete(reference, commit, file, partial, where=where)
            except HubError:
                if not begun:
                    raise
                # What was there before may have been damaged since.
                _complete(reference, commit, file, partial, where=where)
            try:
                partial.replace(blob)
                return
            except PermissionError:
                pass  # Windows renames no file that is open
        with contextlib.suppress(PermissionError):  # another process has just opened it, and finds it whole
            partial.replace(blob)


def _complete(reference: Reference, commit: str, file: RemoteFile, partial: Path, *, where: str) -> None:
    """Fetch what is missing. Where the whole then has another digest, it is removed."""
    hub.call(_append, reference, commit, file, partial, few=True)
    try:
        check_arrived(partial, file, where=where)
    except HubError:
        partial.write_bytes(b"")
        raise


def _append(reference: Reference, commit: str, file: RemoteFile, partial: Path) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    url = hf_hub_url(reference.repo, file.path, revision=commit, endpoint=hub.client().endpoint)
    with partial.open("ab") as stream:
        if stream.tell() > file.size:
            stream.truncate(0)
            stream.seek(0)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=hub.headers(),
            expected_size=file.size,
            displayed_filename=file.path,
        )


def _xet_is_available() -> bool:
    from huggingface_hub import constants

    return importlib.util.find_spec("hf_xet") is not None and not constants.HF_HUB_DISABLE_XET


def _blobs(reference: Reference) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=reference.repo, repo_type="model") / "blobs"
