"""Correct rounding of half-precision weights for adapters that were made to defeat it, against rational arithmetic."""

from __future__ import annotations

import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vera_tools
from tests.adapters import edit
from tests.merging.models import make_adapter, make_base, weights
from vera_tools.dtypes import np_dtype
from vera_tools.errors import CheckFailedError
from vera_tools.merging import arithmetic, exact, rounding, verification
from vera_tools.merging import values as merging_values
from vera_tools.merging.workspace import Workspace

# Pairs are edited, which their key does not give.
pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")

BITS = {"bfloat16": (8, -133), "float16": (11, -24)}  # of the significand; the exponent of the smallest number


def nearest(value: Fraction, dtype: str) -> float:
    """A rational number, finite in the half type, rounded to nearest even."""
    significand, smallest = BITS[dtype]
    if not value:
        return 0.0
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    while abs(value) >= Fraction(2) ** exponent:
        exponent += 1
    step = Fraction(2) ** max(exponent - significand, smallest)
    return float(round(value / step) * step)  # Python rounds a tie to even


def change(adapter, module, row, column):
    """One element of an adapter's change, without rounding."""
    tensors = weights(adapter)
    prefix = f"base_model.model.{module}."
    A, B = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
    d, b = (tensors[prefix + name] for name in ("vera_lambda_d", "vera_lambda_b"))
    terms = (Fraction(float(B[row, k])) * Fraction(float(d[k])) * Fraction(float(A[k, column])) for k in range(len(d)))
    return Fraction(float(b[row])) * sum(terms)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(
    numerator=st.integers(-(2**80), 2**80),
    exponent=st.integers(-120, 15),
)
@settings(deadline=None)
def test_integers_round_as_rationals_do(dtype, numerator, exponent):
    value = Fraction(numerator) * Fraction(2) ** (exponent - 80)
    found = rounding.rounded(np.array([exact.to_odd(numerator, exponent - 80)]), dtype)[0]
    assert float(found) == nearest(value, dtype)


@given(st.lists(st.tuples(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 3), min_size=1, max_size=20))
@settings(deadline=None)
def test_sums_of_products_are_exact(terms):
    arrays = [exact.Scaled(np.array(column, np.float32)) for column in zip(*terms, strict=True)]
    integer, exponent = exact.product_sum(arrays)
    expected = sum(Fraction(a) * Fraction(b) * Fraction(c) for a, b, c in terms)
    assert Fraction(integer) * Fraction(2) ** exponent == expected


def test_numbers_that_float64_cannot_hold():
    assert exact.to_odd(1, 2000) == np.inf
    assert exact.to_odd(-3, 1024) == -np.inf
    assert exact.to_odd(1, -1080) == 2.0**-1074  # odd, and so not zero
    assert str(exact.to_odd(0, 5)) == "0.0"  # and not -0.0, as no sum of numbers is that cancel each other
    assert exact.to_odd(-(2**2000), -2000) == -1.0  # an integer beyond all floats


SHAPES = {"model.layers.0.up": (24, 40)}
(NAME,) = SHAPES
PREFIX = f"base_model.model.{NAME}."


def constant(tensors):
    """Every product the same: in float32 each partial sum is rounded the same way."""
    tensors["base_model.vera_A"][...] = np.float32(0.1)
    tensors["base_model.vera_B"][...] = np.float32(0.3)


def ties(tensors):
    """Powers of two, and sums that lie exactly in the middle between two numbers."""
    tensors["base_model.vera_A"][...] = 1
    tensors["base_model.vera_B"][...] = 1
    tensors[PREFIX + "vera_lambda_d"][...] = 0
    tensors[PREFIX + "vera_lambda_d"][0] = 1
    tensors[PREFIX + "vera_lambda_b"][...] = 2.0 ** -np.arange(24)


def cancelling(tensors):
    """Large products that take each other away and leave next to nothing."""
    A = tensors["base_model.vera_A"]
    A[1::2] = -A[::2]
    tensors["base_model.vera_B"][:, 1::2] = tensors["base_model.vera_B"][:, ::2]
    tensors[PREFIX + "vera_lambda_d"][...] = np.float32(1e4)
    tensors[PREFIX + "vera_lambda_d"][0] = np.nextafter(np.float32(1e4), np.float32(2e4))


