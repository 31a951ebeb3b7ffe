"""Small models that the tests of vera_tools.nn share, ours and PEFT's."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from vera_tools.nn import VeraConfig, VeraModel

#: What most adapters of these tests are.
OPTIONS: dict[str, Any] = {
    "r": 16,
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "projection_prng_key": 7,
    "d_initial": 0.5,
}
VOCABULARY = 97


def llama(dtype: torch.dtype = torch.float32, *, layers: int = 2, **options: Any) -> nn.Module:
    """A Llama of random weights, the same ones in every call. Its adapted layers have three shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def bert(task: str = "SequenceClassification", *, layers: int = 1) -> nn.Module:
    """A BERT of random weights with the head of a task, the same ones in every call."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    return getattr(transformers, f"BertFor{task}")(config).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The model's logits, as float32."""
    return model(ids, **options).logits.float()


def some_ids(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Random input ids."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, *, steps: int = 12, lr: float = 0.05) -> list[float]:
    """Learn four random rows by heart; the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    ids = some_ids(4, 12, seed=1)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def randomise(model: nn.Module, *, seed: int = 5) -> None:
    """Give every VeRA vector random values, so that the adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "vera_lambda" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def fresh(dtype: torch.dtype = torch.float32, **options: Any) -> VeraModel:
    """A Llama with a new adapter, which does nothing yet."""
    return VeraModel(llama(dtype), VeraConfig(**{**OPTIONS, **options}))


def adapted(dtype: torch.dtype = torch.float32, *, seed: int = 5, **options: Any) -> VeraModel:
    """A Llama with an adapter that does something."""
    model = fresh(dtype, **options)
    randomise(model, seed=seed)
    return model


def two_adapters(**options: Any) -> VeraModel:
    """The same with a second adapter, `options` being what is different about it."""
    model = adapted()
    model.add_adapter("second", VeraConfig(**{**OPTIONS, **options}))
    randomise(model)
    return model


class Tiny(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8, bias=False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x))


def tiny(**options: Any) -> VeraModel:
    """It, with an adapter that does something."""
    model = VeraModel(Tiny(), VeraConfig(**{"r": 4, "target_modules": ["0", "2"], **options}))
    randomise(model)
    return model


def peft_model(base: nn.Module, **options: Any) -> Any:
    """PEFT's model with a VeRA adapter."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, peft.VeraConfig(**{**OPTIONS, **options})).eval()


def made(library: Any, base: Any = llama, **options: Any) -> Any:
    """A model with a new adapter as `peft` makes it, or `vera_tools.nn`."""
    return library.get_peft_model(base(), library.VeraConfig(**{**OPTIONS, **options}))
