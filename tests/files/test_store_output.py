"""Outputs in object stores: whole or not there, whoever looks and whatever fails."""

from __future__ import annotations

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, MANIFEST, WEIGHTS, base_of, files_of
from tests.command import run_cli, run_json
from vera_tools.errors import FormatError, StoreError, UsageError, VeraToolsError
from vera_tools.files.store import UNFINISHED

HERE = CHECKPOINTS / KEPT


def test_what_is_written_is_what_would_be_on_disk(memory, tmp_path):
    """From disk to a store, from a store to disk, and from one place in a store to another."""
    base = memory.put("base", base_of(KEPT))
    there = memory.put("adapter", HERE)
    vera_tools.strip_projections(HERE, tmp_path / "stripped")
    vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    vera_tools.to_lora(HERE, tmp_path / "lora", base=base_of(KEPT))
    assert vera_tools.strip_projections(there, memory / "stripped").output == memory / "stripped"
    vera_tools.embed_projections(memory / "stripped", memory / "embedded")
    vera_tools.to_lora(there, memory / "lora", base=base)
    for name in ("stripped", "embedded"):
        assert memory.files(name) == files_of(tmp_path / name)
    assert memory.files("lora").keys() == files_of(tmp_path / "lora").keys()
    assert memory.files("lora")[WEIGHTS] == files_of(tmp_path / "lora")[WEIGHTS]
    code, report = run_json("embed-projections", memory / "stripped", "-o", memory / "again")
    assert (code, report["path"], report["output"]) == (0, memory / "stripped", memory / "again")
    assert memory.files("embedded")[WEIGHTS] == (HERE / WEIGHTS).read_bytes()


def test_a_merge_comes_from_a_store_and_goes_to_one(memory, tmp_path):
    base = memory.put("base", base_of(KEPT))
    report = vera_tools.merge(memory.put("adapter", HERE), base=base, output=memory / "merged", verify=True)
    vera_tools.merge(HERE, base=base_of(KEPT), output=tmp_path / "merged")
    assert (report.path, report.base, report.finished) == (memory / "merged", base, True)
    merged = memory.files("merged")
    assert merged.keys() == files_of(tmp_path / "merged").keys()
    assert merged["model.safetensors"] == (tmp_path / "merged" / "model.safetensors").read_bytes()
    for options in ({"part": (1, 2)}, {"resume": True}, {"finish": True}):
        with pytest.raises(UsageError, match="take a folder on disk"):
            vera_tools.merge(HERE, base=base, output=memory / "other", **options)
    assert memory.files("other") == {}


@pytest.mark.parametrize(
    ("output", "options", "why"),
    [
        ("{}/adapter", {}, "the output lies inside an input's folder"),
        ("{}/adapter/below", {}, "the output lies inside an input's folder"),
        ("{}/there", {}, "already exists"),
        ("{}/new", {"overwrite": True}, "a store cannot replace a folder in one step"),
        ("memory://", {}, "this is no folder in a store"),
        ("ftp://host/a", {}, "may show half an object"),
        ("ftp://me:hunter2x@host/a", {}, "an address with a password"),
        ("hf://ann/x", {}, "is on the Hub"),
    ],
)
def test_what_cannot_appear_whole_is_refused_before_any_work(memory, output, options, why):
    memory.put("there", {"a": b"x"})
    address = memory.put("adapter", HERE)
    with pytest.raises(UsageError, match=why) as caught:
        vera_tools.strip_projections(address, output.replace("{}", memory.address), **options)
    assert "hunter2x" not in str(caught.value)
    assert memory.files().keys() == {"there/a", *(f"adapter/{name}" for name in files_of(HERE))}


def test_other_commands_write_to_no_store(memory, hub):
    assert run_cli("regenerate", "--checkpoint", HERE, "-o", memory / "pair").returncode == 2
    assert run_cli("pull", "ann/x", "-o", memory / "pulled").returncode == 2
    assert run_cli("strip-projections", "-R", CHECKPOINTS, "--out-dir", memory / "all").returncode == 2
    with pytest.raises(UsageError, match="only what is on disk is changed in place"):
        vera_tools.strip_projections(memory.put("adapter", HERE), in_place=True)


def test_a_dry_run_makes_nothing(memory):
    adapter, base = memory.put("adapter", HERE), memory.put("base", base_of(KEPT))
    before = memory.files()
    assert vera_tools.strip_projections(adapter, memory / "out", dry_run=True).output == memory / "out"
    assert vera_tools.merge(adapter, base=base, output=memory / "merged", dry_run=True).path == memory / "merged"
    assert memory.files() == before


@pytest.fixture
def writes(monkeypatch):
    """Called before each object that is written, with its name."""
    steps = []

    def wrap(name, place):
        function = getattr(MemoryFileSystem, name)

        def wrapped(self, *given, **options):
            for step in steps:
                step(given[place].rsplit("/", 1)[-1])
            return function(self, *given, **options)

        monkeypatch.setattr(MemoryFileSystem, name, wrapped)

    wrap("pipe_file", 0)
    wrap("put_file", 1)
    wrap("rm_file", 0)
    return steps


