"""The safetensors format: a strict reader that loads what is asked for, and a writer whose bytes are determined.

A file is an 8-byte little-endian header length, a JSON header, and the tensors' bytes. The reader holds it to these
rules, each of which stops a file that would otherwise be read wrongly or not end:

- the header is at most `MAX_HEADER` bytes and lies within the file; it is one JSON object without duplicate names;
- it is no longer than its tensors explain, and holds no more of them, and no longer names, than any model has;
- every dtype is known, every dimension is a non-negative integer, of which there are at most `MAX_DIMENSIONS`, and a
  tensor's extent is shape times element size;
- the tensors follow each other without hole or overlap and fill the file to its last byte;
- ``__metadata__`` maps strings to strings.

The library's own writer orders metadata at random in every process; this one sorts it, so that what is written twice
is written the same. Tensors are laid out as the library does it: widest element first, then by name.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError, FormatError
from vera_tools.files import safetensors_library
from vera_tools.files.local import ByteSource, Closing, LocalFile
from vera_tools.files.safetensors_header import HEADER_ROOM as HEADER_ROOM
from vera_tools.files.safetensors_header import MAX_DIMENSIONS as MAX_DIMENSIONS
from vera_tools.files.safetensors_header import MAX_HEADER as MAX_HEADER
from vera_tools.files.safetensors_header import MAX_NAME as MAX_NAME
from vera_tools.files.safetensors_header import MAX_TENSORS as MAX_TENSORS
from vera_tools.files.safetensors_header import MAX_VALUES as MAX_VALUES
from vera_tools.files.safetensors_header import TENSOR_ROOM as TENSOR_ROOM
from vera_tools.files.safetensors_header import TensorInfo as TensorInfo
from vera_tools.files.safetensors_header import check_extent, read_header
from vera_tools.files.safetensors_header import encode_header as encode_header
from vera_tools.files.safetensors_header import layout as layout
from vera_tools.files.safetensors_header import parse_header as parse_header

Array = npt.NDArray[Any]

CHUNK = 1 << 20
#: A piece of a tensor.
Piece = TypeVar("Piece", memoryview, Array)


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made piece by piece while it is written, so that a file may be larger than memory.

    Attributes:
        dtype: Name of its dtype.
        shape: Its shape.
        pieces: Makes its elements in row-major order; a piece is used up before the next one is asked for.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[memoryview | Array]]


class TensorFile(Closing):
    """An open safetensors file: the header is parsed, the tensors are read on demand.

    Attributes:
        label: The file's name in messages.
        header: The header's bytes as they stand in the file, padding included, the 8 length bytes not.
        metadata: The ``__metadata__`` entries.
        tensors: Name to `TensorInfo`, in the order of the bytes in the file.
        parsed: What the header says, the tensors under the names that they have in the file.

    Once a tensor was hashed, whoever reads the whole of it gets the bytes that were hashed, or a `FormatError`: a disk
    or a memory that fails may give others when it is asked again.
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.label = source.label
        self._hashed: dict[int, str] = {}  # by where a tensor begins, because names may change
        try:
            self.header = self.header_of(source)
            try:
                self.parsed = read_header(self.header, where=source.label)
                check_extent(self.parsed, source.size - 8 - len(self.header), where=source.label)
            except FormatError as error:
                if error.hint is None and _library_reads(self.header, source.size):
                    error.hint = f"{safetensors_library.LIBRARY} does read it: load and save it with that library"
                raise
        except BaseException:
            source.close()
            raise
        self.data_start = 8 + len(self.header)
        self.metadata, self.tensors = dict(self.parsed.metadata), dict(self.parsed.tensors)

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Open a file on disk.

        Raises:
            FormatError: unreadable, or not safetensors.
        """
        return cls(LocalFile(Path(path)))

    def close(self) -> None:
        """Close the underlying file."""
        self._source.close()

    @property
    def source(self) -> ByteSource:
        """The underlying file."""
        return self._source

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._source.size

    def rename(self, names: Mapping[str, str | None]) -> None:
        """Call the tensors otherwise from here on: their names in the file to others, or to None to leave one out."""
        renamed = {new: replace(self.tensors[old], name=new) for old, new in names.items() if new is not None}
        self.tensors = dict(sorted(renamed.items(), key=lambda item: (item[1].start, item[1].stop)))

    def read(self, name: str) -> Array:
        """One whole tensor, little-endian, C-contiguous; bfloat16 and float8 in ml_dtypes' numpy dtypes.

        Raises:
            KeyError: no such tensor.
            FormatError: the file ends too early, numpy has no dtype for the tensor, or its bytes were others before.
        """
        info = self.tensors[name]
        (elements,) = self.in_order(info, info.size) if info.size else (self.read_elements(info, 0, 0),)
        return elements.reshape(info.shape)

    def in_order(self, info: TensorInfo, count: int) -> Iterator[Array]:
        """The elements of the flattened tensor, `count` at a time, each time in a new array.

        Raises:
            FormatError: as for `read`, and before the last of them are handed out.
        """
        spans = ((start, min(start + count, info.size)) for start in range(0, info.size, count))
        return self._as_hashed(info, (self.read_elements(info, *span) for span in spans))

    def read_elements(self, info: TensorInfo, start: int, stop: int, *, out: Array | None = None) -> Array:
        """Elements `start` to `stop` of the flattened tensor, in a new array or in `out`, of their number and dtype."""
        try:
            dtype = np_dtype(info.dtype)
        except (TypeError, AttributeError) as error:
            raise FormatError(f"no numpy dtype for {info.dtype}", where=f"{self.label}: {info.name}") from error
        elements = np.empty(stop - start, dtype) if out is None else out
        self._source.read_into(elements.view(np.uint8).data, self.data_start + info.start + start * dtype.itemsize)
        return elements

    def chunks(self, info: TensorInfo) -> Iterator[memoryview]:
        """The tensor's bytes, at most `CHUNK` at a time, in one buffer that is used again and again."""
        buffer = memoryview(bytearray(min(CHUNK, info.nbytes)))
        for start in range(info.start, info.stop, CHUNK):
            view = buffer[: min(CHUNK, info.stop - start)]
            self._source.read_into(view, self.data_start + start)
            yield view

    def runs(self) -> Iterator[tuple[list[TensorInfo], Iterator[memoryview]]]:
        """Every tensor with its bytes, in the order of the file, at most `CHUNK` at a time.

        Small neighbours come together and in one piece, a large tensor comes alone and in several. What was handed out
        is overwritten when the next one is asked for.
        """
        return self._runs(self.tensors)

    def _runs(self, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[list[TensorInfo], Iterator[memoryview]]]:
        end = max((info.stop for info in tensors.values()), default=0)
        buffer = memoryview(bytearray(min(CHUNK, end)))

        def pieces(first: int, last: int) -> Iterator[memoryview]:
            for start in range(first, last, CHUNK):
                view = buffer[: min(CHUNK, last - start)]
                self._source.read_into(view, self.data_start + start)
                yield view

        run: list[TensorInfo] = []
        for info in tensors.values():
            if run and (info.start != run[-1].stop or info.stop - run[0].start > CHUNK):
                yield run, pieces(run[0].start, run[-1].stop)
                run = []
            run.append(info)
        if run:
            yield run, pieces(run[0].start, run[-1].stop)

    def deferred(self, name: str) -> Deferred:
        """One tensor as it stands, to be copied into another file."""
        info = self.tensors[name]
        return Deferred(info.dtype, info.shape, lambda: self._as_hashed(info, self.chunks(info)))

    def _as_hashed(self, info: TensorInfo, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """All pieces of a tensor, the last of them once it is seen that they are what was hashed, if it was."""
        if info.start not in self._hashed:
            yield from pieces
            return
        digest, done = hashlib.sha256(), 0
        for piece in pieces:
            data = as_bytes(piece)
            digest.update(data)
            done += len(data)
            if done == info.nbytes:
                self.note(info, digest.hexdigest())
            yield piece

    def note(self, info: TensorInfo, sha256: str) -> None:
        """Take down what was found when a whole tensor was hashed.

        Raises:
            FormatError: its bytes were others before.
        """
        before = self._hashed.setdefault(info.start, sha256) if info.nbytes else sha256
        if before != sha256:
            raise read_otherwise(info.name, where=self.label, before=before, now=sha256)

    def sha256(self, name: str) -> str:
        """sha256 over the tensor's bytes, which are little-endian and row-major.

        Raises:
            FormatError: they were others before.
        """
        info = self.tensors[name]
        found = sha256_of(self.chunks(info))
        self.note(info, found)
        return found

    def file_sha256(self, *, each: bool = True) -> str:
        """sha256 over the whole file.

        Args:
            each: Hash each tensor too, so that what is read of it is what this is the digest of.

        Raises:
            FormatError: a tensor's bytes were others before.
        """
        digest = hashlib.sha256(struct.pack("<Q", len(self.header)) + self.header)
        # The tensors are without hole or overlap, and so the rest of the file.
        end = self._source.size - self.data_start
        if not each:
            for piece in self.chunks(TensorInfo("", "uint8", (end,), 0, end)):
                digest.update(piece)
            return digest.hexdigest()

        def passing(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
            for piece in pieces:
                digest.update(piece)
                yield piece

        for infos, pieces in self._runs(self.parsed.tensors):
            self._digests(infos, passing(pieces))
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """sha256 over each tensor's bytes, by name.

        Raises:
            FormatError: they were others before.
        """
        found: dict[str, str] = {}
        for infos, pieces in self.runs():
            found |= self._digests(infos, pieces)
        return found

    def _digests(self, infos: Sequence[TensorInfo], pieces: Iterator[memoryview]) -> dict[str, str]:
        if len(infos) == 1:
            found = {infos[0].name: sha256_of(pieces)}
        else:
            found = digests_in(infos, next(pieces, memoryview(b"")))
        for info in infos:
            self.note(info, found[info.name])
        return found

    def objection(self) -> str | None:
        """How the safetensors library reads the file otherwise, in one sentence; None where it reads the same.

        Names, dtypes, shapes, the order of the tensors in the file and the metadata are compared. As the tensors fill
        a file without hole or overlap, that settles where each one lies.
        """
        try:
            theirs = safetensors_library.read(self.header, self.size)
        except FormatError as error:
            return error.what
        entries, metadata = self.parsed.tensors, self.parsed.metadata
        ours = {name: (info.dtype, info.shape) for name, info in entries.items()}
        for name in [*ours, *theirs.tensors]:
            if ours.get(name) != theirs.tensors.get(name):
                found, read = (_in_words(tensors.get(name)) for tensors in (theirs.tensors, ours))
                return f"{safetensors_library.LIBRARY} finds {found} under {name}, where {read} was read"
        filled = [name for name, info in entries.items() if info.nbytes]
        if [name for name in theirs.tensors if entries[name].nbytes] != filled:
            return f"{safetensors_library.LIBRARY} finds the tensors in another order"
        return None if theirs.metadata == metadata else f"{safetensors_library.LIBRARY} finds other metadata"

    @staticmethod
    def header_of(source: ByteSource) -> bytes:
        """The header's bytes, not parsed.

        Raises:
            FormatError: there is no room for one.
        """
        if source.size < 8:
            raise FormatError(
                "not a safetensors file",
                where=source.label,
                expected="8 bytes or more",
                found=f"{source.size} bytes",
            )
        start = bytearray(8)
        source.read_into(memoryview(start), 0)
        (length,) = struct.unpack("<Q", start)
        room = min(MAX_HEADER, source.size - 8)
        if length > room:
            hint = None
            if start[:2] == b"PK" or start[0] == 0x80:
                hint = "this is a pickle: load it with torch.load(..., weights_only=True) and save it as safetensors"
            elif bytes(start) == b"version ":
                hint = "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
            raise FormatError(
                "not a safetensors file, or cut off",
                where=source.label,
                expected=f"a header length of at most {room}",
                found=str(length),
                hint=hint,
            )
        header = bytearray(length)
        source.read_into(memoryview(header), 8)
        return bytes(header)


def read_otherwise(name: str, *, where: str, before: str, now: str) -> FormatError:
    """What is raised for a tensor whose bytes are others than those that were hashed before."""
    return FormatError(
        f"{name} was read twice, with different bytes",
        where=where,
        expected=f"sha256 {before}",
        found=now,
        hint="the disk or the memory fails, or something else writes to the file: look into that first",
    )


def sha256_of(pieces: Iterable[memoryview]) -> str:
    """sha256 over a tensor's bytes."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def digests_in(infos: Sequence[TensorInfo], data: memoryview) -> dict[str, str]:
    """sha256 over the bytes of each of a run of tensors, all of which are `data`."""
    first, sha256 = infos[0].start, hashlib.sha256
    return {info.name: sha256(data[info.start - first : info.stop - first]).hexdigest() for info in infos}


def _library_reads(header: bytes, size: int) -> bool:
    try:
        safetensors_library.read(header, size)
    except FormatError:
        return False
    return True


def _in_words(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def write(path: Path, header: bytes, data: Iterable[memoryview | Array]) -> None:
    """Write a file from an encoded header and the tensors' bytes in the header's order.

    Raises:
        CheckFailedError: what was written is read otherwise, see `confirm`.
    """
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)))
        stream.write(header)
        for piece in data:
            stream.write(as_bytes(piece))
    confirm(path)


def confirm(path: Path) -> None:
    """Open a file that was just written, with our reader and with the safetensors library.

    Raises:
        CheckFailedError: the library cannot read it, or finds something else in it.
        FormatError: our reader cannot read it.
    """
    with TensorFile.open(path) as file:
        if objection := file.objection():
            raise CheckFailedError(
                f"what was written would be read otherwise: {objection}",
                where=path,
                hint="nothing was kept; please report it with the header of the file that it was made from",
            )


def as_bytes(piece: memoryview | Array) -> memoryview:
    """A piece of a tensor as the bytes that stand in the file, without a copy where it is contiguous."""
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data if isinstance(piece, np.ndarray) else piece


def save(path: Path, tensors: Mapping[str, Array | Deferred], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory, or are made as they are written."""
    infos = layout(
        {
            name: (tensor.dtype if isinstance(tensor, Deferred) else tensor.dtype.name, tensor.shape)
            for name, tensor in tensors.items()
        }
    )
    write(path, encode_header(infos, metadata), pieces(tensors[name] for name in infos))


def pieces(tensors: Iterable[Array | Deferred]) -> Iterator[memoryview | Array]:
    """The tensors' elements, one tensor after the other."""
    for tensor in tensors:
        if isinstance(tensor, Deferred):
            yield from tensor.pieces()
        else:
            yield tensor
