"""Where a VeRA adapter is: the walk over folders, and the signs by which one is known that lost its config.

Every gate over many adapters passes what it does not see. So a folder counts as an adapter by any of its own files: an
adapter_config.json, a vera_manifest.json, or weights whose header names VeRA's vectors. A pickle is not opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME, most_bytes
from vera_tools.errors import FormatError, VeraToolsError
from vera_tools.files import local
from vera_tools.files.local import ByteSource, Folder, LocalFile
from vera_tools.files.safetensors import TensorFile, parse_header
from vera_tools.files.strict_json import parse_json
from vera_tools.texts import Texts

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

#: A vector's name; those of PVeRA end in the same letters.
_VECTOR = re.compile(r"(?<![A-Za-z0-9_])vera_lambda_[bd]")


def sign_of(names: Collection[str], weights: Callable[[], ByteSource]) -> str | None:
    """The file by which a folder is known to hold an adapter; None where it holds none.

    Args:
        names: Of the files in the folder.
        weights: Opens its adapter_model.safetensors, of which the header alone is read, and only without a config.
    """
    for name in (CONFIG_NAME, MANIFEST_NAME):
        if name in names:
            return name
    if WEIGHTS_NAME not in names:
        return None
    try:
        return WEIGHTS_NAME if _names_vectors(_header(weights()), where=WEIGHTS_NAME) else None
    except VeraToolsError:  # it may be one: whoever opens it is told what is wrong
        return WEIGHTS_NAME


def find(root: Path) -> Iterator[Path]:
    """Every folder at or below `root` that holds an adapter, sorted, hidden folders left out.

    Names are in the order that people give them: checkpoint-1000 comes after checkpoint-500.

    Links are followed, and each folder is entered once, by whichever of its names comes first. A folder that cannot be
    listed is handed out too: it may hold a checkpoint, and opening it says what is wrong.

    Raises:
        FormatError: no such folder.
    """
    if not local.is_folder(root):
        raise FormatError("no such folder", where=root)
    seen = _Seen()
    # One of these for each level, because Python's own walk gives up on folders that are nested a thousand deep.
    waiting = [iter([root])]
    while waiting:
        if (folder := next(waiting[-1], None)) is None:
            waiting.pop()
            continue
        try:
            if not seen.add(folder):
                continue
            files, inside = set(), Texts()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _is_folder(entry):
                        files.add(entry.name)
                    elif not entry.name.startswith("."):
                        inside.append(entry.name)
        except OSError:
            yield folder
            continue
        if is_adapter(folder, files):
            yield folder
        waiting.append(map(folder.joinpath, inside.sorted(in_order)))


def is_adapter(folder: Path, files: Collection[str]) -> bool:
    """Whether a folder on disk with these files holds an adapter."""
    return sign_of(files, lambda: LocalFile(folder / WEIGHTS_NAME)) is not None


def nothing_found(where: object) -> FormatError:
    """What is raised where a search finds no adapter: a gate that finds nothing must not pass."""
    return FormatError(f"no {CONFIG_NAME} in this folder or below", where=str(where))


def in_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """What to sort names by, such that the numbers in them count as numbers."""
    parts = enumerate(re.split(r"([0-9]+)", name))
    numbers = [(n % 2, text.lstrip("0") if n % 2 else text) for n, text in parts]
    return [(len(text) if is_number else 0, text) for is_number, text in numbers], name


def refuse_mislabelled(folder: Folder, names: Collection[str], kind: str, *, where: str) -> None:
    """Refuse another kind of adapter where something beside it is VeRA's: it would be skipped, and not verified.

    What this tool writes as LoRA has a manifest of its own, which records a config of that kind, and is LoRA.

    Args:
        folder: Where it lies.
        names: Those of an adapter's files that are there.
        kind: What it is said to be.
        where: What says so.

    Raises:
        FormatError: the weights hold VeRA's vectors, or the manifest records an adapter of another kind.
    """
    header, sign = b"", None
    if WEIGHTS_NAME in names:
        try:
            header = _header(folder.open(WEIGHTS_NAME))
            if _names_vectors(header, where=folder.path_of(WEIGHTS_NAME)):
                sign = f"{WEIGHTS_NAME} holds VeRA's vectors"
        except FormatError:  # of what cannot be read, the config alone says what it is
            pass
    if sign is None and MANIFEST_NAME in names and (recorded := _recorded_kind(folder, len(header))) != kind:
        sign = f"{MANIFEST_NAME} records {'something else' if recorded is None else f'an adapter of kind {recorded}'}"
    if sign:
        raise FormatError(
            f"this says that the adapter is of kind {kind}, and {sign}",
            where=where,
            hint="copy the right file; or, where it is no VeRA adapter any more, delete what is left of one",
        )


def _header(source: ByteSource) -> bytes:
    with contextlib.closing(source):
        return TensorFile.header_of(source)


def _names_vectors(header: bytes, *, where: str) -> bool:
    """Whether a safetensors header has a tensor of a VeRA vector's name. It is parsed only where it may have.

    Raises:
        FormatError: not a header.
    """
    if b"vera_lambda_" not in header and rb"\u" not in header:  # a hundred times faster than the expression
        return False
    _, tensors = parse_header(header, where=where)
    return any(map(_VECTOR.search, tensors))


def _recorded_kind(folder: Folder, header: int) -> str | None:
    """The kind of the config in the manifest beside a file with such a header; None where it cannot be read."""
    try:
        text = local.read_text(folder, MANIFEST_NAME, limit=most_bytes(header))
        config = parse_json(text, where=folder.path_of(MANIFEST_NAME))["config"]
        return str(config["peft_type"])
    except (FormatError, KeyError, TypeError):
        return None


class _Seen:
    """The folders that were entered: by their numbers, which are the same for all names of one, and come in a row."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._paths: set[str] = set()

    def add(self, folder: Path) -> bool:
        """Whether it is new. Raises OSError where it cannot be reached."""
        status = os.stat(folder)  # resolving links takes as many calls as the folder is deep
        if not status.st_ino:  # FAT has no numbers
            real, before = os.path.realpath(folder), len(self._paths)
            self._paths.add(real)
            return len(self._paths) > before
        place, bit = (status.st_dev, status.st_ino >> 6), 1 << (status.st_ino & 63)
        known = self._numbers.get(place, 0)
        self._numbers[place] = known | bit
        return not known & bit


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be entered
        return False
