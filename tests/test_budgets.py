"""The budget of docs/security.md: no checkpoint takes more than 2 seconds and 300 MB beyond what its own tensors need.

Each file is verified in a process of its own, whose processor time and peak of memory are held against several times
the budget: what these tests find is growth without bounds, not a slow machine.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fuzz import oracle, targets
from tests import ROOT
from tests.adapters import CONFIG, MANIFEST, PAIR, WEIGHTS
from tests.command import VERA_TOOLS, run_cli
from vera_tools import record, strip_projections
from vera_tools.checkpoints import config, expressions, manifest, resolution
from vera_tools.drifting import comparison
from vera_tools.errors import FormatError
from vera_tools.files import local, safetensors
from vera_tools.hub import push
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying import log
from vera_tools.verifying.verifier import Verifier

#: The budget, and how far above it a machine that does much else may seem to be.
SECONDS, MEGABYTES, MARGIN = 2.0, 300.0, 3.0
#: What each tensor may take of its own: seconds, and bytes of memory.
EACH_SECONDS, EACH_BYTES = 50e-6, 3000


class Cost(NamedTuple):
    seconds: float
    megabytes: float
    code: int
    said: str


# Between this process and the one that is measured, whose peak would begin with what the first one holds.
_MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss, done.returncode, done.stdout.decode()]))
"""


