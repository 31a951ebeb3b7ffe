"""Adapters, bases and their files that mean harm, one small program for each kind.

`BAD` are adapters that nothing can be done with, `ODD` those that are read and are strange, `HARMLESS` what PEFT takes
and we must take too, `BASES` what may be wrong with a base.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.adapters import (
    CONFIG,
    MANIFEST,
    PAIR,
    WEIGHTS,
    config_of,
    drop_pair,
    edit,
    edit_json,
    edit_manifest,
    set_config,
)
from vera_tools import record

Change = Callable[[Path], object]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
VECTOR = f"{LAYER}.vera_lambda_b"


def config(**values: object) -> Change:
    """Set keys of the config."""
    return lambda folder: (folder / CONFIG).write_text(json.dumps({**config_of(folder), **values}))


def text(before: str, after: str) -> Change:
    """Add a key to the config's text, its value as it is written."""

    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps(config_of(folder))[:-1] + f", {before}{after}}}")

    return change


def header(change: Callable[[dict[str, Any]], bytes | None]) -> Change:
    """Write the header again, the tensors' bytes behind it as long as it says."""

    def apply(folder: Path) -> None:
        path = folder / WEIGHTS
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        document = json.loads(data[8 : 8 + length])
        tail = change(document) or data[8 + length :]
        new = json.dumps(document).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + tail)

    return apply


def one_tensor(name: str, shape: list[int], code: str = "F32", values: bytes = b"") -> Change:
    """A file of one tensor."""

    def change(document: dict[str, Any]) -> bytes:
        document.clear()
        document[name] = {"dtype": code, "shape": shape, "data_offsets": [0, len(values)]}
        return values or b""

    return header(change)


def tensors(**shapes: tuple[int, ...]) -> Change:
    """Put zeros of these shapes into the places of tensors: vera_A, vera_B, and the first layer's vectors."""
    names = {"A": PAIR[0], "B": PAIR[1], "b": VECTOR, "d": f"{LAYER}.vera_lambda_d"}
    return lambda folder: edit(
        folder, lambda held: held.update({names[key]: np.zeros(shape, np.float32) for key, shape in shapes.items()})
    )


def added(name: str, shape: tuple[int, ...] = (4,), dtype: Any = np.float32) -> Change:
    """Add one tensor."""
    return lambda folder: edit(folder, lambda held: held.update({name: np.zeros(shape, dtype)}))


def metadata(value: str) -> Change:
    """Put something else in the place of the file's own record."""
    return lambda folder: edit(folder, lambda held: None, metadata={"vera_tools": value})


def manifest(change: Callable[[dict[str, Any]], object], *, seed_only: bool = False) -> Change:
    """Change the manifest, of a checkpoint with its pair or without."""

    def apply(folder: Path) -> None:
        record(folder)
        if seed_only:
            drop_pair(folder)
            set_config(folder, save_projection=False)
        edit_manifest(folder, change)

    return apply


def claim(**numbers: int) -> Change:
    """A seed-only checkpoint whose manifest claims a pair of another size."""

    def change(document: dict[str, Any]) -> None:
        document.update(numbers)
        pair = document["projections"]
        pair["vera_A"]["shape"] = [document["r"], document["in_max"]]
        pair["vera_B"]["shape"] = [document["out_max"], document["r"]]

    return manifest(change, seed_only=True)


def original(**values: str) -> Change:
    """A seed-only checkpoint whose manifest holds another original."""
    whole = {"header": "e30=", "config": "{}", "sha256": "0" * 64, **values}
    return manifest(lambda document: document.update(original=whole), seed_only=True)


