"""`push`: verify a checkpoint, add a manifest and a model card, and upload what changed, in one commit.

The local files are copied first and stay as they are: what was verified is what is sent. Uploading is the Hub client's
own, over LFS or Xet. The commit names its parent, so that nobody's work is overwritten; and afterwards the Hub's
listing must name the digests of what was sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import WEIGHTS_NAME, Checkpoint
from vera_tools.checkpoints.config import CONFIG_NAME, VeraConfig
from vera_tools.checkpoints.manifest import MANIFEST_NAME, Manifest, ProjectionRecord
from vera_tools.checkpoints.resolution import Assumptions, resolve
from vera_tools.checkpoints.writing import describe
from vera_tools.errors import (
    CheckFailedError,
    FormatError,
    HubError,
    UnrecordedWarning,
    UsageError,
    VeraToolsError,
)
from vera_tools.files import hub_client as hub
from vera_tools.files import local, opening
from vera_tools.files.hub import HubFile
from vera_tools.files.hub_answers import RemoteFile, commit_of
from vera_tools.files.hub_client import Reference
from vera_tools.hub import card
from vera_tools.hub.transfer import CARD_NAME, Digests, Transferred, refuse_unfit, relabel, select, speaking_of
from vera_tools.report import Report
from vera_tools.verifying.report import CheckpointReport
from vera_tools.verifying.verify import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi


@dataclass(frozen=True, repr=False)
class PushReport(Report):
    """What was pushed.

    Attributes:
        path: The local checkpoint.
        endpoint: The Hub.
        repo: "owner/name".
        revision: The branch; None is the default one.
        subfolder: Path inside the repository, "" for its root.
        committed: Whether there was anything to commit.
        commit: The commit that holds it now.
        commit_url: Its page.
        pr_url: The pull request's page, where one was opened.
        created: The repository was created.
        private: Whether the repository is private.
        files: Every file, and what became of it.
        record: The projections, or None where nothing is known of them.
        verification: What `verify` says of what was pushed.
    """

    name: ClassVar[str] = "push"

    path: str
    endpoint: str
    repo: str
    revision: str | None
    subfolder: str
    committed: bool
    commit: str
    commit_url: str
    pr_url: str | None
    created: bool
    private: bool
    files: tuple[Transferred, ...]
    record: ProjectionRecord | None
    verification: CheckpointReport

    def body(self) -> dict[str, Any]:
        """The push/v1 document's own part."""
        recipe = self.record.recipe if self.record else None
        return {
            "path": self.path,
            "endpoint": self.endpoint,
            "repo": self.repo,
            "revision": self.revision,
            "subfolder": self.subfolder,
            "committed": self.committed,
            "commit": self.commit,
            "commit_url": self.commit_url,
            "pr_url": self.pr_url,
            "created": self.created,
            "private": self.private,
            "recipe": recipe.to_dict() if recipe else None,
            "assumed": self.record.assumed if self.record else False,
            "files": [file.to_dict() for file in self.files],
            "verification": self.verification.to_dict(),
        }


