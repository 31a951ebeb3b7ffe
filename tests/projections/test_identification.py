"""Which recipe made a stored pair, and how far off the nearest one is."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import FIXTURES
from tests.adapters import CHECKPOINTS
from tests.memory import traced_peak
from tests.projections import torch_draws
from vera_tools.dtypes import FLOATS
from vera_tools.files.safetensors import TensorFile
from vera_tools.projections.floats import max_ulp
from vera_tools.projections.identification import identify, identify_pair, same_bits, with_digests
from vera_tools.projections.key import KEY_MAX, KEY_MIN
from vera_tools.projections.pair import Pair, PairShape
from vera_tools.projections.prng import bound, digests, generate
from vera_tools.projections.recipe import Recipe, candidates

pytestmark = pytest.mark.capability

KEY = 11
SMALL = PairShape(16, 256, 192)
REAL = PairShape(256, 2048, 2048)
ROUNDING = json.loads((FIXTURES / "golden" / "rounding.json").read_text())
F32 = Recipe(prng_key=KEY)


def kinds(found) -> list[str]:
    return [found.matches[name].match for name in ("vera_A", "vera_B")]


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("recipe", candidates(KEY), ids=lambda recipe: recipe.name)
def test_every_candidate_is_told_from_every_other_at_real_size(recipe):
    found = identify(*generate(recipe, REAL, stored_dtype="float64"), prng_key=KEY)
    assert found.exact
    assert kinds(found) == ["identical", "identical"]
    # So few bits are drawn, or so many rounded away again, that how the affine map rounds leaves no trace.
    coarse = recipe.half_sampling == "scalar" or (recipe.drawn_dtype == "float64" and recipe.rounded_through)
    if coarse:
        assert {recipe, recipe.replace(rounding="fused"), recipe.replace(rounding="separate")} <= set(found.all_recipes)
        assert found.recipe.rounding == "fused"
        assert {(r.drawn_dtype, r.half_sampling) for r in found.all_recipes} == {
            (recipe.drawn_dtype, recipe.half_sampling)
        }
    else:
        assert found.all_recipes == (recipe,)
    assert all((m.differing, m.max_abs, m.max_ulp, m.relative_norm) == (0, 0, 0, 0) for m in found.matches.values())


@pytest.mark.parametrize("stored", FLOATS)
def test_all_recipes_that_give_the_bits_are_found_and_the_canonical_one_comes_first(stored):
    pairs = {recipe: generate(recipe, SMALL, stored_dtype=stored) for recipe in candidates(KEY)}
    groups: dict[bytes, list[Recipe]] = {}
    for recipe, (vera_A, vera_B) in pairs.items():
        groups.setdefault(vera_A.tobytes() + vera_B.tobytes(), []).append(recipe)
    for recipe, pair in pairs.items():
        found = identify(*pair, prng_key=KEY)
        expected = groups[pair[0].tobytes() + pair[1].tobytes()]
        assert found.exact
        assert set(found.all_recipes) == set(expected)
        assert len(found.all_recipes) == len(expected)
        assert same_bits(recipe, candidates(KEY), SMALL, stored) == set(expected) - {recipe}
        assert_canonical_order(found, stored)


def assert_canonical_order(found, stored):
    usual = stored if stored in ("bfloat16", "float16") else None
    order = [
        (FLOATS.index(r.drawn_dtype), r.rounded_through != usual, r.rounding != "fused", candidates(KEY).index(r))
        for r in found.all_recipes
    ]
    assert order == sorted(order)


def test_a_pair_stored_in_bfloat16_was_rounded_through_it():
    found = identify(*generate(F32, SMALL, stored_dtype="bfloat16"), prng_key=KEY)
    assert found.recipe.name == "mt19937-f32-fused-via-bf16"
    assert F32 in found.also_matches


@pytest.mark.parametrize("rounding", ["fused", "separate"])
def test_after_bfloat16_the_recorded_pair_still_shows_how_it_was_rounded(rounding):
    shape = PairShape(ROUNDING["r"], ROUNDING["in_max"], ROUNDING["out_max"])
    assert shape.r >= 256
    assert shape.in_max >= 2048
    recipe = Recipe(prng_key=ROUNDING["prng_key"], rounding=rounding, rounded_through="bfloat16")
    assert digests(recipe, shape) == ROUNDING["sha256"][rounding]
    pair = generate(recipe, shape)
    found = identify(*pair, prng_key=recipe.prng_key)
    assert (found.recipe, found.also_matches) == (recipe, ())
    other = recipe.replace(rounding="separate" if rounding == "fused" else "fused")
    for name, here, there in zip(("vera_A", "vera_B"), pair, generate(other, shape), strict=True):
        places = np.argwhere(bits(here) != bits(there))
        values = (here, there) if rounding == "fused" else (there, here)
        listed = [[int(i), int(j), float(values[0][i, j]), float(values[1][i, j])] for i, j in places]
        assert listed == ROUNDING["differing"][name]
        assert len(listed) > 20


@pytest.mark.parametrize("rounding", ["fused", "separate"])
def test_torch_makes_the_recorded_pair_again(rounding, request):
    asked = {"key": ROUNDING["prng_key"], **{key: ROUNDING[key] for key in ("r", "in_max", "out_max")}}
    asked["through"] = "bfloat16"
    if rounding == torch_draws.rounding():
        drawn = torch_draws.digests(asked)
    elif rounding == "separate":
        drawn = request.getfixturevalue("separate_kernels")(torch_draws.digests, asked)
    else:
        pytest.skip("this process has no fused kernels")
    assert drawn == ROUNDING["sha256"][rounding]


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "peft-0.11.1-llama-bf16-kept": "mt19937-f32-fused-via-bf16",
        "peft-0.11.1-llama-f32-kept": "mt19937-f32-fused",
        "peft-0.20.0-llama-bf16-kept": "mt19937-f32-fused-via-bf16",
        "peft-0.20.0-llama-f32-kept": "mt19937-f32-fused",
        "peft-0.21.2-bert-seqcls-kept": "mt19937-f32-fused",
        "peft-0.21.2-gpt2-conv1d-kept": "mt19937-f32-fused",
        "peft-0.21.2-llama-bf16-kept": "mt19937-f32-fused-via-bf16",
        "peft-0.21.2-llama-f32-kept": "mt19937-f32-fused",
        "peft-0.21.2-llama-f32-kept-noavx": "mt19937-f32-separate",
    }.items(),
)
def test_peft_checkpoints_are_what_they_were_made_as(name, expected):
    key = json.loads((CHECKPOINTS / name / "adapter_config.json").read_text())["projection_prng_key"]
    with TensorFile.open(CHECKPOINTS / name / "adapter_model.safetensors") as file:
        found = identify(*(file.read(f"base_model.{tensor}") for tensor in ("vera_A", "vera_B")), prng_key=key)
    assert found.exact
    assert found.recipe.name == expected
    assert found.made_by(key)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("recipe", [F32, F32.replace(rounding="separate"), F32.replace(rounded_through="float16")])
def test_one_changed_bit_is_found_in_its_place(recipe, stored):
    for bit in (0, 5, 8 * np.dtype(generate(recipe, SMALL, stored_dtype=stored)[0].dtype).itemsize - 1):
        for tensor, row, column in ((0, 3, 77), (1, 191, 15)):
            pair = generate(recipe, SMALL, stored_dtype=stored)
            before = float(pair[tensor][row, column])
            bits(pair[tensor])[row, column] ^= 1 << bit
            after = float(pair[tensor][row, column])
            found = identify(*pair, prng_key=KEY)
            assert not found.exact
            assert found.all_recipes == ()
            assert kinds(found)[tensor] == "edited"
            assert kinds(found)[1 - tensor] == "identical"
            match = found.matches[("vera_A", "vera_B")[tensor]]
            assert match.places == ((row, column),)
            assert match.differing == 1 / pair[tensor].size
            assert match.max_abs == abs(after - before)
            if bit < 8:
                assert match.max_ulp == 1 << bit
            rival = {found.recipe, *same_bits(found.recipe, candidates(KEY), SMALL, stored)}
            assert recipe in rival


@pytest.mark.parametrize(("edits", "listed"), [(1, 1), (2, 2), (16, 16), (17, 0), (40, 0)])
def test_places_are_listed_where_they_are_few(edits, listed):
    vera_A, vera_B = generate(F32, SMALL)
    flat = np.random.RandomState(0).permutation(vera_B.size)[:edits]
    vera_B.reshape(-1)[flat] += 1
    found = identify(vera_A, vera_B, prng_key=KEY)
    match = found.matches["vera_B"]
    assert (found.recipe, match.match, match.differing) == (F32, "edited", edits / vera_B.size)
    expected = sorted((int(i) // SMALL.r, int(i) % SMALL.r) for i in flat)
    assert list(match.places) == (expected if listed else [])
    assert match.max_abs == pytest.approx(1, abs=1e-6)
    exact = math.sqrt(
        sum((float(vera_B.reshape(-1)[i]) - float(b)) ** 2 for i, b in zip(flat, original(flat), strict=True))
    )
    assert match.relative_norm == pytest.approx(exact / np.linalg.norm(generate(F32, SMALL)[1].astype(np.float64)))


@pytest.mark.parametrize(
    ("moved", "kind", "extent"),
    [
        (200, "edited", "1.0% of the elements"),
        (201, "ulp", "1.0% of the elements, by at most 1 ulp"),
        (20_000, "ulp", "all elements, by at most 1 ulp"),
    ],
)
def test_what_is_moved_by_an_ulp_in_more_than_a_hundredth_is_no_edit(moved, kind, extent):
    vera_A, vera_B = generate(F32, PairShape(10, 2000, 20))
    flat = vera_A.reshape(-1)
    flat[:moved] = np.nextafter(flat[:moved], np.float32(9))
    match = identify(vera_A, vera_B, prng_key=KEY).matches["vera_A"]
    assert (match.match, match.extent) == (kind, extent)


def original(flat):
    return generate(F32, SMALL)[1].reshape(-1)[flat]


def test_the_other_rounding_in_one_tensor_is_told_apart():
    separate = F32.replace(rounding="separate")
    vera_A, other_B = generate(F32, SMALL)[0], generate(separate, SMALL)[1]
    found = identify(vera_A, other_B, prng_key=KEY)
    assert not found.exact
    assert found.recipe in (F32, separate)
    assert sorted(kinds(found)) == ["identical", "ulp"]
    match = next(match for match in found.matches.values() if match.match == "ulp")
    assert 0.3 < match.differing < 0.7
    assert 0 < match.max_abs < 1e-6
    assert match.max_ulp >= 1
    assert 0 < match.relative_norm < 2e-7
    assert match.places == ()


def test_a_pair_moved_by_one_ulp_everywhere_is_called_so():
    moved = [np.nextafter(array, np.float32(9)) for array in generate(F32, SMALL)]
    found = identify(*moved, prng_key=KEY)
    assert (kinds(found), found.recipe) == (["ulp", "ulp"], F32)
    assert [match.max_ulp for match in found.matches.values()] == [1, 1]
    assert [match.differing for match in found.matches.values()] == [1, 1]


@pytest.mark.parametrize(("quarters", "kind"), [(2.9, "ulp"), (5.1, "rounded")])
def test_what_a_rounding_of_float32_may_move_is_a_share_of_the_bound(quarters, kind):
    """Four times 2**-24 of the bound, give or take once in which the sum itself is rounded."""
    pair = [array + np.float32(quarters * 2.0**-24 * bound(array.shape[1])) for array in generate(F32, SMALL)]
    assert kinds(identify(*pair, prng_key=KEY)) == [kind, kind]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_a_pair_that_went_through_float8_is_called_rounded(dtype, stored):
    pair = [a.astype(dtype).astype(stored) for a in generate(F32, PairShape(64, 512, 512))]
    found = identify(*pair, prng_key=KEY)
    assert not found.exact
    assert kinds(found) == ["rounded", "rounded"]
    assert found.recipe.drawn_dtype == "float32"
    assert found.recipe.prng_key == KEY
    assert 0.005 < found.matches["vera_A"].relative_norm < 0.125


def test_a_pair_rounded_twice_is_called_rounded():
    pair = [a.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32) for a in generate(F32, SMALL)]
    pair = [np.float32(a * np.float32(1 + 2**-10)) for a in pair]
    assert kinds(identify(*pair, prng_key=KEY)) == ["rounded", "rounded"]


@pytest.mark.parametrize(
    ("recipe", "key"),
    {
        "key 0 in place of another": (Recipe(prng_key=0), KEY),
        "key 1": (Recipe(prng_key=1), KEY),
        "key 42": (Recipe(prng_key=42, rounding="separate"), KEY),
        "the next key": (Recipe(prng_key=KEY + 1), KEY),
        "the key before": (Recipe(prng_key=KEY - 1, rounded_through="bfloat16"), KEY),
        "B from key + 1": (Recipe(prng_key=KEY, prng_key_B=KEY + 1), KEY),
        "B from key + 1, separate": (Recipe(prng_key=KEY, prng_key_B=KEY + 1, rounding="separate"), KEY),
        "seeded again before B": (Recipe(prng_key=KEY, prng_key_B=KEY), KEY),
        "B drawn first": (Recipe(prng_key=KEY, b_first=True), KEY),
        "B drawn first, through float16": (Recipe(prng_key=KEY, b_first=True, rounded_through="float16"), KEY),
        "at the largest key": (Recipe(prng_key=KEY_MAX, prng_key_B=KEY_MIN), KEY_MAX),
    }.values(),
)
def test_another_plausible_key_or_order_is_named(recipe, key):
    found = identify(*generate(recipe, SMALL), prng_key=key)
    assert found.exact
    assert found.recipe == recipe
    assert not found.made_by(key)
    assert found.made_by(recipe.prng_key) == recipe.is_peft_order


@pytest.mark.parametrize("key", [2**32 + KEY, KEY - 2**32, 2**63 + KEY])
def test_only_the_low_32_bits_decide_whose_pair_it_is(key):
    found = identify(*generate(F32, SMALL), prng_key=key)
    assert found.recipe == Recipe(prng_key=key)
    assert found.made_by(key)
    assert found.made_by(KEY)
    assert not found.made_by(KEY + 1)


@pytest.mark.parametrize("key", [KEY_MIN, KEY_MAX])
def test_the_ends_of_the_keys_range_have_one_neighbour(key):
    assert identify(*generate(F32, SMALL), prng_key=key).recipe is None


UNRELATED = {
    "normal": lambda random, shape: random.normal(0, 0.1, shape),
    "uniform, other key": lambda random, shape: random.uniform(-0.15, 0.15, shape),
    "zeros": lambda random, shape: np.zeros(shape),
    "ones": lambda random, shape: np.ones(shape),
    "huge": lambda random, shape: random.normal(0, 1e30, shape),
    "NaN": lambda random, shape: np.full(shape, np.nan),
    "infinite": lambda random, shape: np.full(shape, -np.inf),
}


@pytest.mark.parametrize("make", UNRELATED.values(), ids=UNRELATED)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float64"])
def test_what_is_unrelated_is_called_so_and_not_guessed(make, stored):
    random = np.random.RandomState(5)
    pair = [
        make(random, shape).astype(generate(F32, SMALL, stored_dtype=stored)[0].dtype)
        for shape in (SMALL.vera_A, SMALL.vera_B)
    ]
    found = identify(*pair, prng_key=KEY)
    assert found.recipe is None
    assert found.also_matches == ()
    assert not found.exact
    assert not found.made_by(KEY)
    assert kinds(found) == ["unrelated", "unrelated"]
    assert all(match.differing > 0.9 for match in found.matches.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_no_number_is_an_edit_without_figures(value):
    vera_A, vera_B = generate(F32, SMALL)
    vera_A[2, 9] = value
    found = identify(vera_A, vera_B, prng_key=KEY)
    match = found.matches["vera_A"]
    assert (found.recipe, kinds(found), match.places) == (F32, ["edited", "identical"], ((2, 9),))
    assert (match.max_abs, match.max_ulp, match.relative_norm) == (None, None, None)
    json.dumps(match.to_dict(), allow_nan=False)


@pytest.mark.parametrize(("rows", "kind"), [(5, "edited"), (8, "edited"), (9, "unrelated")])
def test_half_of_a_tensor_overwritten_is_still_the_recipe(rows, kind):
    vera_A, vera_B = generate(F32, SMALL)
    vera_A[:rows] = 0
    found = identify(vera_A, vera_B, prng_key=KEY)
    assert (found.recipe, kinds(found)) == (F32, [kind, "identical"])
    assert found.matches["vera_A"].differing == pytest.approx(rows / 16, abs=1e-3)


def test_negative_zero_is_another_bit_but_no_distance():
    vera_A, vera_B = generate(F32, SMALL)
    vera_A[0, 0] = 0.0
    zero = identify(vera_A, vera_B, prng_key=KEY).matches["vera_A"]
    vera_A[0, 0] = -0.0
    minus = identify(vera_A, vera_B, prng_key=KEY).matches["vera_A"]
    assert zero == minus
    assert zero.places == ((0, 0),)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_tiny_pairs_are_identified_too_and_always_in_the_same_order(stored):
    for shape in (PairShape(1, 1, 1), PairShape(1, 3, 2), PairShape(2, 1, 1)):
        found = identify(*generate(F32, shape, stored_dtype=stored), prng_key=KEY)
        assert found.exact
        assert found.recipe == (F32 if stored == "float32" else F32.replace(rounded_through="bfloat16"))
        assert_canonical_order(found, stored)


def test_a_pair_must_be_two_matrices_of_one_dtype_that_fit():
    vera_A, vera_B = generate(F32, SMALL)
    for wrong in (
        (vera_A[0], vera_B),
        (vera_A, vera_B.T),
        (vera_A[:8], vera_B),
        (vera_A, vera_B.astype(np.float64)),
        (vera_A[None], vera_B),
    ):
        with pytest.raises(ValueError, match=r"expected vera_A \(r, in_max\) and vera_B \(out_max, r\) of one dtype"):
            identify(*wrong, prng_key=KEY)


def test_a_pair_may_lie_in_memory_in_any_way():
    vera_A, vera_B = generate(F32, SMALL)
    assert identify(np.asfortranarray(vera_A), np.repeat(vera_B, 2, axis=0)[::2], prng_key=KEY).recipe == F32


@pytest.mark.parametrize("edit", [False, True])
def test_memory_does_not_grow_with_the_pair(edit):
    shape = PairShape(128, 6000, 4000)
    flat = dict(zip(("vera_A", "vera_B"), (a.reshape(-1) for a in generate(F32, shape)), strict=True))
    if edit:
        flat["vera_B"][7] = 1
    pair = Pair(shape, "float32", lambda name, start, stop: flat[name][start:stop])
    memory, found = traced_peak(lambda: identify_pair(pair, prng_key=KEY))
    assert found.exact != edit
    assert memory < 40 << 20  # 28 candidates with a block of scratch each


def test_digests_are_filled_in():
    found = with_digests(identify(*generate(F32, SMALL), prng_key=KEY), {"vera_A": "a", "vera_B": "b"})
    assert [match.sha256 for match in found.matches.values()] == ["a", "b"]
    assert found.matches["vera_A"].to_dict() == {
        "shape": [16, 256],
        "dtype": "float32",
        "sha256": "a",
        "match": "identical",
        "differing": 0.0,
        "places": [],
        "max_abs": 0.0,
        "max_ulp": 0,
        "relative_norm": 0.0,
    }


FLOATS32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(value=FLOATS32, steps=st.integers(0, 50), up=st.booleans())
def test_ulps_count_representable_numbers(value, steps, up):
    towards = np.float32(np.inf if up else -np.inf)
    moved = np.float32(value)
    for _ in range(steps):
        with np.errstate(over="ignore"):  # the step from the largest number to infinity
            step = np.nextafter(moved, towards)
        if not np.isfinite(step):
            return
        moved = step
    pair = np.array([value], np.float32), np.array([moved], np.float32)
    assert max_ulp(*pair) == max_ulp(*pair[::-1]) == steps


def test_ulps_are_exact_across_the_whole_range():
    largest = np.finfo(np.float64).max
    count = max_ulp(np.array([largest]), np.array([-largest]))
    assert count == 2 * int(np.array([largest]).view(np.int64)[0])
    assert max_ulp(np.array([0.0]), np.array([-0.0])) == 0
    assert max_ulp(np.array([], np.float32), np.array([], np.float32)) == 0
    one = np.array([1, 1], ml_dtypes.bfloat16)
    assert max_ulp(one, np.array([1, 1 + 2**-7], ml_dtypes.bfloat16)) == 1
    assert Fraction(float(np.nextafter(np.float32(1), np.float32(2)))) == 1 + Fraction(1, 2**23)


@pytest.mark.parametrize("intact", ["vera_A", "vera_B"])
@pytest.mark.parametrize("recipe", [F32, F32.replace(rounding="separate", rounded_through="float16")])
@pytest.mark.parametrize("damage", ["random", "zero", "doubled"])
def test_a_replaced_tensor_says_nothing_about_the_other(intact, recipe, damage):
    pair = dict(zip(("vera_A", "vera_B"), generate(recipe, SMALL), strict=True))
    other = "vera_B" if intact == "vera_A" else "vera_A"
    values = pair[other]
    pair[other] = {
        "random": np.random.default_rng(5).uniform(-0.3, 0.3, values.shape).astype(values.dtype),
        "zero": np.zeros_like(values),
        "doubled": values * 2,
    }[damage]
    found = identify(**pair, prng_key=KEY)
    assert not found.exact
    assert found.recipe == recipe
    assert (found.matches[intact].match, found.matches[other].match) == ("identical", "unrelated")


def test_a_replaced_tensor_hides_no_edit_of_the_other():
    vera_A, vera_B = generate(F32, SMALL)
    vera_B[3, 4] += 1
    found = identify(np.zeros_like(vera_A), vera_B, prng_key=KEY)
    assert (found.recipe, kinds(found)) == (F32, ["unrelated", "edited"])
