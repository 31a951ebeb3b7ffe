"""Everything that the commands print and write over fixtures/, as text: what must not change unless it is meant to.

    python -m tests.outputs                 compare with tests/transcripts/, and say what differs
    python -m tests.outputs --write         take what the commands say now as right
    python -m tests.outputs --full FOLDER   write every document and file in full: compare two checkouts with diff -r

tests/transcripts/ holds one file a command. What it prints for people stands there in full; JSON documents, and files
that it writes, as digests. Times and rates, and what tells of this machine (torch, its platform), are masked.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
EXPECTED = Path(__file__).parent / "transcripts"
CHECKPOINTS = sorted(p.name for p in (ROOT / "fixtures" / "checkpoints").iterdir() if not p.name.endswith("-base"))

# Rounding to bfloat16 hides in which order a BLAS library adds up; float32 sums do not.
_SAME_EVERYWHERE = "-bf16-"
_MASKS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"\d+(?:\.\d+)? s, \d+(?:\.\d+)? [kMG]?B(?:ytes)?/s|\d+(?:\.\d+)? s, \d+ bytes/s"), "TIME"),
    (re.compile(r'("seconds": )[-+.0-9e]+'), r"\1TIME"),
    (re.compile(r'("(?:python|torch|machine|system|cpu_model|date|time)": )"[^"]*"'), r'\1"HERE"'),
    (re.compile(r"torch [\d.+a-z]+, Python [\d.]+, \w+ \w+"), "torch HERE"),
    (re.compile(r"    on \S.*"), "    on HERE"),
    (re.compile(r"the atlas has for \S+|torch-[\d.]+-\w+"), "ATLAS"),
    (re.compile(r"\b[0-9a-f]{40}\b"), "COMMIT"),
    (re.compile(r"http://[\w.]+:\d+"), "http://hub"),
    # Each BLAS library, number of threads and CPU adds up in an order of its own, which the last digits show.
    (re.compile(r'("relative_\w+": )(\d\.\d{10,}(?:e-?\d+)?)'), lambda found: f"{found[1]}{float(found[2]):.9g}"),
    (re.compile(r'("logits": \{\s*"max_abs": )\S+(,\s*"relative": )\S+(,\s*"largest": )[^,\s]+'), r"\1N\2N\3N"),
    (re.compile(r"(logits change by up to )\S+ of \S+(?=,)"), r"\1N of N"),
)


@dataclass
class Transcript:
    """What one command gave: for people (text), for programs (documents), and on disk (files)."""

    text: list[str] = field(default_factory=list)
    documents: dict[str, bytes] = field(default_factory=dict)

    def run(self, *arguments: str) -> None:
        """Run one command line, note what it prints, and forget no exit code."""
        code, out, err = _call(arguments)
        line = " ".join(arguments)
        self.text += [f"$ vera-tools {line}", *_lines(out), *(f"! {entry}" for entry in _lines(err))]
        if "--json" in arguments:
            del self.text[-len(_lines(out)) - len(_lines(err)) :]
            self.text += [f"  {self._digest(f'{line}.json', out.encode())}", *(f"! {entry}" for entry in _lines(err))]
        self.text.append(f"  exit {code}")

    def file(self, path: str) -> None:
        """Note one file that a command wrote."""
        data = Path(path).read_bytes() if os.path.exists(path) else b"absent"
        masked = data if path.endswith(".safetensors") else _masked(data.decode()).encode()
        self.text.append(f"  {path} {self._digest(path, masked)}")

    def tree(self, folder: str) -> None:
        """Note every file below a folder."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.file(str(path))

    def _digest(self, name: str, data: bytes) -> str:
        self.documents[f"{len(self.documents):03} {name.replace('/', '_')}"[:200]] = data
        return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()[:16]}"


def _call(arguments: tuple[str, ...]) -> tuple[int, str, str]:
    from vera_tools.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as stop:
            code = stop.code
    return int(code or 0), _masked(out.getvalue()), _masked(err.getvalue())


def _masked(text: str) -> str:
    for pattern, word in _MASKS:
        text = pattern.sub(word, text)
    return text


