"""Change inputs while commands read them, a thousand times each, and look at what comes of it each time.

    python -m tests.swap_loop --rounds 1000

Each round draws a command, the input that changes (an adapter, its weights, its config and manifest, or the base), from
which state to which, how (`swapping.SWAPS`), before which of the command's reads, and whether it changes back before
the next one. The command must end with an error, or with exactly what it makes of the one state or of the other. The
same seed draws the same rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import vera_tools
from tests.adapters import CONFIG, MANIFEST, WEIGHTS, edit, files_of
from tests.merging.models import make_adapter, make_base
from tests.swapping import SWAPS, State, moments, write
from vera_tools.errors import VeraToolsError, VeraToolsWarning

#: What a command ends with, such that equal ends are equal.
End = object
#: Which files of an adapter change.
PARTS = {"all": None, "weights": (WEIGHTS,), "config and manifest": (CONFIG, MANIFEST)}


@dataclass(frozen=True)
class Places:
    """Where the inputs lie, and where the output goes."""

    adapter: Path
    base: Path
    out: Path


def _verify(at: Places) -> End:
    report = vera_tools.verify(at.adapter, base=at.base)
    return json.dumps([report.exit_code, report.checkpoints[0].to_dict()])


def _written(call: Callable[[Places], object]) -> Callable[[Places], End]:
    def run(at: Places) -> End:
        try:
            call(at)
            return files_of(at.out)
        finally:
            shutil.rmtree(at.out, ignore_errors=True)

    return run


def _record(at: Places) -> End:
    vera_tools.record(at.adapter, base=at.base)
    return files_of(at.adapter)


_strip = _written(lambda at: vera_tools.strip_projections(at.adapter, at.out))
_convert = _written(lambda at: vera_tools.to_lora(at.adapter, at.out, base=at.base))
_merge = _written(lambda at: vera_tools.merge(at.adapter, base=at.base, output=at.out, jobs=1))

#: Each command, and the kind of adapter that it takes: "kept" and "seeds" have a manifest, "plain" has none.
COMMANDS: dict[str, tuple[str, Callable[[Places], End]]] = {
    "verify": ("kept", _verify),
    "verify seeds": ("seeds", _verify),
    "strip": ("kept", _strip),
    "strip plain": ("plain", _strip),
    "record": ("kept", _record),
    "embed": ("seeds", _written(lambda at: vera_tools.embed_projections(at.adapter, at.out, base=at.base))),
    "convert": ("seeds", _convert),
    "convert kept": ("kept", _convert),
    "convert plain": ("plain", _convert),
    "merge": ("plain", _merge),
    "merge kept": ("kept", _merge),
    "merge seeds": ("seeds", _merge),
}


def make_states(folder: Path) -> dict[str, State]:
    """Two bases; two adapters of the same sizes in which everything differs, and the first with one value edited: as
    PEFT saves them, recorded with the first base, and stripped."""
    for name, seed in (("one", 1), ("two", 2)):
        make_base(folder / f"base {name}", seed=seed, config={"vocab_size": seed})
    for name, seed in (("one", 1), ("two", 2), ("edited", 1)):
        adapter = make_adapter(folder / f"plain {name}", seed=seed, config={"vera_dropout": seed / 10})
        kept = shutil.copytree(adapter, folder / f"kept {name}")
        vera_tools.record(kept, base=folder / "base one")
        if name != "edited":
            vera_tools.strip_projections(kept, folder / f"seeds {name}")
            continue
        for changed in (adapter, kept):
            edit(changed, lambda tensors: tensors["base_model.vera_B"].__setitem__((-1, -1), 7))
    return {path.name: files_of(path) for path in folder.iterdir()}


class Loop:
    """The rounds of one command."""

    def __init__(self, command: str, states: dict[str, State], folder: Path, *, seed: int) -> None:
        self.kind, self.run = COMMANDS[command]
        self.states, self.at = states, Places(folder / "adapter", folder / "base", folder / "out")
        self.chance = random.Random(f"{seed} {command}")
        self.known: dict[object, tuple[End, int]] = {}

    def round(self) -> str:
        """One change: what came of it, "error", "before" or "after".

        Raises:
            AssertionError: it is what neither of the two states gives.
        """
        chance = self.chance
        place = chance.choice(["adapter", "base"])
        names = ["one", "two"] + ["edited"] * (place == "adapter" and f"{self.kind} edited" in self.states)
        first, second = chance.sample(names, 2)
        part = chance.choice(list(PARTS)) if place == "adapter" else "all"
        swap, back = chance.choice(list(SWAPS)), chance.choice([False, True])
        other = "one"  # what the other input is
        ends = [self._alone(place, first, first, part, other), self._alone(place, first, second, part, other)]
        moment = chance.randrange(ends[0][1])
        folder, before, after = self._put(place, first, second, part, other)
        plan = {moment: lambda: SWAPS[swap](folder, after)}
        if back:
            plan[moment + 1] = lambda: SWAPS[swap](folder, {name: before[name] for name in after})
        with moments(plan):
            found = self._end()
        what = f"{place}: {part} from {first} to {second}, {swap}{', and back' * back}, before read {moment}"
        if isinstance(found, VeraToolsError) or _is_refusal(found):
            return "error"
        sound = [end for end, _ in ends]
        assert found in sound, f"a mixture: {what}"
        return "before" if found == sound[0] else "after"

    def _put(self, place: str, first: str, second: str, part: str, other: str) -> tuple[Path, State, State]:
        kind = {"adapter": self.kind, "base": "base"}
        for name, folder in (("adapter", self.at.adapter), ("base", self.at.base)):
            write(folder, self.states[f"{kind[name]} {first if name == place else other}"])
        before, after = self.states[f"{kind[place]} {first}"], self.states[f"{kind[place]} {second}"]
        names = [name for name in PARTS[part] or after if name in before]
        return getattr(self.at, place), before, {name: after[name] for name in names}

    def _alone(self, place: str, first: str, second: str, part: str, other: str) -> tuple[End, int]:
        """What the command ends with where nothing changes, and how many reads it takes."""
        key = (place, first, second, part, other)
        if key not in self.known:
            folder, before, after = self._put(place, first, second, part, other)
            write(folder, {**before, **after})
            with moments({}) as passed:
                end = self._end()
            self.known[key] = (end, passed.count)
        return self.known[key]

    def _end(self) -> End:
        try:
            return self.run(self.at)
        except VeraToolsError as error:
            return error


def _is_refusal(found: End) -> bool:
    """A checkpoint that `verify` calls invalid."""
    return isinstance(found, str) and json.loads(found)[1]["verdict"] == "invalid"


def run(command: str, rounds: int, *, seed: int) -> Counter[str]:
    """How often a command ended with an error, with the state before the change, and with the one after it.

    Raises:
        AssertionError: it ended with what neither of them gives.
    """
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraToolsWarning)
        folder = Path(name)
        (folder / "states").mkdir()
        loop = Loop(command, make_states(folder / "states"), folder, seed=seed)
        found: Counter[str] = Counter()
        for number in range(rounds):
            try:
                found[loop.round()] += 1
            except AssertionError as error:
                raise AssertionError(f"{command}, round {number} of seed {seed}: {error}") from error
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=1000, help="changes for each command (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is drawn (default: %(default)s)")
    parser.add_argument("--command", choices=COMMANDS, action="append", help="what to run (default: everything)")
    options = parser.parse_args()
    for command in options.command or COMMANDS:
        started = time.monotonic()
        found = run(command, options.rounds, seed=options.seed)
        print(
            f"{command}: {options.rounds} changes, never a mixture: {found['error']} errors, {found['before']} times "
            f"the state before, {found['after']} times the one after "
            f"(seed {options.seed}, {time.monotonic() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
