"""Tiny training runs of transformers' Trainer and of TRL's, for the tests here and where torch has other kernels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from tests.nn.models import VOCABULARY, llama, peft_model, some_ids
from vera_tools.nn.trainer import VeraCallback

ROWS = [{"input_ids": row, "labels": row, "unused": torch.tensor(1)} for row in some_ids(8, 6)]
#: The Trainer evaluates every checkpoint, and loads the best one in the end; here it is the last.
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
_COMMON = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 1}
_QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}


def trainer(kind: Any, model: Any, folder: Path, *, callbacks: Any = None, **options: Any) -> Any:
    """A Trainer that takes four steps and saves after two."""
    arguments = TrainingArguments(str(folder), learning_rate=1e-2, **_COMMON, **_QUIET, **options)
    return kind(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS, callbacks=callbacks)


def new(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A new seed-only adapter of PEFT's."""
    return peft_model(llama(dtype), **{"task_type": "CAUSAL_LM", "save_projection": False, **options})


def run(folder: Path | str, dtype: str) -> str:
    """Train one with the callback: run/ is the Trainer's folder, final/ what it was told to save; the kernels' name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about what is not saved
        done = trainer(Trainer, new(getattr(torch, dtype)), Path(folder) / "run", callbacks=[VeraCallback()], **BEST)
        done.train()
        done.save_model(str(Path(folder) / "final"))
    return torch.backends.cpu.get_cpu_capability()


def run_trl(folder: Path) -> None:
    """The same with TRL's SFTTrainer, which makes the PEFT model itself."""
    import peft
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    from tests.nn.models import OPTIONS

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    rows = Dataset.from_list([{"text": " ".join(f"w{i}" for i in row.clamp(2).tolist())} for row in some_ids(8, 6)])
    done = SFTTrainer(
        llama(),
        args=SFTConfig(str(folder / "run"), bf16=False, gradient_checkpointing=False, **_COMMON, **_QUIET),
        train_dataset=rows,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"),
        peft_config=peft.VeraConfig(**{**OPTIONS, "save_projection": False, "task_type": "CAUSAL_LM"}),
        callbacks=[VeraCallback()],
    )
    done.train()
    done.save_model(str(folder / "final"))
