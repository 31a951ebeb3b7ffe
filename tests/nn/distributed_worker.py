"""Run by torchrun on two processes: train under DDP, then under FSDP2, and save what came out; PEFT's model likewise.

Each process sees half of every batch; together they see what a single process would.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.nn.models import OPTIONS, fresh, llama, peft_model, some_ids
from vera_tools.errors import UsageError
from vera_tools.nn import VeraConfig, VeraModel
from vera_tools.nn import peft as vera_peft
from vera_tools.nn.projection import same_bits

STEPS, ROWS, LENGTH = 6, 4, 12


def train(model: torch.nn.Module, *, rank: int, processes: int) -> None:
    """A few steps on this process's share of the rows."""
    # Adam divides by the gradient's size, so where that is near 0 it makes much of the order that sums were taken in.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0, momentum=0.9)
    share = ROWS // processes
    ids = some_ids(ROWS, LENGTH, seed=1)[rank * share : (rank + 1) * share]
    model.train()
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def adapted() -> VeraModel:
    """The model that every process starts from; one pair is shared by two adapters."""
    model = fresh()
    model.add_adapter("second", VeraConfig(**OPTIONS))
    return model


def run_ddp(out: Path, rank: int) -> dict[str, bool]:
    model = adapted()
    held = model.vera_A["default"]
    right = held.clone()
    if rank == 1:  # a broadcast from rank 0 would overwrite this mark, and so be seen
        held[0, 0] = 12345.0
    wrapped = DistributedDataParallel(model)
    wrapped(some_ids(1, 4))
    broadcast = rank == 1 and held[0, 0].item() != 12345.0
    held.copy_(right)
    train(wrapped, rank=rank, processes=2)
    wrapped.module.save_pretrained(out / "ddp")
    return {"broadcast": broadcast, "replaced": model.vera_A["default"] is not held}


def run_fsdp(out: Path, rank: int) -> dict[str, bool]:
    model = adapted()
    before = model.vera_A["default"].clone()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.model.layers:
        fully_shard(block, mesh=mesh)
    for whole in (model.model, model):
        fully_shard(whole, mesh=mesh)
    train(model, rank=rank, processes=2)
    model.save_pretrained(out / "fsdp")
    vectors = [p for name, p in model.named_parameters() if "vera_lambda" in name]
    held = model.vera_A["default"]
    return {
        "vectors_sharded": all(isinstance(p, DTensor) for p in vectors),
        "pair_whole": not isinstance(held, DTensor) and same_bits(held, before),
        "pair_shared": held is model.vera_A["second"]
        and all(layer.vera_A is model.vera_A for layer in model.vera_layers().values()),
    }


def run_peft(out: Path, rank: int) -> dict[str, object]:
    """PEFT's own model, whose pair is recorded by the process that writes; `None` elsewhere."""
    found: dict[str, object] = {}
    model = peft_model(llama(), save_projection=False)
    wrapped = DistributedDataParallel(model)
    train(wrapped, rank=rank, processes=2)
    found["ddp"] = vera_peft.save(wrapped, out / "peft-ddp") is not None

    model = peft_model(llama(), save_projection=False)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, rank=rank, processes=2)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    found["fsdp"] = vera_peft.save(model, out / "peft-fsdp", state_dict=state) is not None

    held = model.base_model.vera_A
    whole = held["default"]
    for name, placement in (("replicated", Replicate()), ("spread", Shard(0))):
        held["default"] = distribute_tensor(whole, mesh, [placement])
        if rank == 0:
            try:
                found[name] = vera_peft.record(model, out / "peft-fsdp").projections.origin
            except UsageError as error:
                found[name] = str(error)
    return found


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    report = {"ddp": run_ddp(out, rank), "fsdp": run_fsdp(out, rank), "peft": run_peft(out, rank)}
    reports: list[object] = [None, None]
    distributed.all_gather_object(reports, report)
    if rank == 0:
        (out / "report.json").write_text(json.dumps(reports))
    distributed.barrier()
    distributed.destroy_process_group()
    # DDP and FSDP2 leave the group's threads running for ever, and once in a while one of them is torn down with the
    # interpreter in a way that ends the process with std::terminate. So leave without tearing anything down.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