def push(
    checkpoint: str | os.PathLike[str],
    repo: str,
    *,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    strip: bool = False,
    embed: bool = False,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    create: bool = True,
    message: str | None = None,
    include: Sequence[str] = (),
    overwrite_card: bool = False,
    strict: bool = False,
    force: bool = False,
) -> PushReport:
    """Verify a checkpoint and upload it, with a manifest and a model card. Its local files are not touched.

    Pushing the same content again makes no commit. A card that is on the Hub already, or else the one beside the
    checkpoint, keeps its own text; a manifest is added where there is none.

    Args:
        checkpoint: A local folder.
        repo: ``owner/name``, or ``hf://owner/name[@branch][/subfolder]``.
        base: The base model: checked against, described in the manifest, and needed where nothing records in_max.
        in_features: Largest in_features of the adapted layers, where nothing records it and no base is at hand.
        strip: Push it without vera_A and vera_B, if they are proven to be regenerable.
        embed: Push it with vera_A and vera_B, if it lacks them.
        private: Create a private repository; refuse a public one that is there.
        revision: The branch. It is made where there is none.
        create_pr: Propose the change as a pull request.
        create: Create what is missing: repository and branch.
        message: The commit's message.
        include: Patterns of further files to push; files that may run code are left out all the same.
        overwrite_card: Start from the README.md beside the checkpoint, not from the Hub's.
        strict: Refuse to assume a recipe, and one that was assumed or stated when it was recorded.
        force: Push it although it is drift or invalid, or a check failed.

    Raises:
        CheckFailedError: drift, or a check failed.
        FormatError: not a VeRA checkpoint, malformed, or a card with wrong metadata.
        UnprovenError: nothing records the recipe, and `strict`.
        UsageError: options that contradict each other, not a local folder, or not a repository.
        HubError: the Hub refused or cannot be reached; or the disk is full.
    """
    reference = _target(repo, revision, create_pr=create_pr)
    if hub.is_offline():
        raise HubError("offline mode is on", where=str(reference), hint="unset HF_HUB_OFFLINE")
    if strip and embed:
        raise UsageError("strip and embed contradict each other")
    label = os.fspath(checkpoint)
    folder = _local(checkpoint)
    with _temporary() as temporary:
        staged = temporary / "checkpoint"
        _copy(folder, staged, include)
        verification = relabel(verify(staged, base=base).checkpoints[0], staged, label)
        refuse_unfit(verification, force=force, strict=strict, verb="pushed")
        convert = (strip and verification.projections_stored) or (embed and verification.projections_stored is False)
        if convert:
            with speaking_of(label, staged):
                staged = _converted(staged, strip=strip, base=base, in_features=in_features, force=force, strict=strict)
            verification = relabel(verify(staged, base=base).checkpoints[0], staged, label)
        remote = _Remote.look(reference, private=private, create=create)
        record = None
        if verification.verdict != "invalid":  # what cannot be read, and is forced, is sent as it is
            with speaking_of(label, staged):
                record, config = _add_manifest(staged, remote, base, in_features, ours=bool(convert))
            verification = relabel(verify(staged, base=base).checkpoints[0], staged, label)
            _add_card(staged, remote, config, record, verification, overwrite_card=overwrite_card)
        digests = {path.name: Digests.of(path) for path in sorted(staged.iterdir())}
        changed = [name for name, digest in digests.items() if not remote.holds(name, digest)]
        files = tuple(remote.transferred(name, digest) for name, digest in digests.items())
        info = None
        if changed:
            remote.create(private=private)
            info = _upload(remote, staged, changed, digests, message or _message(label), create_pr=create_pr)
    commit = info.oid if info else remote.head
    return PushReport(
        path=label,
        endpoint=remote.api.endpoint,
        repo=reference.repo,
        revision=reference.revision,
        subfolder=reference.subfolder,
        committed=info is not None,
        commit=commit,
        commit_url=info.commit_url if info else f"{remote.api.endpoint}/{reference.repo}/commit/{commit}",
        pr_url=info.pr_url if info else None,
        created=remote.created,
        private=remote.private,
        files=files,
        record=record,
        verification=verification,
    )


def _target(repo: str, revision: str | None, *, create_pr: bool) -> Reference:
    reference = Reference.parse(repo)
    if revision is not None:
        reference = dataclasses.replace(reference, revision=revision)
    if create_pr and reference.revision not in (None, "main"):
        raise UsageError("a pull request is opened against the default branch", found=f"revision {reference.revision}")
    if re.fullmatch(r"[0-9a-f]{40}", reference.revision or ""):
        raise UsageError("a commit cannot be pushed to", found=str(reference.revision), hint="name a branch")
    return reference


