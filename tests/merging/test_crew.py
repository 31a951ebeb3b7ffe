"""A merge by copies of its process: the same as by threads, whatever becomes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import vera_tools
from tests import ROOT
from tests.adapters import edit
from tests.merging.models import make_adapter, make_base
from vera_tools.files.local import LocalFile, MemoryFile
from vera_tools.merging import crew

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no process is copied")

SHAPES = {f"model.layers.{n}.{p}": (96, 80) for n in range(6) for p in ("up", "gate")}
EXTRA = {f"model.rest.{n}": np.full(5000, n, np.float32) for n in range(5)}

#: A merge that counts its copies; `BODY` may change what they do.
PROGRAM = """
import os, signal, sys
from vera_tools import blas
blas.start_alone()
import vera_tools
from vera_tools import errors
from vera_tools.merging import crew, execution
from vera_tools.processes import workers
crew.WORTH = 0
made, fork = [], workers.Fork
workers.Fork = lambda *args: made.append(1) or fork(*args)
main = os.getpid()
{body}
seen = []
try:
    report = vera_tools.merge(
        sys.argv[1], base=sys.argv[2], output=sys.argv[3], jobs=2, progress=lambda *step: seen.append(step), **{options}
    )
except errors.VeraToolsError as error:
    print(error)
else:
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    done, total, _ = seen[-1]
    assert 0.97 * total < done <= total, seen[-1]
print(len(made), "copies")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder / "base", SHAPES, files=3, extra=EXTRA)
    adapter = make_adapter(folder / "adapter", SHAPES, r=16)
    vera_tools.merge(adapter, base=base, output=folder / "expected", jobs=2)
    return adapter, base, folder / "expected"


def merged(adapter, base, out, body="", **options):
    program = PROGRAM.format(body=body, options=options)
    kept = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
    result = subprocess.run(
        [sys.executable, "-c", program, str(adapter), str(base), str(out)],
        capture_output=True, text=True, cwd=ROOT, env=kept, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


@linux
@pytest.mark.parametrize(("options", "copies"), [({}, 2), ({"verify": True}, 4), ({"dry_run": True}, 2)])
def test_copies_write_and_prove_what_threads_do(options, copies, made, tmp_path):
    adapter, base, expected = made
    assert merged(adapter, base, tmp_path / "out", **options) == f"{copies} copies\n"
    if "dry_run" in options:
        assert list(tmp_path.iterdir()) == []
        return
    assert files(tmp_path / "out") == files(expected)
    ours, theirs = (json.loads((folder / "vera_merge.json").read_text()) for folder in (tmp_path / "out", expected))
    assert ours["base"] == theirs["base"]
    assert ours["tensors"] == theirs["tensors"]


@linux
@pytest.mark.parametrize(("worth", "copies"), [(12 << 20, 2), (1 + (12 << 20), 0)])
def test_copies_are_made_for_what_is_computed_and_not_for_what_is_copied(worth, copies, made, tmp_path):
    adapter, base, expected = made
    assert merged(adapter, base, tmp_path / "out", f"crew.WORTH = {worth}", verify=True) == f"{2 * copies} copies\n"
    assert files(tmp_path / "out") == files(expected)


@linux
def test_a_copy_that_is_killed_ends_the_merge_and_leaves_nothing(made, tmp_path):
    body = """
def compute(*args, known=execution._compute, **options):
    if "layers.3.up" in args[2].info.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return known(*args, **options)
execution._compute = compute
"""
    out = merged(*made[:2], tmp_path / "out", body)
    assert "not merged: the process that worked on it ended by signal 9" in out
    assert "--jobs 1 needs the least" in out
    assert list(tmp_path.iterdir()) == []


@linux
@pytest.mark.parametrize("verify", [False, True])
def test_what_a_copy_refuses_is_refused(verify, made, tmp_path):
    """As an error of the same kind, with all that it says; by those that write, and by those that read back."""
    base = make_base(tmp_path / "base", SHAPES, files=3, extra=EXTRA)
    victim, body = "model.layers.4.gate.weight", ""
    if verify:
        body = """
def write_at(self, data, offset, known=execution.OutputFile.write_at):
    known(self, bytes(data[:-1]) + bytes([data[-1] ^ 2]) if os.getpid() != main else data, offset)
execution.OutputFile.write_at = write_at
"""
    else:
        for path in base.glob("*.safetensors"):
            if victim.encode() in path.read_bytes():
                edit(base, lambda tensors: tensors[victim].__setitem__((2, 7), np.nan), file=path.name)
    out = merged(made[0], base, tmp_path / "out", body, verify=verify)
    said = "elements are not what they should be" if verify else f"{victim}: the base's weight or the result holds NaN"
    assert said in out
    assert f"{4 if verify else 2} copies" in out
    assert not (tmp_path / "out").exists()


def test_what_is_read_over_a_connection_is_read_by_threads(made):
    def plan(*sources):
        of = [SimpleNamespace(source=source) for source in sources]
        adapters = [SimpleNamespace(checkpoint=SimpleNamespace(weights=of[0]))]
        return SimpleNamespace(base=SimpleNamespace(files=dict(enumerate(of[1:]))), adapters=adapters)

    with LocalFile(made[0] / "adapter_config.json") as here:
        memory, elsewhere = MemoryFile("pickle", b""), SimpleNamespace()
        assert crew._is_at_hand(plan(memory, here, here))
        assert not crew._is_at_hand(plan(elsewhere, here))
        assert not crew._is_at_hand(plan(here, here, elsewhere))


def test_little_work_is_done_by_threads(made, tmp_path, monkeypatch):
    monkeypatch.setattr(crew.forking, "is_safe", lambda: pytest.fail("asked whether to make copies"))
    vera_tools.merge(made[0], base=made[1], output=tmp_path / "out", jobs=2)
    assert files(tmp_path / "out") == files(made[2])
