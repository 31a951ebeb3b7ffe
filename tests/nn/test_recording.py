"""`vera_tools.nn.peft.save` and `record`: the manifest of an adapter that PEFT trains, from the pair in memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import peft
import pytest
import torch

import vera_tools
from tests import FIXTURES, ROOT
from tests.adapters import (
    CHECKPOINTS,
    GPT2,
    KEPT,
    MANIFEST,
    SEED_ONLY,
    WEIGHTS,
    edit_json,
    edit_manifest,
    files_of,
    flip,
)
from tests.nn.models import OPTIONS, llama, logits, peft_model, randomise, some_ids, train
from tests.peers import QUIET_PEERS, base_model, load_peft
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError, FormatError, UsageError
from vera_tools.nn import recording
from vera_tools.nn.peft import load, record, restore_projections, save

pytestmark = [pytest.mark.capability, *QUIET_PEERS]


def new(dtype=torch.float32, **options):
    """A new adapter of PEFT's that does something."""
    model = peft_model(llama(dtype), **{"task_type": "CAUSAL_LM", "save_projection": False, **options})
    randomise(model)
    return model


def resumed(folder, dtype=torch.float32, **options):
    return load_peft(llama(dtype), folder, is_trainable=True, **options)


def origins(folder):
    with Checkpoint.open(folder) as opened:
        return {opened.manifest.projections.origin, opened.embedded.origin}


def verdict(folder):
    (report,) = vera_tools.verify(folder).checkpoints
    assert report.ok, report.checks
    return report.verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [True, False])
def test_a_new_adapter_is_proven_from_its_first_save(dtype, kept, tmp_path):
    model = peft_model(llama(dtype), save_projection=kept)
    train(model, steps=2)
    manifest = save(model, tmp_path / "a")
    assert origins(tmp_path / "a") == {"live"}
    assert verdict(tmp_path / "a") == "reproducible"
    assert manifest.projections.recipe.rounded_through == (None if dtype == torch.float32 else str(dtype)[6:])
    assert manifest.to_dict() == json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert {weight.dtype for weight in manifest.base.weights.values()} == {str(dtype)[6:]}
    assert len(manifest.base.weights) == 6
    again = load(peft.PeftModel, llama(dtype), tmp_path / "a", strict=True)
    assert torch.equal(logits(again.eval(), some_ids()), logits(model, some_ids()))


def test_what_peft_writes_beside_it_stays(tmp_path):
    model = new()
    model.save_pretrained(tmp_path / "plain")
    save(model, tmp_path / "a")
    plain, ours = files_of(tmp_path / "plain"), files_of(tmp_path / "a")
    assert ours.keys() - plain.keys() == {MANIFEST}
    assert {name for name in plain if plain[name] != ours[name]} == {WEIGHTS}
    save(model, tmp_path / "a")
    assert files_of(tmp_path / "a") == ours


def test_recording_what_was_saved(tmp_path):
    model = new()
    model.save_pretrained(tmp_path)
    for wrapped in (torch.nn.parallel.DataParallel(model), torch.compile(model, backend="eager")):
        assert record(wrapped, tmp_path).projections.origin == "live"
    assert verdict(tmp_path) == "reproducible"
    randomise(model, seed=6)
    before = files_of(tmp_path)
    with pytest.raises(CheckFailedError, match="other vectors than the adapter 'default'"):
        record(model, tmp_path)
    assert files_of(tmp_path) == before