def _local(checkpoint: str | os.PathLike[str]) -> Path:
    if opening.is_remote(checkpoint):
        raise UsageError("only a local checkpoint can be pushed", where=os.fspath(checkpoint), hint="pull it first")
    folder, name = opening.locate(checkpoint)
    if name not in (None, WEIGHTS_NAME, CONFIG_NAME) or not isinstance(folder, local.LocalFolder):
        raise UsageError("a checkpoint's folder is pushed, not one file", where=os.fspath(checkpoint))
    return folder.path


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A folder for the copy, below TMPDIR."""
    try:
        parent = tempfile.gettempdir()
    except FileNotFoundError as error:  # each that it knows is full, or read-only
        hint = "make room, or name one with TMPDIR"
        raise HubError("no folder for temporary files can be written to", hint=hint) from error
    with (
        hub.room(parent, hint="make room there, or name another folder with TMPDIR"),
        tempfile.TemporaryDirectory(prefix="vera-tools-push-") as temporary,
    ):
        yield Path(temporary)


def _copy(folder: Path, staged: Path, include: Sequence[str]) -> None:
    source = local.LocalFolder(folder)
    names = select(source.names(), include=include)
    if CONFIG_NAME not in names:
        raise FormatError("no adapter here", where=folder, expected=CONFIG_NAME)
    staged.mkdir()
    for name in names:
        try:
            local.copy(source, name, staged / name, limit=local.MOST_TEXT if name == CARD_NAME else None)
        except OSError as error:
            raise VeraToolsError(f"could not be copied: {error.strerror}", where=folder / name) from error
    source.check_unchanged()


def _converted(
    staged: Path,
    *,
    strip: bool,
    base: str | os.PathLike[str] | None,
    in_features: int | None,
    force: bool,
    strict: bool,
) -> Path:
    """The same checkpoint, without or with its projections, and everything that lay beside it."""
    from vera_tools.converting.embed import embed_projections
    from vera_tools.converting.strip import strip_projections

    converted = staged.with_name("converted")
    if strip:
        strip_projections(staged, converted, force=force)
    else:
        embed_projections(staged, converted, base=base, in_features=in_features, strict=strict)
    for path in staged.iterdir():
        if not (converted / path.name).exists() and path.name != MANIFEST_NAME:
            path.rename(converted / path.name)
    return converted


class _Remote:
    """The repository as it is before the push, and what it takes to write to it."""

    def __init__(self, api: HfApi, reference: Reference) -> None:
        self.api, self.reference = api, reference
        self.head = ""
        self.private = False
        self.created = False
        self.files: dict[str, RemoteFile] = {}
        self._missing: str | None = None

    @classmethod
    def look(cls, reference: Reference, *, private: bool, create: bool) -> _Remote:
        """Read what is there; nothing is changed."""
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


def _add_manifest(
    staged: Path, remote: _Remote, base: str | os.PathLike[str] | None, in_features: int | None, *, ours: bool
) -> tuple[ProjectionRecord | None, VeraConfig]:
    """Write a manifest where there is none, or only `ours`; what is known of the projections, and the config."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(Checkpoint.open(staged))
        model = stack.enter_context(BaseModel.open(base)) if base is not None else None
        record = _resolved(opened, model, in_features)
        manifest = opened.manifest if ours else None
        if opened.manifest is None and opened.manifest_error is None and record is not None:
            manifest = describe(opened, record, base=model)
    if manifest is not None:
        (staged / MANIFEST_NAME).write_bytes(_known_manifest(remote, manifest) or manifest.to_json().encode())
    return record, opened.config


