"""The program that reads machine code, on libraries whose answer is known, and on code written out here."""

from __future__ import annotations

import platform
import shutil
import struct
import subprocess
import sys

import pytest

from tests import FIXTURES

pytest.importorskip("capstone")

FOLDER = FIXTURES / "platforms"
SAMPLES = sorted(path for path in (FOLDER / "samples").iterdir() if path.suffix in (".so", ".dll", ".dylib"))
SLOT = "_ZN2at6native12DispatchStubIPFvRNS_18TensorIteratorBaseEddENS0_12uniform_stubEE7DEFAULTE"

# A64: what the builds of macOS hold.
MASK = 0x12005C08  # and w8, w0, #0xffffff
CONVERT = 0x1E230102  # ucvtf s2, w8
SCALE = 0x1E230842  # fmul s2, s2, s3
MULTIPLY = 0x1E210841  # fmul s1, s2, s1
ADD = 0x1E212800  # fadd s0, s0, s1
FUSED = 0x1F010040  # fmadd s0, s2, s1, s0
STORE = 0xBD000020  # str s0, [x1]
OVERWRITE = 0x1E2040A2  # fmov s2, s5
ADD_TO_SCALED = 0x1E222800  # fadd s0, s0, s2
STORE_SCALED = 0xBD000022  # str s2, [x1]
COMPARE = 0x1E202048  # fcmp s2, #0.0
SKIP = 0x14000002  # b #8
RETURN = 0xD65F03C0


@pytest.fixture(scope="module")
def programs():
    """The modules scan and images, which stand beside their data."""
    sys.path.insert(0, str(FOLDER))
    try:
        import images
        import scan
    finally:
        sys.path.remove(str(FOLDER))
    return scan, images


@pytest.fixture
def scan(programs):
    return programs[0]


def image(images, *words: int):
    """A library on arm64 whose kernel is these instructions."""
    code = struct.pack(f"<{len(words)}I", *words)
    return images.Image(
        "arm64",
        parts=[(0x1000, code)],
        code=[(0x1000, 0x1000 + len(code))],
        starts=[0x1000, 0x1000 + len(code)],
        symbols={SLOT: 0x8000},
        pointers={0x8000: 0x1000},
    )


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_format_both_ways(scan, path):
    (kernel,) = scan.scan(path.read_bytes())
    assert kernel.capability == "default"
    assert kernel.rounding == path.stem.rsplit("-", 1)[1]
    assert "uniform_stub" in kernel.symbol


def test_there_are_samples_of_every_platform():
    kinds = {"linux-x86_64", "linux-aarch64", "macos-x86_64", "macos-arm64", "windows-x86_64"}
    assert {path.stem for path in SAMPLES} == {f"{kind}-{way}" for kind in kinds for way in ("fused", "separate")}


def test_instructions_written_out(programs):
    scan, images = programs
    (kernel,) = scan.kernels(image(images, MASK, CONVERT, SCALE, MULTIPLY, ADD, STORE, RETURN))
    assert kernel.rounding == "separate"
    assert [text.split()[0] for text in kernel.instructions] == ["and", "ucvtf", "fmul", "fmul", "fadd"]
    (kernel,) = scan.kernels(image(images, MASK, CONVERT, SCALE, FUSED, STORE, RETURN))
    assert kernel.rounding == "fused"
    assert kernel.instructions[-1] == "fmadd s0, s2, s1, s0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((MASK, CONVERT, SCALE, OVERWRITE, FUSED, STORE, RETURN), "nothing that draws"),
        ((MASK, CONVERT, FUSED, STORE, RETURN), "nothing that draws"),
        ((MASK, CONVERT, SCALE, ADD_TO_SCALED, STORE, RETURN), "nothing that draws"),
        ((MASK, CONVERT, SCALE, STORE_SCALED, FUSED, RETURN), "nothing that draws"),
        ((MASK, CONVERT, SCALE, COMPARE, FUSED, RETURN), "nothing that draws"),
        ((MASK, CONVERT, SCALE, RETURN, FUSED), "nothing that draws"),
        ((CONVERT, SCALE, FUSED, STORE, RETURN), "nothing that draws"),
        (
            (MASK, CONVERT, SCALE, FUSED, STORE, MASK, CONVERT, SCALE, MULTIPLY, ADD, STORE, RETURN),
            "'fused': 1, 'separate': 1",
        ),
    ],
    ids=["overwritten", "not scaled", "a sum of no product", "stored", "compared", "after the end", "no mask", "both"],
)
def test_code_that_it_does_not_judge(programs, words, message):
    scan, images = programs
    with pytest.raises(scan.ScanError, match=message):
        scan.kernels(image(images, *words))


def test_a_jump_is_followed(programs):
    scan, images = programs
    (kernel,) = scan.kernels(image(images, MASK, CONVERT, SCALE, SKIP, OVERWRITE, FUSED, STORE, RETURN))
    assert kernel.rounding == "fused"


