"""The header of a safetensors file: parsed by the rules that `safetensors` gives, and written."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vera_tools.dtypes import BITS, CODES, NAMES
from vera_tools.errors import FormatError, cut
from vera_tools.files.strict_json import parse_json
from vera_tools.memo import Memo

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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, eq=False)
class Header:
    """What a header says. Files with equal headers share one, so that what follows from it is found out once.

    Attributes:
        data: Its bytes.
        metadata: The ``__metadata__`` entries.
        tensors: Name to `TensorInfo`, in the order of the bytes in the file.
    """

    data: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @property
    def is_shared(self) -> bool:
        """Whether it is short enough to be remembered."""
        return len(self.data) <= _SHORT

    @functools.cached_property
    def sha256(self) -> bytes:
        """Digest of its bytes, to tell it from others by."""
        return hashlib.sha256(self.data).digest()


#: Bytes of the headers that are remembered, each and all together; what they say takes some four times as much memory.
_SHORT, _REMEMBERED = 128 << 10, 2 << 20
_memo = Memo(_REMEMBERED)


def read_header(data: bytes, *, where: str) -> Header:
    """What a header says; of one that was read before, the same object.

    Raises:
        FormatError: not a header, or its tensors leave holes or overlap.
    """

    def compute() -> Header:
        metadata, tensors = parse_header(data, where=where)
        return Header(data, MappingProxyType(metadata), MappingProxyType(tensors))

    return _memo(data, compute, weight=len(data)) if len(data) <= _SHORT else compute()


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


def check_extent(header: Header, room: int, *, where: str) -> None:
    """Refuse tensors that do not fill a file which has so many bytes behind its header.

    Raises:
        FormatError: says which of the two is longer.
    """
    position = max((info.stop for info in header.tensors.values()), default=0)
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
