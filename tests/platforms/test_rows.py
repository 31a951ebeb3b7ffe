"""The platforms of the loader table: each with each torch, how it is known, and which of them a machine is."""

from __future__ import annotations

import pytest

from tests import ROOT
from vera_tools import installed, schema
from vera_tools.platforms import machine, rows
from vera_tools.platforms.environment import describe
from vera_tools.platforms.names import PLATFORMS, platform_of
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe

MINORS = ["1.13", *(f"2.{minor}" for minor in range(16))]
EARLY = ["1.13", "2.0", "2.1"]
#: Platform: minor release to rounding.
KNOWN = {
    "linux-x86_64": dict.fromkeys(MINORS, "fused"),
    "linux-x86_64-without-avx2": dict.fromkeys(MINORS, "separate"),
    "linux-aarch64": dict.fromkeys(MINORS, "fused"),
    "windows-x86_64": dict.fromkeys(MINORS, "separate"),
    "macos-arm64": {minor: "separate" if minor in EARLY else "fused" for minor in MINORS},
    "macos-x86_64": dict.fromkeys([*EARLY, "2.2"], "separate"),
}
READ = ("macos-arm64", "macos-x86_64")


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("minor", MINORS)
def test_each_platform_with_each_torch(platform, minor):
    for torch in (f"{minor}.0", f"{minor}.1+cpu"):
        span = rows.drawn_by(platform, torch)
        assert (span.rounding if span else None) == KNOWN[platform].get(minor)
        if span:
            assert span.evidence == ("machine code" if platform in READ else "drawn")


def test_what_nobody_looked_at_is_not_known():
    for platform, torch in (
        ("linux-x86_64", "2.99.0"),
        ("macos-x86_64", "2.3.0"),
        ("linux-x86_64", None),
        (None, "2.9"),
    ):
        assert rows.drawn_by(platform, torch) is None


def test_the_rows_as_reports_have_them():
    assert rows.to_document() == {
        "fused": [
            {"platform": "linux-x86_64", "torch": "1.13 to 2.15", "evidence": "drawn"},
            {"platform": "linux-aarch64", "torch": "1.13 to 2.15", "evidence": "drawn"},
            {"platform": "macos-arm64", "torch": "2.2 to 2.15", "evidence": "machine code"},
        ],
        "separate": [
            {"platform": "windows-x86_64", "torch": "1.13 to 2.15", "evidence": "drawn"},
            {"platform": "macos-arm64", "torch": "1.13 to 2.1", "evidence": "machine code"},
            {"platform": "macos-x86_64", "torch": "1.13 to 2.2", "evidence": "machine code"},
            {"platform": "linux-x86_64-without-avx2", "torch": "1.13 to 2.15", "evidence": "drawn"},
        ],
    }


def test_the_names_that_people_know():
    assert rows.places("fused") == ("Linux", "Apple silicon (torch >=2.2)")
    assert rows.places("separate") == ("Windows", "Apple silicon (torch <2.2)", "Intel Mac", "Linux without AVX2")
    assert rows.caveat() == "Apple silicon and Intel Mac: read from the builds' machine code, not run"
    assert "macos-arm64 torch 2.2 to 2.15 (machine code)" in rows.citation("fused")
    assert rows.citation("separate").startswith("windows-x86_64 torch 1.13 to 2.15 (drawn), ")


def test_the_known_answer_of_windows_is_what_separate_gives():
    pair = PairShape(64, 1024, 768)
    for name, a, b in (
        ("windows-x86_64", "72be60701a67f55e", "2622464eca2b5400"),
        ("linux-x86_64", "bc97dc3b9d3e7b29", "f7424db4ef38793a"),
    ):
        found = digests(Recipe(prng_key=42, rounding=rows.drawn_by(name, "2.13.0").rounding), pair)
        assert (found["vera_A"][:16], found["vera_B"][:16]) == (a, b)


