"""One batch whose rows use different adapters."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.nn.models import OPTIONS, bert, fresh, llama, logits, randomise, some_ids
from tests.peers import QUIET_PEERS
from vera_tools.errors import UsageError
from vera_tools.nn import VeraConfig, VeraModel
from vera_tools.nn import layer as layer_module

pytestmark = QUIET_PEERS

NAMES = ["second", "__base__", "default", "narrow", "default", "few"]


def many():
    """Adapters that share a pair, one with a pair of its own, one on fewer layers with a pair of its own."""
    model = fresh()
    model.add_adapter("second", VeraConfig(**OPTIONS))
    model.add_adapter("narrow", VeraConfig(**{**OPTIONS, "r": 8}))
    model.add_adapter("few", VeraConfig(**{**OPTIONS, "target_modules": ["q_proj"]}))
    randomise(model)
    return model


def one_by_one(model, ids, names):
    outputs = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                outputs.append(logits(model, row[None]))
        else:
            model.set_adapter(name)
            outputs.append(logits(model, row[None]))
    return torch.cat(outputs)


def test_every_row_is_computed_with_its_own_adapter():
    model, ids = many(), some_ids(len(NAMES))
    want = one_by_one(model, ids, NAMES)
    model.set_adapter("few")
    got = logits(model, ids, adapter_names=NAMES)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (want[2] - want[0]).abs().max() > 1e-3
    alike = logits(model, ids, adapter_names=["few"] * len(NAMES))
    torch.testing.assert_close(alike, logits(model, ids), rtol=0, atol=1e-6)


def test_a_row_without_adapter_is_exactly_the_base():
    model, ids = many(), some_ids(2)
    got = logits(model, ids, adapter_names=["__base__", "__base__"])
    assert torch.equal(got, logits(llama(), ids))


def test_adapters_that_share_a_pair_need_no_further_matrix_products():
    model, ids = many(), some_ids(4)
    with mock.patch.object(layer_module, "add_vera_rows", wraps=layer_module.add_vera_rows) as products:
        logits(model, ids, adapter_names=["default", "second", "default", "second"])
        assert products.call_count == len(model.vera_layers())
        products.reset_mock()
        logits(model, ids, adapter_names=["default", "second", "narrow", "second"])
        assert products.call_count == 2 * len(model.vera_layers())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation(options):
    model, ids = many(), some_ids(3, 6)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    names = ["second", "__base__", "narrow"]
    got = model.generate(ids, adapter_names=names, **settings)
    copies = options.get("num_return_sequences", 1)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(ids[i : i + 1], **settings)
        else:
            model.set_adapter(name)
            alone = model.generate(ids[i : i + 1], **settings)
        assert torch.equal(got[i * copies : (i + 1) * copies], alone)


def test_a_model_that_flattens_rows_and_positions():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.linear(x.reshape(-1, 6)).reshape(*x.shape[:2], 5)

    model = VeraModel(Flat(), VeraConfig(r=4, target_modules=["linear"]))
    model.add_adapter("second", VeraConfig(r=4, target_modules=["linear"]))
    randomise(model)
    model.eval()
    x = torch.randn(2, 3, 6)
    got = model(x, adapter_names=["second", "default"])
    torch.testing.assert_close(got[1], model(x)[1])
    model.set_adapter("second")
    torch.testing.assert_close(got[0], model(x)[0])


def test_saved_modules_are_chosen_by_row_too():
    options = {"r": 4, "task_type": "SEQ_CLS", "target_modules": ["query"]}
    model = VeraModel(bert(), VeraConfig(**options))
    model.add_adapter("second", VeraConfig(**options))
    randomise(model)
    with torch.no_grad():
        for i, head in enumerate(model.saved_modules()["classifier"].modules_to_save.values()):
            head.bias.fill_(i + 1.0)
    names, ids = ["second", "__base__", "default", "second", "__base__"], some_ids(5)
    torch.testing.assert_close(
        logits(model, ids, adapter_names=names), one_by_one(model, ids, names), rtol=0, atol=1e-6
    )


def test_what_cannot_be_asked_for():
    model, ids = many(), some_ids(2)
    with pytest.raises(UsageError, match="Adapter third does not exist"):
        model(ids, adapter_names=["default", "third"])
    with pytest.raises(UsageError, match="adapter_names does not fit"):
        model(ids, adapter_names=["default"] * 3)
    with pytest.raises(UsageError, match="expected a list of adapter names"):
        model(ids, adapter_names="default")
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        model(ids, adapter_names=["default"] * 2)
    model.unmerge_adapter()
    model.train()
    with pytest.raises(ValueError, match="in training mode"):
        model(ids, adapter_names=["default"] * 2)
    model.eval()
    assert all(layer.rows is None for layer in model.vera_layers().values()), "a refused batch left its rows behind"