BAD: dict[str, Change] = {
    "repeats beyond counting": config(target_modules="a{9999999999999999999999}"),
    "a thousand groups": config(target_modules="(" * 1000 + ")" * 1000),
    "five thousand digits": text('"r": ', "9" * 5000),
    "flags in modules_to_save": config(modules_to_save=["(?i)x"]),
    "flags in layers_pattern": config(layers_pattern="(?i)x", layers_to_transform=0),
    "PEFT's own group": config(layers_pattern="(?P<idx>x)", layers_to_transform=0),
    "lists nested deeply": text('"auto_mapping": ', "[" * 100_000),
    "eighteen large dimensions": one_tensor(VECTOR, [2**62] * 18),
    "weights of no columns": one_tensor("base_model.vera_A", [8, 0]),
    "a vector of no dimension": one_tensor(VECTOR, [], values=b"\0" * 4),
    "a million dimensions": one_tensor(VECTOR, [1] * 1_000_000, values=b"\0" * 4),
    "NaN in 65 dimensions": one_tensor(VECTOR, [1] * 65, values=struct.pack("<f", float("nan"))),
    "a name of many dots": one_tensor("base_model.model." + "." * 100_000 + "vera_lambda_b", [1], values=b"\0" * 4),
    "not UTF-8": lambda folder: (folder / CONFIG).write_bytes(b'{"peft_type": "VERA", "x": "\xff"}'),
}
HARMLESS: dict[str, Change] = {
    "half a character": text('"base_model_name_or_path": ', '"\\ud800"'),
    "a value nested 900 deep": text('"future": ', "[" * 900 + "]" * 900),
    "a group of a name that PEFT does not use": config(layers_pattern="(?P<index>layers)", layers_to_transform=[0, 1]),
}
ODD: dict[str, Change] = {
    "five thousand names in modules_to_save": config(modules_to_save=[f"m{n}" for n in range(5000)]),
    "five thousand expressions in modules_to_save": config(modules_to_save=[f"m{n}.*x" for n in range(5000)]),
    "an expression that takes a minute to compile": config(target_modules="(?i)" + "[\u0100-\uffff]" * 3000),
    "expressions of a million characters": config(target_modules="|".join(f"a{n}" for n in range(200_000))),
    "numbers in modules_to_save": config(modules_to_save=[5] * 100_000),
    "weights of [8, 0] and [0, 8]": tensors(A=(8, 0), B=(0, 8)),
    "weights of [0, 0]": tensors(A=(0, 0), B=(0, 0)),
    "weights of no dimension": tensors(A=(), B=()),
    "weights of three dimensions": tensors(A=(8, 4, 2), B=(2, 4, 8)),
    "vectors of no dimension": tensors(b=(), d=()),
    "vectors of no element": tensors(b=(0,), d=(0,)),
    "vectors of two dimensions": tensors(b=(8, 0), d=(0, 8)),
    "a vector of truth values": added(VECTOR, dtype=bool),
    "no tensor": lambda folder: edit(folder, lambda held: held.clear()),
    "the pair alone": lambda folder: edit(folder, lambda held: [held.pop(n) for n in list(held) if n not in PAIR]),
    "a vector of no module": added("base_model.model..vera_lambda_b"),
    "a line break in a name": added(f"{LAYER}\n.vera_lambda_b"),
    "a NUL in a name": added(f"{LAYER}\0.vera_lambda_b"),
    "a bias of no dimension": added(f"{LAYER}.base_layer.bias", ()),
    "elements of four bits": one_tensor(VECTOR, [2], "F4", b"\0"),
    "elements of six bits": one_tensor(VECTOR, [4], "F6_E2M3", b"\0" * 3),
    "complex elements": one_tensor(VECTOR, [2], "C64", b"\0" * 16),
    "a record that is no JSON": metadata("{"),
    "a record that is a number": metadata("5"),
    "a record nested deeply": metadata("[" * 100_000),
    "a record of half a character": metadata('"\\ud800"'),
    "a manifest that is a list": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a manifest nested deeply": lambda folder: (folder / MANIFEST).write_text("[" * 100_000),
    "a manifest whose config has a number for target_modules": manifest(lambda m: m["config"].update(target_modules=5)),
    "a manifest whose config is nested 900 deep": lambda folder: (
        record(folder),
        (folder / MANIFEST).write_text(
            (folder / MANIFEST).read_text().replace('"config": {', f'"config": {{"x": {"[" * 900 + "]" * 900},', 1)
        ),
    ),
    "a manifest whose config is null": manifest(lambda m: m.update(config=None)),
    "a manifest with a text in the place of its tensors": manifest(lambda m: m.update(tensors="x")),
    "a manifest with a hundred thousand numbers as metadata": manifest(
        lambda m: m.update(metadata={str(n): n for n in range(100_000)})
    ),
    "a claim of half a GiB": claim(in_max=1 << 24),
    "a claim of more than there is": claim(in_max=1 << 62),
    "a claim of nothing": claim(in_max=0),
    "a claim of another rank": claim(r=1 << 20),
    "an original of no header": original(header=""),
    "an original that is no base64": original(header="é"),
    "an original with a list as its header": original(header="W10="),
    "an original nested deeply": original(config="[" * 100_000),
    "an original of no config": original(config="5"),
}


def base_config(**values: object) -> Change:
    """Set keys of a base's config.json."""
    return lambda folder: edit_json(folder / "config.json", lambda document: document.update(values))


def base_index(**values: object) -> Change:
    """Give a base an index, with these keys."""

    def change(folder: Path) -> None:
        part = "model-00001-of-00001.safetensors"
        (folder / "model.safetensors").rename(folder / part)
        with (folder / part).open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            names = json.loads(stream.read(length)).keys() - {"__metadata__"}
        document = {"metadata": {}, "weight_map": dict.fromkeys(names, part), **values}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document))

    return change


def base_weights(shape: tuple[int, ...], *, only: str = "") -> Change:
    """Give a base's weights another shape."""

    def change(held: dict[str, np.ndarray]) -> None:
        held.update({name: np.zeros(shape, np.float32) for name in held if only in name})

    return lambda folder: edit(folder, change, file="model.safetensors")


BASES: dict[str, Change] = {
    **{f"architectures {value!r}": base_config(architectures=value) for value in (5, {"a": 1}, [None], "x", [[]])},
    **{f"model_type {value!r}": base_config(model_type=value) for value in (5, ["llama"], {}, [])},
    **{f"text_config {value!r}": base_config(text_config=value) for value in ("x", [], {"model_type": []})},
    "quantization_config a list": base_config(quantization_config=[1]),
    "attention heads a text": base_config(model_type="gpt_neox", num_attention_heads="many"),
    "vocab_size a text": base_config(vocab_size="x"),
    "transformers_weights elsewhere": base_config(transformers_weights="../x"),
    "a config nested 900 deep": lambda folder: (folder / "config.json").write_text(f'{{"x": {"[" * 900 + "]" * 900}}}'),
    "a config nested deeply": lambda folder: (folder / "config.json").write_text("[" * 100_000),
    **{f"index metadata {value!r}": base_index(metadata=value) for value in ("x", [], None, 5)},
    **{f"weight_map {value!r}": base_index(weight_map=value) for value in ("x", [], None, {"a": None}, {"a": ["x"]})},
    "total_size a text": base_index(metadata={"total_size": "x"}),
    "weights of no dimension": base_weights(()),
    "weights of [8, 0]": base_weights((8, 0), only="q_proj"),
    "weights of [0, 8]": base_weights((0, 8), only="q_proj"),
    "weights of three dimensions": base_weights((2, 2, 2), only="q_proj"),
}  # fmt: skip
