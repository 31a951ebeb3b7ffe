"""What a merge computes: bits against float64 arithmetic, logits against transformers and PEFT."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT_NAMES, NAMES, base_of, edit
from tests.merging.models import LAYERS, exact_delta, make_adapter, make_base, rounded_once, weights
from tests.peers import base_model, distance
from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.merging import arithmetic, rounding
from vera_tools.merging.workspace import Workspace

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedRecipeWarning")


def bits(array):
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_adapters_expected_logits(name, tmp_path):
    vera_tools.merge(CHECKPOINTS / name, base=base_of(name), output=tmp_path / "out")
    tolerance = 4e-3 if "bf16" in name else 1e-5
    assert distance(base_model(name, tmp_path / "out"), name) <= tolerance
    effect = distance(base_model(name), name)
    assert effect > 0.5 * tolerance, "the adapter must make a difference, or the comparison says nothing"


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_every_half_precision_element_is_correctly_rounded(name, tmp_path):
    report = vera_tools.merge(CHECKPOINTS / name, base=base_of(name), output=tmp_path / "out")
    before, after = weights(base_of(name)), weights(tmp_path / "out")
    assert set(before) == set(after)
    touched = set(report.merged) | set(report.replaced)
    for tensor, old in before.items():
        if tensor not in touched:
            assert np.array_equal(bits(old), bits(after[tensor])), tensor
    for tensor in report.merged:
        change = exact_delta(CHECKPOINTS / name, tensor.removesuffix(".weight"))
        old = before[tensor]
        change = change.T if "gpt2" in name else change
        exact = old.astype(np.float64) + change[: old.shape[0], : old.shape[1]]
        if old.dtype == np.float32:
            assert np.abs(after[tensor] - exact).max() <= 1e-6 * np.abs(exact).max()
        else:
            assert np.array_equal(after[tensor], rounded_once(exact, old.dtype.name)), tensor


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("transposed", [False, True])
def test_several_adapters_are_summed_and_rounded_once(dtype, transposed, tmp_path):
    shapes = {"model.layers.0.a": (96, 160), "model.layers.0.b": (160, 160), "model.layers.1.a": (96, 160)}
    base = make_base(tmp_path / "base", shapes, dtype=dtype, transposed=transposed)
    given = {"fan_in_fan_out": transposed}
    adapters = [make_adapter(tmp_path / f"a{n}", shapes, r=8 + n, key=n, seed=n, config=given) for n in range(3)]
    factors = [1.0, -0.5, 0.3]
    report = vera_tools.merge(adapters, base=base, output=tmp_path / "out", weights=factors)
    before, after = weights(base), weights(tmp_path / "out")
    assert sorted(report.merged) == sorted(f"{name}.weight" for name in shapes)
    for name, (outs, ins) in shapes.items():
        change = sum(f * exact_delta(a, name)[:outs, :ins] for f, a in zip(factors, adapters, strict=True))
        exact = before[f"{name}.weight"].astype(np.float64) + (change.T if transposed else change)
        found = after[f"{name}.weight"]
        assert found.dtype == before[f"{name}.weight"].dtype
        if dtype in ("bfloat16", "float16"):
            assert np.array_equal(found, rounded_once(exact, dtype))
        else:
            unit = 2.0**-24 if dtype == "float32" else 2.0**-53
            assert np.abs(found - exact).max() <= 64 * unit * np.abs(exact).max()


def _mask(shape, rows, columns):
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


def test_float32_alone_would_round_some_elements_wrongly():
    """The elements that are settled in float64 exist, are all found, and are few."""
    rng = np.random.default_rng(3)
    rank, size = 256, 512
    vera_A = rng.uniform(-0.05, 0.05, (rank, size)).astype(np.float32)
    vera_B = rng.uniform(-0.1, 0.1, (size, rank)).astype(np.float32)
    lambda_b, lambda_d = rng.standard_normal(size) * 0.02, rng.standard_normal(rank)
    factor = arithmetic.Factor(lambda_b, vera_B, lambda_d, vera_A, vera_A.T.copy())
    weight = (rng.standard_normal((size, size)) * 0.02).astype(np_dtype("bfloat16"))
    single, double = (
        arithmetic.Delta([factor], transposed=False, dtype=np.dtype(dtype), workspace=Workspace())
        for dtype in (np.float32, np.float64)
    )
    single.widen()
    product = single.rows(0, size, out=np.empty((size, size), np.float32))
    exact = double.rows(0, size, out=np.empty((size, size))) + weight.astype(np.float64)
    wrong = rounding.rounded(product + weight.astype(np.float32), "bfloat16") != rounded_once(exact, "bfloat16")
    result = np.empty_like(weight)
    spread = single.spread(single.left(0, size), 0)
    usual, (share, own) = single.error_share(np.dtype(np.float32)), single.error_shares()
    shares = []
    for error, besides in [(usual, 0), (share, own)]:
        rows, columns = rounding.sum_to_half(
            product.copy(),
            weight,
            error=spread * np.float32(error),
            bound=spread.max() + np.abs(weight.astype(np.float32)).max(),
            out=result,
            workspace=Workspace(),
            own=np.float32(besides),
        )
        found = _mask(wrong.shape, rows, columns)
        assert not ((result != rounded_once(exact, "bfloat16")) & ~found).any()
        assert wrong.any()
        assert not (wrong & ~found).any()
        shares.append(found.mean())
    assert shares[1] < 0.65 * shares[0] < 0.65 * 0.04
    sums, _ = single.closely(weight, rows, columns, start=0, spread=spread, products=np.dtype(np.float64))
    assert np.allclose(sums, exact[rows, columns], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("own", [0, 2.0**-16])
@pytest.mark.parametrize("scale", [0, 2.0**-149, 2.0**-130, 2.0**-24, 2.0**-14, 1, 60_000, 2.0**100, 3e38])
def test_what_is_not_doubtful_is_right_however_the_error_falls(dtype, scale, own):
    rng = np.random.default_rng(4)
    with np.errstate(over="ignore", under="ignore"):
        total = (rng.standard_normal((64, 300)) * scale).astype(np.float32)
        total[::2] = rng.integers(0, 2**32, (32, 300), dtype=np.uint32).view(np.float32)  # any number there is
        total[~np.isfinite(total)] = 1
        total[1::4] *= -np.sign(total[1::4])  # rows without a positive number
        error = (np.abs(total).max(axis=1) * 2.0 ** -rng.integers(8, 30, 64)).astype(np.float32)
    result = np.empty(total.shape, np_dtype(dtype))
    bound = np.abs(total).max()
    nothing = np.full(total.shape, -0.0, np.float32)
    before = total.astype(np.float64)
    found = rounding.sum_to_half(
        total, nothing, error=error, bound=bound, out=result, workspace=Workspace(), own=np.float32(own)
    )
    doubtful = _mask(total.shape, *found)
    possible = error[:, None].astype(np.float64) + own * np.abs(before)
    low, high = (rounding.rounded(before + sign * possible, dtype) for sign in (-0.999, 0.999))
    assert np.array_equal(bits(low[~doubtful]), bits(result[~doubtful]))
    assert np.array_equal(bits(high[~doubtful]), bits(result[~doubtful]))
    assert not doubtful.all() or scale == 0


@pytest.mark.parametrize("share", [-1.0, 1.0])
def test_settling_place_by_place_or_block_by_block_gives_the_same_bits(share, tmp_path, monkeypatch):
    shapes = {"model.layers.0.up": (200, 300)}
    base = make_base(tmp_path / "base", shapes, dtype="float16")
    adapter = make_adapter(tmp_path / "a", shapes, r=64)
    monkeypatch.setattr(arithmetic, "CROWDED", share)
    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    (name,) = shapes
    exact = weights(base)[f"{name}.weight"].astype(np.float64) + exact_delta(adapter, name)
    assert np.array_equal(weights(tmp_path / "out")[f"{name}.weight"], rounded_once(exact, "float16"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_ordinary_sums_are_told_in_float32_and_those_of_half_types_in_one_product(dtype, tmp_path, monkeypatch):
    """A float32 result is held to the bound of shorter ones: nothing looks again at what a product leaves open."""
    base, adapter = make_base(tmp_path / "base", dtype=dtype), make_adapter(tmp_path / "a", r=160)
    product, at_once = arithmetic.Delta.product, set()

    def noted(delta, left, *, out):
        at_once.add((delta.dtype.name, delta._panel))
        return product(delta, left, out=out)

    monkeypatch.setattr(arithmetic.Delta, "product", noted)
    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    assert at_once == {("float32", 160 if dtype == "bfloat16" else arithmetic.PANEL)}


def test_the_order_of_adapters_does_not_change_a_bit(tmp_path):
    base = make_base(tmp_path / "base", dtype="float32")
    one, two = make_adapter(tmp_path / "one", seed=1), make_adapter(tmp_path / "two", r=16, seed=2)
    vera_tools.merge([one, two], base=base, output=tmp_path / "a", weights=[0.7, 1.3])
    vera_tools.merge([two, one], base=base, output=tmp_path / "b", weights=[1.3, 0.7])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize("jobs", [1, 3])
def test_the_number_of_workers_and_blas_threads_does_not_change_a_bit(jobs, tmp_path):
    shapes = {"model.layers.0.up": (700, 300), "model.layers.0.down": (300, 700)}
    base, adapter = make_base(tmp_path / "base", shapes), make_adapter(tmp_path / "a", shapes, r=64)
    vera_tools.merge(adapter, base=base, output=tmp_path / "usual")
    vera_tools.merge(adapter, base=base, output=tmp_path / "other", jobs=jobs)
    a, b = (tmp_path / name / "model.safetensors" for name in ("usual", "other"))
    assert a.read_bytes() == b.read_bytes()


def test_blocks_of_rows_are_seamless(tmp_path, monkeypatch):
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    vera_tools.merge(adapter, base=base, output=tmp_path / "whole")
    monkeypatch.setattr(arithmetic, "BLOCK", 7 * 32)
    monkeypatch.setattr(rounding, "STRIP", 3 * 32)
    monkeypatch.setattr(arithmetic, "PLACES", 2)
    monkeypatch.setattr(arithmetic, "MANY", -1.0)
    monkeypatch.setattr(arithmetic, "NARROW_PANEL", 3)
    vera_tools.merge(adapter, base=base, output=tmp_path / "pieces", verify=True)
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "pieces"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float64"])
def test_cast_rounds_the_float_sum_once(dtype, stored, tmp_path):
    base, adapter = make_base(tmp_path / "base", dtype=stored), make_adapter(tmp_path / "a", scale=0.3)
    report = vera_tools.merge(adapter, base=base, output=tmp_path / "out", dtype=dtype, verify=True)
    before, after = weights(base), weights(tmp_path / "out")
    for name in LAYERS:
        exact = before[f"{name}.weight"].astype(np.float64) + exact_delta(adapter, name)
        found = after[f"{name}.weight"]
        assert found.dtype.name == dtype
        if dtype != "float32":
            assert np.array_equal(found, rounded_once(exact, dtype))
    assert after["model.steps"].dtype == np.int64
    assert np.array_equal(
        after["model.norm.weight"], rounded_once(before["model.norm.weight"].astype(np.float64), dtype)
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype
    assert report.copied == (1 if dtype != stored else 2)


def test_a_float64_is_not_rounded_twice_on_its_way_to_a_half_type():
    # Just above the middle between 1 and 1 + 2**-7; through float32 it would become the middle, and then go to 1.
    value = np.array(
        [1 + 2.0**-8 + 2.0**-40, -(1 + 2.0**-8 + 2.0**-40), 1 + 2.0**-8, np.inf, -np.inf, 1e300, 0.0, -0.0]
    )
    found = rounding.rounded(value, "bfloat16").astype(np.float64)
    expected = [1 + 2.0**-7, -(1 + 2.0**-7), 1, np.inf, -np.inf, np.inf, 0.0, -0.0]
    assert np.array_equal(found, expected)
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    assert np.isnan(rounding.rounded(np.array([np.nan]), "bfloat16").astype(np.float64)).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_values_that_are_not_finite_are_refused_by_tensor(dtype, bad, tmp_path):
    base, adapter = make_base(tmp_path / "base", dtype=dtype), make_adapter(tmp_path / "a")
    name = "model.layers.1.self_attn.v_proj.weight"
    edit(base, lambda tensors: tensors[name].__setitem__((3, 4), bad), file="model.safetensors")
    with pytest.raises(CheckFailedError, match=r"layers\.1\.self_attn\.v_proj.*NaN or infinity.*1 that are not"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", allow_nonfinite=True, verify=True)
    merged = weights(tmp_path / "out")[name].astype(np.float64)
    assert np.argwhere(~np.isfinite(merged)).tolist() == [[3, 4]]


def test_overflow_of_a_cast_is_refused(tmp_path):
    base = make_base(tmp_path / "base", dtype="float32", extra={"model.big.weight": np.full((2, 2), 1e6, np.float32)})
    with pytest.raises(CheckFailedError, match=r"model\.big\.weight"):
        vera_tools.merge(make_adapter(tmp_path / "a"), base=base, output=tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_overflow_of_a_sum_is_refused(dtype, tmp_path):
    """Weights that are the largest number there is, and changes of which some are larger than half its last place."""
    base = make_base(tmp_path / "base", dtype=dtype)
    top = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}[dtype]
    adapter = make_adapter(tmp_path / "a", scale=top / 8)
    name = next(iter(LAYERS))
    edit(base, lambda tensors: tensors[f"{name}.weight"].__setitem__(..., top), file="model.safetensors")
    with np.errstate(over="ignore"):
        exact = rounded_once(top + exact_delta(adapter, name), dtype).astype(np.float64)
    count = int(np.count_nonzero(~np.isfinite(exact)))
    assert 0 < count < exact.size
    with pytest.raises(CheckFailedError, match=rf"{name}.weight.*NaN or infinity.*{count} that are not"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", allow_nonfinite=True)
    assert np.array_equal(weights(tmp_path / "out")[f"{name}.weight"].astype(np.float64), exact)


@pytest.mark.parametrize("vector", ["vera_lambda_b", "vera_lambda_d"])
def test_an_adapter_with_nan_is_refused_before_anything_is_written(vector, tmp_path):
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{vector}"
    size = 48 if vector.endswith("b") else 8
    adapter = make_adapter(tmp_path / "a", extra={name: np.full(size, np.nan, np.float32)})
    with pytest.raises(CheckFailedError, match=vector):
        vera_tools.merge(adapter, base=make_base(tmp_path / "base"), output=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_seed_only_and_stored_projections_give_the_same_weights(tmp_path):
    base = make_base(tmp_path / "base", dtype="float32")
    for name, stored in (("kept", True), ("seed", False)):
        make_adapter(tmp_path / name, save_projection=stored)
        vera_tools.merge(tmp_path / name, base=base, output=tmp_path / f"{name}-out")
    a, b = (tmp_path / f"{name}-out/model.safetensors" for name in ("kept", "seed"))
    assert a.read_bytes() == b.read_bytes()