def one_sided(tensors):
    """lambda_d that makes every product of one element positive, first half, and negative, second half."""
    signs = np.sign(tensors["base_model.vera_B"][3] * tensors["base_model.vera_A"][:, 5])
    half = len(signs) // 2
    tensors[PREFIX + "vera_lambda_d"][...] = np.where(np.arange(len(signs)) < half, signs, -signs) * np.float32(0.1)


def tiny(tensors):
    """Products below the smallest normal float32."""
    tensors[PREFIX + "vera_lambda_b"] *= np.float32(2.0**-70)
    tensors[PREFIX + "vera_lambda_d"] *= np.float32(2.0**-70)


def uneven(tensors):
    """Columns of vera_A of very different size."""
    tensors["base_model.vera_A"] *= np.float32(2) ** (4 * (np.arange(40, dtype=np.float32) - 20))


MADE = [constant, ties, cancelling, one_sided, tiny, uneven]


def lost_on_the_left(tensors):
    """Rows of lambda_b * vera_B that are zero in float32, times columns that make something of them again."""
    tensors[PREFIX + "vera_lambda_b"][...] = np.float32(2.0**-149)
    tensors[PREFIX + "vera_lambda_d"][...] = np.float32(2.0**60)


def lost_on_the_right(tensors):
    tensors[PREFIX + "vera_lambda_b"][...] = np.float32(2.0**60)
    tensors[PREFIX + "vera_lambda_d"][...] = np.float32(2.0**-149)


def beyond_what_norms_hold(tensors):
    """Sums next to the middle between two numbers, of factors whose squares float64 does not hold."""
    tensors[PREFIX + "vera_lambda_b"] = np.full(24, 2.0**700)
    tensors[PREFIX + "vera_lambda_d"] = np.where(np.arange(64) == 0, 2.0**-708, 2.0**-790)
    tensors["base_model.vera_A"][...] = 1
    tensors["base_model.vera_B"][...] = 1


def nasty(tensors, rng):
    """Magnitudes over many orders, signs, zeros, repeated values."""
    for name in tensors:
        values = tensors[name]
        spread = rng.integers(0, 24)
        scaled = rng.standard_normal(values.shape) * 2.0 ** rng.integers(-spread - 1, spread + 1, values.shape)
        kind = rng.integers(0, 4)
        if kind == 1:
            scaled = np.round(scaled * 4) / 4
        elif kind == 2:
            scaled = np.where(rng.random(values.shape) < 0.5, 0, scaled)
        elif kind == 3:
            scaled = np.broadcast_to(scaled.reshape(-1)[:1], values.shape)
        tensors[name] = scaled.astype(np.float32)


def base_near_the_middle(folder, dtype, adapter, *, scale):
    """A base whose sums with the adapter's change lie near the middle between two numbers, or are nearly nothing."""
    rng = np.random.default_rng(1)
    base = make_base(folder, SHAPES, dtype=dtype)

    def near(tensors):
        weight = tensors[f"{NAME}.weight"]
        values = (rng.standard_normal(weight.shape) * scale).astype(weight.dtype)
        for row in range(weight.shape[0]):
            for column in range(0, weight.shape[1], 3):
                values[row, column] = -float(change(adapter, NAME, row, column))
        weight[...] = values

    edit(base, near, file="model.safetensors")
    return base


def check(tmp_path, dtype, adapter, base, *, columns=None):
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
    before, after = (weights(folder)[f"{NAME}.weight"] for folder in (base, tmp_path / "out"))
    wrong = []
    for row in range(before.shape[0]):
        for column in range(before.shape[1]) if columns is None else columns:
            value = Fraction(float(before[row, column])) + change(adapter, NAME, row, column)
            if float(after[row, column]) != nearest(value, dtype):
                wrong.append((row, column))
    assert not wrong