def cost(*arguments: object) -> Cost:
    """What a command takes in a process of its own, with all that it starts."""
    command = [sys.executable, "-c", _MEASURE, *VERA_TOOLS, *map(str, arguments)]
    seconds, peak, code, said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return Cost(seconds, peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), code, said)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def weights(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def many(tensors: int, *, r: int = 2, **config: object) -> dict[str, bytes]:
    """A sound adapter of so many tensors."""
    pair = dict(zip(PAIR, generate(Recipe(prng_key=7), PairShape(r, 6, 8)), strict=True))
    for number in range((tensors - 2) // 2):
        module = f"base_model.model.model.layers.{number // 7}.self_attn.q{number % 7}_proj"
        pair[f"{module}.vera_lambda_b"] = np.ones(8, np.float32)
        pair[f"{module}.vera_lambda_d"] = np.ones(r, np.float32)
    targeted = [f"q{n}_proj" for n in range(7)]
    written = {"peft_type": "VERA", "r": r, "projection_prng_key": 7, "target_modules": targeted}
    return {CONFIG: json.dumps({**written, **config}).encode(), WEIGHTS: targets.file(pair, {"format": "pt"})}


def with_config(**values: object) -> dict[str, bytes]:
    return {**targets.adapter(), CONFIG: json.dumps({**json.loads(targets.adapter()[CONFIG]), **values}).encode()}


def claiming(*, r: int, in_max: int) -> dict[str, bytes]:
    """A sound seed-only adapter of this rank, whose manifest claims a wider pair than it was trained with."""
    with oracle.folder({}) as place:
        folder = put(place / "a", many(200, r=r))
        record(folder)
        strip_projections(folder, in_place=True)
        document = json.loads((folder / MANIFEST).read_bytes()) | {"in_max": in_max}
        document["projections"]["vera_A"]["shape"] = [r, in_max]
        del document["digest"]
        (folder / MANIFEST).write_text(json.dumps(document))
        return targets.files_of(folder)


def one_entry(name: str, shape: list[int]) -> bytes:
    document = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    return weights(json.dumps(document).encode(), bytes(4))


def empty_tensors(count: int, *, bytes_each: int) -> bytes:
    """A header of so many tensors without any element, each with a name that fills it up."""
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    room = bytes_each - len(entry)
    return weights(("{" + ",".join(entry.format(f"{n:0{room}}") for n in range(count)) + "}").encode())


#: A file of each kind, what is said of it (None: it is verified as every other), and how many tensors it has.
KINDS = {
    "20,000 tensors": (lambda: many(20_000), None, 20_000),
    "100,000 tensors": (lambda: many(100_000), None, 100_000),
    "600,000 tensors": (
        lambda: {**targets.adapter(), WEIGHTS: empty_tensors(600_000, bytes_each=80)},
        "the header has too many tensors (expected at most 500,000, found 600,000)",
        0,
    ),
    "80 MB of header for a hundred tensors": (
        lambda: {**targets.adapter(), WEIGHTS: empty_tensors(100, bytes_each=800_000)},
        "the header has too many bytes (expected at most 16,879,616 for 100 tensors",
        0,
    ),
    "16 MB of empty lists in a header": (
        lambda: {**targets.adapter(), WEIGHTS: weights(b'{"x":[' + b"[]," * 5_000_000 + b"[]]}")},
        "the header has too many values (expected at most 1,000,000 for 0 tensors",
        0,
    ),
    "a million dimensions": (
        lambda: {**targets.adapter(), WEIGHTS: one_entry("base_model.vera_A", [1] * 900_000)},
        "too many dimensions (expected at most 64, found 900,000)",
        0,
    ),
    "a name of 100,000 dots": (
        lambda: {**targets.adapter(), WEIGHTS: one_entry("base_model.model." + "." * 100_000, [1])},
        "the name of a tensor is too long (expected at most 4,096 characters",
        0,
    ),
    "names of 4,000 dots and 5,000 modules to save": (
        lambda: with_config(modules_to_save=[f"{'.' * (n % 50)}m{n}" for n in range(900)])
        | {WEIGHTS: one_entry("base_model.model." + "." * 4000 + "weight", [1])},
        "",
        0,
    ),
    "5,000 modules to save in 5,000 layers": (
        lambda: many(10_000, modules_to_save=[f"model.m{n}.x" for n in range(5000)]),
        "modules_to_save names model.m0.x",
        10_000,
    ),
    "a thousand expressions that have no end": (
        lambda: many(200, modules_to_save=[f"(.*.*)*x{n}" for n in range(999)]),
        "the regular expression takes too long (expected an answer within 1 s for all names together",
        0,
    ),
    "a thousand expressions in 5,000 layers": (
        lambda: many(10_000, modules_to_save=[f"x{n}.*y" for n in range(999)]),
        "too many expressions for so many modules (expected at most 1,000,000 of one with the other",
        10_000,
    ),
    "5,000 expressions": (
        lambda: with_config(modules_to_save=[f"m{n}+" for n in range(5000)]),
        "too many regular expressions (expected at most 1,000, found 5,000)",
        0,
    ),
    "an expression that takes a minute to compile": (
        lambda: with_config(target_modules="(?i)" + "[\u0100-\uffff]" * 8000),
        "the regular expression takes too long",
        0,
    ),
    "4 MB of empty lists in a config": (lambda: with_config(x=[[]] * 1_000_000), None, 0),
    "5 MB of config": (lambda: with_config(x="x" * 5_000_000), "too large for what it is", 0),
    "100,000 numbers in modules_to_save": (
        lambda: with_config(modules_to_save=[*["x"] * 100_000, 5]),
        "modules_to_save.100000: has a wrong value (expected a string, found 5)",
        0,
    ),
    "a claim of 4 GiB": (
        lambda: claiming(r=64, in_max=1 << 24),
        "not regenerated: no adapter has projections of this size (expected at most 536870912 bytes",
        0,
    ),
    "20 MB of manifest": (
        lambda: {**targets.adapter(), MANIFEST: b"[" + b"[]," * 7_000_000 + b"[]]"},
        "too large for what it is",
        0,
    ),
    "4 MB of empty lists in a manifest": (
        lambda: {**targets.adapter(), MANIFEST: b"[" + b"[]," * 1_380_000 + b"[]]"},
        "vera_manifest.json: has a wrong value",
        0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """What a sound adapter takes, most of which is Python itself."""
    return cost("verify", put(tmp_path_factory.mktemp("usual") / "a", targets.adapter()))


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="says what a process took")
@pytest.mark.parametrize(("files", "said", "tensors"), KINDS.values(), ids=KINDS)
def test_no_checkpoint_takes_more(files, said, tensors, usual, tmp_path):
    found = cost("verify", put(tmp_path / "a", files()))
    print(f"{found.seconds - usual.seconds:.2f} s, {found.megabytes - usual.megabytes:.0f} MB beyond the usual")
    if said is None:
        assert found.code == 0, found.said
    else:
        assert said in found.said
        assert found.code in (1, 4)
    assert found.seconds - usual.seconds < MARGIN * (SECONDS + tensors * EACH_SECONDS)
    assert found.megabytes - usual.megabytes < 1.3 * (MEGABYTES + tensors * EACH_BYTES / 1e6)


def test_the_page_tells_of_the_limits_of_the_code():
    page = (ROOT / "docs" / "security.md").read_text("utf-8")
    for row in (
        f"| tensors in a file | {safetensors.MAX_TENSORS:,} |",
        f"| {safetensors.HEADER_ROOM >> 20} MiB, and {safetensors.TENSOR_ROOM >> 10} KiB for each tensor; "
        f"{safetensors.MAX_HEADER:,} bytes |",
        f"| {safetensors.MAX_VALUES:,}, and {safetensors.MAX_DIMENSIONS + 8} for each tensor |",
        f"| characters of a tensor's name | {safetensors.MAX_NAME:,} |",
        f"| dimensions of a tensor | {safetensors.MAX_DIMENSIONS} |",
        f"| adapter_config.json | {config.MOST_BYTES >> 20} MiB |",
        f"| {expressions.MOST:,}, of {expressions.MOST_CHARACTERS:,} characters together |",
        f"| such expressions times modules | {expressions.MOST_TRIES:,} |",
        f"| time of a processor for all of them | {expressions.LIMIT:g} second |",
        f"| manifest | {manifest.MOST_BYTES >> 20} MiB, and "
        f"{manifest.most_bytes(1) - manifest.MOST_BYTES} bytes for each byte of the header |",
        f"| {resolution.MOST_CLAIMED >> 20} MiB, or {resolution.CLAIMED_TIMES} times the file |",
        f"| line of a log | {log._LONGEST_LINE >> 20} MiB |",
        f"| saved report of `drift` | {comparison.MOST_BYTES >> 20} MiB |",
    ):
        assert row in page, row


def calls(work: Callable[[], object]) -> int:
    """How many functions are called: work that no other process can make seem more."""
    profile = cProfile.Profile()
    profile.enable()
    work()
    profile.disable()
    return pstats.Stats(profile).total_calls


def test_work_grows_with_the_tensors_and_no_faster(tmp_path):
    names = [f"head{n}" for n in range(300)]

    def work(tensors):
        folder = put(tmp_path / str(tensors), many(tensors, bias="all", modules_to_save=names))
        return calls(lambda: Verifier().verify(str(folder)))

    _, some, more = map(work, (10, 1000, 3000))  # what is done once is done with the first
    assert more < 3.3 * some
    assert Verifier().verify(str(tmp_path / "3000")).verdict == "reproducible"


#: What reads or writes a checkpoint, given a stored one with its manifest, a seed-only one, a base and an output.
COMMANDS = {
    "verify": ["verify", "{stored}"],
    "verify with a base": ["verify", "{stored}", "--base", "{base}"],
    "inspect": ["inspect", "{stored}"],
    "record": ["record", "{stored}"],
    "record with a base": ["record", "{stored}", "--base", "{base}"],
    "strip": ["strip-projections", "{stored}", "-o", "{out}"],
    "embed": ["embed-projections", "{seed_only}", "-o", "{out}"],
    "convert": ["convert", "{stored}", "--to", "lora", "--base", "{base}", "-o", "{out}"],
    "diff": ["diff", "{stored}", "{seed_only}"],
    "merge": ["merge", "{stored}", "--base", "{base}", "-o", "{out}"],
}


class Places(NamedTuple):
    stored: Path
    seed_only: Path
    base: Path
    out: Path


def places(folder: Path, tensors: int) -> Places:
    """An adapter of so many tensors, with its pair and without, and its base, of no known class."""
    folder.mkdir()
    stored = put(folder / "stored", many(tensors))
    record(stored)
    strip_projections(stored, folder / "seed-only")
    weights = {
        f"model.layers.{n // 7}.self_attn.q{n % 7}_proj.weight": np.ones((8, 6), np.float32)
        for n in range((tensors - 2) // 2)
    }
    base = put(folder / "base", {"config.json": b"{}", "model.safetensors": targets.file(weights, {"format": "pt"})})
    return Places(stored, folder / "seed-only", base, folder / "out")


@pytest.fixture(scope="module")
def few_some_and_more(tmp_path_factory):
    root = tmp_path_factory.mktemp("growth")
    return [places(root / str(tensors), tensors) for tensors in (10, 300, 900)]


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"merge"}))  # which asks transformers about the base
def test_the_work_of_each_command_grows_with_the_tensors_and_no_faster(command, few_some_and_more, tmp_path):
    def work(number):
        at = few_some_and_more[number]._replace(out=tmp_path / str(number))
        return calls(lambda: run_cli(*(part.format(**at._asdict()) for part in COMMANDS[command])))

    _, some, more = map(work, range(3))
    assert more < 3.3 * some


#: What each tensor may take, of the adapter and of the base together, where something is written: seconds and bytes.
EACH_WRITTEN_SECONDS, EACH_WRITTEN_BYTES = 200e-6, 8000


@pytest.fixture(scope="module")
def many_and_more(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    return {tensors: places(root / str(tensors), tensors) for tensors in (10, 10_000, 100_000)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="says what a process took")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hundred_thousand_tensors_take_ten_times_as_long_as_ten_thousand(command, many_and_more, tmp_path):
    """Also where the work is done within one call, which no count of calls shows."""

    def work(tensors):
        at = many_and_more[tensors]._replace(out=tmp_path / str(tensors))
        found = cost(*(part.format(**at._asdict()) for part in COMMANDS[command]))
        assert found.code == (1 if command == "diff" else 0), found.said
        return found

    few, some, more = map(work, many_and_more)
    print(f"{more.seconds - few.seconds:.1f} s, {more.megabytes - few.megabytes:.0f} MB beyond few tensors")
    assert more.seconds - few.seconds < 2 * 10 * (some.seconds - few.seconds)
    assert more.seconds - few.seconds < MARGIN * (SECONDS + 100_000 * EACH_WRITTEN_SECONDS)
    assert more.megabytes - few.megabytes < MEGABYTES + 100_000 * EACH_WRITTEN_BYTES / 1e6


def test_a_card_that_is_too_large_is_not_copied(tmp_path):
    folder = put(tmp_path / "a", targets.adapter())
    with (folder / "README.md").open("wb") as stream:
        stream.truncate(3 << 30)  # which takes no room
    with pytest.raises(FormatError, match=r"README\.md: too large for what it is \(expected at most 16777216 bytes"):
        push._copy(folder, tmp_path / "staged", ())
    with pytest.raises(FormatError, match="too large for what it is"):
        local.read_text(local.LocalFolder(folder), "README.md")


def test_a_manifest_may_grow_with_the_tensors_that_it_is_of(tmp_path, monkeypatch):
    """`record` wrote manifests that `verify` then called too large."""
    monkeypatch.setattr(manifest, "MOST_BYTES", 4000)
    folder = put(tmp_path / "a", many(400))
    record(folder)
    assert (folder / MANIFEST).stat().st_size > 20 * 4000
    report = Verifier().verify(str(folder))
    assert (report.verdict, report.ok) == ("reproducible", True)
