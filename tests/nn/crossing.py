"""Seed-only checkpoints that go from one CPU to another: saved and loaded again by vera-tools and by PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.nn.models import fresh, llama, peft_model
from tests.peers import load_peft
from vera_tools.nn import VeraModel, save_adapter


def _pairs(ours: Any, peers: Any) -> dict[str, list[torch.Tensor]]:
    models = {"ours": ours, "peers": peers.base_model}
    return {who: [model.vera_A["default"], model.vera_B["default"]] for who, model in models.items()}


def save(folder: str | Path) -> str:
    """A new adapter of each, without its projections, and beside them what those were; the kernels' name."""
    folder = Path(folder)
    ours = fresh(save_projection=False)
    peers = peft_model(llama(), save_projection=False)
    save_adapter(ours, folder / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about what is not saved
        peers.save_pretrained(folder / "peers")
    torch.save(_pairs(ours, peers), folder / "pairs.pt")
    return torch.backends.cpu.get_cpu_capability()


def load(folder: str | Path) -> dict[str, bool]:
    """Whether each of the two computes with the projections that its adapter was saved with."""
    folder = Path(folder)
    ours = VeraModel.from_pretrained(llama(), folder / "ours", strict=True)
    peers = load_peft(llama(), folder / "peers")
    trained = torch.load(folder / "pairs.pt")
    return {who: all(map(torch.equal, pair, trained[who])) for who, pair in _pairs(ours, peers).items()}
