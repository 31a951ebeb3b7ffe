"""What is looked at once for many checkpoints is never said of one that it does not hold of."""

from __future__ import annotations

import itertools
import json
import shutil
import struct

import ml_dtypes
import numpy as np
import pytest

import vera_tools
from tests.adapters import (
    CHECKPOINTS,
    CONFIG,
    KEPT,
    MANIFEST,
    PAIR,
    WEIGHTS,
    config_of,
    edit,
    edit_manifest,
    set_config,
)
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.files import safetensors, safetensors_header, safetensors_library
from vera_tools.files.local import MemoryFile
from vera_tools.files.safetensors import TensorFile
from vera_tools.projections.pair import PairShape
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying import checks
from vera_tools.verifying.verifier import Verifier


@pytest.fixture(scope="module")
def alike(tmp_path_factory):
    """Adapters of which each two share something: the header, the config, or the manifest."""
    root = tmp_path_factory.mktemp("alike")
    recorded = root / "recorded"
    shutil.copytree(CHECKPOINTS / KEPT, recorded)
    vera_tools.record(recorded)

    def another(name, change):
        change(shutil.copytree(recorded, root / name))

    another("other r", lambda folder: set_config(folder, r=8))
    another("other key", lambda folder: set_config(folder, projection_prng_key=7))
    another("other targets", lambda folder: set_config(folder, target_modules=["k_proj"]))
    another("a head", lambda folder: set_config(folder, modules_to_save=["other"]))
    another("not saved", lambda folder: set_config(folder, save_projection=False))
    another("unknown key", lambda folder: set_config(folder, unheard_of=1))
    another("other values", lambda folder: edit(folder, lambda tensors: tensors[PAIR[0]].__setitem__((0, 0), 3)))
    another("other names", lambda folder: edit(folder, lambda tensors: _rename(tensors, ".q_proj.", ".k_proj.")))
    another("a NaN", lambda folder: edit(folder, lambda tensors: tensors[PAIR[0]].__setitem__((1, 2), np.nan)))
    another("no manifest", lambda folder: (folder / MANIFEST).unlink())
    another("no config", lambda folder: (folder / CONFIG).unlink())
    another("longer", lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"))
    stripped = root / "stripped"
    vera_tools.strip_projections(recorded, stripped)
    wider = shutil.copytree(stripped, root / "wider")

    def widen(manifest):
        for name, shape in (("vera_A", [16, 65]), ("vera_B", [65, 16])):
            manifest["projections"][name]["shape"] = shape
        manifest.update(in_max=65, out_max=65)

    edit_manifest(wider, widen)
    edit(wider, lambda tensors: None, metadata={"format": "pt"})
    edit(shutil.copytree(stripped, root / "no record"), lambda tensors: None, metadata={"format": "pt"})
    return sorted(path for path in root.iterdir())


def _rename(tensors, one, other):
    for name in list(tensors):
        tensors[name.replace(one, other)] = tensors.pop(name)


def test_in_whatever_order_they_come(alike):
    """Each says what it says to a verifier that has seen nothing else."""
    expected = {path: Verifier().verify(str(path)) for path in alike}
    assert len({(report.verdict, report.checks) for report in expected.values()}) == len(alike)
    for paths in (alike, alike[::-1], [path for pair in itertools.pairwise(alike) for path in pair]):
        verifier = Verifier()
        assert [verifier.verify(str(path)) for path in paths] == [expected[path] for path in paths]


def test_a_refusal_of_the_library_is_asked_for_again(alike, monkeypatch):
    """It may have been for want of memory."""
    (recorded,) = (path for path in alike if path.name == "recorded")
    verifier, read = Verifier(), safetensors_library.read
    monkeypatch.setattr(safetensors_library, "read", lambda header, size: (_ for _ in ()).throw(_refused()))
    assert {check.id for check in verifier.verify(str(recorded)).failed} == {"tensors.official"}
    monkeypatch.setattr(safetensors_library, "read", read)
    assert verifier.verify(str(recorded)).ok


def _refused():
    return vera_tools.errors.FormatError("cannot map the file")


def test_a_config_that_was_changed_in_memory_is_nobody_elses(alike):
    (recorded,) = (path for path in alike if path.name == "recorded")
    with Checkpoint.open(recorded) as one, Checkpoint.open(recorded) as two:
        one.config.r = 1
        one.weights.tensors.clear()
        one.weights.metadata["x"] = "y"
        one.layers.clear()
        one.projections.clear()
        assert two.config.r == config_of(recorded)["r"]
        assert two.weights.tensors
        assert len(two.layers) == 4
        assert len(two.projections) == 2
        assert "x" not in two.weights.metadata
    with Checkpoint.open(recorded) as three:
        assert (len(three.layers), len(three.projections), len(three.weights.tensors)) == (4, 2, 10)


def file_of(tensors, metadata=None):
    infos = safetensors.layout({name: (array.dtype.name, array.shape) for name, array in tensors.items()})
    header = safetensors.encode_header(infos, metadata or {})
    data = b"".join(tensors[name].tobytes() for name in infos)
    return MemoryFile("memory", struct.pack("<Q", len(header)) + header + data)


def test_equal_headers_are_parsed_once_and_a_refusal_names_the_file(monkeypatch):
    tensors = {"a": np.zeros(3, np.float32), "never seen before": np.zeros(2, np.float16)}
    one, two = TensorFile(file_of(tensors)), TensorFile(file_of(tensors))
    assert one.parsed is two.parsed
    assert one.tensors is not two.tensors
    assert TensorFile(file_of(tensors, {"b": "c"})).parsed is not one.parsed
    broken = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}).encode()
    for label in ("one", "two"):
        with pytest.raises(vera_tools.errors.FormatError, match=f"{label}: a"):
            safetensors_header.read_header(broken, where=label)
    long = {f"{n}{'x' * 4000}": np.zeros(1, np.float32) for n in range(40)}
    assert TensorFile(file_of(long)).parsed is not TensorFile(file_of(long)).parsed