def _add_card(
    staged: Path,
    remote: _Remote,
    config: VeraConfig,
    record: ProjectionRecord | None,
    verification: CheckpointReport,
    *,
    overwrite_card: bool,
) -> None:
    """Write README.md: the text that the Hub has, or else the local one's, with our section and metadata."""
    local = staged / CARD_NAME
    existing = None if overwrite_card else remote.read(CARD_NAME)
    if existing is None and local.exists():
        existing = local.read_bytes()
    try:
        text = existing.decode("utf-8") if existing is not None else None
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}", where=CARD_NAME) from error
    rendered = card.render(
        text,
        reference=str(dataclasses.replace(remote.reference, revision=None)),
        config=config,
        base_model=hub.name_of(config.base_model_name_or_path),
        record=record,
        verification=verification,
    )
    local.write_bytes(rendered.encode())


def _resolved(opened: Checkpoint, model: BaseModel | None, in_features: int | None) -> ProjectionRecord | None:
    """The projections; None where nothing can say what they are, with a warning."""
    try:
        return resolve(opened, Assumptions(base=model, in_features=in_features)).record
    except UsageError:
        if model is not None or in_features is not None:
            raise
        message = "pushed without a manifest, because nothing says in_max: name the base with --base"
        warnings.warn(f"{opened.label}: {message}", UnrecordedWarning, stacklevel=2)
    except (CheckFailedError, FormatError):  # forced: its record is wrong
        pass
    return None


def _known_manifest(remote: _Remote, manifest: Manifest) -> bytes | None:
    """The manifest that is there, if it says the same and only was written on another machine."""
    data = remote.read(MANIFEST_NAME)
    if data is None:
        return None
    try:
        there = Manifest.from_json(data.decode("utf-8"))
    except (CheckFailedError, FormatError, UnicodeDecodeError):
        return None
    same = dataclasses.replace(there, torch=manifest.torch, platform=manifest.platform, tool=manifest.tool) == manifest
    return data if same else None


def _message(label: str) -> str:
    return f"Upload VeRA adapter {Path(label).resolve().name} with vera-tools"


def _upload(
    remote: _Remote, staged: Path, changed: list[str], digests: dict[str, Digests], message: str, *, create_pr: bool
) -> CommitInfo:
    reference, api = remote.reference, remote.api
    with hub.errors(str(reference)):
        info: CommitInfo
        try:
            info = hub.call(
                api.upload_folder,
                few=True,
                repo_id=reference.repo,
                folder_path=staged,
                path_in_repo=reference.subfolder or None,
                allow_patterns=[glob.escape(name) for name in changed],
                commit_message=message,
                revision=reference.revision,
                create_pr=create_pr,
                parent_commit=remote.head,
                unsafe=create_pr,  # each try would open one more
            )
        except Exception:
            # The answer may have been lost on the way while the commit was made.
            landed = None if create_pr else _landed(remote, digests)
            if landed is None:
                raise
            info = _commit_info(api, reference, landed, message)
    commit = commit_of(info.oid, where=str(reference))
    there = hub.listing(api, Reference(reference.repo), commit, recursive=True)
    for name, digest in digests.items():
        found = there.get(reference.path(name))
        if found is None or not digest.is_of(found):
            raise HubError("the Hub does not hold what was sent", where=f"{reference}: {name}", hint="push again")
    return info


def _landed(remote: _Remote, digests: dict[str, Digests]) -> str | None:
    """The branch's head, if it is a new commit that holds exactly what was to be pushed."""
    try:
        head = hub.resolve(remote.api, remote.reference)
        there = hub.listing(remote.api, Reference(remote.reference.repo), head, recursive=True)
    except HubError:
        return None
    paths = {name: remote.reference.path(name) for name in digests}
    held = all(paths[name] in there and digest.is_of(there[paths[name]]) for name, digest in digests.items())
    return head if held and head != remote.head else None


def _commit_info(api: HfApi, reference: Reference, commit: str, message: str) -> CommitInfo:
    from huggingface_hub import CommitInfo

    return CommitInfo(
        commit_url=f"{api.endpoint}/{reference.repo}/commit/{commit}",
        commit_message=message,
        commit_description="",
        oid=commit,
    )
