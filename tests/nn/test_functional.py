from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.functional import linear

from vera_tools.nn.functional import add_vera, add_vera_rows, delta_weight, linear_vera


def operands(*, rows=(3, 5), n_in=6, n_out=7, r=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    trained = {"result": draw(*rows, n_out), "x": draw(*rows, n_in), "d": draw(r), "b": draw(n_out)}
    return {name: t.requires_grad_() for name, t in trained.items()}, {"A": draw(r, n_in), "B": draw(n_out, r)}


def in_order(trained, frozen):
    """`add_vera` as a function of the trained tensors alone."""
    return lambda *values: add_vera(**dict(zip(trained, values, strict=True)), **frozen)


def plain(result, x, *, A, B, d, b):
    """The definition, by autograd."""
    return result + b * linear(d * linear(x, A), B)


@pytest.mark.parametrize("rows", [(5,), (3, 5), (2, 3, 4), (1,), (0, 5)])
def test_gradients_are_those_of_finite_differences(rows):
    trained, frozen = operands(rows=rows)

    assert torch.autograd.gradcheck(in_order(trained, frozen), [*trained.values()])


@pytest.mark.parametrize("frozen_names", [("x",), ("d",), ("b",), ("d", "b"), ("result",), ("result", "x")])
def test_gradients_where_some_are_not_wanted(frozen_names):
    trained, frozen = operands()
    for name in frozen_names:
        trained[name].requires_grad_(False)

    assert torch.autograd.gradcheck(in_order(trained, frozen), [*trained.values()])


def test_value_and_gradients_equal_the_definition_in_float32():
    trained, frozen = operands(rows=(4, 33), n_in=48, n_out=40, r=16, dtype=torch.float32)
    outputs = [function(**trained, **frozen) for function in (add_vera, plain)]
    weight = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad((output * weight).sum(), list(trained.values())) for output in outputs]
    torch.testing.assert_close(*outputs)
    for ours, autograd in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen_names", [(), ("x", "result"), ("d", "b")], ids=str)
def test_second_derivatives_are_those_of_finite_differences(frozen_names):
    trained, frozen = operands()
    for name in frozen_names:
        trained[name].requires_grad_(False)

    assert torch.autograd.gradgradcheck(in_order(trained, frozen), [*trained.values()])


def test_the_gradient_of_each_row_by_itself():
    """What ``torch.func`` makes of a model: vmap over grad."""
    trained, frozen = operands()
    result, x = (trained[name].detach() for name in ("result", "x"))
    vectors = {name: trained[name].detach() for name in ("d", "b")}

    def loss(function, vectors, result, x):
        return function(result, x, **vectors, **frozen).square().sum()

    ours, autograd = (
        torch.func.vmap(torch.func.grad(partial(loss, function)), in_dims=(None, 0, 0))(vectors, result, x)
        for function in (add_vera, plain)
    )
    for name in vectors:
        assert ours[name].shape == (3, *vectors[name].shape)
        torch.testing.assert_close(ours[name], autograd[name])


