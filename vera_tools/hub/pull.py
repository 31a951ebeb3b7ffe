"""`pull`: a checkpoint from the Hub, pinned to a commit, every file compared with the Hub's digests, then verified.

The Hub's client does not look at the content of what it downloads, neither over HTTP nor through Xet: a flipped byte
arrives in silence. Here every file's digest is compared with the one in the Hub's listing after it arrived.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vera_tools._version import TOOL
from vera_tools.checkpoints import destination
from vera_tools.checkpoints.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.errors import FormatError, HubError
from vera_tools.files import atomic
from vera_tools.files import hub_client as hub
from vera_tools.files.hub_answers import RemoteFile, is_git_name, is_sha256
from vera_tools.files.hub_reference import Reference
from vera_tools.hub import blobs
from vera_tools.hub.transfer import (
    PROVENANCE_NAME,
    Digests,
    Transferred,
    check_arrived,
    refuse_unfit,
    relabel,
    select,
    speaking_of,
)
from vera_tools.report import Report
from vera_tools.verifying.report import CheckpointReport
from vera_tools.verifying.verify import verify


@dataclass(frozen=True, repr=False)
class PullReport(Report):
    """What was pulled.

    Attributes:
        repo: "owner/name".
        revision: What was asked for; None is the default branch.
        commit: The commit that it stood for.
        subfolder: Path inside the repository, "" for its root.
        endpoint: The Hub.
        output: The folder that was written.
        files: Every file that came from the Hub.
        offline: They came from the local cache, and the Hub was not asked.
        embedded: vera_A and vera_B were written in.
        verification: What `verify` says of the folder as it lies there now.
    """

    name: ClassVar[str] = "pull"

    repo: str
    revision: str | None
    commit: str
    subfolder: str
    endpoint: str
    output: str
    files: tuple[Transferred, ...]
    offline: bool
    embedded: bool
    verification: CheckpointReport

    def body(self) -> dict[str, Any]:
        """The pull/v1 document's own part."""
        return {
            **self._source(),
            "output": self.output,
            "provenance": str(Path(self.output) / PROVENANCE_NAME),
            "offline": self.offline,
            "embedded": self.embedded,
            "files": [file.to_dict() for file in self.files],
            "verification": self.verification.to_dict(),
        }

    def _source(self) -> dict[str, Any]:
        return {
            "endpoint": self.endpoint,
            "repo": self.repo,
            "revision": self.revision,
            "commit": self.commit,
            "subfolder": self.subfolder,
        }


def pull(
    repo: str,
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    allow_pickle: bool = False,
    embed: bool = False,
    base: str | os.PathLike[str] | None = None,
    in_features: int | None = None,
    strict: bool = False,
    force: bool = False,
    overwrite: bool = False,
) -> PullReport:
    """Fetch a checkpoint from the Hub and verify it. `output` appears whole or not at all.

    The files are the Hub's own, unchanged; beside them stands vera_provenance.json, which names the commit and every
    digest. With HF_HUB_OFFLINE set, the client's cache is used. What arrived before a download broke off is not
    fetched again, be it in this process or in an earlier one.

    Args:
        repo: ``owner/name``, or ``hf://owner/name[@revision][/subfolder]``.
        output: The folder to write.
        revision: Branch, tag, commit or ``refs/pr/N``.
        include: Patterns of further files to take; files that may run code are left out all the same.
        allow_pickle: Take adapter_model.bin, and pickles that `include` names.
        embed: Write vera_A and vera_B in, so that PEFT >= 0.21 loads it exactly with default options.
        base: The base model to check against, and to embed for.
        in_features: Largest in_features of the adapted layers, to embed where nothing records it.
        strict: Refuse a seed-only checkpoint with nothing recorded, and a recipe that was assumed or stated.
        force: Keep it although it is drift or invalid, or a check failed.
        overwrite: Replace `output` where it exists.

    Raises:
        HubError: the Hub refused, or cannot be reached, or other bytes arrived than it lists; or the disk is full.
        CheckFailedError: drift, or a check failed.
        FormatError: not a VeRA checkpoint, or malformed.
        UnprovenError: nothing to compare with, and `strict`.
        UsageError: not a repository, or `output` exists.
    """
    reference = Reference.parse(repo)
    if revision is not None:
        reference = Reference(reference.repo, revision, reference.subfolder)
    target = destination.refuse_output(output, overwrite=overwrite, inputs=(base,))
    snapshot = _fetch(reference, include=tuple(include), allow_pickle=allow_pickle)
    with _room(target), atomic.folder(target, overwrite=overwrite) as folder:
        files = tuple(_take(snapshot, path, folder, target) for path in snapshot.files)
        verification = _verify(folder, target, base, allow_pickle=allow_pickle)
        refuse_unfit(verification, force=force, strict=strict, verb="pulled")
        embedded = embed and verification.projections_stored is False
        if embedded:
            with speaking_of(str(target), folder):
                _embed(folder, base=base, in_features=in_features, strict=strict)
            verification = _verify(folder, target, base, allow_pickle=False)
        report = PullReport(
            repo=reference.repo,
            revision=reference.revision,
            commit=snapshot.commit,
            subfolder=reference.subfolder,
            endpoint=hub.client().endpoint,
            output=str(target),
            files=files,
            offline=snapshot.offline,
            embedded=embedded,
            verification=verification,
        )
        (folder / PROVENANCE_NAME).write_bytes(_provenance(report).encode())
    return report


