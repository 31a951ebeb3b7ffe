"""What each platform draws: every entry against its schema, the reference generator, and what it says of itself."""

from __future__ import annotations

import functools
import json

import pytest

from tests import FIXTURES
from vera_tools import schema
from vera_tools.dtypes import FLOATS
from vera_tools.platforms import atlas
from vera_tools.platforms.streams import Draw
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe

FILES = sorted((FIXTURES / "atlas" / "platforms").glob("*.json"))
DOCUMENTS = {file.stem: json.loads(file.read_text("utf-8")) for file in FILES}
ROWS = [
    (document["torch"], entry, document)
    for document in DOCUMENTS.values()
    for entry in document["entries"]
]  # fmt: skip
MINORS = ["1.13", *(f"2.{minor}" for minor in range(16))]
KNOWN = Draw(42, 64, 1024, 768)
#: The beginnings of its float32 digests, as drawn on Windows and on Linux with AVX2.
SEPARATE = {"vera_A": "72be60701a67f55e", "vera_B": "2622464eca2b5400"}
FUSED = {"vera_A": "bc97dc3b9d3e7b29", "vera_B": "f7424db4ef38793a"}
FMA = ("vfm", "vfnm", "fmadd", "fmsub", "fnmadd", "fnmsub")


@functools.cache
def reference(name: str, draw: Draw, dtype: str) -> dict[str, str]:
    return digests(Recipe.parse(name, prng_key=draw.prng_key), draw.shape, stored_dtype=dtype)


def minor(release: str) -> str:
    return release.rsplit(".", 1)[0]


def number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def roundings(platform: str, evidence: str | None = None) -> dict[str, set[str]]:
    """Each minor release's roundings on a platform."""
    found: dict[str, set[str]] = {}
    for torch, entry, _ in ROWS:
        if entry["platform"] == platform and evidence in (None, entry["evidence"]):
            found.setdefault(minor(torch), set()).add(entry["rounding"])
    return found


@pytest.mark.parametrize("name", DOCUMENTS)
def test_file(name):
    document = DOCUMENTS[name]
    schema.validate(document, "platform.v1", where=name)
    platforms = {entry["platform"].removesuffix("-without-avx2") for entry in document["entries"]}
    evidence = {entry["evidence"] for entry in document["entries"]}
    assert len(platforms) == len(evidence) == 1
    assert name == f"torch-{document['torch']}-{platforms.pop()}-{evidence.pop().replace(' ', '-')}"
    assert document["wheel"]["file"].startswith(f"torch-{document['torch']}-")
    capabilities = [entry["capability"] for entry in document["entries"]]
    assert len(set(capabilities)) == len(capabilities)


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith("-drawn")])
def test_drawn_entries_are_what_the_reference_draws(name):
    document = DOCUMENTS[name]
    assert Draw(**document["pair"]) == KNOWN
    report = atlas.Entry.from_document(document["report"], name=name)
    assert [row.cpu_capability for row in report.environments] == [row["capability"] for row in document["entries"]]
    for row, entry in zip(report.environments, document["entries"], strict=True):
        assert atlas.release(row.torch) == document["torch"]
        assert (row.system, row.machine) == ("Windows", "AMD64")
        assert set(row.streams) == set(entry["digests"]) == set(FLOATS)
        assert row.streams["float32"].recipe.rounding == entry["rounding"]
        for dtype, stream in row.streams.items():
            for recipe in (stream.recipe.name, *stream.also_matches):
                assert reference(recipe, KNOWN, dtype) == entry["digests"][dtype]
                for draw, drawn in zip(report.draws, stream.digests, strict=True):
                    assert reference(recipe, draw, dtype) == drawn


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name.endswith("-machine-code")])
def test_the_instructions_say_what_the_entry_says(name):
    for entry in DOCUMENTS[name]["entries"]:
        names = [instruction.split()[0] for instruction in entry["instructions"]]
        assert "0xffffff" in entry["instructions"][0]
        if entry["rounding"] == "fused":
            assert names[-1].startswith(FMA)
        else:
            assert not any(one.startswith(FMA) for one in names)
            assert [one.lstrip("v")[-5:] for one in names[-2:]] in (["mulss", "addss"], ["fmul", "fadd"])
        assert entry["capability"].upper() in entry["symbol"]
        assert "uniform_stub" in entry["symbol"]


def test_windows_never_fuses():
    assert {key: {"separate"} for key in MINORS} == roundings("windows-x86_64", "drawn")
    assert {key: {"separate"} for key in MINORS} == roundings("windows-x86_64", "machine code")
    for _, entry, document in ROWS:
        if entry["evidence"] == "drawn":
            assert {row["capability"] for row in document["entries"]} == {"default", "avx2", "avx512"}
            assert {tensor: text[:16] for tensor, text in entry["digests"]["float32"].items()} == SEPARATE


def test_known_answers_of_the_reference():
    for rounding, known in (("separate", SEPARATE), ("fused", FUSED)):
        found = reference(f"mt19937-f32-{rounding}", KNOWN, "float32")
        assert {tensor: text[:16] for tensor, text in found.items()} == known


def test_macos_on_arm64_changed_with_the_compiler_of_2_2():
    found = roundings("macos-arm64")
    assert found == {key: {"separate"} if number(key) < (2, 2) else {"fused"} for key in MINORS}
    compilers = {
        document["torch"]: document["compiler"] for _, entry, document in ROWS if entry["platform"] == "macos-arm64"
    }
    assert compilers["2.1.2"].startswith("Xcode_13.3.1; macOS SDK 12.3, ")
    assert compilers["2.2.0"].startswith("Xcode_14.3.1; macOS SDK 13.3, ")


def test_macos_on_x86_never_fused():
    assert roundings("macos-x86_64") == {key: {"separate"} for key in ("1.13", "2.0", "2.1", "2.2")}
    assert {entry["capability"] for _, entry, _ in ROWS if entry["platform"] == "macos-x86_64"} == {"default", "avx2"}


def test_the_scan_says_of_linux_builds_what_they_are_known_to_draw():
    drawn = {
        (atlas.release(row.torch), row.machine, row.cpu_capability): row.streams["float32"].recipe.rounding
        for entry in atlas.entries()
        for row in entry.environments
    }
    compared = set()
    for torch, entry, _ in ROWS:
        if entry["platform"].startswith("linux"):
            machine = entry["platform"].removeprefix("linux-").removesuffix("-without-avx2")
            build = torch, machine, entry["capability"]
            if entry["capability"].startswith("sve"):  # nothing that was drawn with had such a CPU
                assert entry["rounding"] == "fused"
                continue
            assert drawn[build] == entry["rounding"]
            compared.add((machine, entry["capability"], entry["rounding"]))
    assert {("x86_64", "default", "separate"), ("x86_64", "avx2", "fused"), ("aarch64", "default", "fused")} <= compared