def saved_bytes(function, trained, frozen):
    """Bytes that the graph keeps for the backward pass, the frozen projections and the vectors left out."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*trained.values(), *frozen.values())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(**trained, **frozen)
    assert output.requires_grad
    return sum(kept.values())


def test_only_rank_r_activations_are_kept():
    trained, frozen = operands(rows=(2, 32), n_in=64, n_out=96, r=8, dtype=torch.float32)
    positions = 2 * 32
    assert saved_bytes(add_vera, trained, frozen) == positions * 8 * 4
    assert saved_bytes(plain, trained, frozen) >= positions * 96 * 4


def test_half_precision_input_is_computed_with_float32_projections():
    trained, frozen = operands(dtype=torch.float32)
    half = {name: trained[name].detach().bfloat16() for name in ("result", "x")}
    vectors = {name: trained[name].detach() for name in ("d", "b")}
    ours = add_vera(**half, **vectors, **frozen)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain(half["result"].float(), half["x"].float(), **vectors, **frozen))


def test_autocast_chooses_the_dtype_of_the_products():
    trained, frozen = operands(rows=(4, 33), n_in=48, n_out=40, r=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = add_vera(**trained, **frozen)
        assert ours.dtype == torch.float32
    exact = plain(**trained, **frozen)
    assert not torch.allclose(ours, exact, rtol=1e-5, atol=1e-5)
    assert (ours - exact).norm() <= 0.02 * exact.norm()
    gradients = [torch.autograd.grad(output.sum(), list(trained.values())) for output in (ours, exact)]
    for rounded, autograd in zip(*gradients, strict=True):
        assert (rounded - autograd).norm() <= 0.02 * autograd.norm()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("how", ["alone", "in a gradient", "under torch.func"])
def test_the_sum_is_rounded_once(autocast, how):
    trained, frozen = operands(rows=(4, 33), n_in=48, n_out=40, r=16, dtype=torch.float32)
    trained["result"] = trained["result"].detach().bfloat16()
    with torch.set_grad_enabled(how != "alone"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wide = add_vera(**trained, **frozen)
        if how == "under torch.func":
            rounded = torch.func.vmap(
                lambda x, r: add_vera(**{**trained, "x": x, "result": r}, **frozen, dtype=r.dtype)
            )(trained["x"], trained["result"])
        else:
            rounded = add_vera(**trained, **frozen, dtype=torch.bfloat16)
    assert wide.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, wide.bfloat16())


def test_going_back_under_autocast_rounds_no_vectors_gradient():
    trained, frozen = operands(rows=(4, 33), n_in=48, n_out=40, r=16, dtype=torch.float32)
    wanted = [trained["d"], trained["b"], trained["x"], trained["result"]]
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            ours = add_vera(**trained, **frozen, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(ours.float().square().sum(), wanted))
    assert all(torch.equal(inside, outside) for inside, outside in zip(*found, strict=True))
    assert found[0][1].dtype == torch.float32
    assert not torch.equal(found[0][1], found[0][1].bfloat16().float())


def test_rows_with_vectors_of_their_own():
    trained, frozen = operands(rows=(3, 5))
    d, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    together = add_vera_rows(trained["result"], trained["x"], d=d, b=b, **frozen)
    for row in range(3):
        alone = plain(trained["result"][row], trained["x"][row], d=d[row], b=b[row], **frozen)
        torch.testing.assert_close(together[row], alone)
    flat = add_vera_rows(trained["result"][:, 0], trained["x"][:, 0], d=d, b=b, **frozen)
    torch.testing.assert_close(flat, together[:, 0])


def test_delta_weight_is_the_update_as_a_matrix():
    trained, frozen = operands()
    delta = delta_weight(d=trained["d"], b=trained["b"], **frozen)
    update = add_vera(**trained, **frozen) - trained["result"]
    torch.testing.assert_close(linear(trained["x"], delta), update)


def whole_layer(*, rows=(4, 33), dtype=torch.float64, n_in=6, n_out=7):
    trained, frozen = operands(rows=rows, dtype=dtype, n_in=n_in, n_out=n_out)
    generator = torch.Generator().manual_seed(1)
    del trained["result"]
    W = torch.randn(n_out, n_in, generator=generator, dtype=dtype)
    return trained, {**frozen, "W": W, "bias": torch.randn(n_out, generator=generator, dtype=dtype)}


@pytest.mark.parametrize("frozen_names", [(), ("d",), ("b",), ("d", "b")], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_whole_layers_gradients_are_those_of_finite_differences(frozen_names, bias):
    trained, frozen = whole_layer(rows=(2, 5))
    for name in frozen_names:
        trained[name].requires_grad_(False)
    if not bias:
        frozen["bias"] = None

    def function(*values):
        return linear_vera(**dict(zip(trained, values, strict=True)), **frozen)

    assert torch.autograd.gradcheck(function, [*trained.values()])
    assert torch.autograd.gradgradcheck(function, [*trained.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_layer_gives_the_same_bits(dtype):
    trained, frozen = whole_layer(dtype=dtype, n_in=48, n_out=40)
    total = linear_vera(**trained, **frozen)
    W, bias = frozen.pop("W"), frozen.pop("bias")
    apart = add_vera(linear(trained["x"], W, bias), **trained, **frozen)
    assert torch.equal(total, apart)
    gradients = [torch.autograd.grad(y.square().sum(), list(trained.values())) for y in (total, apart)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_where_a_layer_is_not_computed_whole():
    def declines(**change):
        trained, frozen = whole_layer(dtype=torch.float32)
        return linear_vera(**{**trained, **frozen, **change}) is None

    trained, frozen = whole_layer(dtype=torch.float32)
    assert not declines()
    assert declines(W=frozen["W"].bfloat16())
    assert declines(W=frozen["W"].clone().requires_grad_())
    assert declines(bias=frozen["bias"].clone().requires_grad_())
    assert declines(x=trained["x"].detach())
    assert declines(x=trained["x"][:1, :1])
    with torch.no_grad():
        assert declines()
    with torch.autocast("cpu", torch.bfloat16):
        assert declines()