@pytest.mark.parametrize(
    ("system", "name", "capability", "platform"),
    [
        ("Linux", "x86_64", "avx2", "linux-x86_64"),
        ("Linux", "x86_64", "avx512", "linux-x86_64"),
        ("Linux", "x86_64", "default", "linux-x86_64-without-avx2"),
        ("Linux", "x86_64", None, None),
        ("Linux", "aarch64", "sve256", "linux-aarch64"),
        ("Linux", "aarch64", None, "linux-aarch64"),
        ("Windows", "AMD64", "avx2", "windows-x86_64"),
        ("Windows", "AMD64", None, "windows-x86_64"),
        ("Windows", "ARM64", None, None),
        ("Darwin", "arm64", None, "macos-arm64"),
        ("Darwin", "x86_64", None, "macos-x86_64"),
        ("Linux", "riscv64", "default", None),
        (None, None, None, None),
    ],
)
def test_which_platform_a_machine_is(system, name, capability, platform):
    assert platform_of(system, name, capability) == platform


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """This machine, made another."""
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)

    def pretended(system, name, *, cpuinfo="", vectors="", torch=None):
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        (tmp_path / "vectors").write_text(vectors)
        monkeypatch.setattr("platform.system", lambda: system)
        monkeypatch.setattr("platform.machine", lambda: name)
        monkeypatch.setattr(machine, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(machine, "_VECTOR_LENGTH", tmp_path / "vectors")
        monkeypatch.setattr(installed, "version", lambda distribution: torch if distribution == "torch" else None)

    return pretended


@pytest.mark.parametrize(
    ("name", "cpuinfo", "vectors", "capability"),
    [
        ("x86_64", "flags\t\t: fpu sse2 fma avx2\n", "", "avx2"),
        ("x86_64", "flags\t\t: fpu sse2 avx2\n", "", "default"),  # ATen asks for FMA as well
        ("x86_64", "flags : fma avx2 avx512f avx512dq avx512bw avx512vl\n", "", "avx512"),
        ("x86_64", "flags : fma avx2 avx512f\n", "", "avx2"),
        ("x86_64", "flags : fpu sse2\nflags : fma avx2\n", "", "default"),
        ("x86_64", "", "", None),
        ("aarch64", "Features : fp asimd\n", "32\n", "default"),
        ("aarch64", "Features : fp asimd sve\n", "32\n", "sve256"),
    ],
)
def test_kernels_as_the_cpu_has_them(pretend, name, cpuinfo, vectors, capability):
    pretend("Linux", name, cpuinfo=cpuinfo, vectors=vectors)
    assert machine.cpu_capability() == machine.Capability(capability, "cpu")


def test_kernels_as_the_environment_asks(pretend, monkeypatch):
    pretend("Linux", "x86_64", cpuinfo="flags : fma avx2\n")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert machine.cpu_capability() == machine.Capability("default", "ATEN_CPU_CAPABILITY")
    assert machine.this_platform() == "linux-x86_64-without-avx2"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "nonsense")  # torch takes no notice of it either
    assert machine.cpu_capability() == machine.Capability("avx2", "cpu")


@pytest.mark.parametrize(
    ("system", "name", "cpuinfo", "torch", "platform", "recipe", "evidence"),
    [
        ("Linux", "x86_64", "flags : fma avx2", "2.13.0+cpu", "linux-x86_64", "mt19937-f32-fused", "drawn"),
        ("Linux", "x86_64", "flags : sse2", "2.1.2", "linux-x86_64-without-avx2", "mt19937-f32-separate", "drawn"),
        ("Linux", "aarch64", "Features : sve", "2.10.0", "linux-aarch64", "mt19937-f32-fused", "machine code"),
        ("Linux", "aarch64", "Features : fp", "2.10.0", "linux-aarch64", "mt19937-f32-fused", "drawn"),
        ("Windows", "AMD64", "", "2.13.0", "windows-x86_64", "mt19937-f32-separate", "drawn"),
        ("Darwin", "arm64", "", "2.1.2", "macos-arm64", "mt19937-f32-separate", "machine code"),
        ("Darwin", "arm64", "", "2.2.0", "macos-arm64", "mt19937-f32-fused", "machine code"),
        ("Darwin", "x86_64", "", "2.2.2", "macos-x86_64", "mt19937-f32-separate", "machine code"),
        ("Darwin", "arm64", "", None, "macos-arm64", None, None),
        ("Linux", "riscv64", "", "2.13.0", None, None, None),
    ],
)
def test_env(pretend, system, name, cpuinfo, torch, platform, recipe, evidence):
    pretend(system, name, cpuinfo=cpuinfo, vectors="32", torch=torch)
    report = describe()
    document = report.to_dict()
    schema.validate(document, "env.v1", where="env")
    assert (report.platform, report.recipe, report.evidence) == (platform, recipe, evidence)
    assert (document["draws"] or {}).get("recipe") == recipe
    assert {row["platform"] for row in document["known"]} == ({platform} if platform else set())
    assert len(document["known"]) == (2 if platform == "macos-arm64" else 1 if platform else 0)


def test_no_sentence_promises_what_holds_on_linux_alone():
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "vera_tools").rglob("*.py")]
    assert len(files) > 100
    for file in files:
        words = " ".join(file.read_text("utf-8").split())
        assert "almost every machine" not in words, file
        if file.name != "CHANGELOG.md" and "platforms" not in file.parts:
            assert "fused rounding" not in words, file
            assert "separate rounding" not in words, file
