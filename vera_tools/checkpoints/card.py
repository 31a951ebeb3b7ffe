"""README.md beside an adapter: its metadata as PEFT and the Hub expect it. An author's words are kept byte for byte."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import FormatError
from vera_tools.files import markup

CARD_NAME = "README.md"
TAGS = ("vera", "vera-tools")
#: The Hub's pipeline tag for a task of PEFT's.
PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}

_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)(?:(?<=\n)|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
#: A repository of the Hub, as opposed to a path.
_REPOSITORY = re.compile(r"[\w][\w.-]*/[\w][\w.-]*|[\w][\w.-]*", re.ASCII)
_BODY = """
# A VeRA adapter

[VeRA](https://arxiv.org/abs/2310.11454) trains two small vectors per layer; the two large projections are random,
frozen and shared by all layers. `vera_manifest.json` tells what made them; `vera-tools verify` checks them.
"""


def beside_adapter(existing: str | None, config: VeraConfig, base: str | None) -> str:
    """The text of the card of an adapter that is saved.

    Args:
        existing: The card that is there, or None.
        config: The adapter's config.
        base: The base's name, which is given where it may be a repository of the Hub.

    Raises:
        FormatError: the metadata of the card that is there is not a YAML mapping.
    """
    metadata, body = split(existing or "")
    wanted = completed(metadata, config, base if base and _REPOSITORY.fullmatch(base) else None)
    return head(existing or "", wanted) + (body if existing else _BODY)


def head(existing: str, wanted: Mapping[str, Any]) -> str:
    """The front matter that holds this metadata: the one that is there, where it holds it already."""
    match = _FRONT_MATTER.match(existing)
    if match is not None and split(existing)[0] == wanted:
        return match[0]
    import yaml

    text = yaml.safe_dump(dict(wanted), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{text}---\n".replace("\n", "\r\n" if "\r\n" in existing else "\n")


def completed(existing: Mapping[str, Any], config: VeraConfig, base_model: str | None) -> dict[str, Any]:
    """The existing metadata with what is missing; what the author set, stands.

    Args:
        existing: The metadata.
        config: The adapter's config.
        base_model: The base's name on the Hub, or None.
    """
    metadata = dict(existing)
    metadata.setdefault("library_name", "peft")
    if base_model:
        metadata.setdefault("base_model", base_model)
    if config.task_type in PIPELINES:
        metadata.setdefault("pipeline_tag", PIPELINES[config.task_type])
    tags = metadata.get("tags") or []
    if isinstance(tags, list):  # anything else is for who checks the card to refuse
        named = (f"base_model:adapter:{base_model}",) if base_model else ()
        metadata["tags"] = [*tags, *(tag for tag in (*named, *TAGS) if tag not in tags)]
    return metadata


def split(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and the rest of it.

    Raises:
        FormatError: the metadata is not a YAML mapping.
    """
    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    metadata = markup.yaml(match["yaml"], where="README.md", first=2)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        found = type(metadata).__name__
        raise FormatError("wrong metadata", where="README.md: metadata", expected="a mapping", found=found)
    return metadata, text[match.end() :]