class TestLoaded:
    def test_without_a_record_it_is_assumed(self, tmp_path):
        new().save_pretrained(tmp_path / "a")
        model = resumed(tmp_path / "a")
        train(model, steps=1)
        with pytest.warns(AssumedRecipeWarning, match="nothing records which projections it was trained with"):
            save(model, tmp_path / "b")
        assert origins(tmp_path / "b") == {"assumed"}
        assert verdict(tmp_path / "b") == "assumed"
        model = resumed(tmp_path / "b")  # and stays so
        with pytest.warns(AssumedRecipeWarning, match="what it says of its own"):
            save(model, tmp_path / "c")
        assert verdict(tmp_path / "c") == "assumed"

    def test_an_untrained_adapter_takes_no_pair_with_it(self, tmp_path):
        peft_model(llama(), save_projection=False).save_pretrained(tmp_path / "a")
        model = resumed(tmp_path / "a")
        train(model, steps=1)
        assert save(model, tmp_path / "b").projections.origin == "live"

    def test_its_origin_is_the_manifests(self, tmp_path):
        save(new(), tmp_path / "a")
        for origin in ("live", "stated"):
            assumed = origin == "stated"
            edit_manifest(tmp_path / "a", lambda m, o=origin, a=assumed: m.update(origin=o, assumed=a))
            model = resumed(tmp_path / "a")
            train(model, steps=1)
            if assumed:
                with pytest.warns(AssumedRecipeWarning):
                    save(model, tmp_path / "b")
            else:
                save(model, tmp_path / "b")
            assert origins(tmp_path / "b") == {origin}

    def test_it_may_be_saved_over_what_it_was_loaded_from(self, tmp_path):
        save(new(), tmp_path)
        for _ in range(2):
            model = resumed(tmp_path)
            train(model, steps=1)
            save(model, tmp_path)
            assert (origins(tmp_path), verdict(tmp_path)) == ({"live"}, "reproducible")

    def test_a_stale_manifest_proves_nothing(self, tmp_path):
        model = new()
        save(model, tmp_path)
        randomise(model, seed=6)
        model.save_pretrained(tmp_path)
        with pytest.warns(AssumedRecipeWarning, match="saved again since"):
            save(resumed(tmp_path), tmp_path / "b")

    def test_a_manifest_that_was_changed_proves_nothing(self, tmp_path):
        save(new(), tmp_path / "a")
        edit_json(tmp_path / "a" / MANIFEST, lambda manifest: manifest.update(torch="9"))
        with pytest.warns(AssumedRecipeWarning, match="cannot be used: .*changed after it was written"):
            save(resumed(tmp_path / "a"), tmp_path / "b")
        assert origins(tmp_path / "b") == {"assumed"}

    def test_a_file_that_changes_while_it_is_recorded_is_refused(self, tmp_path, monkeypatch):
        model = new()
        model.save_pretrained(tmp_path)
        write = recording.write_checkpoint

        def writing(*arguments, **options):
            flip(tmp_path / WEIGHTS, -1)
            return write(*arguments, **options)

        monkeypatch.setattr(recording, "write_checkpoint", writing)
        with pytest.raises(FormatError, match=f"{WEIGHTS}: the file was changed while it was read"):
            record(model, tmp_path)
        assert not (tmp_path / MANIFEST).exists()

    def test_a_pair_that_it_was_not_trained_with_is_refused_until_it_is_restored(self, tmp_path):
        trained = new(torch.bfloat16)
        save(trained, tmp_path / "a")
        model = resumed(tmp_path / "a")
        with pytest.raises(CheckFailedError, match=r"not those that it was trained with.*restore_projections"):
            save(model, tmp_path / "b")
        assert not (tmp_path / "b" / MANIFEST).exists()
        restore_projections(model, tmp_path / "a")
        manifest = save(model, tmp_path / "b")
        assert (manifest.projections.origin, manifest.projections.recipe.rounded_through) == ("live", "bfloat16")

    def test_stored_projections_are_what_they_are(self, tmp_path):
        model = load_peft(base_model(KEPT), CHECKPOINTS / KEPT, is_trainable=True)
        save(model, tmp_path / "a")
        assert origins(tmp_path / "a") == {"stored"}
        assert verdict(tmp_path / "a") == "reproducible"

    def test_a_manifest_without_origins(self, tmp_path):
        folder = FIXTURES / "released" / "0.1.0"
        assert all("origin" not in json.loads((folder / n / MANIFEST).read_text()) for n in ("recorded", "stripped"))
        model = load_peft(base_model(SEED_ONLY), folder / "recorded", is_trainable=True)
        # Which of the two it is depends on what this CPU draws; what was assumed at the time decides nothing.
        with pytest.warns(AssumedRecipeWarning, match="records another pair|what it says of its own pair"):
            save(model, tmp_path / "recorded")
        assert origins(tmp_path / "recorded") == {"assumed"}
        model = load(peft.PeftModel, base_model(GPT2), folder / "stripped", is_trainable=True)
        save(model, tmp_path / "stripped")
        assert origins(tmp_path / "stripped") == {"stored"}

    def test_from_a_state_dict(self, tmp_path):
        for kept in (True, False):
            model = new(save_projection=kept)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            other = new(save_projection=kept)
            other.load_state_dict(state)
            if kept:
                assert save(other, tmp_path / "kept").projections.origin == "live"
                other.load_state_dict({k: v * 2 if ".vera_A." in k else v for k, v in state.items()})
                assert save(other, tmp_path / "another").projections.origin == "stored"
            else:
                with pytest.warns(AssumedRecipeWarning, match="without the projections"):
                    assert save(other, tmp_path / "seed").projections.origin == "assumed"

    def test_from_a_folder_with_a_windows_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save(new(), r"C:\runs\my-adapter")
        assert save(resumed(r"C:\runs\my-adapter"), r"D:\again").projections.origin == "live"

    @pytest.mark.usefixtures("hub")
    def test_from_the_hub(self, hub, tmp_path):
        save(new(), tmp_path / "a")
        hub.add_repo("ann/x", files_of(tmp_path / "a", "sub/"))
        hub.add_repo("ann/y", files_of(CHECKPOINTS / SEED_ONLY))
        assert save(resumed("ann/x", subfolder="sub", revision="main"), tmp_path / "b").projections.origin == "live"
        model = load_peft(base_model(SEED_ONLY), "ann/y", is_trainable=True)
        with pytest.warns(AssumedRecipeWarning, match="hf://ann/y"):
            save(model, tmp_path / "c")


