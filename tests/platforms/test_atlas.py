"""Every entry of the atlas against its schema, the reference generator and the rules that docs/kernels.md states."""

from __future__ import annotations

import dataclasses
import functools
import json
import re

import pytest

from tests import FIXTURES, ROOT
from vera_tools import schema
from vera_tools.dtypes import FLOATS, HALVES
from vera_tools.platforms import atlas
from vera_tools.platforms.streams import identify_stream
from vera_tools.projections import philox
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe

pytestmark = pytest.mark.capability

FILES = sorted((FIXTURES / "atlas").glob("*.json"))
MINORS = ["1.13", *(f"2.{minor}" for minor in range(16))]


@functools.cache
def reference(name: str, draw, dtype: str) -> dict[str, str]:
    return digests(Recipe.parse(name, prng_key=draw.prng_key), draw.shape, stored_dtype=dtype)


def expected(release: str, capability: str, machine: str, dtype: str) -> set[str]:
    """The streams that a build may have, from its release and kernels alone."""
    short = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}[dtype]
    half = ""
    if dtype in HALVES:
        half = "-opmath" if tuple(map(int, release.split(".")[:2])) >= (2, 12) else "-scalar"
    rounding = "separate" if (machine, capability) == ("x86_64", "default") else "fused"
    return {f"mt19937-{short}{half}-{rounding}"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_entry(file):
    document = json.loads(file.read_text("utf-8"))
    schema.validate(document, "drift.v1", where=file.name)
    entry = atlas.Entry.from_document(document, name=file.stem)
    assert [row.interpreter for row in entry.environments] == ["python"] * len(entry.environments)
    assert entry.environments[0].native
    for row in entry.environments:
        assert file.stem == f"torch-{atlas.release(row.torch)}-{row.machine}"
        assert set(row.streams) == set(FLOATS)
        for dtype, stream in row.streams.items():
            assert stream.recipe is not None
            names = {stream.recipe.name, *stream.also_matches}
            assert names & expected(atlas.release(row.torch), row.cpu_capability, row.machine, dtype)
            for draw, drawn in zip(entry.draws, stream.digests, strict=True):
                assert all(reference(name, draw, dtype) == drawn for name in names)


def test_it_holds_a_build_of_every_minor_release():
    releases = {(row.machine, atlas.release(row.torch)) for entry in atlas.entries() for row in entry.environments}
    for machine in ("x86_64", "aarch64"):
        assert {release.rsplit(".", 1)[0] for kind, release in releases if kind == machine} == set(MINORS)
    assert len(atlas.entries()) == len(FILES)


def test_the_half_types_changed_in_2_12_and_float32_never():
    rows = {entry.name: entry.environments[0] for entry in atlas.entries()}
    old, new = rows["torch-2.11.0-x86_64"], rows["torch-2.12.1-x86_64"]
    changed = {dtype for dtype in FLOATS if old.streams[dtype].digests != new.streams[dtype].digests}
    assert changed == {"bfloat16", "float16"}
    assert len({json.dumps(row.streams["float32"].digests) for row in rows.values()}) == 1


def test_look_up():
    entry = next(entry for entry in atlas.entries() if entry.name == "torch-2.12.1-x86_64")
    row, draws = entry.environments[0], entry.draws
    assert atlas.look_up(row, draws) == {"entry": entry.name, "agrees": True}
    assert atlas.look_up(row, draws[:1]) == {"entry": entry.name, "agrees": True}
    local = dataclasses.replace(row, torch="2.12.1+cpu")
    assert atlas.look_up(local, draws) == {"entry": entry.name, "agrees": True}
    other = dataclasses.replace(row, streams={**row.streams, "float32": row.streams["float64"]})
    assert atlas.look_up(other, draws) == {"entry": entry.name, "agrees": False}
    for change in ({"torch": "2.12.77"}, {"machine": "riscv64"}, {"cpu_capability": "vsx"}, {"device": "cuda"}):
        assert atlas.look_up(dataclasses.replace(row, **change), draws) is None


def test_look_up_tells_windows_from_linux():
    linux = next(entry for entry in atlas.entries() if entry.name == "torch-2.12.1-x86_64")
    row = linux.environments[0]
    here = dataclasses.replace(row, system="Windows", machine="AMD64")
    assert atlas.look_up(here, linux.draws) == {"entry": "torch-2.12.1-windows-x86_64-drawn", "agrees": False}
    (windows,) = [one for one in atlas.platform_entries() if one.name == "torch-2.12.1-windows-x86_64-drawn"]
    for row in windows.environments:
        assert row.platform == "windows-x86_64"
        assert atlas.look_up(row, windows.draws) == {"entry": windows.name, "agrees": True}
        as_linux = dataclasses.replace(row, system="Linux")
        agrees = row.cpu_capability == "default"
        assert atlas.look_up(as_linux, windows.draws) == {"entry": linux.name, "agrees": agrees}
    assert atlas.look_up(dataclasses.replace(here, system="Darwin"), linux.draws) is None


DEVICES = sorted((FIXTURES / "atlas" / "devices").glob("*.json"))


@pytest.mark.parametrize("file", DEVICES, ids=lambda file: file.stem)
def test_what_a_device_drew_is_what_the_reference_for_cuda_gives(file):
    """The card itself drew this: `philox` computes it from the number of the card's threads alone."""
    document = json.loads(file.read_text("utf-8"))
    schema.validate(document, "drift.v1", where=file.name)
    entry = atlas.Entry.from_document(document, name=file.stem)
    (row,) = entry.environments
    assert file.stem == f"torch-{atlas.release(row.torch)}-{re.sub(r'[^a-z0-9]+', '-', row.device_name.lower())}"
    assert (row.device, row.exact, set(row.streams)) == ("cuda", False, set(FLOATS))
    for dtype, stream in row.streams.items():
        drawn = [dict(pair) for pair in stream.digests]
        for enough, multiprocessors in (
            (True, 132),
            (False, 127),
        ):  # fewer than 128 would draw the larger pair in turns
            made = identify_stream(dtype, drawn, entry.draws, threads=[multiprocessors, 2048])
            assert (made.label == stream.label == f"{philox.NAME}, 132 multiprocessors of 2048 threads") is enough


def test_look_up_of_a_device():
    entry = atlas.device_entries()[0]
    row, draws = entry.environments[0], entry.draws
    assert atlas.look_up(row, draws) == {"entry": entry.name, "agrees": True}
    second = dataclasses.replace(row, device="cuda:1", cpu_capability="avx2", cpu_model="another")
    assert atlas.look_up(second, draws) == {"entry": entry.name, "agrees": True}
    other = dataclasses.replace(row, streams={**row.streams, "float32": row.streams["float64"]})
    assert atlas.look_up(other, draws) == {"entry": entry.name, "agrees": False}
    for change in ({"torch": "2.12.1"}, {"device_name": "another"}, {"device": "cpu"}, {"device": "xpu"}):
        assert (atlas.look_up(dataclasses.replace(row, **change), draws) or {}).get("entry") != entry.name


def test_it_ships_with_the_package():
    tomllib = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"]["fixtures/atlas"] == "vera_tools/fixtures/atlas"
