"""One registry, verified by processes, by dask's workers, in parts and from a store, has one report, paths apart."""

from __future__ import annotations

import json
import re
import shutil

import pytest

import vera_tools
from tests.adapters import BERT, CHECKPOINTS, KEPT, SEED_ONLY, edit, edit_json
from tests.stores import Bucket, ask_s3, s3
from tests.verifying.registries import mixed

pytestmark = [
    pytest.mark.slow,
    # dask, and the clients of stores and their servers, warn of themselves.
    pytest.mark.filterwarnings("default"),
]

PARTS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Stored and seed-only ones, with manifests and without, drifting, damaged, broken, and of another kind."""
    root = tmp_path_factory.mktemp("registry")
    adapters = [("a/stored", KEPT), ("a/head", BERT), ("b/seeds", SEED_ONLY), ("drift", KEPT), ("cut", KEPT)]
    adapters += [(f"checkpoint-{n}", KEPT) for n in (500, 1000)]
    mixed(root, adapters, drift="drift", cut="cut", other="other")
    recorded = shutil.copytree(CHECKPOINTS / KEPT, root / "recorded")
    vera_tools.record(recorded)
    vera_tools.strip_projections(recorded, root / "b" / "stripped")
    damaged = shutil.copytree(recorded, root / "damaged")
    edit(damaged, lambda tensors: next(tensor for name, tensor in tensors.items() if "lambda_b" in name).fill(7))
    edit_json(shutil.copytree(recorded, root / "edited") / "vera_manifest.json", lambda found: found.update(torch="9"))
    odd = shutil.copytree(CHECKPOINTS / KEPT, root / "odd names")
    edit(odd, lambda tensors: tensors.update({f"_orig_mod.{name}": tensors.pop(name) for name in list(tensors)}))
    return root


def said(report, root):
    """The report, with the root's name left out; a record is not made of what lies in a store, but of a copy."""
    text = json.dumps(report.to_dict(), ensure_ascii=False).replace(str(root), "ROOT")
    return report.exit_code, re.sub(r"vera-tools record (ROOT/[^\s\"']*|'ROOT/[^']*')", "vera-tools record COPY", text)


@pytest.fixture(scope="module")
def expected(root):
    report = vera_tools.verify(root, recursive=True, jobs=1)
    assert {checkpoint.verdict for checkpoint in report.checkpoints} == {"reproducible", "unproven", "drift", "invalid"}
    assert (len(report.checkpoints), len(report.skipped)) == (12, 1)
    return said(report, root)


@pytest.fixture
def stored(root):
    """The same registry in a bucket."""
    with s3() as address, pytest.MonkeyPatch.context() as patch:
        ask_s3(address, patch, key="key", secret="secret")
        bucket = Bucket("s3://vera-registry")
        bucket.system.mkdir("vera-registry")
        yield bucket.put("registry", root)


def assert_same(report, root, expected):
    """Line by line, so that what differs is what is shown."""
    code, text = said(report, root)
    assert [code, *text.split(", ")] == [expected[0], *expected[1].split(", ")]


def in_parts(root, folder):
    """The report that `summarize` makes of the logs of all parts."""
    logs = [folder / f"{n}.jsonl" for n in range(PARTS)]
    codes = [
        vera_tools.verify(root, recursive=True, part=(n, PARTS), log=log).exit_code
        for n, log in enumerate(logs, start=1)
    ]
    report = vera_tools.summarize(*logs)
    assert report.exit_code == max(codes, key=(0, 3, 1, 4).index)
    return report


def test_by_processes(root, expected, monkeypatch):
    monkeypatch.setattr("vera_tools.verifying.registry.PATIENCE", 0)
    assert_same(vera_tools.verify(root, recursive=True, jobs=2), root, expected)


def test_by_dask(root, expected):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        client.get_executor() as executor,
    ):
        assert_same(vera_tools.verify(root, recursive=True, executor=executor), root, expected)


def test_in_parts(root, expected, tmp_path):
    assert_same(in_parts(root, tmp_path), root, expected)


def test_from_a_log(root, expected, tmp_path):
    for taken in (0, 13):
        report = vera_tools.verify(root, recursive=True, log=tmp_path / "log")
        assert report.from_log == taken
    assert said(report, root)[1].replace(f', "from_log": {taken}', "") == expected[1]


def test_from_a_store(stored, expected, tmp_path):
    assert_same(vera_tools.verify(stored, recursive=True), stored, expected)
    assert_same(in_parts(stored, tmp_path), stored, expected)


def test_a_difference_would_be_seen(root, expected, tmp_path):
    """So that `said` leaves out no more than it should."""
    moved = shutil.copytree(root, tmp_path / "moved")
    assert_same(vera_tools.verify(moved, recursive=True, jobs=1), moved, expected)
    edit(moved / "b" / "seeds", lambda tensors: tensors.popitem())
    assert said(vera_tools.verify(moved, recursive=True, jobs=1), moved) != expected
