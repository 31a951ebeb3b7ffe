"""How a folder of a repository on the Hub is called: ``hf://``, or the address of a page, as a browser copies it.

Every text that the client's own ``parse_hf_uri`` takes for a model means the same here.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from vera_tools.errors import UsageError
from vera_tools.files import secrets

SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# Revisions whose slashes stand as they are.
_SPECIAL = r"refs/(?:pr/\d+|convert/[\w.-]+)"
_REFERENCE = re.compile(
    rf"(?:hf://)?(?:models/(?=[^/@]+/))?(?P<repo>{_NAME}/{_NAME})"
    rf"(?:@(?P<revision>{_SPECIAL}|[^/]+))?(?:/(?P<subfolder>.*))?"
)
#: What else the Hub keeps, by the first part of its name.
_OTHERS = ("datasets", "spaces", "kernels", "buckets")
#: Where the Hub's own pages are, and which of them show a file or a folder.
_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PAGES = ("blame", "blob", "raw", "resolve", "tree")


@dataclass(frozen=True)
class Reference:
    """``hf://owner/name[@revision][/subfolder]``: a folder of a model repository.

    Attributes:
        repo: "owner/name".
        revision: Branch, tag, commit or ``refs/pr/N``; None is the default branch.
        subfolder: Path inside the repository, without slashes at its ends; "" is the root.
    """

    repo: str
    revision: str | None = None
    subfolder: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """The reference that `text` spells. A slash inside a revision is written %2F (refs/pr/N stands as it is).

        Args:
            text: As above, "owner/name" and what may follow it, or the address of a page that shows it.

        Raises:
            UsageError: not such a reference.
        """
        spelled = from_page(text) or text
        match = _REFERENCE.fullmatch(spelled)
        subfolder = (match["subfolder"] or "").strip("/") if match else ""
        wrong = any(part in ("", ".", "..") for part in subfolder.split("/") if subfolder) or "\0" in subfolder
        if kind := _other_kind(spelled):
            what = f"only models are read from the Hub, and no {kind}"
            raise UsageError(what, where=secrets.redact(text), expected="hf://owner/name", hint="download it first")
        if match is None or wrong:
            raise UsageError(
                "not a model repository",
                where=secrets.redact(text),
                expected="owner/name or hf://owner/name[@revision][/subfolder]",
            )
        revision = match["revision"]
        return cls(match["repo"], unquote(revision) if revision else None, subfolder)

    def __str__(self) -> str:
        # "hf://models/a/b" is model b of a: an owner of that name needs the word twice.
        doubled = self.repo.startswith("models/") and self.revision is None and self.subfolder
        text = SCHEME + ("models/" if doubled else "") + self.repo
        if self.revision is not None:
            special = re.fullmatch(_SPECIAL, self.revision) is not None
            text += "@" + (self.revision if special else self.revision.replace("%", "%25").replace("/", "%2F"))
        return f"{text}/{self.subfolder}" if self.subfolder else text

    def path(self, name: str) -> str:
        """The path, in the repository, of a file of this folder."""
        return f"{self.subfolder}/{name}" if self.subfolder else name


def _other_kind(text: str) -> str | None:
    """What the Hub keeps under such a name, ``hf://datasets/owner/name`` for one; None for a model."""
    return next((kind for kind in _OTHERS if text.startswith(f"{SCHEME}{kind}/")), None)


def from_page(text: str) -> str | None:
    """The ``hf://`` form of a page's address; None where this is none, or the page shows no file and no folder.

    What follows "?" or "#" is left out. The address may lack its scheme, as some browsers copy it.
    """
    scheme, found, rest = text.partition("://")
    if text.startswith("/") or (found and scheme.lower() not in ("http", "https")):
        return None
    try:
        page = urlsplit(f"//{rest}" if found else f"//{text}")
        host, own = page.hostname or "", urlsplit(os.environ.get("HF_ENDPOINT") or "")
        prefix = own.path.strip("/").split("/") if own.path.strip("/") and host == own.hostname else []
        known = host in _HOSTS and page.port in (None, 80, 443)
        known = known or (bool(found) and host == own.hostname and page.port == own.port)
    except ValueError:  # a host or a port that is none
        return None
    parts = [part for part in page.path.split("/") if part]
    if prefix and parts[: len(prefix)] == prefix:
        parts = parts[len(prefix) :]
    kind = parts[:1] if parts[:1] and parts[0] in (*_OTHERS, "models") else []
    repo, rest_parts = parts[len(kind) : len(kind) + 2], parts[len(kind) + 2 :]
    if not known or len(repo) < 2 or (rest_parts and rest_parts[0] not in _PAGES) or repo[0] in ("papers", "docs"):
        return None
    where = "/".join(unquote(part).replace("/", "%2F") for part in rest_parts[1:])
    separator = "/" if kind == ["buckets"] else "@"  # which have no revisions
    return SCHEME + "/".join(kind + repo) + (separator + where if where else "")


def is_repository(name: str) -> bool:
    """Whether this is "owner/name" and no more."""
    return re.fullmatch(f"{_NAME}/{_NAME}", name) is not None


def name_of(model: str | None) -> str | None:
    """The name that a model has on the Hub, as far as a config or a BASE argument tells: a local path has none."""
    if model and model.startswith(SCHEME):
        match = _REFERENCE.fullmatch(model)  # a config's, which may be anything
        return match["repo"] if match and not _other_kind(model) else None
    if not model or "\0" in model or os.path.exists(model):
        return None
    return model if re.fullmatch(rf"{_NAME}(/{_NAME})?", model) else None
