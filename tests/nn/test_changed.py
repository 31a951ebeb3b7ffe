"""What was changed after it was recorded is not loaded, into our model or into PEFT's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.adapters import MANIFEST, edit, edit_json, set_config
from tests.nn.models import adapted, fresh, llama
from tests.peers import QUIET_PEERS, load_peft
from vera_tools import record
from vera_tools.errors import CheckFailedError, FormatError, VeraToolsWarning
from vera_tools.nn import VeraModel, save_adapter
from vera_tools.nn.peft import restore_projections

pytestmark = QUIET_PEERS


def flip_a_bit(folder, vector="vera_lambda_b"):
    def change(tensors):
        name = next(name for name in tensors if name.endswith(vector))
        tensors[name].reshape(-1).view(np.uint32)[3] ^= 1 << 20

    edit(folder, change)


LOADERS = {
    "from_pretrained": lambda folder: VeraModel.from_pretrained(llama(), folder),
    "load_adapter": lambda folder: fresh().load_adapter(folder, "second"),
    "restore_projections": lambda folder: restore_projections(load_peft(llama(), folder), folder),
}
DAMAGES = {
    "a bit of a vector": flip_a_bit,
    "a bit of the pair": lambda folder: flip_a_bit(folder, "vera_A"),
    "the config": lambda folder: set_config(folder, vera_dropout=0.5),
    "the manifest": lambda folder: edit_json(folder / MANIFEST, lambda manifest: manifest.update(platform="x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("loader", LOADERS)
def test_what_is_not_what_its_manifest_records_is_not_loaded(tmp_path, loader, damage):
    save_adapter(adapted(), tmp_path / "a")
    DAMAGES[damage](tmp_path / "a")
    with pytest.raises(CheckFailedError, match=r"not what is recorded of it|changed after it was written"):
        LOADERS[loader](tmp_path / "a")
    with pytest.warns(VeraToolsWarning):  # of what it vouches for
        record(tmp_path / "a")  # whoever meant it says so
    if damage != "a bit of the pair":
        LOADERS[loader](tmp_path / "a")


@pytest.mark.parametrize("loader", LOADERS)
def test_vectors_of_integers_are_not_loaded(tmp_path, loader):
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    edit(
        tmp_path / "a", lambda tensors: tensors.update({k: v.astype(np.int32) for k, v in tensors.items() if "_d" in k})
    )
    with pytest.raises(FormatError, match="not a floating-point dtype that VeRA computes in"):
        LOADERS[loader](tmp_path / "a")


@pytest.mark.parametrize("loader", LOADERS)
def test_what_was_trained_on_since_it_was_recorded_is_loaded_with_a_warning(tmp_path, loader):
    save_adapter(adapted(), tmp_path / "a")

    def train_on(tensors):
        for name, tensor in tensors.items():
            if "lambda" in name:
                tensor += np.float32(0.25)

    edit(tmp_path / "a", train_on)
    with pytest.warns(VeraToolsWarning, match="saved again after training on"):
        LOADERS[loader](tmp_path / "a")
