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
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vera_tools.dtypes import BITS, CODES, NAMES, np_dtype
from vera_tools.errors import CheckFailedError, FormatError, cut
from vera_tools.files import safetensors_library
from vera_tools.files.local import ByteSource, Closing, LocalFile
from vera_tools.files.strict_json import parse_json

Array = npt.NDArray[Any]

MAX_HEADER = 100_000_000  # the limit of the safetensors library
#: Tensors in one file. The largest mixtures of experts have some 150,000, in all of their files together.
MAX_TENSORS = 500_000
#: What a header may hold beside its tensors, which is metadata, and for each of them. Two hundred bytes are usual.
HEADER_ROOM, TENSOR_ROOM = 16 << 20, 1024
#: Values in a header beside those of its tensors.
MAX_VALUES = 1_000_000
#: Characters of a tensor's name. A tenth of this would be long.
MAX_NAME = 4096
MAX_DIMENSIONS = 64  # of torch and of NumPy 2
CHUNK = 1 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it. `start` and `stop` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return self.stop - self.start

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


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
    """

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self.label = source.label
        try:
            self.header = self._read_header()
            try:
                self.metadata, self.tensors = parse_header(self.header, where=source.label)
                _check_extent(self.tensors, source.size - 8 - len(self.header), where=source.label)
            except FormatError as error:
                if error.hint is None and _library_reads(self.header, source.size):
                    error.hint = f"{safetensors_library.LIBRARY} does read it: load and save it with that library"
                raise
        except BaseException:
            source.close()
            raise
        self.data_start = 8 + len(self.header)
        self._entries = dict(self.tensors)  # under the names that they have in the file

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
            FormatError: the file ends too early, or numpy has no dtype for the tensor.
        """
        info = self.tensors[name]
        return self.read_elements(info, 0, info.size).reshape(info.shape)

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

    def walk(self) -> Iterator[tuple[TensorInfo, Iterator[memoryview]]]:
        """Every tensor with its bytes, at most `CHUNK` at a time, in the order of the file.

        Small tensors share a read. What was handed out is overwritten when the next one is asked for.
        """
        infos = list(self.tensors.values())
        end = max((info.stop for info in infos), default=0)
        buffer, first, last = memoryview(bytearray(min(CHUNK, end))), 0, 0  # it holds the bytes from first to last

        def pieces(info: TensorInfo) -> Iterator[memoryview]:
            nonlocal first, last
            for start in range(info.start, info.stop, CHUNK):
                stop = min(start + CHUNK, info.stop)
                if not first <= start <= stop <= last:
                    first, last = start, min(start + CHUNK, end)
                    self._source.read_into(buffer[: last - first], self.data_start + first)
                yield buffer[start - first : stop - first]

        for info in infos:
            yield info, pieces(info)

    def deferred(self, name: str) -> Deferred:
        """One tensor as it stands, to be copied into another file."""
        info = self.tensors[name]
        return Deferred(info.dtype, info.shape, lambda: self.chunks(info))

    def sha256(self, name: str) -> str:
        """sha256 over the tensor's bytes, which are little-endian and row-major."""
        digest = hashlib.sha256()
        for chunk in self.chunks(self.tensors[name]):
            digest.update(chunk)
        return digest.hexdigest()

    def file_sha256(self) -> str:
        """sha256 over the whole file."""
        digest = hashlib.sha256(struct.pack("<Q", len(self.header)) + self.header)
        # The tensors are without hole or overlap, and so the rest of the file.
        end = self._source.size - self.data_start
        for piece in self.chunks(TensorInfo("", "uint8", (end,), 0, end)):
            digest.update(piece)
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """sha256 over each tensor's bytes, by name."""
        found = {}
        for info, pieces in self.walk():
            digest = hashlib.sha256()
            for piece in pieces:
                digest.update(piece)
            found[info.name] = digest.hexdigest()
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
        ours = {name: (info.dtype, info.shape) for name, info in self._entries.items()}
        for name in [*ours, *theirs.tensors]:
            if ours.get(name) != theirs.tensors.get(name):
                found, read = (_in_words(tensors.get(name)) for tensors in (theirs.tensors, ours))
                return f"{safetensors_library.LIBRARY} finds {found} under {name}, where {read} was read"
        filled = [name for name, info in self._entries.items() if info.nbytes]
        if [name for name in theirs.tensors if self._entries[name].nbytes] != filled:
            return f"{safetensors_library.LIBRARY} finds the tensors in another order"
        return None if theirs.metadata == self.metadata else f"{safetensors_library.LIBRARY} finds other metadata"

    def _read_header(self) -> bytes:
        if self._source.size < 8:
            raise FormatError(
                "not a safetensors file",
                where=self.label,
                expected="8 bytes or more",
                found=f"{self._source.size} bytes",
            )
        start = bytearray(8)
        self._source.read_into(memoryview(start), 0)
        (length,) = struct.unpack("<Q", start)
        room = min(MAX_HEADER, self._source.size - 8)
        if length > room:
            hint = None
            if start[:2] == b"PK" or start[0] == 0x80:
                hint = "this is a pickle: load it with torch.load(..., weights_only=True) and save it as safetensors"
            elif bytes(start) == b"version ":
                hint = "this is a Git LFS pointer: fetch the file itself with `git lfs pull`"
            raise FormatError(
                "not a safetensors file, or cut off",
                where=self.label,
                expected=f"a header length of at most {room}",
                found=str(length),
                hint=hint,
            )
        header = bytearray(length)
        self._source.read_into(memoryview(header), 8)
        return bytes(header)


