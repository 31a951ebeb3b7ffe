"""Where other programs keep adapters: what -R finds there, under which names, and in which order."""

from __future__ import annotations

import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT
from tests.command import run_cli
from vera_tools.checkpoints.presence import find, in_order

COMMIT = "60a5c15a17c72420c95ecb32b3de72c8ae422a2c"


def test_numbers_in_names_count_as_numbers():
    names = ["checkpoint-30", "checkpoint-200", "checkpoint-1000", "checkpoint-1000b", "final", "v1.9", "v1.10", "x"]
    assert sorted(set(names), key=in_order) == names
    assert sorted(["a007", "a7", "a07"], key=in_order) == ["a007", "a07", "a7"]
    assert sorted(["1" + "0" * 5000, "9" * 5000], key=in_order) == ["9" * 5000, "1" + "0" * 5000]


@pytest.mark.parametrize(
    ("found", "beside"),
    [
        (  # transformers' Trainer
            ["out", "out/checkpoint-90", "out/checkpoint-500", "out/checkpoint-1000"],
            ["out/checkpoint-90/optimizer.pt", "out/runs/events.out"],
        ),
        (  # MLflow 2, and MLflow 3
            [
                "mlruns/1/0a1b/artifacts/model/peft",
                "mlruns/1/models/m-0c2d/artifacts/peft",
            ],
            ["mlruns/1/0a1b/artifacts/model/MLmodel", "mlruns/1/0a1b/meta.yaml", "mlruns/.trash/2/artifacts/peft/x"],
        ),
        (  # Weights & Biases: runs, and artifacts that were downloaded
            [
                "artifacts/checkpoint-run:v2",
                "artifacts/checkpoint-run:v10",
                "wandb/run-20260101_120000-ab/files/adapter",
            ],
            ["wandb/run-20260101_120000-ab/run-ab.wandb"],
        ),
    ],
)
def test_layouts(tmp_path, found, beside):
    for path in found:
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / path, dirs_exist_ok=True)
    for path in beside:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    report = vera_tools.verify(tmp_path, recursive=True)
    assert [entry.path for entry in report.checkpoints] == [str(tmp_path / path) for path in found]
    assert report.exit_code == 0
    out = run_cli("strip-projections", "-R", tmp_path, "--out-dir", tmp_path / "stripped", "-q")
    assert (out.returncode, out.stderr) == (0, "")
    assert all((tmp_path / "stripped" / path / CONFIG).is_file() for path in found)


def test_a_link_to_the_latest_run_is_no_second_adapter(tmp_path):
    run = tmp_path / "wandb" / "run-20260101_120000-ab"
    shutil.copytree(CHECKPOINTS / KEPT, run / "files" / "adapter")
    (tmp_path / "wandb" / "latest-run").symlink_to(run, target_is_directory=True)
    assert len(vera_tools.verify(tmp_path, recursive=True).checkpoints) == 1


def test_the_cache_of_the_hub(tmp_path):
    """Its files are links to blobs beside the snapshots, and those are no links that lead out of a folder."""
    repository = tmp_path / "hub" / "models--ann--x"
    snapshot = repository / "snapshots" / COMMIT / "en"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted((CHECKPOINTS / KEPT).iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../../blobs/{blob.name}")
    (tmp_path / "hub" / ".locks").mkdir()
    assert list(find(tmp_path)) == [snapshot]
    report = vera_tools.verify(tmp_path / "hub", recursive=True)
    assert [(entry.path, entry.verdict) for entry in report.checkpoints] == [(str(snapshot), "reproducible")]
    out = run_cli("strip-projections", "-R", tmp_path / "hub", "--out-dir", tmp_path / "stripped", "-q")
    assert (out.returncode, out.stderr) == (0, "")
