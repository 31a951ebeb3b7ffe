"""Merges that are killed, shared by several processes, starved of disk, or given files that change under them."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import vera_tools
from tests import ROOT
from tests.command import is_running, run_cli, run_json
from tests.merging.models import make_adapter, make_base, weights
from vera_tools.errors import CheckFailedError, FormatError, UsageError, VeraToolsError
from vera_tools.merging import copying, execution, staging
from vera_tools.merging import merge as merging

resource = pytest.importorskip("resource", reason="signals, limits and terminals of POSIX")

SHAPES = {f"model.layers.{n}.{p}": (512, 384) for n in range(8) for p in ("up", "gate")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base of 8 files, an adapter, and the result that every merge of the two must have."""
    folder = tmp_path_factory.mktemp("made")
    extra = {f"model.rest.{n}": np.random.default_rng(n).standard_normal(50_000).astype(np.float32) for n in range(8)}
    base = make_base(folder / "base", SHAPES, files=8, extra=extra)
    adapter = make_adapter(folder / "adapter", SHAPES, r=64)
    vera_tools.merge(adapter, base=base, output=folder / "expected")
    return base, adapter, snapshot(folder / "expected"), snapshot(base)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(made, out, *options):
    base, adapter, *_ = made
    return [sys.executable, "-m", "vera_tools", "merge", str(adapter), "--base", str(base), "-o", str(out), *options]


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# A merge in a process of its own that comes to a halt at its Nth computed block (of 16) and says so on its output, so
# that it is interrupted in the middle however fast or busy the machine is. Every block from there on takes a second.
# Ctrl-C reaches it as it would in a terminal, even where tests run in the background, where a shell has it ignored.
HALTING = """
import os, signal, sys, time
from vera_tools import blas
blas.start_alone()
from vera_tools.merging import crew, execution
after, crew.WORTH = int(sys.argv.pop(1)), int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)
original, told, (tokens, more) = execution.as_bytes, os.dup(1), os.pipe()
os.write(more, b"." * (after - 1))
os.set_blocking(tokens, False)
def as_bytes(*args):
    try:
        os.read(tokens, 1)
    except BlockingIOError:
        os.write(told, b"halted\\n")
        time.sleep(1)
    return original(*args)
execution.as_bytes = as_bytes
from vera_tools.cli import main
main(sys.argv[1:])
"""
#: Who does the work: threads, or, where processes can be copied, copies of the one that was started.
WORKERS = ["threads", pytest.param("copies", marks=pytest.mark.skipif(sys.platform != "linux", reason="no copies"))]


def halted(made, out, *options, after, workers="threads"):
    """A merge that is at work, halted at its computed block number ``after``."""
    worth, jobs = (0, ("--jobs", "2")) if workers == "copies" else (1 << 60, ())
    arguments = [sys.executable, "-c", HALTING, str(after), str(worth), *command(made, out, *options, *jobs)[3:]]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "halted\n", process.communicate()
    assert len(copies_of(process)) == (2 if workers == "copies" else 0)
    return process


def copies_of(process):
    """The numbers of the processes that one has started."""
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(n) for task in tasks.glob("*/children") for n in task.read_text().split()] if tasks.exists() else []


def open_files(pid):
    return [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]


def wait_for_the_end(pids):
    """Of processes that this one did not start."""
    deadline = time.monotonic() + 0.5  # a block takes a second
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finished_files(out):
    return {path.name for path in (staging.place(out) / "output").iterdir()}