@pytest.mark.parametrize(
    "dtype", [pytest.param("bfloat16", marks=pytest.mark.long), pytest.param("float16", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-20])
@pytest.mark.parametrize("make", MADE)
def test_what_was_made_to_defeat_it_is_correctly_rounded(make, scale, dtype, tmp_path):
    if (make, dtype) == (uneven, "float16"):
        pytest.skip("its sums are beyond float16, and the merge is refused")
    adapter = make_adapter(tmp_path / "a", SHAPES, r=64)
    edit(adapter, make)
    check(tmp_path, dtype, adapter, base_near_the_middle(tmp_path / "base", dtype, adapter, scale=scale))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("make", "size"), [(lost_on_the_left, 2.0**-100), (lost_on_the_right, 2.0**-100), (beyond_what_norms_hold, 1.0)]
)
def test_what_a_dtype_does_not_hold_is_correctly_rounded(make, size, transposed, tmp_path):
    adapter = make_adapter(tmp_path / "a", SHAPES, r=64, config={"fan_in_fan_out": transposed})
    edit(adapter, make)
    base = make_base(tmp_path / "base", SHAPES, transposed=transposed)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., size), file="model.safetensors")
    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    after = weights(tmp_path / "out")[f"{NAME}.weight"]
    after = after.T if transposed else after
    for row, column in [(0, 0), (3, 39), (23, 5)]:
        expected = nearest(Fraction(size) + change(adapter, NAME, row, column), "bfloat16")
        assert float(after[row, column]) == expected != size


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["vera_A", "vera_B"])
def test_nothing_times_what_float32_does_not_hold_is_nothing(name, transposed, tmp_path):
    adapter = make_adapter(tmp_path / "a", SHAPES, r=4, config={"fan_in_fan_out": transposed})

    def grow(tensors):
        for vera in ("vera_A", "vera_B"):
            tensors[f"base_model.{vera}"] = tensors[f"base_model.{vera}"].astype(np.float64)
        tensors[f"base_model.{name}"] *= 1e60
        tensors[PREFIX + "vera_lambda_b"][...] = 0

    edit(adapter, grow)
    base = make_base(tmp_path / "base", SHAPES, transposed=transposed)
    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    before, after = (weights(folder)[f"{NAME}.weight"] for folder in (base, tmp_path / "out"))
    assert np.array_equal(before, after)


def test_an_adapters_weight_is_not_rounded_into_its_vector(tmp_path):
    """A third of three is one in float64, and less in truth: enough to be below the middle between two numbers."""
    adapter = make_adapter(tmp_path / "a", SHAPES, r=64)
    edit(adapter, ties)
    edit(adapter, lambda tensors: tensors[PREFIX + "vera_lambda_b"].__setitem__(..., 3 * 2.0**-8))
    base = make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., 1 + 2.0**-7), file="model.safetensors")
    assert 3 * (1 / 3) == 1
    assert 3 * Fraction(1 / 3) < 1
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", weights=[1 / 3], verify=True)
    assert (weights(tmp_path / "out")[f"{NAME}.weight"] == 1 + 2.0**-7).all()