@dataclass(frozen=True)
class _Snapshot:
    """The files of one commit, in the client's cache. `files` maps a path in the repository to the Hub's listing."""

    label: str
    folder: Path
    commit: str
    files: dict[str, RemoteFile]
    offline: bool = False


def _fetch(reference: Reference, *, include: tuple[str, ...], allow_pickle: bool) -> _Snapshot:
    if hub.is_offline():
        return _from_cache(reference, include=include, allow_pickle=allow_pickle)
    from huggingface_hub import snapshot_download

    api = hub.client()
    for _ in range(3):
        commit = hub.resolve(api, reference)
        files = _chosen(reference, hub.listing(api, reference, commit), include=include, allow_pickle=allow_pickle)
        for file in files.values():
            blobs.fetch(reference, commit, file)
        with hub.errors(str(reference)):
            # By the revision's name, so that the cache knows it when offline; then it must still be that commit.
            folder = hub.call(
                snapshot_download,
                reference.repo,
                revision=reference.revision,
                few=True,
                allow_patterns=[glob.escape(path) for path in files],
                library_name="vera-tools",
                library_version=TOOL["version"],
            )
        if Path(folder).name == commit:
            return _Snapshot(str(reference), Path(folder), commit, files)
    raise HubError("the revision moved while it was pulled", where=str(reference), hint="name a commit or a tag")


