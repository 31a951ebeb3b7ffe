"""What is changed while it is read: a command ends with an error, or does what it does for one of the two states."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest

import vera_tools
from tests import swap_loop
from tests.adapters import CONFIG, MANIFEST, WEIGHTS, edit, files_of
from tests.merging.models import make_adapter, make_base
from tests.swapping import SWAPS, outcomes, write
from vera_tools.errors import FormatError, VeraToolsError, VeraToolsWarning

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")

#: One kind of change for every commit: the one that a file's number does not give away. The others in .ci/full.
each_swap = pytest.mark.parametrize(
    "swap", [pytest.param(swap, marks=pytest.mark.long if swap == "rewritten" else pytest.mark.slow) for swap in SWAPS]
)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Two adapters of the same sizes, stored and seed-only, with everything in them another; and two bases."""
    folder = tmp_path_factory.mktemp("states")
    for name, seed, dropout in (("one", 1, 0.1), ("two", 2, 0.2)):
        make_adapter(folder / name, seed=seed, config={"vera_dropout": dropout})
        vera_tools.record(folder / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VeraToolsWarning)
            vera_tools.strip_projections(folder / name, folder / f"seeds-{name}")
        make_base(folder / f"base-{name}", seed=seed, config={"vocab_size": seed})
    shutil.copytree(folder / "one", folder / "edited")

    def change(tensors):
        tensors["base_model.vera_B"][-1, -1] += 1

    edit(folder / "edited", change)
    return {path.name: files_of(path) for path in folder.iterdir()}


