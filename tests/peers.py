"""PEFT and transformers as the oracle: base models, adapters as PEFT loads them, and the logits that it gave."""

from __future__ import annotations

import hashlib
import json
import runpy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import FIXTURES
from tests.adapters import CHECKPOINTS, base_of

if TYPE_CHECKING:
    import torch

#: Marks for modules that run PEFT and transformers, which warn about themselves.
QUIET_PEERS = [
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning"),
]


def base_model(name: str, folder: Path | None = None) -> torch.nn.Module:
    """The base of an adapter in fixtures/, loaded by transformers; from `folder`, what was made of that base."""
    import transformers

    architecture = json.loads((base_of(name) / "config.json").read_text())["architectures"][0]
    transformers.utils.logging.disable_progress_bar()
    return getattr(transformers, architecture).from_pretrained(folder or base_of(name), dtype="auto").eval()


def load_peft(base: torch.nn.Module, folder: Path | str, **options: Any) -> Any:
    """An adapter, loaded onto `base` by PEFT without a word."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, str(folder), **options).eval()


def distance(model: torch.nn.Module, name: str) -> float:
    """The largest difference between a model's logits and those that PEFT computed when it made the adapter."""
    import torch

    expected = json.loads((CHECKPOINTS / name / "expected_logits.json").read_text())
    with torch.no_grad():
        logits = model(torch.tensor(expected["ids"])).logits.float().flatten()
    return float((logits - torch.tensor(expected["logits"])).abs().max())


def drawn_digests(key: int, r: int, in_max: int, out_max: int) -> list[str]:
    """sha256 of the pair that PEFT draws in this process, vera_A first."""
    import torch
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator(device="cpu").manual_seed(key)
    pair = [_kaiming_init(shape, generator=generator) for shape in ((r, in_max), (out_max, r))]
    return [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in pair]


def make_checkpoints(folder: Path | str) -> list[str]:
    """Every checkpoint of fixtures/ that the PEFT at hand makes with the kernels of this process; their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runpy.run_path(str(FIXTURES / "generate.py"))["checkpoints"](Path(folder), [])


def save_drawn_pair(name: str, path: Path | str) -> None:
    """Load a seed-only adapter of fixtures/ onto its base with PEFT, and write down the pair that it draws."""
    from safetensors.numpy import save_file

    model = load_peft(base_model(name), CHECKPOINTS / name)
    save_file({key: getattr(model.base_model, key)["default"].float().numpy() for key in ("vera_A", "vera_B")}, path)
