"""What each release wrote, kept in fixtures/released: it must mean the same to every later one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import vera_tools
from tests import FIXTURES
from tests.adapters import CHECKPOINTS, CONFIG, GPT2, KEPT, SEED_ONLY, WEIGHTS, tensors_of
from vera_tools import schema

RELEASES = sorted((FIXTURES / "released").iterdir())
RECORDED = f"{SEED_ONLY}-noavx"
MERGED = "peft-0.20.0-llama-bf16-kept"

every_release = pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)


@every_release
def test_its_documents_name_it_and_are_valid_by_the_schema_that_they_name(release):
    documents = [*release.glob("*/vera_manifest.json"), release / "merged" / "vera_merge.json"]
    assert len(documents) == 4
    for path in documents:
        document = json.loads(path.read_text())
        _, name, version = document["schema"].split("/")
        schema.validate(document, f"{name}.{version}", where=str(path))
        assert document["tool"] == {"name": "vera-tools", "version": release.name}


@every_release
def test_what_it_stripped_gives_the_original_files_back(release, tmp_path):
    assert vera_tools.verify(release / "stripped").exit_code == 0
    assert vera_tools.embed_projections(release / "stripped", tmp_path / "out").byte_exact
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "out" / name).read_bytes() == (CHECKPOINTS / GPT2 / name).read_bytes()


@every_release
def test_the_file_that_it_stripped_is_proven_alone(release, tmp_path):
    alone = shutil.copy(release / "stripped" / WEIGHTS, tmp_path / "alone.safetensors")
    (entry,) = vera_tools.verify(alone).checkpoints
    assert entry.verdict == "reproducible"


@every_release
def test_what_it_recorded_of_a_stated_recipe_is_whole_and_not_proven(release):
    report = vera_tools.verify(release / "recorded", base=CHECKPOINTS / f"{RECORDED}-base")
    assert report.exit_code == 3
    (entry,) = report.checkpoints
    assert (entry.verdict, entry.ok) == ("assumed", True)
    assert entry.scope.startswith("projections, vectors and config are covered; ")


@every_release
def test_its_lora_and_its_merged_weights_come_out_again(release, tmp_path):
    vera_tools.to_lora(CHECKPOINTS / KEPT, tmp_path / "lora", base=CHECKPOINTS / f"{KEPT}-base")
    vera_tools.merge(CHECKPOINTS / MERGED, base=CHECKPOINTS / f"{MERGED}-base", output=tmp_path / "merged")
    for old, new in (
        (tensors_of(release / "lora"), tensors_of(tmp_path / "lora")),
        (load_file(release / "merged/model.safetensors"), load_file(tmp_path / "merged/model.safetensors")),
    ):
        assert old.keys() == new.keys()
        assert all(old[name].dtype == new[name].dtype and np.array_equal(old[name], new[name]) for name in old)


def test_the_version_at_hand_has_a_folder():
    """fixtures/make_released.py makes it when the version is raised, and again where bytes change before it is out."""
    assert vera_tools.__version__ in [path.name for path in RELEASES]
