"""The safetensors reader and writer: literal bytes, the library in both directions, and files that mean harm."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import FIXTURES
from tests.adapters import CHECKPOINTS
from tests.memory import traced_peak
from vera_tools.dtypes import BITS, CODES, NAMES, np_dtype
from vera_tools.errors import FormatError
from vera_tools.files import safetensors
from vera_tools.files.safetensors import Deferred, TensorFile, encode_header, layout, parse_header

HOSTILE = runpy.run_path(str(FIXTURES / "hostile" / "safetensors_files.py"))["FILES"]
REAL = sorted(CHECKPOINTS.glob("*/*.safetensors"))

# A header of 144 bytes, padding included, and 12 bytes of tensors.
LITERAL = (
    b"\x90\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"pt"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}'
)
LITERAL = LITERAL + b" " * (152 - len(LITERAL)) + b"\x00\x00\x80\x3f\x00\x00\x00\xc0" + b"\x40\x40\x80\xbf"


@pytest.fixture
def save(tmp_path):
    def write(data: bytes, name: str = "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def test_literal_bytes_are_read(save):
    with TensorFile.open(save(LITERAL)) as file:
        assert file.metadata == {"format": "pt"}
        assert list(file.tensors) == ["w", "b"]
        assert (file.tensors["b"].shape, file.tensors["b"].dtype, file.tensors["b"].nbytes) == ((1, 2), "bfloat16", 4)
        assert file.size == len(LITERAL)
        np.testing.assert_array_equal(file.read("w"), np.float32([1.0, -2.0]))
        assert file.read("b").astype(np.float32).tolist() == [[3.0, -1.0]]
        assert file.read_elements(file.tensors["w"], 1, 2).tolist() == [-2.0]
        assert file.sha256("b") == hashlib.sha256(b"\x40\x40\x80\xbf").hexdigest()
        assert file.file_sha256() == hashlib.sha256(LITERAL).hexdigest()
        with pytest.raises(KeyError):
            file.read("nothing")


def test_literal_bytes_are_written(tmp_path):
    tensors = {"b": np.array([[3.0, -1.0]], np_dtype("bfloat16")), "w": np.float32([1.0, -2.0])}
    safetensors.save(tmp_path / "file", tensors, {"format": "pt"})
    assert (tmp_path / "file").read_bytes() == LITERAL


@pytest.mark.parametrize(("data", "tensor", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_ends_in_one_clear_error(save, data, tensor, words):
    path = save(data)

    def refused():
        with pytest.raises(FormatError) as caught:
            TensorFile.open(path)
        return caught.value

    memory, error = traced_peak(refused)
    text = str(error)
    assert words in text
    assert error.where.startswith(str(path) if tensor is None else f"{path}: {tensor}")
    assert "\n" not in text
    assert len(text) < 600
    assert memory < (1 << 20) + 100 * len(data)


def test_hostile_files_are_written_by_their_program(tmp_path):
    program = FIXTURES / "hostile" / "safetensors_files.py"
    subprocess.run([sys.executable, str(program), str(tmp_path / "out")], check=True)
    written = {path.stem: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert written == {name: hostile.data for name, hostile in HOSTILE.items()}


def test_a_header_over_the_limit_is_not_read(tmp_path):
    with (tmp_path / "file").open("wb") as stream:
        stream.write(struct.pack("<Q", safetensors.MAX_HEADER + 1))
        stream.truncate(safetensors.MAX_HEADER + 1000)  # a sparse file, so the header would fit in it
    with pytest.raises(FormatError, match="expected a header length of at most 100000000, found 100000001"):
        TensorFile.open(tmp_path / "file")


def test_a_failing_open_leaves_no_descriptor(save):
    class Source:
        label, size, closed = "hostile", 9, False

        def read_into(self, buffer, start):
            buffer[:] = bytes(len(buffer))

        def close(self):
            self.closed = True

    source = Source()
    with pytest.raises(FormatError):
        TensorFile(source)
    assert source.closed


def test_opening_reads_the_header_and_nothing_else(save):
    class Source:
        label, size = "counted", len(LITERAL)
        asked = 0

        def read_into(self, buffer, start):
            self.asked += len(buffer)
            buffer[:] = LITERAL[start : start + len(buffer)]

        def close(self):
            pass

    source = Source()
    with TensorFile(source) as file:
        assert source.asked == 8 + len(file.header) == 152
        file.read("b")
        assert source.asked == 156


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.parent.name)
def test_the_library_and_we_read_peft_files_alike(path):
    from safetensors import safe_open

    with TensorFile.open(path) as file, safe_open(path, "pt") as theirs:
        assert file.metadata == theirs.metadata()
        assert set(file.tensors) == set(theirs.keys())
        for name in file.tensors:
            tensor = theirs.get_tensor(name)
            assert f"torch.{file.tensors[name].dtype}" == str(tensor.dtype)
            assert file.read(name).tobytes() == as_bytes(tensor)
        assert file.file_sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def as_bytes(tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("code", [code for code, bits in BITS.items() if bits >= 8])
def test_every_dtype_of_the_library_is_read_and_written_alike(tmp_path, code):
    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, NAMES[code])
    size = 6 * BITS[code] // 8
    raw = torch.arange(1, size + 1, dtype=torch.uint8)
    tensor = (raw % 2 if code == "BOOL" else raw).view(dtype).reshape(2, 3)
    save_file({"t": tensor}, tmp_path / "theirs")
    with TensorFile.open(tmp_path / "theirs") as file:
        array = file.read("t")
    assert (array.shape, array.tobytes()) == ((2, 3), as_bytes(tensor))
    assert array.dtype.name == NAMES[code]
    safetensors.save(tmp_path / "ours", {"t": array}, {})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    loaded = load_file(tmp_path / "ours")["t"]
    assert (loaded.dtype, as_bytes(loaded)) == (dtype, as_bytes(tensor))


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_packed_dtype_is_copied_but_not_read_as_numbers(save, code, tmp_path):
    header = json.dumps({"t": {"dtype": code, "shape": [8], "data_offsets": [0, BITS[code]]}}).encode()
    body = bytes(range(BITS[code]))
    with TensorFile.open(save(struct.pack("<Q", len(header)) + header + body)) as file:
        with pytest.raises(FormatError, match=r"safetensors: t: no numpy dtype for float"):
            file.read("t")
        assert file.sha256("t") == hashlib.sha256(body).hexdigest()
        safetensors.save(tmp_path / "copy", {"t": file.deferred("t")}, {})
    with TensorFile.open(tmp_path / "copy") as copy:
        assert b"".join(map(bytes, copy.chunks(copy.tensors["t"]))) == body


DTYPES = st.sampled_from(["float32", "float64", "float16", "bfloat16", "int64", "int8", "bool", "float8_e4m3fn"])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
TENSORS = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.tuples(DTYPES, SHAPES))
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text(max_size=5))


@settings(max_examples=150, deadline=None)
@given(tensors=TENSORS, seed=st.integers(0, 2**32 - 1))
def test_what_we_write_the_library_reads(tmp_path_factory, tensors, seed):
    from safetensors import safe_open

    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("written") / "file"
    random = np.random.default_rng(seed)
    arrays = {}
    for name, (dtype, shape) in tensors.items():
        high = 2 if dtype == "bool" else 256
        raw = random.integers(0, high, int(np.prod(shape)) * np_dtype(dtype).itemsize).astype(np.uint8)
        arrays[name] = raw.view(np_dtype(dtype)).reshape(shape)
    metadata = {"é": "ß", "a": "1"} if seed % 2 else {}
    safetensors.save(path, arrays, metadata)
    with safe_open(path, "pt") as theirs, TensorFile.open(path) as ours:
        assert (theirs.metadata() or {}) == ours.metadata == metadata
        assert set(theirs.keys()) == set(ours.tensors) == set(arrays)
        for name, array in arrays.items():
            assert as_bytes(theirs.get_tensor(name)) == ours.read(name).tobytes() == array.tobytes()
            assert tuple(theirs.get_tensor(name).shape) == ours.read(name).shape == array.shape
    assert ours.data_start % 8 == 0


@settings(max_examples=400, deadline=None)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(LITERAL) - 1), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 20),
    tail=st.binary(max_size=4),
)
def test_whatever_we_take_the_library_takes_too(tmp_path_factory, edits, cut, tail):
    from safetensors import safe_open

    data = bytearray(LITERAL)
    for place, value in edits:
        data[place] = value
    path = tmp_path_factory.mktemp("fuzzed") / "file"
    path.write_bytes(bytes(data[: len(data) - cut] if cut > 15 else data) + (tail if cut > 12 else b""))
    try:
        file = TensorFile.open(path)
    except FormatError:
        return
    with file, safe_open(path, "np") as theirs:
        assert set(file.tensors) == set(theirs.keys())
        assert (theirs.metadata() or {}) == file.metadata
        for name, info in file.tensors.items():
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert CODES[info.dtype] == theirs.get_slice(name).get_dtype()


def test_the_layout_is_the_librarys_own(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {
        "c": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.ones(1, 2),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "é": torch.zeros(0, 4),
        "d": torch.ones(2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    with TensorFile.open(tmp_path / "theirs") as file:
        arrays = {name: file.read(name) for name in sorted(file.tensors, reverse=True)}
    safetensors.save(tmp_path / "ours", arrays, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_is_written_twice_is_written_the_same(tmp_path):
    arrays = {name: np.zeros(2, np.float32) for name in "cab"}
    metadata = {key: key for key in "zyxabc"}
    safetensors.save(tmp_path / "one", arrays, metadata)
    safetensors.save(
        tmp_path / "two", dict(sorted(arrays.items())), dict(sorted(metadata.items(), key=lambda item: item[0]))
    )
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_header_is_encoded_as_it_was_parsed():
    for path in REAL:
        with TensorFile.open(path) as file:
            infos = layout(
                {name: (info.dtype, info.shape) for name, info in file.tensors.items()}, order=list(file.tensors)
            )
            assert infos == file.tensors
            assert encode_header(file.tensors, file.metadata) == file.header
            assert parse_header(file.header, where="again") == (file.metadata, file.tensors)


def test_a_tensor_may_be_made_while_it_is_written(tmp_path):
    size = 3 * safetensors.CHUNK
    block = np.ones(1000, np.float32)

    def pieces():
        for start in range(0, size, 1000):
            yield block[: min(1000, size - start)]

    made = Deferred("float32", (3, safetensors.CHUNK), pieces)
    tensors = {"made": made, "small": np.zeros(2, np.float16)}
    peak, _ = traced_peak(lambda: safetensors.save(tmp_path / "made", tensors, {}))
    assert peak < 1 << 20
    with TensorFile.open(tmp_path / "made") as file:
        assert (file.read("made") == 1).all()
        assert file.read("made").shape == (3, safetensors.CHUNK)
        chunks = [len(chunk) for chunk in file.chunks(file.tensors["made"])]
        assert chunks == [safetensors.CHUNK] * 12
        safetensors.save(tmp_path / "copy", {name: file.deferred(name) for name in file.tensors}, {})
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "made").read_bytes()


def test_arrays_of_any_memory_layout_are_written_in_rows(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.save(tmp_path / "rows", {"t": array}, {})
    safetensors.save(tmp_path / "columns", {"t": np.asfortranarray(array)}, {})
    safetensors.save(tmp_path / "strided", {"t": np.repeat(array, 2, axis=1)[:, ::2]}, {})
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "columns").read_bytes()
    assert (tmp_path / "rows").read_bytes() == (tmp_path / "strided").read_bytes()


def test_reading_headers_imports_no_torch():
    program = (
        "import sys; from vera_tools.files.safetensors import TensorFile; "
        f"TensorFile.open({str(REAL[0])!r}).close(); print(sorted(m for m in sys.modules if m in "
        "('torch', 'safetensors', 'peft', 'transformers', 'ml_dtypes', 'huggingface_hub')))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "['safetensors']\n"


def test_all_codes_of_the_library_are_known():
    assert len(set(NAMES.values())) == len(NAMES) == len(CODES)
    assert all(re.fullmatch(r"[A-Z0-9_]+", code) for code in NAMES)
