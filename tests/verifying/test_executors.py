"""Other engines than our processes, for real: dask's workers, for `verify` and `merge`, from Python and by --dask."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of
from tests.command import run_cli, run_json
from tests.verifying.registries import mixed
from vera_tools.errors import CheckFailedError, UsageError, VeraToolsError
from vera_tools.merging import merge as merging
from vera_tools.merging import staging


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    adapters = [(str(n), KEPT if n % 2 else SEED_ONLY) for n in range(6)]
    return mixed(tmp_path_factory.mktemp("registry"), adapters, drift="1", cut="3")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def merged(tmp_path, **options):
    """By an executor, in files of their own, beside what one process makes."""
    names = {"base": base_of(KEPT), "max_shard_size": 40_000}
    vera_tools.merge(CHECKPOINTS / KEPT, output=tmp_path / "one", **names)
    report = vera_tools.merge(CHECKPOINTS / KEPT, output=tmp_path / "many", **names, **options)
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")
    assert not list(tmp_path.glob(".*"))
    return report


def test_merge_by_an_executor(tmp_path):
    told = []
    with ThreadPoolExecutor(2) as pool:
        report = merged(tmp_path, executor=pool, verify=True, progress=lambda *args: told.append(args))
    assert report.finished
    assert report.verified
    assert len(report.shards) > 2
    assert set(report.shards) == {path.name for path in (tmp_path / "many").glob("*.safetensors")}
    assert report.bytes_written == report.bytes_total
    assert told[-1][0] >= told[0][0] > 0


def test_a_part_that_fails_leaves_nothing(tmp_path, monkeypatch):
    arguments = {"base": base_of(KEPT), "max_shard_size": 40_000, "output": tmp_path / "out"}
    part = merging._part

    def second_fails(which, given):
        if which[0] == 2:
            raise CheckFailedError("NaN in a weight")
        return part(which, given)

    def second_dies(which, given):
        if which[0] == 2:
            raise RuntimeError("the worker is gone")
        return part(which, given)

    for fails, error, words in (
        (second_fails, CheckFailedError, "NaN"),
        (second_dies, VeraToolsError, "a part was not written: RuntimeError: the worker is gone"),
    ):
        monkeypatch.setattr(merging, "_part", fails)
        with ThreadPoolExecutor(2) as pool, pytest.raises(error, match=words):
            vera_tools.merge(CHECKPOINTS / KEPT, **arguments, executor=pool)
        assert not list(tmp_path.iterdir())
    # with resume, what is finished stays, and is not written again
    with ThreadPoolExecutor(1) as pool, pytest.raises(VeraToolsError):
        vera_tools.merge(CHECKPOINTS / KEPT, **arguments, executor=pool, resume=True)
    assert staging.place(tmp_path / "out").is_dir()
    monkeypatch.setattr(merging, "_part", part)
    with ThreadPoolExecutor(1) as pool:
        report = vera_tools.merge(CHECKPOINTS / KEPT, **arguments, executor=pool, resume=True)
    assert report.resumed
    assert set(report.resumed).isdisjoint(report.shards)


def test_what_does_not_go_with_an_executor(tmp_path):
    for more in ({"part": (1, 2)}, {"finish": True}):
        with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="executor writes all parts"):
            vera_tools.merge(CHECKPOINTS / KEPT, base=base_of(KEPT), output=tmp_path / "out", executor=pool, **more)


@pytest.mark.long
def test_merge_by_processes(tmp_path, monkeypatch):
    """Which stand elsewhere than the one that asks."""
    pool = ProcessPoolExecutor(2, mp_context=get_context("spawn"))
    with pool:
        pool.submit(os.getpid).result()  # started here
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a").mkdir()
        merged(tmp_path / "a", executor=pool)


def test_dask_that_is_not_there(root, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    for command in (["verify", "-R", root], ["merge", root / "5", "--base", base_of(KEPT), "-o", root / "out"]):
        result = run_cli(*command, "--dask", "localhost:8786")
        assert (result.returncode, "pip install 'vera-tools[dask]'" in result.stderr) == (2, True)


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, processes=True, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
    ) as found:
        yield found


@pytest.mark.slow
class TestDask:
    def test_verify(self, root, cluster):
        from distributed import Client

        expected = vera_tools.verify(root, recursive=True, jobs=1)
        with Client(cluster, set_as_default=False) as client, client.get_executor() as executor:
            assert vera_tools.verify(root, recursive=True, executor=executor).to_dict() == expected.to_dict()

    def test_merge(self, cluster, tmp_path):
        from distributed import Client

        with Client(cluster, set_as_default=False) as client, client.get_executor() as executor:
            merged(tmp_path, executor=executor, verify=True)

    def test_the_commands(self, root, cluster, tmp_path):
        address = cluster.scheduler_address.removeprefix("tcp://")
        code, document = run_json("verify", "-R", root, "--dask", address, "--log", tmp_path / "log")
        assert (code, document) == run_json("verify", "-R", root, "--jobs", "1")
        assert run_json("summarize", tmp_path / "log") == (code, document)
        out = tmp_path / "out"
        result = run_cli("merge", root / "5", "--base", base_of(KEPT), "-o", out, "--dask", address, "-q")
        assert (result.returncode, out.is_dir()) == (0, True)

    def test_one_that_nobody_answers_at(self, root, monkeypatch):
        pytest.importorskip("distributed")
        monkeypatch.setattr("vera_tools.cli.executors.PATIENCE", 1)
        assert run_cli("verify", "-R", root, "--dask", "127.0.0.1:9").returncode == 5
        assert run_cli("verify", "-R", root, "--dask", "nonsense://1").returncode == 2
