"""transformers.Trainer trains, evaluates and saves a `VeraModel` and PEFT's; `VeraCallback` records what it saves."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import Trainer

import vera_tools
from tests.adapters import CONFIG, MANIFEST, edit_manifest, files_of
from tests.nn import training
from tests.nn.models import adapted, fresh, llama, logits, peft_model, some_ids
from tests.nn.training import BEST, trainer
from tests.peers import QUIET_PEERS
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.errors import AssumedRecipeWarning, VeraToolsWarning
from vera_tools.nn import VeraModel
from vera_tools.nn.trainer import VeraCallback
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import candidates

pytestmark = [
    *QUIET_PEERS,
    # datasets, which TRL uses, names a part of dill by its old name.
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(dill|multiprocess|datasets|pandas|pyarrow).*"),
]
FIRST, LAST = "checkpoint-2", "checkpoint-4"


def recorded(folder):
    """The origin and the verdict of every adapter at or below a folder, by its place."""
    found = {}
    for path in sorted(Path(folder).rglob(CONFIG)):
        (report,) = vera_tools.verify(path.parent).checkpoints
        assert report.ok, report.checks
        origin = json.loads((path.parent / MANIFEST).read_text())["origin"]
        found[path.parent.relative_to(folder).as_posix()] = (origin, report.verdict)
    return found


def losses(done):
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_its_defaults_train_and_evaluate_as_with_peft(tmp_path):
    done = []
    for name, model in (("ours", fresh()), ("peers", peft_model(llama()))):
        done.append(trainer(Trainer, model, tmp_path / name, save_strategy="no"))
        done[-1].train()
    assert losses(done[0]) == pytest.approx(losses(done[1]), abs=1e-4)
    assert len(losses(done[0])) == 4
    assert done[0].evaluate()["eval_loss"] == pytest.approx(done[1].evaluate()["eval_loss"], abs=1e-4)


def test_a_vera_models_adapter_is_saved_beside_its_state(tmp_path):
    model = fresh()
    whole = trainer(Trainer, model, tmp_path / "run", callbacks=[VeraCallback()], **BEST)
    whole.train()
    proven = ("live", "reproducible")
    assert recorded(tmp_path / "run") == {".": proven, FIRST: proven, LAST: proven}
    for folder in (".", LAST):
        again = VeraModel.from_pretrained(llama(), tmp_path / "run" / folder)
        assert torch.equal(logits(again, some_ids()), logits(model.eval(), some_ids()))
    resumed = trainer(Trainer, fresh(), tmp_path / "run", callbacks=[VeraCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / FIRST))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)


class TestPeft:
    @pytest.mark.capability
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_every_checkpoint_the_end_and_what_is_saved_afterwards(self, dtype, tmp_path):
        training.run(tmp_path, dtype)
        proven = ("live", "reproducible")
        assert recorded(tmp_path) == {"run": proven, f"run/{FIRST}": proven, f"run/{LAST}": proven, "final": proven}
        end, best = (files_of(tmp_path / "run" / folder) for folder in ("", LAST))
        assert {name: best[name] for name in end if "/" not in name and name in best} == {
            name: data for name, data in end.items() if "/" not in name
        }

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_each_other_recipe_fails_what_was_trained_with_either_kind_of_kernel(
        self, dtype, tmp_path, separate_kernels
    ):
        folders = {"here": tmp_path / "here", "separate": tmp_path / "separate"}
        training.run(folders["here"], dtype)
        assert separate_kernels(training.run, folders["separate"], dtype) == "DEFAULT"
        drawn = {}
        for where, folder in folders.items():
            assert set(recorded(folder).values()) == {("live", "reproducible")}
            (report,) = vera_tools.verify(folder / "final").checkpoints
            drawn[where] = report.recipe
            text = (folder / "final" / MANIFEST).read_text()
            for other in candidates(report.recipe.prng_key):
                if _makes_the_same(other, text):
                    continue
                edit_manifest(folder / "final", lambda manifest, other=other: manifest.update(recipe=other.to_dict()))
                (report,) = vera_tools.verify(folder / "final").checkpoints
                assert report.verdict == "drift", other.name
                assert not report.ok
        assert drawn["separate"].rounding == "separate"
        assert drawn["here"].rounded_through == (None if dtype == "float32" else dtype)

    def test_resuming_and_adding_the_callback_late(self, tmp_path):
        training.run(tmp_path, "float32")
        resumed = trainer(Trainer, training.new(), tmp_path / "again")
        resumed.add_callback(VeraCallback())
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / FIRST))
        proven = ("live", "reproducible")
        assert recorded(tmp_path / "again") == {".": proven, LAST: proven}

    def test_resuming_what_nobody_recorded_is_said_once(self, tmp_path):
        trainer(Trainer, training.new(), tmp_path / "plain").train()
        resumed = trainer(Trainer, training.new(), tmp_path / "again", callbacks=[VeraCallback()])
        with pytest.warns(AssumedRecipeWarning) as caught:
            resumed.train(resume_from_checkpoint=str(tmp_path / "plain" / FIRST))
        assert len([warning for warning in caught if warning.category is AssumedRecipeWarning]) == 1
        assert set(recorded(tmp_path / "again").values()) == {("assumed", "assumed")}

    def test_what_cannot_be_recorded_is_said_once_and_ends_nothing(self, tmp_path):
        model = training.new()
        model.base_model.vera_A["default"] *= 2
        edited = trainer(Trainer, model, tmp_path, callbacks=[VeraCallback()])
        with pytest.warns(VeraToolsWarning, match=r"not recorded: .*no known recipe makes the projections") as caught:
            edited.train()
        assert len([warning for warning in caught if issubclass(warning.category, VeraToolsWarning)]) == 1
        assert {path.parent.name for path in tmp_path.rglob(CONFIG)} == {tmp_path.name, FIRST, LAST}
        assert not list(tmp_path.rglob(MANIFEST))

    def test_other_models_are_left_alone(self, tmp_path):
        other = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for model in (other, llama()):
            trainer(Trainer, model, tmp_path / type(model).__name__, callbacks=[VeraCallback()]).train()
            assert "save_pretrained" not in vars(model)
        assert not list(tmp_path.rglob(MANIFEST))

    def test_nothing_is_saved_where_nothing_is_to_be_saved(self, tmp_path):
        model = training.new()
        trainer(Trainer, model, tmp_path / "run", callbacks=[VeraCallback()], save_strategy="no").train()
        assert not list(tmp_path.rglob(CONFIG))
        model.save_pretrained(tmp_path / "mine")
        assert recorded(tmp_path) == {"mine": ("live", "reproducible")}


def test_trls_trainer(tmp_path):
    pytest.importorskip("trl", reason="needs TRL: pip install -c constraints.txt -e '.[dev]'")
    training.run_trl(tmp_path)
    proven = ("live", "reproducible")
    assert recorded(tmp_path) == {"run": proven, f"run/{FIRST}": proven, f"run/{LAST}": proven, "final": proven}


def test_an_instances_forward_takes_what_its_base_takes():
    model = adapted()
    names = list(inspect.signature(model.forward).parameters)
    assert set(names) == {*inspect.signature(model.model.forward).parameters, "adapter_names"}
    assert names[0] == "input_ids"
    assert torch.equal(model.forward(some_ids()).logits, model(input_ids=some_ids()).logits)


def _makes_the_same(recipe, manifest):
    """Whether a recipe makes the very pair that a manifest is about."""
    record = ProjectionRecord.from_dict(json.loads(manifest), where=MANIFEST)
    return digests(recipe, record.shape, stored_dtype=record.dtype) == record.sha256
