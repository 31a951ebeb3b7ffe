"""transformers.Trainer trains, evaluates and saves a `VeraModel`; the documented subclass is run as it stands."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.nn.models import adapted, fresh, llama, logits, peft_model, some_ids
from tests.peers import QUIET_PEERS
from vera_tools.nn import VeraModel

pytestmark = QUIET_PEERS

GUIDE = Path(__file__).parents[2] / "docs" / "training.md"
ROWS = [{"input_ids": row, "labels": row, "unused": torch.tensor(1)} for row in some_ids(8, 6)]


def trainer(kind, model, folder, **options):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        **options,
    )
    return kind(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS)


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def documented():
    (code,) = re.findall(r"```python\n(class VeraTrainer.*?)```", GUIDE.read_text(), re.DOTALL)
    names = {"Trainer": Trainer}
    exec(code, names)
    return names["VeraTrainer"]


def test_its_defaults_train_and_evaluate_as_with_peft(tmp_path):
    done = []
    for name, model in (("ours", fresh()), ("peers", peft_model(llama()))):
        done.append(trainer(Trainer, model, tmp_path / name, save_strategy="no"))
        done[-1].train()
    assert losses(done[0]) == pytest.approx(losses(done[1]), abs=1e-4)
    assert len(losses(done[0])) == 4
    assert done[0].evaluate()["eval_loss"] == pytest.approx(done[1].evaluate()["eval_loss"], abs=1e-4)


def test_the_documented_subclass_saves_the_adapter_resumes_and_finds_the_best(tmp_path):
    kind = documented()
    model = fresh()
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    whole = trainer(kind, model, tmp_path / "run", **best)
    whole.train()
    whole.save_model(tmp_path / "final")
    for folder in ("final", "run/checkpoint-4"):
        again = VeraModel.from_pretrained(llama(), tmp_path / folder)
        assert torch.equal(logits(again, some_ids()), logits(model.eval(), some_ids()))
    resumed = trainer(kind, fresh(), tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


def test_an_instances_forward_takes_what_its_base_takes():
    model = adapted()
    names = list(inspect.signature(model.forward).parameters)
    assert set(names) == {*inspect.signature(model.model.forward).parameters, "adapter_names"}
    assert names[0] == "input_ids"
    assert torch.equal(model.forward(some_ids()).logits, model(input_ids=some_ids()).logits)