def _lines(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _path(name: str) -> str:
    return f"fixtures/checkpoints/{name}"


def _base(name: str) -> str:
    return f"fixtures/checkpoints/{name}-base"


def _seed_only(name: str) -> bool:
    return "seedonly" in name


def verify(note: Transcript) -> None:
    for name in CHECKPOINTS:
        for options in ((), ("-v",), ("--json",), ("--base", _base(name)), ("--base", _base(name), "--json")):
            note.run("verify", _path(name), *options)
    note.run("verify", "-R", "fixtures/checkpoints")
    note.run(
        "verify", "-R", "fixtures/checkpoints", "--jobs", "2", "--json", "--junit", "out.xml", "--require", "drift"
    )
    note.file("out.xml")
    for config in sorted(os.listdir("fixtures/configs")):
        folder = Path("found") / config.removesuffix(".json")
        folder.mkdir(parents=True)
        shutil.copy(f"fixtures/configs/{config}", folder / "adapter_config.json")
        weights = f"{_path('peft-0.21.2-llama-f32-kept')}/adapter_model.safetensors"
        shutil.copy(weights, folder / "adapter_model.safetensors")
        note.run("verify", str(folder))
    hostile = _hostile_files()
    for file, data in hostile.items():
        folder = Path("hostile") / file
        folder.mkdir(parents=True)
        shutil.copy(f"{_path('peft-0.21.2-llama-f32-kept')}/adapter_config.json", folder)
        (folder / "adapter_model.safetensors").write_bytes(data)
        note.run("verify", str(folder))
    note.run("verify", "nothing-here")
    note.run("verify", "fixtures", "--json")


def _hostile_files() -> dict[str, bytes]:
    sys.path.insert(0, str(ROOT / "fixtures" / "hostile"))
    try:
        import safetensors_files
    finally:
        sys.path.pop(0)
    return {name: hostile.data for name, hostile in sorted(safetensors_files.FILES.items()) if len(hostile.data) < 1e5}


def inspect(note: Transcript) -> None:
    for name in CHECKPOINTS:
        for options in ((), ("-v",), ("--json",), ("--base", _base(name), "--json")):
            note.run("inspect", _path(name), *options)


def record(note: Transcript) -> None:
    for name in CHECKPOINTS:
        shutil.copytree(_path(name), name)
        note.run("record", name, "--base", _base(name))
        note.file(f"{name}/vera_manifest.json")
        note.run("record", name, "--json")
        for options in ((), ("--json",), ("--base", _base(name), "-v")):
            note.run("verify", name, *options)
        note.run("inspect", name, "--json")


def regenerate(note: Transcript) -> None:
    for name in CHECKPOINTS:
        note.run("regenerate", "--checkpoint", _path(name), "--base", _base(name), "-o", f"{name}.safetensors")
        note.file(f"{name}.safetensors")
        note.run("regenerate", "--checkpoint", _path(name), "--base", _base(name), "--json")
    given = ("--key", "42", "--rank", "4", "--in-features", "96", "--out-features", "32")
    for options in (
        (),
        ("--rounding", "separate"),
        ("--drawn-dtype", "float64", "--stored-dtype", "float64"),
        ("--drawn-dtype", "bfloat16", "--half-sampling", "scalar"),
        ("--drawn-dtype", "float16", "--rounded-through", "bfloat16"),
        ("--json",),
    ):
        note.run("regenerate", *given, *options)


def _into(note: Transcript, command: str, *arguments: str) -> None:
    """A conversion into a folder of its own, in both forms, and what lies there then."""
    note.run(*arguments, "-o", f"{command}-{len(note.text)}")
    note.run(*arguments, "-o", "out", "--overwrite", "--json")
    if os.path.exists("out"):
        note.tree("out")
        note.run("verify", "out")
        shutil.rmtree("out")


def strip_projections(note: Transcript) -> None:
    for name in CHECKPOINTS:
        _into(note, "strip", "strip-projections", _path(name))
    note.run("strip-projections", "-R", "fixtures/checkpoints", "--out-dir", "all")


def embed_projections(note: Transcript) -> None:
    for name in CHECKPOINTS:
        if _seed_only(name):
            _into(note, "embed", "embed-projections", _path(name), "--base", _base(name))
            _into(note, "embed", "embed-projections", _path(name), "--in-features", "96", "--stored-dtype", "bfloat16")
        else:
            note.run("strip-projections", _path(name), "-o", f"{name}-stripped")
            _into(note, "embed", "embed-projections", f"{name}-stripped")
    note.run("embed-projections", _path(CHECKPOINTS[0]), "-o", "never")


def convert(note: Transcript) -> None:
    for name in CHECKPOINTS:
        _into(note, "lora", "convert", "--to", "lora", _path(name), "--base", _base(name))
        note.run("convert", "--from", "auto", _path(name), "-o", "never")
    note.run("convert", "--to", "lora", _path(CHECKPOINTS[0]), "-o", "lora-without-base")


def diff(note: Transcript) -> None:
    for name in CHECKPOINTS:
        note.run("diff", _path(name), _path(name))
    for a in CHECKPOINTS:
        for b in CHECKPOINTS:
            if a < b and "llama" in a and "llama" in b and ("-f32-" in a) == ("-f32-" in b):
                note.run("diff", _path(a), _path(b))


def merge(note: Transcript) -> None:
    for name in CHECKPOINTS:
        note.run("merge", _path(name), "--base", _base(name), "-o", f"{name}-merged", "--jobs", "1")
        if _SAME_EVERYWHERE in name:
            note.tree(f"{name}-merged")
            note.run("merge", _path(name), "--base", _base(name), "-o", "again", "--jobs", "1", "--verify", "--json")
            shutil.rmtree("again")
    note.run("merge", _path(CHECKPOINTS[0]), "--base", _base("peft-0.21.2-gpt2-conv1d-kept"), "-o", "never")


def push(note: Transcript) -> None:
    import pytest

    from tests.hub.server import HubServer, point_client

    with HubServer(Path("hub")) as server, pytest.MonkeyPatch.context() as monkeypatch:
        point_client(server, Path("home").absolute(), monkeypatch)
        monkeypatch.setenv("HF_TOKEN", server.add_user("ann"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        for name in CHECKPOINTS:
            note.run("push", _path(name), f"ann/{name}", "-v")
            note.run("push", _path(name), f"ann/{name}", "--json")
            note.run("pull", f"ann/{name}", "-o", name)
            note.run("pull", f"ann/{name}", "-o", "out", "--json")
            note.tree(name)
            shutil.rmtree("out", ignore_errors=True)
            if not _seed_only(name):
                note.run("push", "--strip", _path(name), f"hf://ann/all/{name}")
            else:
                note.run("push", "--embed", "--base", _base(name), _path(name), f"hf://ann/all/{name}", "--create-pr")
        note.run("verify", "hf://ann/*")
        note.run("pull", "ann/nothing", "-o", "never")


def drift(note: Transcript) -> None:
    """Under the plainest kernels, which every x86-64 machine has."""
    name = "peft-0.21.2-llama-f32-seedonly"
    with mock.patch.dict(os.environ, {"ATEN_CPU_CAPABILITY": "default"}):
        for options in ((), ("-v",), ("--json",)):
            note.run("drift", "--device", "cpu", *options)
        note.run(
            "drift", "--device", "cpu", "--checkpoint", _path(name), "--base", _base(name), "--save", "report.json"
        )
        note.file("report.json")
        note.run("drift", "--device", "cpu", "--against", "report.json")


def usage(note: Transcript) -> None:
    """Help and wrong calls of every command."""
    from vera_tools.cli import COMMANDS

    note.run("--help")
    for command in COMMANDS:
        note.run(command, "--help")
        note.run(command, "--no-such-option")
        note.run(command, "--no-such-option", "--json")


COMMANDS: dict[str, Callable[[Transcript], None]] = {
    "verify": verify,
    "inspect": inspect,
    "record": record,
    "regenerate": regenerate,
    "strip-projections": strip_projections,
    "embed-projections": embed_projections,
    "convert": convert,
    "diff": diff,
    "merge": merge,
    "push": push,  # and pull
    "drift": drift,
    "usage": usage,
}


@contextlib.contextmanager
def _somewhere() -> Iterator[None]:
    """An empty working folder with fixtures/ in it, on a machine without a name."""
    from vera_tools import installed

    version = installed.version
    here = os.getcwd()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(platform, "system", return_value="System"),
        mock.patch.object(platform, "machine", return_value="machine"),
        mock.patch.object(installed, "version", lambda n: "0.0" if n == "torch" else version(n)),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
    ):
        os.symlink(ROOT / "fixtures", Path(folder) / "fixtures")
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def transcript(command: str) -> Transcript:
    """All that one command says."""
    note = Transcript()
    with _somewhere():
        COMMANDS[command](note)
    return note


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--full", type=Path)
    arguments = parser.parse_args()
    different = 0
    for command in COMMANDS:
        note = transcript(command)
        text = "\n".join(note.text) + "\n"
        if arguments.full:
            folder = arguments.full / command
            folder.mkdir(parents=True)
            (folder / "transcript.txt").write_text(text, "utf-8")
            for name, data in note.documents.items():
                (folder / name).write_bytes(data)
        expected = EXPECTED / f"{command}.txt"
        if arguments.write:
            EXPECTED.mkdir(exist_ok=True)
            expected.write_text(text, "utf-8")
        elif not expected.exists() or expected.read_text("utf-8") != text:
            print(f"{command}: differs")
            different += 1
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
