"""Kill conversions with SIGKILL at random moments, and check each time that the old state or the new one is there.

    python tests/converting/kill_loop.py --rounds 300

A worker converts one checkpoint to and fro without pause: stripped and embedded in place, or two conversions in turn
over one output with ``overwrite``. It is killed after a random time, the tree is compared file by file with the two
states that may be there, and the next worker goes on from where the last one was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from vera_tools import embed_projections, strip_projections, to_lora
from vera_tools.errors import NothingToDoError, VeraToolsWarning

CHECKPOINT = Path(__file__).parents[2] / "fixtures" / "checkpoints" / "peft-0.21.2-llama-f32-kept"
LONGEST = 0.15  # seconds until a worker is killed, at most; a conversion takes about 0.03

State = tuple[tuple[str, int, str], ...]


def state_of(folder: Path) -> State:
    """Every file and folder below, with its permissions and content."""
    return tuple(
        (
            str(path.relative_to(folder)),
            path.stat().st_mode,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in [folder, *sorted(folder.rglob("*"))]
    )


def in_place(folder: Path) -> tuple[Callable[[], object], Callable[[], object], Path]:
    """A checkpoint with a card and a subfolder beside it: strip and embed, each in place."""
    target = folder / "checkpoint"
    shutil.copytree(CHECKPOINT, target)
    (target / "README.md").write_text("# card\n")
    (target / "runs").mkdir()
    (target / "runs" / "events").write_text("events")
    (target / "adapter_model.safetensors").chmod(0o640)
    target.chmod(0o750)
    return (
        lambda: strip_projections(target, in_place=True),
        lambda: embed_projections(target, in_place=True),
        target,
    )


def overwriting(folder: Path) -> tuple[Callable[[], object], Callable[[], object], Path]:
    """One output, written by two conversions in turn."""
    target = folder / "output"
    return (
        lambda: strip_projections(CHECKPOINT, target, overwrite=True),
        lambda: to_lora(CHECKPOINT, target, overwrite=True),
        target,
    )


SCENES = {"in-place": in_place, "overwrite": overwriting}


def run(scene: str, rounds: int, *, seed: int) -> Counter[str]:
    """Kill `rounds` workers. Returns how often each of the two states was found.

    Raises:
        AssertionError: something else was found.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first, second, target = SCENES[scene](folder)
        states = {}
        for label, convert in (("second", second), ("first", first), ("second", second)):
            try:
                convert()
            except NothingToDoError:  # the checkpoint starts in the state that embedding leads to
                continue
            states[state_of(target)] = label
        assert len(states) == 2, "the two states do not differ"
        found: Counter[str] = Counter()
        for number in range(rounds):
            worker = _start(first, second)
            time.sleep(chance.uniform(0, LONGEST))
            os.kill(worker, signal.SIGKILL)
            _, status = os.waitpid(worker, 0)
            assert os.WIFSIGNALED(status), f"round {number}: the worker ended by itself with {status}"
            state = state_of(target)
            assert state in states, f"round {number}: neither the old state nor the new: {[x[0] for x in state]}"
            found[states[state]] += 1
            for path in folder.iterdir():
                if path != target:
                    assert path.name.startswith(f".{target.name}."), f"round {number}: {path.name} was left behind"
                    found["left behind"] += 1
                    shutil.rmtree(path)
        return found


def _start(first: Callable[[], object], second: Callable[[], object]) -> int:
    worker = os.fork()
    if worker:
        return worker
    try:
        while True:
            for convert in (first, second):
                try:
                    convert()
                except NothingToDoError:
                    continue
    finally:
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=300, help="kills for each scene (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random times (default: a new one)")
    parser.add_argument("--scene", choices=SCENES, action="append", help="what to kill (default: everything)")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    warnings.simplefilter("ignore", VeraToolsWarning)
    for scene in options.scene or SCENES:
        started = time.monotonic()
        found = run(scene, options.rounds, seed=seed)
        print(
            f"{scene}: {options.rounds} kills, never a mixture: {found['first']} times the one state, "
            f"{found['second']} times the other, {found['left behind']} hidden folders left behind "
            f"(seed {seed}, {time.monotonic() - started:.0f} s)"
        )
    sys.exit(0)


if __name__ == "__main__":
    main()
