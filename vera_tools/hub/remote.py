"""The repository that is pushed to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vera_tools.checkpoints.checkpoint import WEIGHTS_NAME
from vera_tools.errors import HubError, UsageError
from vera_tools.files import hub_client as hub
from vera_tools.files import local
from vera_tools.files.hub import HubFile
from vera_tools.files.hub_answers import RemoteFile, commit_of
from vera_tools.files.hub_reference import Reference
from vera_tools.hub.transfer import Digests, Transferred

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class Remote:
    """The repository as it is before the push, and what it takes to write to it."""

    def __init__(self, api: HfApi, reference: Reference) -> None:
        self.api, self.reference = api, reference
        self.head = ""
        self.private = False
        self.created = False
        self.files: dict[str, RemoteFile] = {}
        self._missing: str | None = None

    @classmethod
    def look(cls, reference: Reference, *, private: bool, create: bool) -> Remote:
        """Read what is there; nothing is changed.

        Raises:
            HubError: the Hub refused, or cannot be reached.
            UsageError: it is public, and a private one is wanted.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        self = cls(hub.client(), reference)
        with hub.errors(str(reference)):
            try:
                info = hub.call(self.api.model_info, reference.repo)
                self.private = bool(info.private)
                if reference.revision:
                    try:
                        info = hub.call(self.api.model_info, reference.repo, revision=reference.revision)
                    except RevisionNotFoundError:
                        if not create or reference.revision.startswith("refs/"):
                            raise
                        self._missing = "branch"  # it will start where the default branch is
                self.head = commit_of(info.sha, where=str(reference))
            except RepositoryNotFoundError as error:
                if not create or isinstance(error, GatedRepoError):
                    raise
                self._missing, self.private = "repository", private
                return self
        if private and not self.private:
            hint = "make it private on its settings page, or push without --private"
            raise UsageError("the repository is there, and public", where=str(reference), hint=hint)
        listed = hub.listing(self.api, Reference(reference.repo), self.head, recursive=True)
        self.files = {name: listed[path] for path in listed if reference.path(name := path.rsplit("/", 1)[-1]) == path}
        return self

    def refuse_forbidden(self, *, create_pr: bool) -> None:
        """Refuse where the token does not say that it may write here, as far as the Hub tells.

        Raises:
            HubError: nobody is signed in, with such a token, or as one of the repository's owner.
        """
        with hub.errors(str(self.reference)):
            who = hub.call(self.api.whoami)
        names = {who.get("name"), *(org.get("name") for org in who.get("orgs", ()) if isinstance(org, dict))}
        role = ((who.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read" or (self.reference.repo.split("/")[0] not in names and not create_pr):
            what = "the token is for reading" if role == "read" else "no right to write under this name"
            raise HubError(what, where=str(self.reference), hint="use a token with write access to this namespace")

    def create(self, *, private: bool) -> None:
        """Make the repository or the branch that is missing."""
        repo, revision = self.reference.repo, self.reference.revision
        with hub.errors(str(self.reference)):
            if self._missing == "repository":
                hub.call(self.api.create_repo, repo, private=private or None, exist_ok=True)
                self.created = True
                info = hub.call(self.api.model_info, repo)
                self.head = commit_of(info.sha, where=str(self.reference))
                self.private = bool(info.private)
            if revision and (self._missing == "branch" or (self.created and revision != "main")):
                hub.call(self.api.create_branch, repo, branch=revision, exist_ok=True)

    def read(self, name: str) -> bytes | None:
        """A small file that is there, or None."""
        if name not in self.files:
            return None
        label = f"{self.reference}/{name}"
        with contextlib.closing(
            HubFile(self.api, self.reference.repo, self.head, self.files[name], label=label)
        ) as file:
            return local.read_all(file, limit=local.MOST_TEXT)

    def holds(self, name: str, digest: Digests) -> bool:
        """Whether this very content is there."""
        return name in self.files and digest.is_of(self.files[name])

    def transferred(self, name: str, digest: Digests) -> Transferred:
        """What becomes of one file."""
        status = "unchanged" if self.holds(name, digest) else "changed" if name in self.files else "added"
        checked = "sha256" if name == WEIGHTS_NAME else "git-sha1"
        if name in self.files:
            checked = "git-sha1" if self.files[name].sha256 is None else "sha256"
        return Transferred(self.reference.path(name), digest.size, digest.sha256, checked, status)