def test_a_register_that_is_cleared_holds_the_value_no_more(programs):
    scan, images = programs
    draws = bytes.fromhex("25ffffff00 f30f2ac0 f30f59c1")  # and eax, 0xffffff; cvtsi2ss xmm0, eax; mulss xmm0, xmm1
    clears = bytes.fromhex("0f57c0")  # xorps xmm0, xmm0
    uses = bytes.fromhex("f30f59c1 f30f58c2 c3")  # mulss xmm0, xmm1; addss xmm0, xmm2; ret
    plain, cleared = image(images), image(images)
    for one, code in ((plain, draws + uses), (cleared, draws + clears + uses)):
        one.machine, one.parts, one.code = "x86-64", [(0x1000, code)], [(0x1000, 0x1000 + len(code))]
        one.starts = [0x1000, 0x1000 + len(code)]
    assert scan.kernels(plain)[0].rounding == "separate"
    with pytest.raises(scan.ScanError, match="nothing that draws"):
        scan.kernels(cleared)


REACHED_AT = 0x1010
WAYS = {
    "call": (0x94000004,),  # bl #0x10
    "address": (0x10000080,),  # adr x0, #0x10
    "page and offset": (0x90000000, 0x91004000),  # adrp x0, #0; add x0, x0, #0x10
    "pointer": (0x90000000, 0xF9408000),  # adrp x0, #0; ldr x0, [x0, #0x100]
    "stub": (0x94000008,),  # bl #0x20
}


@pytest.mark.parametrize("label", [None, "a_uniform_loop", "other"])
@pytest.mark.parametrize("way", WAYS)
def test_functions_that_the_kernel_reaches(programs, way, label):
    scan, images = programs
    root = (*WAYS[way], *[RETURN] * (4 - len(WAYS[way])))
    one = image(images, *root, MASK, CONVERT, SCALE, FUSED, STORE, RETURN)
    one.starts.insert(1, REACHED_AT)
    one.pointers[0x1100] = REACHED_AT
    one.stubs[0x1020] = REACHED_AT
    one.labels = {} if label is None else {REACHED_AT: label}
    if label == "other":
        with pytest.raises(scan.ScanError, match="nothing that draws"):
            scan.kernels(one)
    else:
        assert scan.kernels(one)[0].functions == (label or hex(REACHED_AT),)


def test_a_stub_of_the_linker_ends_where_it_jumps(programs):
    scan, images = programs
    stub = (0x90000010, 0xF9408211, 0xD61F0220)  # adrp x16, #0; ldr x17, [x16, #0x100]; br x17
    one = image(images, 0x94000002, RETURN, *stub, MASK, CONVERT, SCALE, FUSED, STORE, RETURN)  # bl #8; ret
    one.starts.insert(1, 0x1008)
    with pytest.raises(scan.ScanError, match="nothing that draws"):
        scan.kernels(one)


def test_tables_of_the_loader(programs):
    _, images = programs
    for machine in ("arm64", "x86_64"):
        one = images.load((FOLDER / "samples" / f"macos-{machine}-fused.dylib").read_bytes())
        assert {one.symbols["serial_for_each"], one.symbols["uniform_real"]} <= set(one.pointers.values())
        assert {one.symbols["serial_for_each"], one.symbols["uniform_real"]} <= set(one.stubs.values())
        assert one.executable(one.symbols["uniform_real"])
        assert not one.executable(one.symbols[SLOT])
    # "$x" and "$d", which mark code and data on arm64, are nobody's name.
    one = images.load((FOLDER / "samples" / "linux-aarch64-fused.so").read_bytes())
    assert "uniform_loop" in one.labels.values()
    assert not [label for label in one.labels.values() if label.startswith("$")]
    # A place, then bits for the words after it.
    assert list(images._relr(struct.pack("<2Q", 0x1000, 0b1101))) == [0x1000, 0x1010, 0x1018]


def test_a_library_without_the_kernel(programs):
    scan, images = programs
    empty = image(images, RETURN)
    empty.pointers = {}
    with pytest.raises(scan.ScanError, match="no kernel"):
        scan.kernels(empty)
    with pytest.raises(ValueError, match="neither ELF nor PE nor Mach-O"):
        scan.scan(b"not a library")


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="compiles for x86-64 Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize(
    ("flags", "rounding"),
    [
        (["-mavx2", "-mfma"], "fused"),
        (["-mavx2", "-mfma", "-ffp-contract=off"], "separate"),
        (["-mno-fma"], "separate"),
        (["-mavx2", "-mfma", "-DOTHER_USE"], None),
    ],
)
def test_compiled_here(scan, tmp_path, flags, rounding):
    library = tmp_path / "sample.so"
    source = FOLDER / "samples" / "sample.c"
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", *flags, "-o", library, source], check=True)
    if rounding is None:
        with pytest.raises(scan.ScanError, match="nothing that draws"):
            scan.scan(library.read_bytes())
    else:
        (kernel,) = scan.scan(library.read_bytes())
        assert kernel.rounding == rounding


def test_compilers(scan):
    assert scan.compiler((FOLDER / "samples" / "macos-arm64-fused.dylib").read_bytes()) == "macOS SDK 11.0, ld 14.0"
    assert scan.compiler(b"..\0/Applications/Xcode_14.3.1.app/Contents/\0") == "Xcode_14.3.1"
    assert scan.compiler(b"GCC: (GNU) 9.3.1\0GCC: (Debian 12.2.0-14) 12.2.0\0") == (
        "GCC: (Debian 12.2.0-14) 12.2.0; GCC: (GNU) 9.3.1"
    )
    assert scan.compiler(b"MZ") is None
