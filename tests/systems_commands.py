"""A series of commands over fixtures/, and what each prints and leaves on disk: the same on every system.

Run by `tests.systems`. Those for the Hub are left out where the environment names none (`tests.hub.server`).
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import huggingface_hub

from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY
from tests.outputs import Transcript
from vera_tools import installed


def verify(note: Transcript) -> None:
    note.run("verify", "stored", "--base", "base")
    note.run("verify", "-R", ".", "--jobs", "2", "--json", "--junit", "report.xml", "--require", "unproven")


def inspect(note: Transcript) -> None:
    note.run("inspect", "stored", "-v")


def record(note: Transcript) -> None:
    note.run("record", "seed", "--base", "base")
    note.run("record", "seed", "--json")


def strip(note: Transcript) -> None:
    note.run("strip-projections", "stored", "-o", "small")
    note.run("strip-projections", "stored", "-o", "small", "--overwrite")
    note.run("strip-projections", "-R", "many", "--out-dir", "many-small")


def in_place(note: Transcript) -> None:
    note.run("strip-projections", "own", "--in-place")


def embed(note: Transcript) -> None:
    note.run("embed-projections", "small", "-o", "back")
    note.run("embed-projections", "seed", "-o", "full", "--json")


def convert(note: Transcript) -> None:
    note.run("convert", "--to", "lora", "stored", "--base", "base", "-o", "lora")


def diff(note: Transcript) -> None:
    note.run("diff", "stored", "small")


def regenerate(note: Transcript) -> None:
    note.run("regenerate", "--checkpoint", "stored", "-o", "pair.safetensors")
    note.run("regenerate", "--checkpoint", "stored", "-o", "pair.safetensors", "--overwrite")


def merge(note: Transcript) -> None:
    note.run("merge", "stored", "--base", "base", "-o", "merged", "--max-shard-size", "60kB", "--jobs", "2", "--sync")
    # Its base is in several files, and most of them are copied.
    note.run("merge", "few", "--base", "merged", "-o", "twice", "--jobs", "2", "--verify")
    note.run("merge", "few", "--base", "merged", "-o", "twice", "--jobs", "2", "--overwrite")


def merge_in_parts(note: Transcript) -> None:
    for part in ("1/2", "2/2"):
        note.run("merge", "stored", "--base", "merged", "-o", "parts", "--part", part)
    note.run("merge", "stored", "--base", "merged", "-o", "parts", "--finish", "--verify")


def merge_interrupted(note: Transcript) -> None:
    from vera_tools.merging.staging import Staging

    finish, finished = Staging.finish, []

    def interrupted(*arguments: object) -> None:
        if finished:
            raise KeyboardInterrupt
        finished.append(arguments)
        finish(*arguments)

    with mock.patch.object(Staging, "finish", interrupted):
        note.run("merge", "stored", "--base", "merged", "-o", "resumed", "--jobs", "1")
    note.run("merge", "stored", "--base", "merged", "-o", "resumed", "--jobs", "1", "--resume")


def merge_twice_at_once(note: Transcript) -> None:
    from vera_tools.files import locking

    os.mkdir(".busy.merge")
    with open(".busy.merge/lock", "ab") as held:
        locking.take(held.fileno())
        note.run("merge", "stored", "--base", "base", "-o", "busy", "-q")
        note.run("merge", "stored", "--base", "base", "-o", "busy", "-q", "--part", "1/2")
    shutil.rmtree(".busy.merge", ignore_errors=True)
    shutil.rmtree("busy", ignore_errors=True)


def hub(note: Transcript) -> None:
    note.run("push", "stored", "ann/stored", "-v")
    note.run("push", "--strip", "stored", "hf://ann/small/in/here")
    note.run("pull", "ann/stored", "-o", "pulled")
    note.run("pull", "hf://ann/small/in/here", "-o", "pulled", "--overwrite", "--embed")
    note.run("pull", "hf://ann/many/one", "-o", "pulled-one")
    for _ in range(2):
        note.run("verify", "hf://ann/*", "--log", "log.jsonl", "--base", "base")


def hub_offline(note: Transcript) -> None:
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        note.run("pull", "ann/stored", "-o", "offline")


SERIES: dict[str, Callable[[Transcript], None]] = {
    "verify": verify,
    "inspect": inspect,
    "record": record,
    "strip": strip,
    "in place": in_place,
    "embed": embed,
    "convert": convert,
    "diff": diff,
    "regenerate": regenerate,
    "merge": merge,
    "merge in parts": merge_in_parts,
    "merge interrupted": merge_interrupted,
    "merge twice at once": merge_twice_at_once,
    "hub": hub,
    "hub offline": hub_offline,
}


def prepare() -> None:
    """Fill the working folder."""
    shutil.copytree(CHECKPOINTS / KEPT, "stored")
    shutil.copytree(CHECKPOINTS / KEPT, "own")
    shutil.copytree(CHECKPOINTS / SEED_ONLY, "seed")
    shutil.copytree(CHECKPOINTS / f"{KEPT}-base", "base")
    shutil.copytree(CHECKPOINTS / "peft-0.21.2-llama-f32-kept-noavx", "few")
    shutil.copytree(CHECKPOINTS / KEPT, Path("many", "a", "one"))
    shutil.copytree(CHECKPOINTS / "peft-0.20.0-llama-bf16-kept", Path("many", "two"))


@contextlib.contextmanager
def _without_a_name() -> Iterator[None]:
    """On a machine without a name."""
    version = installed.version
    with (
        mock.patch.object(platform, "system", return_value="System"),
        mock.patch.object(platform, "machine", return_value="machine"),
        mock.patch.object(installed, "version", lambda n: "0.0" if n == "torch" else version(n)),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
    ):
        yield


def run() -> dict[str, dict[str, list[str]]]:
    """Run the series. Of each step: what it printed, and every file that it left, with its digest."""
    prepare()
    results, before = {}, _files()
    with _without_a_name():
        for name, step in SERIES.items():
            if name.startswith("hub") and "HF_ENDPOINT" not in os.environ:
                continue
            note = Transcript()
            step(note)
            now = _files()
            results[name] = {"said": note.text, "left": sorted(now - before), "gone": sorted(before - now)}
            before = now
    return results


def _files() -> set[str]:
    note = Transcript()
    note.tree(".")
    lines = [line.strip() for line in note.text]
    # A log holds the times of the files that it tells of, which are others in each run.
    return {"log.jsonl" if line.startswith("log.jsonl ") else line for line in lines}
