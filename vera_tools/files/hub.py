"""A folder on the Hub, read by ranges: kilobytes for a header, and large files piece by piece, never whole.

The revision is pinned to a commit when the folder is opened, so that all its files belong together. Requests are made,
and made again, by the client's own `http_backoff`, and follow the Hub's redirects to signed URLs.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vera_tools.errors import HubError
from vera_tools.files import hub_client as hub
from vera_tools.files import local
from vera_tools.files.hub_answers import RemoteFile
from vera_tools.files.hub_reference import Reference
from vera_tools.files.ranges import RangedFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import Response

#: How the names of files end that are opened.
FILES = (".safetensors", ".json", ".bin")


def folder(reference: str) -> local.Folder:
    """Open ``hf://owner/name[@revision][/subfolder]``; offline, what the client's cache holds of it.

    Raises:
        UsageError: not such a reference.
        HubError: not there, no access, or the Hub cannot be reached.
    """
    parsed = Reference.parse(reference)
    return CachedFolder(parsed) if hub.is_offline() else HubFolder(parsed)


def locate(reference: str) -> tuple[local.Folder, str | None]:
    """The folder that a reference stands for, and the file in it that was named, if one was.

    Raises:
        UsageError: not a reference.
        HubError: not there, no access, or the Hub cannot be reached.
    """
    parsed = Reference.parse(reference)
    above, _, name = parsed.subfolder.rpartition("/")
    if name.endswith(FILES):
        parent = folder(str(dataclasses.replace(parsed, subfolder=above)))
        if name in parent.names():
            return parent, name
    return folder(reference), None


class HubFolder:
    """A folder of a repository at one commit.

    Attributes:
        label: As it was asked for.
        reference: What was asked for.
        commit: The commit that it stands for.
    """

    def __init__(self, reference: Reference) -> None:
        self.label, self.reference = str(reference), reference
        self._api = hub.client()
        self.commit = hub.resolve(self._api, reference)

    @cached_property
    def files(self) -> dict[str, RemoteFile]:
        """The files directly in the folder, by name."""
        found = hub.listing(self._api, self.reference, self.commit)
        return {path.rsplit("/", 1)[-1]: file for path, file in found.items()}

    def names(self) -> list[str]:
        """Sorted names of the files."""
        return sorted(self.files)

    def path_of(self, name: str) -> str:
        """The file's reference."""
        return f"{self.label}/{name}"

    def open(self, name: str) -> HubFile:
        """Open one file.

        Raises:
            HubError: no such file.
        """
        if name not in self.files:
            raise HubError("no such file in the repository", where=self.path_of(name), hint="check the revision")
        return HubFile(self._api, self.reference.repo, self.commit, self.files[name], label=self.path_of(name))

    def folder(self, name: str) -> HubFolder | None:
        """A folder in it, at the same commit, or None where there is none.

        Raises:
            HubError: the Hub refused, or cannot be reached.
        """
        path = self.reference.path(name)
        listed = hub.listing(self._api, self.reference, self.commit, recursive=True)
        if not any(file.startswith(f"{path}/") for file in listed):
            return None
        inside = copy.copy(self)
        inside.label, inside.reference = self.path_of(name), dataclasses.replace(self.reference, subfolder=path)
        inside.__dict__.pop("files", None)
        return inside

    def refuse_leaving(self, name: str) -> None:
        """There are no links."""

    def check_unchanged(self, at: Path | None = None) -> None:
        """A commit does not change."""

    def forget(self, name: str | None = None) -> None:
        """There is nothing to check."""


class HubFile(RangedFile):
    """A file on the Hub: what fits into one request is fetched whole, and checked; what is larger, by ranges.

    Of a large file, what lies in the first range alone - a header - is taken from there, unchecked until more is read.
    """

    def __init__(self, api: HfApi, repo: str, commit: str, file: RemoteFile, *, label: str) -> None:
        super().__init__(label=label, size=file.size)
        self._api, self._repo, self._commit, self._file = api, repo, commit, file

    @property
    def version(self) -> str:
        """The digest that the Hub lists for it."""
        return self._file.sha256 or self._file.git_sha1

    def _comes_whole(self, stop: int) -> bool:
        return self._file.sha256 is None or super()._comes_whole(stop)

    def _too_short(self, expected: int) -> HubError:
        return HubError("the file ends too early", where=self.label, expected=f"{expected} bytes")

    def _get_whole(self, *, before: tuple[int, bytes]) -> bytes:
        """All of it, if it has the digest that the Hub lists, and what was read of it before was the same."""
        if self._file.sha256 is None:
            content = self._get({}).content
            arrived = hub.git_sha1(content) == self._file.git_sha1
        else:
            content = self._get_range(0, self.size)
            arrived = hashlib.sha256(content).hexdigest() == self._file.sha256
        first, held = before
        if not arrived or content[first : first + len(held)] != held:
            raise HubError("the bytes that arrived are not the ones on the Hub", where=self.label, hint="try again")
        return content

    def _get_range(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        response = self._get({"Range": f"bytes={start}-{stop - 1}"})
        content = response.content
        if response.status_code == 200 and len(content) == self.size:  # a server that does not do ranges
            content = content[start:stop]
        if len(content) != stop - start:
            raise HubError(
                "the Hub sent another range than asked for",
                where=self.label,
                expected=f"{stop - start} bytes",
                found=str(len(content)),
                hint="try again",
            )
        return content

    def _get(self, headers: dict[str, str]) -> Response:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        url = hf_hub_url(self._repo, self._file.path, revision=self._commit, endpoint=self._api.endpoint)
        with hub.errors(self.label):
            hub.watch_answers()
            response = http_backoff(
                "GET", url, headers={**hub.headers(), **headers}, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            )
            hf_raise_for_status(response)
        return response


class CachedFolder(local.LocalFolder):
    """What the client's cache holds of a folder, for when HF_HUB_OFFLINE is set."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(_cached(reference))
        self.label, self.reference = str(reference), reference

    def path_of(self, name: str) -> str:
        """The file's reference."""
        return f"{self.label}/{name}"


def _cached(reference: Reference) -> Path:
    """The folder of the cache that holds the reference's files."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("adapter_config.json", "config.json", "adapter_model.safetensors", "model.safetensors"):
        found = try_to_load_from_cache(reference.repo, reference.path(name), revision=reference.revision)
        if isinstance(found, str):
            return Path(found).parent
    raise HubError(
        "offline mode is on, and the local cache does not have it",
        where=str(reference),
        hint="unset HF_HUB_OFFLINE, or fetch it while online: then the cache is enough",
    )