def test_a_store_that_keeps_half_of_what_it_was_given(memory, monkeypatch):
    def put_half(self, here, there, **options):
        with open(here, "rb") as stream:
            content = stream.read()
        self.pipe_file(there, content[: len(content) // 2])

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_half)
    with pytest.raises(StoreError, match="the store does not hold what was written"):
        vera_tools.strip_projections(HERE, memory / "out")
    assert memory.files("out") == {}


def test_a_reader_never_sees_a_part(memory, writes):
    """Ours is told that it is not whole; one that begins with the config finds none before all else is there."""
    seen = []

    def look(name):
        files = memory.files("out")
        seen.append(name)
        if not files:
            return
        assert UNFINISHED in files
        assert CONFIG not in files or files.keys() >= {WEIGHTS, MANIFEST}
        with pytest.raises(FormatError, match="this is being written, or was left unfinished"):
            vera_tools.inspect(memory / "out")

    adapter = memory.put("adapter", HERE)
    writes.append(look)
    vera_tools.strip_projections(adapter, memory / "out")
    assert (seen[0], seen[1], seen[-2], seen[-1]) == (UNFINISHED, UNFINISHED, CONFIG, UNFINISHED)
    assert memory.files("out").keys() == {CONFIG, WEIGHTS, MANIFEST, "expected_logits.json"}
    assert vera_tools.verify(memory / "out").exit_code == 0


def test_a_store_that_writes_over_what_is_there_is_refused(memory, monkeypatch):
    pipe = MemoryFileSystem.pipe_file
    adapter = memory.put("adapter", HERE)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lambda self, path, value, **_: pipe(self, path, value))
    with pytest.raises(StoreError, match="writes over what is there although it is told not to"):
        vera_tools.strip_projections(adapter, memory / "out")
    assert memory.files("out") == {}


@pytest.mark.parametrize("fails", [UNFINISHED, CONFIG, WEIGHTS, MANIFEST])
def test_what_fails_leaves_nothing(memory, writes, fails):
    failed = []

    def fail(name):
        if name == fails and not failed:
            failed.append(name)
            raise ConnectionError("broken off")

    adapter = memory.put("adapter", HERE)
    writes.append(fail)
    with pytest.raises(StoreError, match="the store cannot be reached: broken off"):
        vera_tools.strip_projections(adapter, memory / "out")
    assert memory.files("out") == {}
    assert vera_tools.strip_projections(adapter, memory / "out").output == memory / "out"


def test_what_cannot_be_removed_is_marked(memory, writes):
    """As after a kill: no reader takes it, and the next writer says what it is."""

    def fail(name):
        if name == CONFIG:
            writes[:] = [lambda _: (_ for _ in ()).throw(ConnectionError("broken off"))]
            raise ConnectionError("broken off")

    adapter = memory.put("adapter", HERE)
    writes.append(fail)
    with pytest.raises(StoreError, match="broken off"):
        vera_tools.strip_projections(adapter, memory / "out")
    writes.clear()
    assert UNFINISHED in memory.files("out")
    assert CONFIG not in memory.files("out")
    with pytest.raises(FormatError, match="left unfinished by a run that was killed"):
        vera_tools.verify(memory / "out").checkpoints[0] and vera_tools.inspect(memory / "out")
    with pytest.raises(UsageError, match="a run is writing here, or was killed while it did"):
        vera_tools.strip_projections(adapter, memory / "out")


def test_an_answer_that_is_lost_leaves_no_part(memory, monkeypatch):
    """The client asks again, and is told that the object is there: it is ours, and nobody can know it."""
    put = MemoryFileSystem.put_file

    def lose(self, source, target, **options):
        put(self, source, target, **options)
        if target.endswith(CONFIG):
            raise FileExistsError(target)

    adapter = memory.put("adapter", HERE)
    monkeypatch.setattr(MemoryFileSystem, "put_file", lose)
    with pytest.raises(StoreError, match="something is there already"):
        vera_tools.strip_projections(adapter, memory / "out")
    assert memory.files("out").keys() == {CONFIG, UNFINISHED}
    assert vera_tools.verify(memory / "out").checkpoints[0].verdict == "invalid"


def test_a_mark_that_stays_is_named(memory, writes):
    def fail(name):
        if CONFIG in memory.files("out") and name == UNFINISHED:
            raise ConnectionError("broken off")

    adapter = memory.put("adapter", HERE)
    writes.append(fail)
    with pytest.raises(StoreError, match=f"{UNFINISHED}: all is written, but the mark"):
        vera_tools.strip_projections(adapter, memory / "out")
    writes.clear()
    memory.remove(f"out/{UNFINISHED}")
    assert vera_tools.verify(memory / "out").exit_code == 0


@pytest.mark.parametrize("when", [UNFINISHED, WEIGHTS, CONFIG])
def test_of_two_writers_one_is_refused(memory, writes, when):
    other = []

    def meanwhile(name):
        if name == when and not other:
            other.append(name)
            try:
                vera_tools.strip_projections(adapter, memory / "out")
            except VeraToolsError as error:
                other.append(error)

    adapter = memory.put("adapter", HERE)
    writes.append(meanwhile)
    if when == UNFINISHED:  # the other one finished before this one began
        with pytest.raises(UsageError, match="has appeared meanwhile"):
            vera_tools.strip_projections(adapter, memory / "out")
        assert len(other) == 1
    else:
        vera_tools.strip_projections(adapter, memory / "out")
        assert isinstance(other[1], UsageError)
    assert memory.files("out").keys() == {CONFIG, WEIGHTS, MANIFEST, "expected_logits.json"}
    assert vera_tools.verify(memory / "out").exit_code == 0


def test_an_input_that_changes_leaves_no_output(memory, monkeypatch):
    from vera_tools.converting import strip

    write = strip.write_checkpoint

    def changing(*given, **options):
        memory.put(f"adapter/{CONFIG}", (HERE / CONFIG).read_bytes())
        return write(*given, **options)

    adapter = memory.put("adapter", HERE)
    monkeypatch.setattr(strip, "write_checkpoint", changing)
    with pytest.raises(FormatError, match=f"{CONFIG}: the file was changed while it was read"):
        vera_tools.strip_projections(adapter, memory / "out")
    assert memory.files("out") == {}
