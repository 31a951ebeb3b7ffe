"""What PyTorch makes of a model: graphs that are compiled, exported, checkpointed and differentiated by function."""

from __future__ import annotations

import locale

import pytest
import torch
from torch.func import functional_call, grad, vmap

from tests.nn.models import adapted, some_ids, tiny
from tests.peers import QUIET_PEERS

pytestmark = QUIET_PEERS


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    def gradients(checkpointing):
        model = adapted()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        model(input_ids=some_ids(), labels=some_ids()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == 12
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
    not locale.getpreferredencoding(False).lower().startswith("utf"), reason="torch reads its own source"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torch_compile():
    model = tiny()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 6)
    torch.testing.assert_close(compiled(x), model(x))
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)
    model.merge_adapter()  # what the graph was compiled for has changed, and it has to notice
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export():
    model, x = tiny().eval(), torch.randn(4, 6)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_the_gradients_of_each_row_by_torch_func():
    model, x = tiny(), torch.randn(4, 6)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(values, row):
        return functional_call(model, values, (row[None],)).square().sum()

    by_row = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for i in range(4):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in trained.items():
            torch.testing.assert_close(by_row[name][i], parameter.grad)
