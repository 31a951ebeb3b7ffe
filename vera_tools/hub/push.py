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
    LocalBaseWarning,
    UnrecordedWarning,
    UsageError,
    VeraToolsError,
)
from vera_tools.files import hub_client as hub
from vera_tools.files import local, opening
from vera_tools.files.hub_answers import commit_of
from vera_tools.files.hub_reference import Reference, name_of
from vera_tools.hub import card
from vera_tools.hub.remote import Remote
from vera_tools.hub.transfer import (
    CARD_NAME,
    TRAINING_STATE,
    Digests,
    Transferred,
    refuse_unfit,
    relabel,
    select,
    speaking_of,
)
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
        card: The text of the card; None where nothing could be read, and it was forced.
        left_out: Names of the local files that were not pushed.
        notes: What else is to be known, one sentence each.
        dry_run: Nothing was sent: it tells of what would be. `commit` is "" where the repository is not there.
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
    card: str | None
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    dry_run: bool = False

    def body(self) -> dict[str, Any]:
        """The push/v1 document's own part."""
        recipe = self.record.recipe if self.record else None
        return {
            "path": self.path,
            "endpoint": self.endpoint,
            "repo": self.repo,
            "revision": self.revision,
            "subfolder": self.subfolder,
            **({"dry_run": True} if self.dry_run else {}),
            "committed": self.committed,
            "commit": self.commit or None,
            "commit_url": self.commit_url or None,
            "pr_url": self.pr_url,
            "created": self.created,
            "private": self.private,
            "recipe": recipe.to_dict() if recipe else None,
            "assumed": self.record.assumed if self.record else False,
            "files": [file.to_dict() for file in self.files],
            "left_out": list(self.left_out),
            "card": self.card,
            "notes": list(self.notes),
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
    dry_run: bool = False,
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
        dry_run: Send nothing: make what would be sent, and refuse what would be refused.

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
        remote = Remote.look(reference, private=private, create=create)
        if dry_run:
            remote.refuse_forbidden(create_pr=create_pr)
        record, text = None, None
        notes: tuple[str, ...] = ()
        if verification.verdict != "invalid":  # what cannot be read, and is forced, is sent as it is
            with speaking_of(label, staged):
                record, config = _add_manifest(staged, remote, base, in_features, ours=bool(convert))
            verification = relabel(verify(staged, base=base).checkpoints[0], staged, label)
            named = name_of(config.base_model_name_or_path) or name_of(os.fspath(base) if base else None)
            _warn_of_local_base(label, config)
            text, notes = _add_card(
                staged, remote, config, record, verification, base_model=named, overwrite_card=overwrite_card
            )
        digests = {path.name: Digests.of(path) for path in sorted(staged.iterdir())}
        changed = [name for name, digest in digests.items() if not remote.holds(name, digest)]
        files = tuple(remote.transferred(name, digest) for name, digest in digests.items())
        info = None
        if changed and not dry_run:
            remote.create(private=private)
            info = _upload(remote, staged, changed, digests, message or _message(label), create_pr=create_pr)
    commit = info.oid if info else remote.head
    url = f"{remote.api.endpoint}/{reference.repo}/commit/{commit}" if commit else ""
    return PushReport(
        path=label,
        endpoint=remote.api.endpoint,
        repo=reference.repo,
        revision=reference.revision,
        subfolder=reference.subfolder,
        committed=info is not None,
        commit=commit,
        commit_url=info.commit_url if info else url,
        pr_url=info.pr_url if info else None,
        created=remote.created,
        private=remote.private,
        files=files,
        record=record,
        verification=verification,
        card=text,
        left_out=tuple(sorted(set(local.LocalFolder(folder).names()) - digests.keys())),
        notes=notes,
        dry_run=dry_run,
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
        hint = "pull it first" if opening.is_on_hub(checkpoint) else "copy it to a folder first"
        raise UsageError("only a local checkpoint can be pushed", where=opening.spelled(checkpoint), hint=hint)
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
    names = select(source.names(), include=include, leave_out=TRAINING_STATE)
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


def _add_manifest(
    staged: Path, remote: Remote, base: str | os.PathLike[str] | None, in_features: int | None, *, ours: bool
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
    remote: Remote,
    config: VeraConfig,
    record: ProjectionRecord | None,
    verification: CheckpointReport,
    *,
    base_model: str | None,
    overwrite_card: bool,
) -> tuple[str, tuple[str, ...]]:
    """Write README.md: the text that the Hub has, or else the local one's, with our section and metadata.

    Returns:
        Its text, and what is to be said of it.
    """
    path = staged / CARD_NAME
    existing = None if overwrite_card else remote.read(CARD_NAME)
    if existing is None and path.exists():
        existing = path.read_bytes()
    try:
        text = existing.decode("utf-8") if existing is not None else None
    except UnicodeDecodeError as error:
        raise FormatError(f"not UTF-8 at byte {error.start}", where=CARD_NAME) from error
    rendered = card.render(
        text,
        reference=str(dataclasses.replace(remote.reference, revision=None)),
        config=config,
        base_model=base_model,
        record=record,
        verification=verification,
    )
    path.write_bytes(rendered.encode())
    empty = text is not None and card.is_empty_template(text)
    return rendered, ("PEFT's template of a card, in which nothing was filled in, was left out",) if empty else ()


def _warn_of_local_base(label: str, config: VeraConfig) -> None:
    path = config.base_model_name_or_path
    if path and name_of(path) is None:
        warnings.warn(
            f"{label}: {CONFIG_NAME} names its base by a path, which nobody else has: {path}; set "
            "base_model_name_or_path to the base's name on the Hub",
            LocalBaseWarning,
            stacklevel=3,
        )


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


def _known_manifest(remote: Remote, manifest: Manifest) -> bytes | None:
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
    remote: Remote, staged: Path, changed: list[str], digests: dict[str, Digests], message: str, *, create_pr: bool
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


def _landed(remote: Remote, digests: dict[str, Digests]) -> str | None:
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