def test_an_adapter_that_was_there_before_the_import_is_live_while_it_is_untrained(tmp_path):
    """Watched by nobody: trained and saved with its pair, trained and seed-only, untrained; watched from then on."""
    code = f"""
import warnings; warnings.simplefilter("ignore")
import peft, torch
from transformers import LlamaConfig, LlamaForCausalLM
shape = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
def train(model):
    for parameter in model.parameters():
        if parameter.requires_grad: torch.nn.init.normal_(parameter)
models = []
for kept in (True, False, False, False, False):
    config = peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=kept)
    models.append(peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), config))
for model in (*models[:2], models[3]): train(model)
from vera_tools.nn.peft import save
from vera_tools.nn.trainer import VeraCallback
for model in models[3:]:
    VeraCallback().on_init_end(None, None, None, model=model)
    train(model)
print(*(save(model, f"{tmp_path}/{{i}}").projections.origin for i, model in enumerate(models)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["stored", "assumed", "live", "assumed", "live"], result.stderr


class TestWhatCannotBeRecorded:
    def test_an_edited_pair_is_recorded_as_it_is_or_refused(self, tmp_path):
        kept, seed_only = new(save_projection=True), new()
        for model in (kept, seed_only):
            model.base_model.vera_B["default"][1, 2] += 1
        manifest = save(kept, tmp_path / "kept")
        assert (manifest.projections.recipe, manifest.projections.origin) == (None, "live")
        assert vera_tools.verify(tmp_path / "kept").checkpoints[0].verdict == "drift"
        with pytest.raises(UsageError, match=r"not reproducible.*save_projection = True"):
            save(seed_only, tmp_path / "seed")
        assert vera_tools.verify(tmp_path / "seed").checkpoints[0].verdict == "unproven"
        seed_only.peft_config["default"].save_projection = True
        save(seed_only, tmp_path / "seed")
        again = load_peft(llama(), tmp_path / "seed")
        assert torch.equal(logits(again, some_ids()), logits(seed_only.eval(), some_ids()))

    def test_no_values(self, tmp_path):
        model = new()
        model.save_pretrained(tmp_path)
        pair = model.base_model.vera_A
        pair["default"] = pair["default"].to("meta")
        with pytest.raises(UsageError, match=r"vera_A of the adapter 'default': is on the meta device"):
            record(model, tmp_path)
        with pytest.raises(CheckFailedError, match=r"saved without values.*state_dict"):
            save(new(), tmp_path, state_dict={k: v[:0] for k, v in new().state_dict().items()})

    def test_layers_with_pairs_of_their_own(self, tmp_path):
        model = new()
        model.save_pretrained(tmp_path)
        layer = model.base_model.model.model.layers[1].mlp.down_proj
        layer.vera_B = type(layer.vera_B)({"default": layer.vera_B["default"] * 2})
        with pytest.raises(CheckFailedError, match="hold different vera_B"):
            record(model, tmp_path)

    def test_another_adapters_checkpoint(self, tmp_path):
        new(save_projection=True, projection_prng_key=8).save_pretrained(tmp_path / "a")
        with pytest.raises(CheckFailedError, match="not those of the model"):
            record(peft_model(llama(), save_projection=True).eval(), _without_vectors(tmp_path / "a"))
        new(r=8).save_pretrained(tmp_path / "b")
        with pytest.raises(CheckFailedError, match="another adapter's"):
            record(new(), tmp_path / "b")

    def test_a_pickle(self, tmp_path):
        with pytest.raises(FormatError, match="pickles can run code"):
            save(new(), tmp_path, safe_serialization=False)
        assert (tmp_path / "adapter_model.bin").exists()

    def test_no_such_adapter(self, tmp_path):
        with pytest.raises(UsageError, match="no PEFT model"):
            save(llama(), tmp_path)
        merged = new().merge_and_unload()
        with pytest.raises(UsageError, match="no VeRA adapter 'default'"):
            record(merged, tmp_path)
        other = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(UsageError, match="no PEFT model with a VeRA adapter"):
            save(other, tmp_path)


def test_a_merged_adapter_is_the_same_adapter(tmp_path):
    model = new()
    save(model, tmp_path / "a")
    model.merge_adapter()
    save(model, tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_two_adapters_each_with_a_pair_of_its_own(tmp_path):
    save(new(torch.bfloat16), tmp_path / "rounded")
    model = new()
    model.load_adapter(tmp_path / "rounded", "second")
    restore_projections(model, tmp_path / "rounded", "second")
    for name, through in (("default", None), ("second", "bfloat16")):
        manifest = save(model, tmp_path / "out", name)
        assert (manifest.projections.origin, manifest.projections.recipe.rounded_through) == ("live", through)
        folder = tmp_path / "out" if name == "default" else tmp_path / "out" / name
        assert (origins(folder), verdict(folder)) == ({"live"}, "reproducible")
    assert record(model, tmp_path / "out", "second") == record(model, tmp_path / "out" / "second", "second")


def test_the_documented_loop_with_accelerate(tmp_path, monkeypatch):
    from accelerate import Accelerator

    guide = (ROOT / "docs" / "training.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(from vera_tools.nn import peft as vera_peft.*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    accelerator = Accelerator(cpu=True)
    model = peft_model(llama(), save_projection=False)
    prepared = accelerator.prepare(model)
    train(prepared, steps=2)
    exec(code, {"accelerator": accelerator, "model": prepared})
    assert (origins("my-adapter"), verdict("my-adapter")) == ({"live"}, "reproducible")
    assert torch.equal(logits(load_peft(llama(), "my-adapter"), some_ids()), logits(model.eval(), some_ids()))


def test_a_model_can_be_copied(tmp_path):
    import copy

    new().save_pretrained(tmp_path / "a")
    for model, origin in ((new(), "live"), (resumed(tmp_path / "a"), "assumed")):
        twin = copy.deepcopy(model)
        if origin == "assumed":
            with pytest.warns(AssumedRecipeWarning):
                assert save(twin, tmp_path / "b").projections.origin == origin
        else:
            assert save(twin, tmp_path / "b").projections.origin == origin


def _without_vectors(folder):
    """The checkpoint's vectors as 0, as those of a new adapter are."""
    from tests.adapters import edit

    def clear(tensors):
        for name, array in tensors.items():
            if name.endswith(("vera_lambda_b", "vera_lambda_d")):
                array[:] = 0 if name.endswith("b") else OPTIONS["d_initial"]

    edit(folder, clear)
    return folder
