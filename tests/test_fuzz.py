"""The fuzzer itself: its sound files are sound, its seeds bring up nothing, and it finds what is planted."""

from __future__ import annotations

import random

import pytest

from fuzz import oracle, targets
from fuzz.mutation import Source
from vera_tools.architectures import witness
from vera_tools.checkpoints.manifest import Manifest
from vera_tools.files import local
from vera_tools.files.hub_reference import Reference
from vera_tools.files.safetensors import TensorFile
from vera_tools.verifying import recorded
from vera_tools.verifying.verifier import Verifier

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    """What `oracle.prepare` sets, for as long as a test runs."""
    monkeypatch.setenv("VERA_TOOLS_DEBUG", "1")
    monkeypatch.setattr(witness, "is_there", lambda: False)
    monkeypatch.setattr(local, "_TICKS", 0)


@pytest.mark.parametrize("files", [targets.adapter, targets.recorded, targets.stripped])
def test_the_sound_files_are_sound(files, tmp_path):
    oracle.put(tmp_path / "a", files())
    report = Verifier().verify(str(tmp_path / "a"))
    assert (report.verdict, report.ok) == ("reproducible", True)


def test_seeds_bring_up_nothing():
    names = {targets.run(seed) for seed in targets.seeds()}
    assert names == {target.__name__ for target in targets.TARGETS}


def inputs(count, seed=0):
    rng = random.Random(seed)
    return (rng.randbytes(24) for _ in range(count))


def finds(target, count):
    for data in inputs(count):
        try:
            with oracle.bounded(target.__name__):
                target(Source(data))
        except Exception as error:
            return error
    pytest.fail("nothing was found")


def test_a_planted_error_is_found(monkeypatch):
    monkeypatch.setattr(Manifest, "from_json", classmethod(lambda cls, text, **_: {}[text[:1]]))
    assert isinstance(finds(targets.manifest, 50), KeyError)


def test_a_reference_that_prints_to_another_is_found(monkeypatch):
    monkeypatch.setattr(Reference, "__str__", lambda self: f"hf://{self.repo}")
    assert "prints to another" in str(finds(targets.reference, 500))


def test_a_change_that_is_not_seen_is_found(monkeypatch):
    monkeypatch.setattr(recorded, "against_manifest", lambda checkpoint, scans: ())
    assert "called reproducible" in str(finds(targets.verify, 2000))


def test_what_is_left_behind_is_found(monkeypatch):
    def stop(self):
        (targets.Path(self.label).parent.parent / "left").mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(TensorFile, "file_sha256", stop)
    assert "left behind" in str(finds(targets.strip, 200))