@pytest.mark.parametrize("crowded", [-1.0, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_nasty_adapters_are_correctly_rounded(seed, crowded, tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "CROWDED", crowded)
    rng = np.random.default_rng(seed)
    adapter = make_adapter(tmp_path / "a", SHAPES, r=int(rng.integers(1, 48)))
    edit(adapter, lambda tensors: nasty(tensors, rng))
    base = base_near_the_middle(tmp_path / "base", "bfloat16", adapter, scale=2.0 ** rng.integers(-60, 10))
    check(tmp_path, "bfloat16", adapter, base, columns=range(0, 40, 2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_float64_can_tell_is_not_computed_exactly(dtype):
    sums = np.array([1.3, -0.7, 1 + 2.0**-7 + 2.0**-40, np.nan, np.inf])
    found = rounding.decide(sums, np.full(5, 2.0**-50), dtype, lambda places: pytest.fail(f"{places} are certain"))
    assert [float(value) for value in found[:3]] == [nearest(Fraction(value), dtype) for value in sums[:3]]
    assert np.isnan(found[3].astype(float))
    assert found[4] == np.inf


@pytest.mark.parametrize("tie", [2.0**-134, -(2.0**-134), 3 * 2.0**-134])
def test_a_tie_among_the_smallest_numbers_goes_to_even(tie):
    total, result = np.full((1, 1), tie, np.float32), np.empty((1, 1), np_dtype("bfloat16"))
    nothing = np.zeros(1, np.float32)
    sum_and_found = rounding.sum_to_half(
        total, None, error=nothing, bound=np.abs(total[0]), out=result, workspace=Workspace()
    )
    assert sum_and_found[0].size or float(result[0, 0]) == nearest(Fraction(tie), "bfloat16")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sum_is_open_where_its_errors_reach_the_middle_together(dtype, sign):
    """The product's own, the sum's rounding to float32, and another for adding the one: then the middle goes up."""
    last = 2.0 ** (1 - BITS[dtype][0])
    weight, middle = 1 + 2 * last, 1 + 1.5 * last
    product, error = middle - weight + (1 - 0.45) * 2.0**-23, (1 - 0.425) * 2.0**-23
    true = Fraction(weight) + Fraction(float(np.float32(product))) - Fraction(float(np.float32(error)))
    assert nearest(true, dtype) == 1 + last
    assert float(np.float32(weight) + np.float32(product)) == middle + 2.0**-23
    result = np.empty((1, 1), np_dtype(dtype))
    found, _ = rounding.sum_to_half(
        np.full((1, 1), sign * product, np.float32),
        np.full((1, 1), sign * weight, np_dtype(dtype)),
        error=np.full(1, error, np.float32),
        bound=np.float32(weight),
        out=result,
        workspace=Workspace(),
    )
    assert found.size or float(result[0, 0]) == sign * (1 + last)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_errs_by_a_share_of_itself_and_not_of_a_sum_that_takes_most_of_it_away(dtype):
    last = 2.0 ** (1 - BITS[dtype][0])
    total = np.full((1, 1), 256 + last / 2 + last / 32, np.float32)
    found, _ = rounding.sum_to_half(
        total,
        np.full((1, 1), -255, np_dtype(dtype)),
        error=np.zeros(1, np.float32),
        bound=np.float32(256),
        out=np.empty((1, 1), np_dtype(dtype)),
        workspace=Workspace(),
        own=np.float32(2.0**-18),
    )
    assert total[0, 0] == 1 + last / 2 + last / 32  # which is less than 2**-10 from the middle
    assert found.size


@pytest.mark.parametrize("crowded", [-1.0, 1.0])
def test_just_above_the_middle_among_the_smallest_numbers(crowded, tmp_path, monkeypatch):
    """By less than float32 holds at all: taken for the middle, the sum would go to zero, which is even."""
    monkeypatch.setattr(arithmetic, "CROWDED", crowded)
    adapter = make_adapter(tmp_path / "a", SHAPES, r=16)

    def above(tensors):
        tensors[PREFIX + "vera_lambda_b"][...] = 2.0**-67
        tensors[PREFIX + "vera_lambda_d"][...] = np.arange(16) < 2
        tensors["base_model.vera_A"][...] = 2.0**-67
        tensors["base_model.vera_B"][...] = np.where(np.arange(16) == 0, 1, 2.0**-26)

    edit(adapter, above)
    base = make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., 0), file="model.safetensors")
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
    assert (weights(tmp_path / "out")[f"{NAME}.weight"].astype(np.float64) == 2.0**-133).all()


def test_more_open_sums_than_can_be_computed_exactly_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "MAX_EXACT", 3)
    adapter = make_adapter(tmp_path / "a", SHAPES, r=4)
    edit(adapter, ties)
    base = make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., 1.0), file="model.safetensors")
    with pytest.raises(CheckFailedError, match=r"sums lie in the middle between two bfloat16 numbers.*3 at most"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["one step off", "NaN"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_finds_a_single_element_that_is_another(dtype, wrong, tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "a", SHAPES, r=16)
    base = make_base(tmp_path / "base", SHAPES, dtype=dtype)
    right = rounding.sum_to_half

    def one_off(*args, out, **options):
        found = right(*args, out=out, **options)
        bits = out.view(np.uint16)
        bits[2, 7] = bits[2, 7] + 1 if wrong == "one step off" else 0x7FFF
        return found

    monkeypatch.setattr("vera_tools.merging.values.sum_to_half", one_off)
    vera_tools.merge(adapter, base=base, output=tmp_path / "unverified")
    with pytest.raises(CheckFailedError, match="1 elements are not what they should be"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)


def test_verify_finds_a_float32_that_is_further_off_than_any_sum(tmp_path, monkeypatch):
    adapter, base = make_adapter(tmp_path / "a", SHAPES, r=16), make_base(tmp_path / "base", SHAPES, dtype="float32")
    right = merging_values._finished

    def one_off(values, entry, *, exact):
        found = right(values, entry, exact=exact)
        if not exact:
            found[2, 7] *= 1 + 2.0**-12
        return found

    monkeypatch.setattr(merging_values, "_finished", one_off)
    with pytest.raises(CheckFailedError, match="1 elements are not what they should be"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)


def test_verify_says_what_the_first_wrong_element_is():
    error = verification._wrong(np.array([1.0, 2, 3]), np.array([1.0, 5, 6]), np.array([1, 2]), where="file: tensor")
    assert (error.expected, error.found) == ("2 at the first of them", "5")
    assert "2 elements are not" in str(error)


def test_verify_gives_up_on_more_open_sums_than_it_can_compute(tmp_path, monkeypatch):
    adapter = make_adapter(tmp_path / "a", SHAPES, r=4)
    edit(adapter, ties)
    base = make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., 1.0), file="model.safetensors")
    monkeypatch.setattr(verification, "MAX_EXACT", 3)
    with pytest.raises(CheckFailedError, match="or nearer to the middle between two numbers than float64 can tell"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)


