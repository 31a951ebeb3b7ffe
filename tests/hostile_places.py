"""What may lie in an adapter's place among others: other files, none, or what is no file at all; and odd names.

Unlike the changes of `hostile`, which alter what an adapter's files say, these cannot be put to a command that copies
or reads the folder beforehand.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from tests.adapters import CONFIG, MANIFEST, PICKLE, WEIGHTS, set_config
from tests.hostile import Change
from vera_tools import record

FILES = (CONFIG, WEIGHTS, MANIFEST)


def each(change: Callable[[Path], object], *names: str) -> dict[str, Change]:
    """The same done to each of an adapter's files, which is removed before."""

    def one(name: str) -> Change:
        def apply(folder: Path) -> None:
            record(folder)
            (folder / name).unlink()
            change(folder / name)

        return apply

    return {name: one(name) for name in names or FILES}


def named(what: str, changes: dict[str, Change]) -> dict[str, Change]:
    """Changes under names that say what they are."""
    return {f"{what}: {name}": change for name, change in changes.items()}


def sparse(path: Path) -> None:
    """A file of 3 GiB that takes no room."""
    with path.open("wb") as stream:
        stream.truncate(3 << 30)


def bind(path: Path) -> None:
    """A socket; its path may be too long for the system, its name is not."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(here)


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


def pickled(folder: Path, name: str) -> None:
    """Pickled code in the place of the weights."""
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(folder / "exploded")))


def appended(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def with_header(header: bytes) -> Change:
    """Weights of this header alone."""
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def entry(shape: str, offsets: str = "[0,4]", dtype: str = '"F32"') -> Change:
    """Weights of one entry, as its text stands, and four bytes."""
    header = f'{{"base_model.vera_A":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def value(key: str, text: str) -> Change:
    """A key of the config with a value as it is written."""

    def change(folder: Path) -> None:
        document = json.loads((folder / CONFIG).read_text())
        document.pop(key, None)
        (folder / CONFIG).write_text(json.dumps(document)[:-1] + f', "{key}": {text}}}')

    return change


LORA = {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}


def foreign(folder: Path) -> None:
    """A LoRA, which is nobody's mistake."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(LORA))
    with_header(b'{"base_model.model.q_proj.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}')(folder)


#: Adapters that are no good.
BAD: dict[str, Change] = {
    **named("nothing there", each(lambda path: None, CONFIG, WEIGHTS)),
    **named("no byte", each(lambda path: path.touch())),
    **named("a folder", each(lambda path: path.mkdir())),
    **named("a pipe", each(os.mkfifo)),
    **named("a socket", each(bind)),
    **named("a device", each(lambda path: path.symlink_to("/dev/zero"))),
    **named("a link to itself", each(lambda path: path.symlink_to(path.name))),
    **named("a broken link", each(lambda path: path.symlink_to("gone"))),
    **named("3 GiB without content", each(sparse)),
    **named("a Git LFS pointer", each(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"))),
    **named("UTF-16", each(lambda path: path.write_text('{"peft_type": "VERA"}', "utf-16"), CONFIG, MANIFEST)),
    "cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
    "a byte too many": lambda folder: appended(folder / WEIGHTS, b"\0"),
    "more after the config": lambda folder: appended(folder / CONFIG, b"{}"),
    "pickled code, called safetensors": lambda folder: pickled(folder, WEIGHTS),
    "pickled code": lambda folder: pickled(folder, PICKLE),
    "called LoRA": lambda folder: set_config(folder, peft_type="LORA"),
    "a header of 2**63 bytes": lambda folder: (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 63)),
    "a header of no byte": with_header(b""),
    "a header of spaces": with_header(b" " * 4096),
    "a header that is a list": with_header(b"[]"),
    "a header that is not UTF-8": with_header(b'{"\xff":{}}'),
    "a header nested deeply": with_header(b'{"x":' + b"[" * 100_000),
    "a header with a name twice": with_header(
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    ),
    **{f"a shape of {shape}": entry(shape) for shape in (
        "[NaN]", "[Infinity]", "[1e0]", "[1.0]", '["1"]', "[-1]", "[true]", "[null]", "[[1]]", "1", "null", "[2]",
        "[" + "9" * 400 + "]", "[18446744073709551617]",
    )},
    **{f"offsets of {offsets}": entry("[1]", offsets) for offsets in (
        "[NaN,4]", "[-4,0]", "[4,0]", "[0,8]", "[1,5]", "[0]", "null", "[0,4,8]", "[0,1e1]",
    )},
    **{f"a dtype of {dtype}": entry("[1]", "[0,4]", dtype) for dtype in ('"F33"', "null", "5", '"f32"', '["F32"]')},
    **{f"r of {text}": value("r", text) for text in (
        "NaN", "1e999", "-1", "0", "null", "[8]", '"x"', "1" + "0" * 400, "8.5", "{}",
    )},
    **{f"a key of {text}": value("projection_prng_key", text) for text in (
        "NaN", "[1]", '"x"', "1.5", "1" + "0" * 400,
    )},
    **{f"{key} of {text}": value(key, text) for key, text in (
        ("target_modules", "{}"), ("target_modules", "[null]"), ("modules_to_save", '{"a": 1}'),
        ("layers_to_transform", '"x"'), ("layers_to_transform", "1" + "0" * 400), ("layers_pattern", "9" * 400),
        ("peft_type", "null"), ("peft_type", "[]"),
    )},
}  # fmt: skip
#: What is no VeRA adapter, and is passed over.
OTHERS: dict[str, Change] = {"a LoRA": foreign}
#: Names of folders, of adapters that are sound. A name is bytes to most systems.
NAMES = [
    b"b\xffd", b"\xc3\x28", b"\xed\xa0\x80", b"line\nbreak", b"carriage\rreturn", b"esc\x1b[31mred", b"bell\x07",
    "bidi\u202eknil".encode(), "nul\u2400".encode(), b"<script>alert(1)</script>", b"]]>", b"&amp;", b"'\"`", b"$(id)",
    b"-R", b"--json", b" ", b"x ", b"a%00b", b"*", b"[x]", b"[link=https://a.b]c", b"::error::x", b"{}", b"~",
    b"hf:", "\u00e9\u4e00\U0001f600".encode(), b"n" * 255, b"\\", b"#", b"?",
]  # fmt: skip