DTYPES = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int32, np.uint8)
VALUES = {
    "zeros": lambda array: array.fill(0),
    "negative zeros": lambda array: array.fill(-0.0 if array.dtype.kind not in "iu" else 0),
    "zero first": lambda array: array.reshape(-1)[:1].fill(0),
    "zero but for the last": lambda array: (array.fill(0), array.reshape(-1)[-1:].fill(1)),
    "ones": lambda array: array.fill(1),
    "NaN": lambda array: array.dtype.kind in "iu" or array.reshape(-1)[-1:].fill(np.nan),
    "infinity": lambda array: array.dtype.kind in "iu" or array.reshape(-1)[:1].fill(-np.inf),
}


@pytest.mark.parametrize("seed", range(60))
def test_neighbours_are_scanned_as_each_alone(seed, monkeypatch):
    """Of any dtypes, side by side, some of them empty or larger than what is read at a time."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(safetensors, "CHUNK", 96)  # of which the largest of these tensors takes two and a half
    tensors = {"large": np.ones(60, np.float16)}
    dtypes = DTYPES if seed % 2 else DTYPES[:2]
    for number in range(12):
        size = rng.choice([0, 1, 2, 3, 5, 30])
        array = np.ones((size, 1) if number % 3 else (size,), dtypes[rng.integers(len(dtypes))])
        list(VALUES.values())[rng.integers(len(VALUES) if seed % 3 == 0 else 5)](array)
        tensors[f"{rng.integers(100)}-{number}"] = array
    with TensorFile(file_of(tensors)) as file:
        found = checks.scan(type("Opened", (), {"weights": file}))
        alone = {info.name: checks._scan(info, file.chunks(info)) for info in file.tensors.values()}
        assert list(found.items()) == list(alone.items())
        assert file.digests() == {name: scan.sha256 for name, scan in alone.items()}
        runs = [[info.name for info in infos] for infos, _ in file.runs()]
        assert [name for run in runs for name in run] == list(file.tensors)
        assert any(len(run) > 1 for run in runs)
        assert any(len(run) == 1 for run in runs)


def test_a_file_alone_of_which_the_names_are_odd(tmp_path):
    """What its own record says of the pair is asked for once the names are put right."""
    folder = shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "adapter")
    vera_tools.record(folder)
    with Checkpoint.open(folder) as opened:
        metadata = opened.recorded.to_metadata()
    edit(
        folder,
        lambda tensors: tensors.update({f"_orig_mod.{n}": tensors.pop(n) for n in list(tensors)}),
        metadata=metadata,
    )
    (folder / CONFIG).unlink()
    (folder / MANIFEST).unlink()
    report = Verifier().verify(str(folder / WEIGHTS))
    assert (report.verdict, report.save_projection, report.projections_stored) == ("reproducible", True, True)
    assert {check.id for check in report.failed} == {"tensors.names"}
    edit(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(PAIR)])
    report = Verifier().verify(str(folder / WEIGHTS))
    assert (report.verdict, report.save_projection, report.projections_stored) == ("reproducible", False, False)


def test_each_record_is_its_own():
    shapes = PairShape(16, 64, 64), PairShape(16, 64, 65)
    records = [
        ProjectionRecord(
            Recipe(prng_key=key), "stored", shape, "float32", dict.fromkeys(("vera_A", "vera_B"), "0" * 64)
        )
        for key in (1, 2)
        for shape in shapes
    ]
    found = [ProjectionRecord.from_metadata(record.to_metadata(), where="file") for record in (*records, *records)]
    assert found == [*records, *records]
    assert found[0] is found[4]
    for where in ("one", "two"):
        with pytest.raises(vera_tools.errors.FormatError, match=where):
            ProjectionRecord.from_metadata({"vera_tools": "{}"}, where=where)