def test_verify_finds_a_header_that_was_not_planned(tmp_path):
    base = make_base(tmp_path / "base", SHAPES)
    with pytest.raises(CheckFailedError, match="the header is not the planned one"):
        verification._open(base, SimpleNamespace(name="model.safetensors", header=b"{}"))


def test_verify_finds_a_number_where_nan_should_be(tmp_path, monkeypatch):
    adapter, base = make_adapter(tmp_path / "a", SHAPES, r=16), make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__((2, 7), np.nan), file="model.safetensors")
    right = merging_values.decide

    def one_off(sums, *args):
        found = right(sums, *args)
        found[np.isnan(sums)] = 1
        return found

    monkeypatch.setattr(merging_values, "decide", one_off)
    with pytest.raises(CheckFailedError, match="1 elements are not what they should be"):
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", allow_nonfinite=True, verify=True)


def test_strips_of_a_block_are_settled_at_their_own_rows(tmp_path, monkeypatch):
    """By way of float64, and where that leaves sums open, in integers: each strip begins at another row."""
    adapter = make_adapter(tmp_path / "a", SHAPES, r=4)
    edit(adapter, ties)
    base = make_base(tmp_path / "base", SHAPES)
    odd = np.arange(24 * 40).reshape(24, 40) % 7 * 2.0**-7 + 1
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(..., odd), file="model.safetensors")
    monkeypatch.setattr(arithmetic, "CROWDED", -1.0)
    monkeypatch.setattr(merging_values, "_STRIP", 5 * 40)
    check(tmp_path, "bfloat16", adapter, base)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_sums_of_subnormal_numbers_pass_the_verification(dtype, tmp_path):
    adapter = make_adapter(tmp_path / "a", SHAPES, r=16)
    edit(adapter, tiny)
    base = make_base(tmp_path / "base", SHAPES, dtype=dtype)
    small = np.full(SHAPES[NAME], 2.0**-140).astype(np_dtype(dtype))
    edit(base, lambda tensors: tensors.update({f"{NAME}.weight": small}), file="model.safetensors")
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
    assert json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("idle", ["vera_lambda_b", "vera_lambda_d", "weight"])
def test_zeros_need_no_exact_arithmetic(idle, tmp_path, monkeypatch):
    """Rows that an adapter leaves alone, and a base that was pruned, are no doubtful sums."""
    adapter = make_adapter(tmp_path / "a", SHAPES, r=16)
    step = {"vera_lambda_b": 2, "vera_lambda_d": 1}.get(idle)
    if step:
        edit(adapter, lambda tensors: tensors[PREFIX + idle].__setitem__(slice(None, None, step), 0))
    base = make_base(tmp_path / "base", SHAPES)
    edit(base, lambda tensors: tensors[f"{NAME}.weight"].__setitem__(slice(0, 12), 0), file="model.safetensors")
    monkeypatch.setattr(arithmetic.Delta, "exactly", lambda *_: pytest.fail("computed exactly"))
    vera_tools.merge(adapter, base=base, output=tmp_path / "out", weights=[0.0 if idle == "weight" else 1.0])