def result(out):
    """What lies in the output folder, which is removed."""
    try:
        return files_of(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


COMMANDS = {
    "strip": ("", lambda source, base, out: vera_tools.strip_projections(source, out)),
    "convert": ("", lambda source, base, out: vera_tools.to_lora(source, out, base=base)),
    "embed": ("seeds-", lambda source, base, out: vera_tools.embed_projections(source, out, base=base)),
    "merge": ("", lambda source, base, out: vera_tools.merge(source, base=base, output=out, jobs=1)),
    "merge seeds": ("seeds-", lambda source, base, out: vera_tools.merge(source, base=base, output=out, jobs=1)),
}


def check(found, sound, moment):
    """An error, or one of the sound ends; how many errors there were is counted by the caller."""
    if isinstance(found, VeraToolsError):
        return 1
    assert found in sound, f"a mixture, with the change before read {moment}"
    return 0


@pytest.mark.parametrize("back", [False, True], ids=["for good", "and back"])
@each_swap
@pytest.mark.parametrize("command", COMMANDS)
def test_no_mixture_of_an_adapter_is_written(states, tmp_path, command, swap, back):
    prefix, call = COMMANDS[command]
    source, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    write(base, states["base-one"])
    one, two = states[f"{prefix}one"], states[f"{prefix}two"]

    def run():
        call(source, base, out)
        return result(out)

    sound = []
    for state in (one, two):
        write(source, state)
        sound.append(run())
    assert sound[0] != sound[1]
    refused = sum(check(f, sound, n) for n, f in outcomes(source, one, two, SWAPS[swap], run, back=back))
    assert refused > 3


@each_swap
@pytest.mark.parametrize("names", [(WEIGHTS,), (CONFIG, MANIFEST)], ids=["the weights", "config and manifest"])
@pytest.mark.parametrize("command", ["strip", "convert", "merge"])
def test_part_of_an_adapter(states, tmp_path, command, names, swap):
    """Then the state after the change is itself of two adapters; it is what is there, and whole, from then on."""
    _, call = COMMANDS[command]
    source, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    write(base, states["base-one"])
    after = {name: states["two"][name] for name in names}

    def run():
        call(source, base, out)
        return result(out)

    sound = []
    for state in (states["one"], {**states["one"], **after}):
        write(source, state)
        try:
            sound.append(run())
        except VeraToolsError:
            continue
    assert sound
    assert sum(check(f, sound, n) for n, f in outcomes(source, states["one"], after, SWAPS[swap], run)) > 3


@pytest.mark.parametrize("back", [False, True], ids=["for good", "and back"])
@each_swap
@pytest.mark.parametrize("command", ["merge", "merge seeds"])
def test_no_mixture_of_a_base_is_written(states, tmp_path, command, swap, back):
    prefix, call = COMMANDS[command]
    source, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    write(source, states[f"{prefix}one"])

    def run():
        call(source, base, out)
        return result(out)

    sound = []
    for state in (states["base-one"], states["base-two"]):
        write(base, state)
        sound.append(run())
    found = outcomes(base, states["base-one"], states["base-two"], SWAPS[swap], run, back=back)
    assert sum(check(f, sound, n) for n, f in found) > 3


@each_swap
@pytest.mark.parametrize("command", ["strip", "embed"])
def test_in_place(states, tmp_path, command, swap):
    """An error leaves what the other wrote; nothing of it is lost."""
    prefix, _ = COMMANDS[command]
    call = {"strip": vera_tools.strip_projections, "embed": vera_tools.embed_projections}[command]
    source = tmp_path / "adapter"
    one, two = states[f"{prefix}one"], states[f"{prefix}two"]
    sound = []
    for state in (one, two):
        write(source, state)
        call(source, in_place=True)
        sound.append(files_of(source))
    refused = 0
    for moment, found in outcomes(source, one, two, SWAPS[swap], lambda: call(source, in_place=True)):
        left = files_of(source)
        if isinstance(found, VeraToolsError):
            assert left == two, moment
            refused += 1
        else:
            assert left in sound, moment
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert refused > 3


@each_swap
def test_record(states, tmp_path, swap):
    source = tmp_path / "adapter"
    one, two = ({k: v for k, v in states[name].items() if k != MANIFEST} for name in ("one", "two"))

    def run():
        (source / MANIFEST).unlink(missing_ok=True)
        vera_tools.record(source)
        return files_of(source)

    sound = [states["one"], states["two"]]
    assert sum(check(f, sound, n) for n, f in outcomes(source, one, two, SWAPS[swap], run)) > 2


@pytest.mark.parametrize("back", [False, True], ids=["for good", "and back"])
@each_swap
def test_an_edited_pair_is_never_called_reproducible(states, tmp_path, swap, back):
    """Nor does what is remembered of it vouch for another checkpoint of the same bytes."""
    racing, edited, sound = tmp_path / "racing", tmp_path / "edited", tmp_path / "sound"
    write(edited, states["edited"])
    write(sound, states["one"])

    def run():
        return vera_tools.verify(racing, edited, sound).checkpoints

    for before, after in (("one", "edited"), ("edited", "one")):
        changed = {WEIGHTS: states[after][WEIGHTS]}
        for moment, found in outcomes(racing, states[before], changed, SWAPS[swap], run, back=back):
            first, second, third = found
            assert (second.verdict, third.verdict) == ("drift", "reproducible"), moment
            assert first.verdict in ("reproducible", "drift", "invalid"), moment
            if first.verdict != "invalid":
                (twin,) = (other for other in (second, third) if other.verdict == first.verdict)
                assert first.projections == twin.projections, moment
                assert first.loads == twin.loads, moment


@pytest.mark.long
@pytest.mark.parametrize("command", swap_loop.COMMANDS)
def test_any_input_and_any_moment(command):
    """Thirty changes drawn from all that may be drawn; `python -m tests.swap_loop` draws a thousand."""
    found = swap_loop.run(command, 30, seed=1)
    assert sum(found.values()) == 30
    assert found["error"] > 5


@pytest.mark.long
def test_a_file_that_is_opened_again_must_be_the_same(states, tmp_path):
    from vera_tools.files.local import LocalFolder

    write(tmp_path / "x", states["one"])
    folder = LocalFolder(tmp_path / "x")
    folder.open(CONFIG).close()
    SWAPS["rewritten"](tmp_path / "x", {CONFIG: states["two"][CONFIG]})
    with pytest.raises(FormatError, match=f"{CONFIG}: the file was changed while it was read"):
        folder.open(CONFIG)


@pytest.mark.long
@pytest.mark.parametrize("command", ["verify", "inspect", "diff", "strip", "merge"])
def test_in_a_real_race(states, tmp_path, command):
    """Another process writes all the time, and does not keep to our reads."""
    source, base, out = tmp_path / "adapter", tmp_path / "base", tmp_path / "out"
    write(source, states["one"])
    write(base, states["base-one"])
    for name in ("one", "edited" if command == "verify" else "two"):
        write(tmp_path / name, states[name])
    other = "edited" if command == "verify" else "two"
    program = textwrap.dedent(f"""
        import itertools, os, pathlib, time
        root, stop = pathlib.Path({str(tmp_path)!r}), time.monotonic() + 20
        for name in itertools.cycle(({other!r}, "one")):
            for file in ({WEIGHTS!r}, {CONFIG!r}):
                with (root / "adapter" / file).open("r+b") as stream:
                    stream.write((root / name / file).read_bytes())
            time.sleep(0.002)
            if time.monotonic() > stop or (root / "stop").exists():
                break
    """)
    sound = []
    for name in ("one", other):
        write(source, states["one"] | {file: states[name][file] for file in (WEIGHTS, CONFIG)})
        sound.append(_end(command, source, base, out, states))
    write(source, states["one"])
    writer = subprocess.Popen([sys.executable, "-c", program])
    try:
        stop, runs = time.monotonic() + 1.5, 0
        while time.monotonic() < stop or runs < 20:
            found = _end(command, source, base, out, states)
            assert found in sound or isinstance(found, str), runs
            runs += 1
    finally:
        (tmp_path / "stop").touch()
        writer.wait()


def _end(command: str, source: Path, base: Path, out: Path, states: dict[str, dict[str, bytes]]) -> object:
    """What a command ends with, such that equal ends are equal; an error as text."""
    try:
        if command == "verify":
            report = vera_tools.verify(source).checkpoints[0]
            return "invalid" if report.verdict == "invalid" else (report.verdict, report.projections)
        if command == "inspect":
            return vera_tools.inspect(source).to_dict()
        if command == "diff":
            return vera_tools.diff(source, base.parent / "one").to_dict()
        COMMANDS[command][1](source, base, out)
        return result(out)
    except VeraToolsError as error:
        shutil.rmtree(out, ignore_errors=True)
        return str(error)
