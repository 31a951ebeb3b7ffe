"""Kill merges with SIGKILL at random moments, resume them, and compare every result with an undisturbed merge.

    python -m tests.merging.kill_loop --rounds 500

A worker merges an adapter into a base of eight files and is killed after a random time. The output is there whole, or
not at all. Half of the time the next worker is killed too, on top of what the last one left; the other half the merge
is resumed and comes to its end. What it ends in is, byte for byte, what a merge that nobody disturbs writes.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

import vera_tools
from tests.adapters import files_of
from tests.merging.models import Shapes, make_adapter, make_base
from vera_tools.architectures import witness
from vera_tools.errors import VeraToolsWarning

SHAPES: Shapes = {f"model.layers.{n}.{p}": (512, 384) for n in range(8) for p in ("up", "gate")}


def run(rounds: int, *, seed: int) -> Counter[str]:
    """Kill `rounds` workers. Returns how often what was found.

    Raises:
        AssertionError: an output is not what it must be, or something else lies beside it.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        extra = {f"model.rest.{n}": np.random.default_rng(n).standard_normal(50_000).astype("f4") for n in range(8)}
        base = make_base(folder / "base", SHAPES, files=8, extra=extra)
        adapter = make_adapter(folder / "adapter", SHAPES, r=64)
        inputs, out = files_of(base) | files_of(adapter, "adapter/"), folder / "here" / "out"
        vera_tools.merge(adapter, base=base, output=folder / "expected")
        expected = files_of(folder / "expected")
        out.parent.mkdir()
        longest = 1.2 * min(_seconds(adapter, base, out) for _ in range(5))  # the machine may be busy for a while
        found: Counter[str] = Counter()
        for number in range(rounds):
            worker = _start(adapter, base, out)
            time.sleep(chance.uniform(0, longest))
            os.kill(worker, signal.SIGKILL)
            _, status = os.waitpid(worker, 0)
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"round {number}: ended with {status}"
            beside = sorted(path.name for path in out.parent.iterdir())
            assert set(beside) <= {"out", ".out.merge"}, f"round {number}: {beside}"
            if out.exists():
                found["whole before the kill"] += 1
            elif chance.random() < 0.5:
                found["killed again"] += 1
                continue
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VeraToolsWarning)
                    report = vera_tools.merge(adapter, base=base, output=out, resume=True)
                found["resumed"] += 1
                found["files taken over"] += len(report.resumed)
                assert sorted(path.name for path in out.parent.iterdir()) == ["out"], f"round {number}: leftovers"
            assert files_of(out) == expected, f"round {number}: other bytes"
            shutil.rmtree(out)
        assert files_of(base) | files_of(adapter, "adapter/") == inputs, "an input was changed"
        return found


def _seconds(adapter: Path, base: Path, out: Path) -> float:
    """How long a merge takes that nobody disturbs; its output is removed."""
    started = time.monotonic()
    vera_tools.merge(adapter, base=base, output=out)
    taken = time.monotonic() - started
    shutil.rmtree(out)
    return taken


def _start(adapter: Path, base: Path, out: Path) -> int:
    worker = os.fork()
    if worker:
        return worker
    try:
        vera_tools.merge(adapter, base=base, output=out, resume=True)
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=500, help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times (default: %(default)s)")
    options = parser.parse_args()
    witness.is_there = lambda: False  # it would ask transformers in a process of its own, for each merge
    started = time.monotonic()
    found = run(options.rounds, seed=options.seed)
    print(
        f"merge: {options.rounds} kills, never other bytes: {found['whole before the kill']} outputs were whole, "
        f"{found['killed again']} merges were killed again, {found['resumed']} resumed with "
        f"{found['files taken over']} files taken over (seed {options.seed}, {time.monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
