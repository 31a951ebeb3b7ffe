"""What the safetensors library finds in a file: a second opinion beside our own reader.

PEFT and transformers read with that library. Ours is the engine, because it reads ranges, keeps the header's bytes and
survives a file that is cut off while it is open (docs/decisions/0001-our-own-safetensors-reader.md). Two readers that
do not agree on what is in a file are a way past every check, so the library is asked too, wherever that matters: when
a checkpoint is verified, when our reader refuses a file, and after every write.

It maps what it opens, and a mapped file that somebody cuts off ends the process. So it is given the header's bytes, as
our reader has them, at the head of an empty file of the same size: the tensors' values are no part of the question.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors

from vera_tools.dtypes import NAMES
from vera_tools.errors import FormatError

#: The library and its version, as messages call it.
LIBRARY = f"safetensors {safetensors.__version__}"


class Contents(NamedTuple):
    """What the library finds: name to (dtype, shape), in the order of the bytes in the file, and the metadata."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]


def read(header: bytes, size: int) -> Contents:
    """A file as the library reads it.

    Args:
        header: The header's bytes, padding included, the 8 length bytes not.
        size: Bytes of the whole file.

    Raises:
        FormatError: the library refuses the file.
    """
    head = struct.pack("<Q", len(header)) + header
    try:
        with _empty_file(head, size) as path, safetensors.safe_open(path, framework="numpy") as file:
            return Contents({name: _described(file, name) for name in file.offset_keys()}, file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise FormatError(f"{LIBRARY} cannot read the file: {error}") from error


def _described(file: safetensors.safe_open, name: str) -> tuple[str, tuple[int, ...]]:
    part = file.get_slice(name)  # type: ignore[no-untyped-call] # the stub has no types here
    code = part.get_dtype()
    return NAMES.get(code, code), tuple(part.get_shape())


@contextlib.contextmanager
def _empty_file(head: bytes, size: int) -> Iterator[str]:
    """The path of a file that begins with `head` and is as large as `size`: the rest are zeros, which take no room."""
    if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir():
        descriptor = os.memfd_create("header")
        with open(descriptor, "wb") as stream:
            stream.write(head)
            stream.truncate(size)
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.TemporaryDirectory(prefix="vera-tools-") as folder:
            path = Path(folder) / "header.safetensors"
            with path.open("wb") as stream:
                stream.write(head)
                stream.truncate(size)
            yield str(path)
