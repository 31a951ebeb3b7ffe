"""DistributedDataParallel and FSDP2 on two gloo processes, under torchrun, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import vera_tools
from tests import ROOT
from tests.nn.distributed_worker import adapted, train
from tests.peers import QUIET_PEERS
from vera_tools.nn.projection import same_bits

pytestmark = QUIET_PEERS

ENGINES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with what each engine saved, what one process saved, and the processes' reports."""
    out = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, "-m", "tests.nn.distributed_worker", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    single = adapted()
    train(single, rank=0, processes=1)
    single.save_pretrained(out / "single")
    return out


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_the_checkpoint_is_that_of_a_single_process(trained, engine):
    for folder in ("", "second"):
        ours, single = (
            load_file(trained / where / folder / "adapter_model.safetensors") for where in (engine, "single")
        )
        assert ours.keys() == single.keys()
        for name, tensor in single.items():
            if "lambda" in name:
                torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
            else:
                assert same_bits(ours[name], tensor)
        configs, manifests = (
            [json.loads((trained / where / folder / name).read_text()) for where in (engine, "single")]
            for name in ("adapter_config.json", "vera_manifest.json")
        )
        assert configs[0] == configs[1]
        for part in ("recipe", "projections", "base", "metadata"):
            assert manifests[0][part] == manifests[1][part]
    moved = load_file(trained / engine / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0.1 for name, tensor in moved.items() if name.endswith("lambda_b"))


def test_ddp_does_not_send_the_pair(trained):
    for report in json.loads((trained / "report.json").read_text()):
        assert report["ddp"] == {"broadcast": False, "replaced": False}


def test_fsdp_shards_the_vectors_and_leaves_the_pair_whole_and_shared(trained):
    for report in json.loads((trained / "report.json").read_text()):
        assert report["fsdp"] == {"vectors_sharded": True, "pair_whole": True, "pair_shared": True}


@pytest.mark.parametrize("engine", ["peft-ddp", "peft-fsdp"])
def test_a_peft_models_pair_is_recorded_by_the_process_that_writes(trained, engine):
    (report,) = vera_tools.verify(trained / engine).checkpoints
    assert (report.verdict, report.ok) == ("reproducible", True)
    assert json.loads((trained / engine / "vera_manifest.json").read_text())["origin"] == "live"
    ours, single = (load_file(trained / where / "adapter_model.safetensors") for where in (engine, "single"))
    assert ours.keys() == {name for name in single if "lambda" in name}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, single[name], rtol=0, atol=1e-5)


def test_a_pair_that_is_spread_over_processes_is_refused(trained):
    first, second = (report["peft"] for report in json.loads((trained / "report.json").read_text()))
    assert first | {"spread": ""} == {"ddp": True, "fsdp": True, "replicated": "live", "spread": ""}
    assert "vera_A of the adapter 'default': is spread over processes" in first["spread"]
    assert second == {"ddp": False, "fsdp": False}
