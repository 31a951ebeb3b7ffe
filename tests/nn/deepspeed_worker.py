"""Run by itself: train a `VeraModel` under DeepSpeed's ZeRO-3 on the CPU, one process, and save what it gathers."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed

from tests.nn.models import fresh, some_ids
from vera_tools.errors import UsageError

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(where)
    deepspeed.ops.__compatible_ops__.clear()  # it would compile an extension for talking to other processes
    model = fresh()
    counted = model.get_nb_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, config=CONFIG, model_parameters=trained)
    for _ in range(2):
        engine.backward(engine(input_ids=some_ids(), labels=some_ids()).loss)
        engine.step()
    assert all(p.numel() == 0 for name, p in model.named_parameters() if "vera_lambda" in name)
    assert model.get_nb_trainable_parameters() == counted
    try:
        model.save_pretrained(sys.argv[1])
    except UsageError as error:
        assert "no values here" in str(error)  # noqa: PT017 (no test of pytest's)
    else:
        raise AssertionError("empty vectors were saved")
    assert not list(Path(sys.argv[1]).iterdir())
    state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    model.save_pretrained(sys.argv[1], state_dict=state)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