def _from_cache(reference: Reference, *, include: tuple[str, ...], allow_pickle: bool) -> _Snapshot:
    """The newest snapshot that the cache holds. It keeps each file under its digest, and links to that."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    from vera_tools.files.hub import CachedFolder

    inside = CachedFolder(reference)
    folder = inside.path
    for _ in Path(reference.subfolder).parts:
        folder = folder.parent
    listed = {}
    for name in inside.names():
        link = inside.path / name
        digest = Path(os.readlink(link)).name if link.is_symlink() else ""
        if not is_sha256(digest) and not is_git_name(digest):
            raise HubError("the cache keeps no digest of it", where=str(link), hint="pull it while online")
        sha256 = digest if is_sha256(digest) else None
        path = reference.path(name)
        listed[path] = RemoteFile(path, link.stat().st_size, digest, sha256)
    files = _chosen(reference, listed, include=include, allow_pickle=allow_pickle)
    try:
        tree = get_cached_repo_tree(reference.repo, revision=folder.name)
    except CachedRepoTreeNotFoundError:
        tree = []  # put there by something that fetches single files; what is missing shows when it is verified
    direct = {file.path: file for file in tree if Path(file.path).parent == Path(reference.path("x")).parent}
    names = select((Path(path).name for path in direct), include=include, allow_pickle=allow_pickle)
    missing = [name for name in names if reference.path(name) not in files]
    if missing:
        hint = "the download was interrupted: pull it while online"
        raise HubError(f"the local cache lacks {', '.join(missing)}", where=str(reference), hint=hint)
    return _Snapshot(str(reference), folder, folder.name, files, offline=True)


def _chosen(
    reference: Reference, listed: dict[str, RemoteFile], *, include: tuple[str, ...], allow_pickle: bool
) -> dict[str, RemoteFile]:
    by_name = {path.rsplit("/", 1)[-1]: path for path in listed}
    if CONFIG_NAME not in by_name:
        raise FormatError("no adapter here", where=str(reference), expected=CONFIG_NAME, found=_some(by_name))
    if PICKLE_NAME in by_name and WEIGHTS_NAME not in by_name and not allow_pickle:
        raise FormatError(
            "pickles can run code, so vera-tools does not pull them",
            where=f"{reference}/{PICKLE_NAME}",
            expected=WEIGHTS_NAME,
            hint="pass --allow-pickle to take it all the same",
        )
    names = select(by_name, include=include, allow_pickle=allow_pickle)
    return {by_name[name]: listed[by_name[name]] for name in names}


def _some(names: dict[str, str]) -> str:
    listed = sorted(name for name in names if not name.startswith("."))
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "") if listed else "nothing"


def _room(target: Path) -> AbstractContextManager[None]:
    return hub.room(target, hint="make room there, or name another output")


def _take(snapshot: _Snapshot, path: str, folder: Path, target: Path) -> Transferred:
    """Copy one file out of the cache, and check the copy against the Hub's listing."""
    remote, cached, copy = snapshot.files[path], snapshot.folder / path, folder / Path(path).name
    where = f"{snapshot.label}: {path}"
    _refuse_outside_cache(cached, where=where)
    with hub.errors(where), _room(target):
        shutil.copyfile(cached, copy)
    try:
        digests: Digests = check_arrived(copy, remote, where=where)
    except HubError:
        for bad in (Path(os.path.realpath(cached)), cached):
            if _lies_in_cache(bad):
                bad.unlink(missing_ok=True)
        raise
    return Transferred(path, digests.size, digests.sha256, "git-sha1" if remote.sha256 is None else "sha256")


def _refuse_outside_cache(cached: Path, *, where: str) -> None:
    """Refuse what is not the client's own: neither the path nor, where it is a link, what it links to may lie outside.

    Raises:
        HubError: it does.
    """
    outside = [path for path in (cached, Path(os.path.realpath(cached))) if not _lies_in_cache(path)]
    if outside:
        raise HubError(
            "this does not lie in the client's cache",
            where=where,
            expected=f"a file below {_cache()}",
            found=str(outside[0]),
            hint="nothing of it was touched",
        )


def _lies_in_cache(path: Path) -> bool:
    """Whether a file, under this very name, lies below the cache."""
    folder = os.path.realpath(path.parent)
    return Path(folder, path.name).is_relative_to(_cache()) and path.name not in ("", ".", "..")


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(os.path.realpath(constants.HF_HUB_CACHE))


def _verify(folder: Path, target: Path, base: str | os.PathLike[str] | None, *, allow_pickle: bool) -> CheckpointReport:
    report = verify(folder, base=base, allow_pickle=allow_pickle).checkpoints[0]
    return relabel(report, folder, str(target))


def _embed(folder: Path, *, base: str | os.PathLike[str] | None, in_features: int | None, strict: bool) -> None:
    """Replace the seed-only checkpoint in `folder` by one that holds its projections."""
    from vera_tools.converting.embed import embed_projections

    written = folder.with_name(f"{folder.name}.embedded")
    try:
        embed_projections(folder, written, base=base, in_features=in_features, strict=strict)
        for file in written.iterdir():
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(written, ignore_errors=True)


def _provenance(report: PullReport) -> str:
    """vera_provenance.json: where the files come from, and every digest as it came."""
    document = {
        "schema": "vera-tools/provenance/v1",
        "tool": dict(TOOL),
        **report._source(),
        "embedded": report.embedded,
        "files": [file.to_dict() for file in report.files],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
