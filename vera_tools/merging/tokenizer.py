"""The tokenizer that lies beside an adapter, and which of the two goes with the merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vera_tools.errors import UsageError
from vera_tools.files import local
from vera_tools.merging.adapters import Adapter

#: Where transformers keeps the chat templates of a tokenizer that has several.
TEMPLATES = "additional_chat_templates"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)

#: Files to copy: path in the output, and the folder that it comes from.
Files = dict[str, local.Folder]


def is_part(path: str) -> bool:
    """Whether a file, by its path in a model's folder, belongs to the tokenizer."""
    return path in _FILES or path.startswith(f"{TEMPLATES}/")


def own_files(folder: local.Folder) -> Files:
    """The tokenizer's files in a folder."""
    found: Files = {name: folder for name in folder.names() if name in _FILES}
    if inner := folder.folder(TEMPLATES):
        found |= {f"{TEMPLATES}/{name}": inner for name in inner.names()}
    return found


def choose(copied: Mapping[str, local.Folder], adapters: Sequence[Adapter], choice: str) -> tuple[Files, list[str]]:
    """The files that are copied beside the weights, and what is to be said about them.

    Args:
        copied: The base's files.
        adapters: The adapters.
        choice: "base" or "adapter": whose tokenizer goes with the result.

    Raises:
        FormatError: a link leads out of the adapter's folder.
        UsageError: no adapter has a tokenizer to take, or several have different ones.
    """
    brought = {adapter.label: files for adapter in adapters if (files := own_files(adapter.checkpoint.folder))}
    if choice == "base":
        before = {path: folder for path, folder in copied.items() if is_part(path)}
        others = [label for label, files in brought.items() if not _are_same(before, files)]
        notes = [
            f"{label} has a tokenizer of its own ({', '.join(sorted(brought[label]))}), and the result has the base's: "
            "take the adapter's with --tokenizer adapter"
            for label in others
        ]
        return dict(copied), notes
    if not brought:
        raise UsageError("no adapter brings a tokenizer", hint="leave out --tokenizer adapter")
    first, *rest = brought.values()
    if not all(_are_same(first, files) for files in rest):
        raise UsageError(
            "the adapters bring different tokenizers",
            found=" and ".join(brought),
            hint="merge them one after the other",
        )
    for path, folder in first.items():
        folder.refuse_leaving(path.rpartition("/")[2])
    return {path: folder for path, folder in copied.items() if not is_part(path)} | first, []


def _are_same(one: Mapping[str, local.Folder], other: Mapping[str, local.Folder]) -> bool:
    """Whether all files of `other` are in `one` with the same bytes."""
    return all(path in one and local.same(one[path], other[path], path.rpartition("/")[2]) for path in other)
