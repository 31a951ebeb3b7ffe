"""`VeraCallback`: adapters that transformers' Trainer, or TRL's, trains are proven from their first checkpoint on.

Three lines::

    from vera_tools.nn.trainer import VeraCallback

    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[VeraCallback()])

The one module here that imports transformers.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vera_tools.errors import AssumedRecipeWarning, VeraToolsError, VeraToolsWarning
from vera_tools.nn import live, provenance, recording
from vera_tools.nn.model import VeraModel


class VeraCallback(TrainerCallback):
    """Record the live pair in every checkpoint of a training run.

    With a PEFT model, everything that its ``save_pretrained`` writes is recorded from the start of training on: the
    Trainer's checkpoints, ``trainer.save_model(...)``, and your own calls. With a `VeraModel`, of which the Trainer
    saves the whole state, each checkpoint gets the adapter too. At the end of training the adapter is written into
    ``output_dir``: the best one with ``load_best_model_at_end``. Only the process that saves writes.

    What cannot be recorded is said in one warning, and training goes on. A model without VeRA adapters is left alone.
    """

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Watch the model before a checkpoint is loaded into it to resume from."""
        self._begin(kwargs.get("model"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The same, where the callback was added later; and say before training what could not be recorded after."""
        self._begin(kwargs.get("model"))
        if args.should_save and (model := _peft_model(kwargs.get("model"))) is not None:
            for name in live.adapter_names(model):
                self._try(lambda name=name: recording.check(model, name))  # type: ignore[misc]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write a `VeraModel`'s adapter beside its state; a PEFT model's was recorded as it was saved."""
        folder = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
        if (model := _vera_model(kwargs.get("model"))) is not None and os.path.isdir(folder):
            self._try(lambda: model.save_pretrained(folder, is_main_process=args.should_save))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the adapter into ``output_dir``, unless nothing is to be saved."""
        if args.save_strategy == "no":
            return
        if (model := _vera_model(kwargs.get("model"))) is not None:
            self._try(lambda: model.save_pretrained(str(args.output_dir), is_main_process=args.should_save))
        elif args.should_save and (peft_model := _peft_model(kwargs.get("model"))) is not None:
            vectors = [p for name, p in peft_model.named_parameters() if ".vera_lambda_" in name]
            # Vectors that are spread over processes are gathered by all of them; the last checkpoint has them.
            if all(vector.numel() and not hasattr(vector, "full_tensor") for vector in vectors):
                self._try(lambda: peft_model.save_pretrained(args.output_dir))

    def _begin(self, model: nn.Module | None) -> None:
        peft_model = _peft_model(model)
        if peft_model is not None and not isinstance(peft_model.__dict__.get("save_pretrained"), _RecordedSave):
            provenance.watch(peft_model)
            peft_model.save_pretrained = _RecordedSave(peft_model, self._try)

    def _try(self, step: Callable[[], object]) -> None:
        """Do something that must not end a training run: what goes wrong becomes a warning, once for each reason."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                step()
            except Exception as error:
                what = error.what if isinstance(error, VeraToolsError) else str(error)
                self._warn(what, VeraToolsWarning(f"the adapter is not recorded: {error}"))
        for warning in caught:
            assumed = isinstance(warning.message, AssumedRecipeWarning)
            self._warn("assumed" if assumed else str(warning.message), warning.message)

    def _warn(self, reason: str, warning: Warning | str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(warning, stacklevel=4)


class _RecordedSave:
    """A PEFT model's ``save_pretrained`` that records what was saved. The Trainer has no event for `save_model`."""

    def __init__(self, model: Any, attempt: Callable[[Callable[[], object]], None]) -> None:
        self.model, self.attempt = model, attempt

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        method = type(self.model).save_pretrained
        given = inspect.signature(method).bind(self.model, save_directory, *args, **kwargs)
        given.apply_defaults()
        result = method(self.model, save_directory, *args, **kwargs)
        if given.arguments.get("is_main_process", True):
            known = live.adapter_names(self.model)
            for name in given.arguments.get("selected_adapters") or list(self.model.peft_config):
                if name in known:
                    self.attempt(lambda name=name: recording.record_saved(self.model, save_directory, name))  # type: ignore[misc]
        return result


def _vera_model(model: nn.Module | None) -> VeraModel | None:
    found = None if model is None else recording.unwrapped(model)
    return found if isinstance(found, VeraModel) else None


def _peft_model(model: nn.Module | None) -> Any:
    """The PEFT model with a VeRA adapter in what the Trainer trains, or None."""
    if model is None:
        return None
    found = recording.unwrapped(model)
    saves = hasattr(found, "save_pretrained") and not isinstance(found, VeraModel)
    return found if saves and live.tuner_of(found) is not None else None
