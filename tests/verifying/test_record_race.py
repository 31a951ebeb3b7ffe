"""`record` beside whatever else writes to the folder: no manifest describes what is not there any more."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import threading
import time

import pytest

import vera_tools
from tests.adapters import CONFIG, MANIFEST, WEIGHTS, edit, files_of, flip
from tests.merging.models import make_adapter
from tests.verifying.reports import failed, one
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.writing import replaced_files
from vera_tools.errors import FormatError, VeraToolsError
from vera_tools.files import atomic

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
needs_exchange = pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step")


def train_on(folder):
    """What a trainer does that knows nothing of us: other vectors into the file."""
    flip(folder / WEIGHTS, -9)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("recorded", [False, True], ids=["no manifest", "a manifest"])
def test_who_asks_for_no_lock_and_writes_meanwhile(tmp_path, monkeypatch, when, recorded):
    """The moments just before and just after the manifest appears; what was there comes back."""
    folder = make_adapter(tmp_path / "x")
    if recorded:
        vera_tools.record(folder)
        edit(folder, lambda tensors: [array.__imul__(2) for name, array in tensors.items() if "lambda" in name])
    before = files_of(folder)
    write_bytes, calls = atomic.write_bytes, []

    def writing(path, data, **options):
        calls.append(path)
        if len(calls) == 1 and when == "before":
            train_on(folder)
        write_bytes(path, data, **options)
        if len(calls) == 1 and when == "after":
            train_on(folder)

    monkeypatch.setattr(atomic, "write_bytes", writing)
    with pytest.raises(FormatError, match="was changed while it was read"):
        vera_tools.record(folder)
    after = files_of(folder)
    assert after.pop(WEIGHTS) != before.pop(WEIGHTS)
    assert after == before


def test_what_was_changed_before_is_not_recorded_for_a_moment(tmp_path, monkeypatch):
    folder = make_adapter(tmp_path / "x")
    alone = atomic.alone

    def waiting(path):
        train_on(folder)
        return alone(path)

    monkeypatch.setattr(atomic, "alone", waiting)
    monkeypatch.setattr(atomic, "write_bytes", lambda *_, **__: pytest.fail("it was written"))
    with pytest.raises(FormatError, match="was changed while it was read"):
        vera_tools.record(folder)


@needs_exchange
def test_a_conversion_in_place_is_waited_for(tmp_path, monkeypatch):
    """It holds the folder before `record` looks at what is there, and lets it go after the exchange."""
    folder = make_adapter(tmp_path / "x")
    holds, go_on = threading.Event(), threading.Event()
    exchange = atomic.exchange

    def exchanging(a, b):
        holds.set()
        assert go_on.wait(10)
        exchange(a, b)

    monkeypatch.setattr(atomic, "exchange", exchanging)
    converting = threading.Thread(target=lambda: vera_tools.strip_projections(folder, in_place=True))
    converting.start()
    assert holds.wait(10)
    threading.Timer(0.1, go_on.set).start()
    with pytest.raises(FormatError, match="was changed while it was read"):
        vera_tools.record(folder)
    converting.join()
    assert not failed(one(folder))
    assert not one(folder).projections_stored


@needs_exchange
@pytest.mark.parametrize("kind", ["overwritten", "saved"])
def test_record_is_waited_for(tmp_path, monkeypatch, kind):
    """Another output of that name, and files that are saved into it, come after the manifest."""
    folder, other = make_adapter(tmp_path / "x"), make_adapter(tmp_path / "other", seed=2)
    vera_tools.strip_projections(other, tmp_path / "stripped")
    order = []

    def write():
        if kind == "overwritten":
            vera_tools.strip_projections(other, folder, overwrite=True)
        else:
            with replaced_files(folder) as scratch:
                for name in (WEIGHTS, CONFIG, MANIFEST):
                    shutil.copy(tmp_path / "stripped" / name, scratch)
        order.append("write")

    writer = threading.Thread(target=write)
    write_bytes = atomic.write_bytes

    def writing(path, data, **options):
        writer.start()
        time.sleep(0.2)  # time enough to write, were it not held
        write_bytes(path, data, **options)
        order.append("record")

    monkeypatch.setattr(atomic, "write_bytes", writing)
    vera_tools.record(folder)
    monkeypatch.undo()
    writer.join()
    assert order == ["record", "write"]
    assert not failed(one(folder))
    assert json.loads((folder / MANIFEST).read_text())["original"]


def test_nothing_is_saved_over_what_was_changed_since_it_was_read(tmp_path):
    folder = make_adapter(tmp_path / "x")
    with Checkpoint.open(folder) as checkpoint:
        train_on(folder)
        before = files_of(folder)
        with (  # noqa: PT012
            pytest.raises(FormatError, match=f"{WEIGHTS}: the file was changed while"),
            replaced_files(folder, check=checkpoint.check_unchanged) as scratch,
        ):
            for name in (WEIGHTS, CONFIG, MANIFEST):
                (scratch / name).write_text("other")
        assert files_of(folder) == before
        checkpoint.folder.forget()


def test_a_file_that_is_written_while_others_are_saved_is_an_error(tmp_path, monkeypatch):
    """The weights are in their place, the manifest is not yet, and a trainer writes others."""
    folder = make_adapter(tmp_path / "x")
    vera_tools.record(folder)
    before, file = files_of(folder), atomic.file
    written = []

    def writing(path, **options):
        written.append(path.name)
        if path.name == MANIFEST:
            train_on(folder)
        return file(path, **options)

    monkeypatch.setattr(atomic, "file", writing)
    with (  # noqa: PT012
        pytest.raises(FormatError, match=f"{WEIGHTS}: the file was changed while"),
        replaced_files(folder) as scratch,
    ):
        for name, content in before.items():
            (scratch / name).write_bytes(content)
    assert written == [WEIGHTS, CONFIG, MANIFEST]


@needs_exchange
def test_both_at_once(tmp_path):
    """Whoever is first, what lies there in the end is whole; and now and then each of them is."""
    made = make_adapter(tmp_path / "made")
    ends = set()
    for number in range(30):
        folder = tmp_path / str(number)
        shutil.copytree(made, folder)
        found = {}

        def run(name, call, found=found):
            try:
                call()
                found[name] = "done"
            except VeraToolsError as error:
                found[name] = type(error).__name__

        strip = functools.partial(vera_tools.strip_projections, folder, in_place=True)
        record = functools.partial(vera_tools.record, folder)
        threads = [threading.Thread(target=run, args=item) for item in (("strip", strip), ("record", record))]
        threads[number % 2].start()
        time.sleep(0.001 * (number % 7))
        threads[1 - number % 2].start()
        for thread in threads:
            thread.join()
        ends.add(tuple(sorted(found.items())))
        assert not failed(one(folder)), (number, found)
    assert any(dict(end)["strip"] == "done" for end in ends)