def _library_reads(header: bytes, size: int) -> bool:
    try:
        safetensors_library.read(header, size)
    except FormatError:
        return False
    return True


def _in_words(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "nothing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def parse_header(header: bytes, *, where: str) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """A header's metadata, and its tensors in the order of their bytes.

    Raises:
        FormatError: not a header, or its tensors leave holes or overlap.
    """
    _refuse_excess(header, where=where)
    try:
        text = header.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"the header is not UTF-8 at byte {error.start}", where=where) from error
    if not text.startswith("{"):
        raise FormatError("the header does not start with '{'", where=where)
    document = parse_json(text, where=f"{where}: header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("wrong metadata", where=f"{where}: __metadata__", expected="an object of strings")
    infos = sorted(
        (_parse_entry(name, entry, where=where) for name, entry in document.items()),
        key=lambda info: (info.start, info.stop),
    )
    position = 0
    for info in infos:
        if info.start != position:
            raise FormatError(
                "the tensors overlap" if info.start < position else "there is a hole between the tensors",
                where=f"{where}: {info.name}",
                expected=f"a start at byte {position}",
                found=str(info.start),
            )
        position = info.stop
    return metadata, {info.name: info for info in infos}


def _refuse_excess(header: bytes, *, where: str) -> None:
    """Refuse a header that would take more time and memory to parse than its tensors explain, before it is parsed."""
    tensors = header.count(b'"data_offsets"')  # nobody writes these with escapes, and who does gets less room
    for what, most, found in (
        ("tensors", MAX_TENSORS, tensors),
        ("bytes", HEADER_ROOM + TENSOR_ROOM * tensors, len(header)),
        ("values", MAX_VALUES + (MAX_DIMENSIONS + 8) * tensors, header.count(b",")),
    ):
        if found > most:
            many = f" for {tensors} tensors" if what != "tensors" else ""
            raise FormatError(
                f"the header has too many {what}",
                where=where,
                expected=f"at most {most:,}{many}",
                found=f"{found:,}",
                hint="no model is known that has so many: if yours is one, please report it",
            )


def _check_extent(tensors: Mapping[str, TensorInfo], room: int, *, where: str) -> None:
    position = max((info.stop for info in tensors.values()), default=0)
    if position != room:
        raise FormatError(
            "the tensors do not fill the file",
            where=where,
            expected=f"{position} bytes of tensors, as the header says",
            found=f"{room}",
            hint="the file was cut off" if position > room else "something was appended to it",
        )


def _parse_entry(name: str, entry: Any, *, where: str) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise FormatError(
            "the name of a tensor is too long",
            where=f"{where}: {cut(name)}",
            expected=f"at most {MAX_NAME:,} characters",
            found=f"{len(name):,}",
        )
    try:
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        start, stop = offsets
        good = len(entry) == 3 and code in NAMES and _are_counts(shape) and _are_counts(offsets) and start <= stop
    except (KeyError, TypeError, ValueError):
        good = False
    if not good or len(shape) > MAX_DIMENSIONS:
        raise _wrong_entry(entry, where=f"{where}: {name}")
    bits = math.prod(shape) * BITS[code]
    if bits != 8 * (stop - start):
        raise FormatError(
            f"shape and extent contradict each other for {code} {shape}",
            where=f"{where}: {name}",
            expected=f"{_in_bytes(bits)} bytes",
            found=str(stop - start),
        )
    return TensorInfo(name, NAMES[code], tuple(shape), start, stop)


def _wrong_entry(entry: Any, *, where: str) -> FormatError:
    """What is wrong with an entry that is none."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return FormatError("wrong header entry", where=where, expected="dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in NAMES:
        return FormatError("unknown dtype", where=where, expected=" ".join(NAMES), found=cut(repr(code)))
    if not _are_counts(shape):
        found = cut(repr(shape))
        return FormatError("wrong shape", where=where, expected="a list of non-negative integers", found=found)
    if len(shape) > MAX_DIMENSIONS:
        found = f"{len(shape):,}"
        return FormatError("too many dimensions", where=where, expected=f"at most {MAX_DIMENSIONS}", found=found)
    return FormatError("wrong data_offsets", where=where, expected="[start, stop]", found=cut(repr(offsets)))


def _in_bytes(bits: int) -> str:
    whole, rest = divmod(bits, 8)
    if whole >= 2**64:
        return "2**64 or more"
    return f"{whole}{f'{rest / 8:g}'[1:] if rest else ''}"


_TOO_LARGE = 2**63


def _are_counts(value: Any) -> bool:
    if type(value) is not list:
        return False
    # A header has two of these for each tensor, and a generator takes three times as long.
    for item in value:  # noqa: SIM110
        if type(item) is not int or not 0 <= item < _TOO_LARGE:
            return False
    return True


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, order: Sequence[str] | None = None
) -> dict[str, TensorInfo]:
    """Where each tensor goes in a new file: name to (dtype, shape), in `order`, or else in the library's own order."""
    names = order or sorted(tensors, key=lambda name: (-BITS[CODES[tensors[name][0]]], name))
    infos, position = {}, 0
    for name in names:
        dtype, shape = tensors[name]
        stop = position + math.prod(shape) * BITS[CODES[dtype]] // 8
        infos[name] = TensorInfo(name, dtype, shape, position, stop)
        position = stop
    return infos


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header's bytes, padded with spaces to a multiple of 8, without the 8 length bytes."""
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        document[name] = {
            "dtype": CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [info.start, info.stop],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


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