class TestKill:
    @pytest.mark.parametrize("workers", WORKERS)
    @pytest.mark.parametrize("after", range(1, 16, 3))
    def test_sigkill_leaves_nothing_half_written_and_resumes(self, after, workers, made, tmp_path):
        out = tmp_path / "out"
        process = halted(made, out, after=after, workers=workers)
        copies = copies_of(process)
        assert not any(name.endswith("/lock") for pid in copies for name in open_files(pid))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        wait_for_the_end(copies)
        process.communicate()
        assert hidden(tmp_path) == [".out.merge"]
        finished = finished_files(out)
        report = vera_tools.merge(made[1], base=made[0], output=out, resume=True, verify=True)
        assert set(report.resumed) == finished & {path for path in made[2] if path.endswith(".safetensors")}
        assert snapshot(out) == made[2]
        assert hidden(tmp_path) == []
        assert snapshot(made[0]) == made[3]

    @pytest.mark.parametrize("seed", range(4))
    def test_sigkill_at_a_random_moment(self, seed, made, tmp_path):
        out = tmp_path / "out"
        process = subprocess.Popen(command(made, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(random.Random(seed).uniform(0.1, 0.8))
        process.kill()
        process.communicate()
        if not out.exists():  # otherwise it had come to its end
            vera_tools.merge(made[1], base=made[0], output=out, resume=staging.place(out).exists(), verify=True)
            assert hidden(tmp_path) == []
        assert snapshot(out) == made[2]

    def test_resume_takes_over_what_is_finished(self, made, tmp_path):
        out = tmp_path / "out"
        process = halted(made, out, after=10)
        process.kill()
        process.communicate()
        report = vera_tools.merge(made[1], base=made[0], output=out, resume=True)
        assert len(report.resumed) >= 2
        assert len(report.shards) >= 2
        assert len(report.resumed) + len(report.shards) == 8
        assert snapshot(out) == made[2]

    def test_without_resume_it_starts_afresh(self, made, tmp_path):
        out = tmp_path / "out"
        process = halted(made, out, after=10)
        process.kill()
        process.communicate()
        report = vera_tools.merge(made[1], base=made[0], output=out)
        assert report.resumed == ()
        assert snapshot(out) == made[2]

    @pytest.mark.parametrize("workers", WORKERS)
    def test_ctrl_c_keeps_what_is_finished(self, workers, made, tmp_path):
        out = tmp_path / "out"
        process = halted(made, out, after=10, workers=workers)
        copies = copies_of(process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
        assert process.returncode == 130, stderr
        assert not any(map(is_running, copies))
        assert list((staging.place(out) / "parts").iterdir()) == []
        assert "Traceback" not in stderr
        assert not out.exists()
        assert vera_tools.merge(made[1], base=made[0], output=out, resume=True).resumed
        assert snapshot(out) == made[2]

    def test_ctrl_c_between_closing_a_file_and_declaring_it_finished(self, made, tmp_path, monkeypatch):
        def interrupt(path):
            raise KeyboardInterrupt

        monkeypatch.setattr(execution, "confirm", interrupt)
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            vera_tools.merge(made[1], base=made[0], output=out)
        assert list((staging.place(out) / "parts").iterdir()) == []

    @pytest.mark.parametrize("damage", ["copied", "computed", "cut", "journal"])
    def test_resume_checks_what_is_there(self, damage, made, tmp_path):
        out = tmp_path / "out"
        vera_tools.merge(made[1], base=made[0], output=out, part=(1, 2))
        folder = staging.place(out)
        victim = min((folder / "output").iterdir())
        with vera_tools.files.safetensors.TensorFile.open(victim) as file:
            name = "model.rest" if damage == "copied" else ".weight"
            info = next(info for tensor, info in file.tensors.items() if name in tensor and "norm" not in tensor)
            place = file.data_start + info.start + 1000
        if damage == "journal":
            (folder / "journal" / victim.name).write_text("{}")
        elif damage == "cut":
            os.truncate(victim, victim.stat().st_size - 1)
        else:
            data = bytearray(victim.read_bytes())
            data[place] ^= 1
            victim.write_bytes(data)
        report = vera_tools.merge(made[1], base=made[0], output=out, part=(1, 2))
        assert report.shards == (victim.name,)
        assert victim.name not in report.resumed

    def test_what_a_power_failure_has_emptied_is_written_again(self, made, tmp_path):
        out = tmp_path / "out"
        process = halted(made, out, after=10)
        process.kill()
        process.communicate()
        folder = staging.place(out)
        finished = sorted(finished_files(out))
        assert len(finished) >= 2
        for path in (folder / "plan", folder / "journal" / finished[0]):
            os.truncate(path, 0)
        report = vera_tools.merge(made[1], base=made[0], output=out, resume=True)
        assert set(report.resumed) == set(finished[1:])
        assert snapshot(out) == made[2]

    def test_another_merge_is_not_resumed(self, made, tmp_path):
        out = tmp_path / "out"
        vera_tools.merge(made[1], base=made[0], output=out, part=(1, 2))
        with pytest.raises(UsageError, match="belongs to another merge"):
            vera_tools.merge(made[1], base=made[0], output=out, weights=[2], part=(2, 2))
        with pytest.raises(UsageError, match="have begun to fill"):
            vera_tools.merge(made[1], base=made[0], output=out)


@pytest.mark.long
class TestSharing:
    def test_a_base_on_the_hub_that_is_replaced_between_two_parts(self, hub, tmp_path):
        """Same names, shapes and sizes, other weights: nothing may be merged from some of both."""
        first, second = (make_base(tmp_path / f"base-{seed}", SHAPES, files=2, seed=seed) for seed in (0, 1))
        adapter = make_adapter(tmp_path / "adapter", SHAPES)
        repo = hub.add_repo("ann/base", snapshot(first))
        out = tmp_path / "out"
        vera_tools.merge(adapter, base="hf://ann/base", output=out, part=(1, 2))
        stored = {name: hub.store(data, large=name.endswith(".safetensors")) for name, data in snapshot(second).items()}
        old = repo.head.oid
        hub.commit(repo, "refs/heads/main", old, stored, "other weights", "ann")
        with pytest.raises(UsageError, match="belongs to another merge: base, "):
            vera_tools.merge(adapter, base="hf://ann/base", output=out, part=(2, 2))
        repo.refs["refs/heads/main"] = old
        vera_tools.merge(adapter, base="hf://ann/base", output=out, part=(2, 2))
        vera_tools.merge(adapter, base="hf://ann/base", output=out, finish=True)
        vera_tools.merge(adapter, base=first, output=tmp_path / "expected")
        assert weights(out).keys() == weights(first).keys()
        assert all(np.array_equal(weights(out)[n], t) for n, t in weights(tmp_path / "expected").items())

    def test_processes_share_the_files_and_one_finishes(self, made, tmp_path):
        out = tmp_path / "out"
        names = ("--part", "--shard", "--part")  # the second is the older name
        parts = [subprocess.Popen(command(made, out, name, f"{n}/3", "-q")) for n, name in enumerate(names, 1)]
        assert [part.wait() for part in parts] == [0, 0, 0]
        assert not out.exists()
        code, document = run_json(*command(made, out, "--finish", "--verify")[3:])
        assert code == 0
        assert document["finished"] is True
        assert len(document["resumed"]) == 8
        assert snapshot(out) == made[2]
        assert hidden(tmp_path) == []

    def test_every_file_belongs_to_exactly_one_part(self, made, tmp_path):
        reports = [vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", part=(n, 3)) for n in (1, 2, 3)]
        names = [name for report in reports for name in report.shards]
        assert sorted(names) == sorted(path for path in made[2] if path.endswith(".safetensors"))
        assert all(len(report.shards) in (2, 3) for report in reports)
        assert not any(report.finished for report in reports)

    def test_more_parts_than_files(self, made, tmp_path):
        for n in range(1, 11):
            vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", part=(n, 10))
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", finish=True)
        assert snapshot(tmp_path / "out") == made[2]

    def test_finish_refuses_what_is_incomplete(self, made, tmp_path):
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", part=(1, 3))
        with pytest.raises(UsageError, match="not every file is finished"):
            vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", finish=True)
        assert hidden(tmp_path) == [".out.merge"]
        for n in (2, 3):
            vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", part=(n, 3))
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", finish=True)
        assert snapshot(tmp_path / "out") == made[2]

    @pytest.mark.parametrize("workers", WORKERS)
    def test_two_merges_into_one_output(self, workers, made, tmp_path):
        out = tmp_path / "out"
        first = halted(made, out, after=8, workers=workers)
        first.send_signal(signal.SIGSTOP)
        try:
            for options in ((), ("--resume",), ("--finish",), ("--part", "1/2")):
                second = run_cli(*command(made, out, *options)[3:])
                assert second.returncode == 2
                assert "another merge is at work on this output" in second.stderr
        finally:
            first.send_signal(signal.SIGCONT)
            first.communicate()
        assert first.returncode == 0
        assert snapshot(out) == made[2]

    def test_many_at_once_leave_one_result(self, made, tmp_path):
        processes = [subprocess.Popen(command(made, tmp_path / "out"), stderr=subprocess.PIPE) for _ in range(4)]
        codes = [process.wait() for process in processes if process.communicate()]
        assert codes.count(0) == 1
        assert set(codes) <= {0, 2}
        assert snapshot(tmp_path / "out") == made[2]
        assert hidden(tmp_path) == []


class TestDisk:
    def test_a_full_disk(self, made, tmp_path, small_disk):
        with small_disk(1_500_000) as folder:
            result = run_cli(*command(made, folder / "out")[3:])
            assert result.returncode == 1
            assert "the disk has too little room" in result.stderr
            assert list(folder.iterdir()) == []

    def test_a_disk_that_fills_up_meanwhile(self, made, tmp_path):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

        result = subprocess.run(
            command(made, tmp_path / "out"), capture_output=True, text=True, preexec_fn=limit, check=False
        )
        assert result.returncode == 1
        assert "could not be written" in result.stderr
        assert "Traceback" not in result.stderr
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "replace"])
    def test_any_call_that_fails(self, call, made, tmp_path, monkeypatch):
        calls = iter(range(100))

        def fail(*args, **options):
            if next(calls) < 1:
                return original(*args, **options)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        where = Path if call == "replace" else os  # Python 3.10's paths keep the function that they found
        original = getattr(where, call)
        monkeypatch.setattr(where, call, fail)
        with pytest.raises(VeraToolsError, match="No space left"):
            vera_tools.merge(made[1], base=made[0], output=tmp_path / "out")
        monkeypatch.undo()
        assert list(tmp_path.iterdir()) == []

    def test_a_part_of_a_shared_merge_that_fails_leaves_no_half_file(self, made, tmp_path, monkeypatch):
        def fail(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        out = tmp_path / "out"
        vera_tools.merge(made[1], base=made[0], output=out, part=(1, 2))
        monkeypatch.setattr(os, "copy_file_range", fail)
        with pytest.raises(VeraToolsError, match="No space left"):
            vera_tools.merge(made[1], base=made[0], output=out, part=(2, 2))
        monkeypatch.undo()
        assert list((staging.place(out) / "parts").iterdir()) == []
        assert len(list((staging.place(out) / "output").iterdir())) == 4
        vera_tools.merge(made[1], base=made[0], output=out, part=(2, 2))
        vera_tools.merge(made[1], base=made[0], output=out, finish=True)
        assert snapshot(out) == made[2]

    def test_a_system_without_copy_file_range(self, made, tmp_path, monkeypatch):
        def refuse(*args):
            raise OSError(errno.EXDEV, "cross-device")

        monkeypatch.setattr(os, "copy_file_range", refuse)
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out")
        assert snapshot(tmp_path / "out") == made[2]
        monkeypatch.setattr(os, "copy_file_range", lambda *args: 0)
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "zero")
        assert snapshot(tmp_path / "zero") == made[2]
        monkeypatch.delattr(os, "copy_file_range")
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "none")
        assert snapshot(tmp_path / "none") == made[2]

    def test_copies_in_pieces(self, made, tmp_path, monkeypatch):
        monkeypatch.setattr(copying, "PIECE", 1000)
        monkeypatch.setattr(execution, "PIECE", 3001)
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", jobs=4)
        assert snapshot(tmp_path / "out") == made[2]


class TestChangingBase:
    @pytest.fixture
    def own(self, tmp_path):
        base = make_base(tmp_path / "base", SHAPES, files=4)
        return base, make_adapter(tmp_path / "adapter", SHAPES, r=64)

    def merge_while(self, own, tmp_path, monkeypatch, happen):
        """Merge, and let something happen to the base once the plan is made."""
        base, adapter = own
        original = merging.make

        def make(*args, **options):
            plan = original(*args, **options)
            happen(sorted(base.glob("*.safetensors"))[-1])
            return plan

        monkeypatch.setattr(merging, "make", make)
        return vera_tools.merge(adapter, base=base, output=tmp_path / "out")

    def test_a_shard_that_is_truncated(self, own, tmp_path, monkeypatch):
        with pytest.raises(FormatError, match=r"ends too early|changed while it was read"):
            self.merge_while(own, tmp_path, monkeypatch, lambda path: os.truncate(path, path.stat().st_size // 2))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]

    def test_a_shard_that_is_written_to(self, own, tmp_path, monkeypatch):
        def write(path):
            with path.open("r+b") as stream:
                stream.seek(-100, os.SEEK_END)
                stream.write(b"\0")

        with pytest.raises(FormatError, match="changed while it was read"):
            self.merge_while(own, tmp_path, monkeypatch, write)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]

    def test_a_shard_that_vanishes_while_it_is_open_is_refused(self, own, tmp_path, monkeypatch):
        """It could still be read; whether what else was read belongs to it, nobody could say."""
        with pytest.raises(FormatError, match="changed while it was read"):
            self.merge_while(own, tmp_path, monkeypatch, lambda path: path.unlink())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]

    def test_a_shard_that_is_not_there(self, own, tmp_path):
        max(own[0].glob("*.safetensors")).unlink()
        with pytest.raises(FormatError, match=r"not there.*model-00004-of-00004"):
            vera_tools.merge(own[1], base=own[0], output=tmp_path / "out")

    def test_a_shard_that_is_cut_off_is_refused_before_anything_is_written(self, own, tmp_path):
        path = max(own[0].glob("*.safetensors"))
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FormatError, match="do not fill the file"):
            vera_tools.merge(own[1], base=own[0], output=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


class TestVerify:
    @pytest.mark.parametrize("victim", ["model.rest.3", "model.layers.2.up.weight"])
    def test_one_wrong_bit_is_found_and_nothing_appears(self, victim, made, tmp_path, monkeypatch):
        original = merging.verification.verify

        def corrupt(plan, staging, **options):
            shard = next(s for s in plan.shards if any(e.info.name == victim for e in s.entries))
            entry = next(e for e in shard.entries if e.info.name == victim)
            path = staging.done(shard)
            data = bytearray(path.read_bytes())
            data[shard.data_start + entry.info.start + 1200] ^= 2
            path.write_bytes(data)
            return original(plan, staging, **options)

        monkeypatch.setattr(merging.verification, "verify", corrupt)
        with pytest.raises(CheckFailedError, match=victim.replace(".", r"\.")):
            vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", verify=True)
        assert list(tmp_path.iterdir()) == []

    def test_progress_ends_at_the_total(self, made, tmp_path):
        seen = []
        vera_tools.merge(
            made[1], base=made[0], output=tmp_path / "out", verify=True, progress=lambda *a: seen.append(a)
        )
        done, total, _ = seen[-1]
        assert 0.97 * total < done <= total
        assert [row[0] for row in seen] == sorted(row[0] for row in seen)

    def test_sync(self, made, tmp_path, monkeypatch):
        synced = []
        monkeypatch.setattr(
            os, "fsync", lambda fd, o=os.fsync: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), o(fd))
        )
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out")
        assert not any(path.endswith(".safetensors") and "output" in path for path in synced)
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "durable", sync=True)
        assert sum(path.endswith(".safetensors") and "output" in path for path in synced) == 8


def test_the_record_is_the_same_after_a_resume(made, tmp_path):
    for n in (1, 2):
        vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", part=(n, 2))
    vera_tools.merge(made[1], base=made[0], output=tmp_path / "out", finish=True)
    assert json.loads((tmp_path / "out/vera_merge.json").read_bytes()) == json.loads(made[2]["vera_merge.json"])


def test_threads_end_and_blas_gets_its_own_back(made, tmp_path):
    import threadpoolctl

    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    before = threading.active_count(), [library["num_threads"] for library in blas.info()]
    vera_tools.merge(made[1], base=made[0], output=tmp_path / "out")
    assert (threading.active_count(), [library["num_threads"] for library in blas.info()]) == before
