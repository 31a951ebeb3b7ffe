"""Names, keys and combinations of recipes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vera_tools.errors import FormatError, UsageError
from vera_tools.projections import recipe as module
from vera_tools.projections.key import KEY_MAX, KEY_MIN, check_key
from vera_tools.projections.recipe import Method, Recipe, candidates

KEYS = st.integers(KEY_MIN, KEY_MAX)
ALL = [
    *candidates(5),
    *candidates(5, prng_key_B=6),
    *candidates(5, b_first=True),
    *candidates(5, prng_key_B=6, b_first=True),
]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_a_name_is_parsed_back_to_its_recipe(recipe):
    assert Recipe.parse(recipe.name, prng_key=recipe.prng_key, prng_key_B=recipe.prng_key_B) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_names_are_distinct_and_can_be_typed():
    names = [recipe.name for recipe in ALL]
    assert len(set(names)) == len(names) == 4 * 28
    assert all(re.fullmatch(r"[a-z0-9-]{5,60}", name) for name in names)


def test_the_names_in_the_module_docstring_are_recipes():
    names = re.findall(r"^    (mt19937-\S+) ", module.__doc__, re.MULTILINE)
    assert len(names) == 7
    for name in names:
        key_B = 1 if name.endswith("-split") else None
        assert Recipe.parse(name, prng_key=0, prng_key_B=key_B).name == name


def test_the_default_is_peft_on_almost_every_machine():
    assert Recipe(prng_key=7).to_dict() == {
        "name": "mt19937-f32-fused",
        "generator": "mt19937",
        "prng_key": 7,
        "prng_key_B": None,
        "drawn_dtype": "float32",
        "half_sampling": None,
        "rounding": "fused",
        "rounded_through": None,
    }
    assert Recipe(prng_key=7).is_peft_order
    assert not Recipe(prng_key=7, prng_key_B=7).is_peft_order
    assert not Recipe(prng_key=7, b_first=True).is_peft_order


def test_candidates_stand_in_canonical_order():
    names = [recipe.name for recipe in candidates(0)]
    assert names[:6] == [
        "mt19937-f32-fused",
        "mt19937-f32-separate",
        "mt19937-f32-fused-via-bf16",
        "mt19937-f32-separate-via-bf16",
        "mt19937-f32-fused-via-f16",
        "mt19937-f32-separate-via-f16",
    ]
    drawn = [recipe.drawn_dtype for recipe in candidates(0)]
    assert list(dict.fromkeys(drawn)) == ["float32", "float64", "bfloat16", "float16"]
    assert all(r.prng_key == -9 and r.prng_key_B == 4 and r.b_first for r in candidates(-9, prng_key_B=4, b_first=True))


@pytest.mark.parametrize(
    ("fields", "words"),
    {
        "unknown dtype": ({"drawn_dtype": "float8_e4m3fn"}, "drawn_dtype has an unknown value"),
        "integer dtype": ({"drawn_dtype": "int32"}, "drawn_dtype"),
        "unknown rounding": ({"rounding": "up"}, "expected fused or separate, found 'up'"),
        "rounded through a wide dtype": ({"rounded_through": "float32"}, "expected None or bfloat16 or float16"),
        "half sampling of a wide dtype": ({"half_sampling": "scalar"}, "half_sampling goes with a half drawn_dtype"),
        "half dtype without sampling": ({"drawn_dtype": "bfloat16"}, "expected scalar or opmath, found None"),
        "unknown sampling": ({"drawn_dtype": "float16", "half_sampling": "vector"}, "half_sampling"),
        "key of B out of range": ({"prng_key_B": 2**64}, "not a PRNG key"),
        "key of B a bool": ({"prng_key_B": True}, "expected an integer, found True"),
    }.values(),
)
def test_a_combination_that_no_generator_has_is_refused(fields, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        Recipe(prng_key=0, **fields)


@pytest.mark.parametrize("key", [True, False, 1.0, "1", None, 2**64, -(2**63) - 1, 2**70])
def test_a_key_that_torch_refuses_is_refused(key):
    import torch

    with pytest.raises(UsageError, match="not a PRNG key"):
        check_key(key)
    if not isinstance(key, bool):  # torch takes True for 1, but no config should say so
        with pytest.raises((TypeError, RuntimeError, OverflowError, ValueError)):
            torch.Generator("cpu").manual_seed(key)


@given(KEYS)
def test_a_key_that_torch_takes_is_taken(key):
    import torch

    torch.Generator("cpu").manual_seed(key)
    assert check_key(key) == Recipe(prng_key=key).prng_key == key


def test_rounding_through_the_drawn_dtype_is_no_rounding():
    recipe = Recipe(prng_key=0, drawn_dtype="bfloat16", half_sampling="opmath", rounded_through="bfloat16")
    assert recipe.name == "mt19937-bf16-opmath-fused"
    assert recipe == Recipe(prng_key=0, drawn_dtype="bfloat16", half_sampling="opmath")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "mt19937",
        "mt19937-f32",
        "mt19937-f32-fused ",
        "MT19937-F32-FUSED",
        "mt19937-f32-fused-via-f32",
        "mt19937-f32-fused-via-f64",
        "mt19937-f32-scalar-fused",
        "mt19937-bf16-fused",
        "mt19937-f32-fused-bfirst-split",
        "philox-f32-fused",
        "mt19937-f32-fused\n",
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError):
        Recipe.parse(name, prng_key=0)


def test_a_key_of_B_goes_with_split_names_only():
    with pytest.raises(UsageError, match="-split"):
        Recipe.parse("mt19937-f32-fused", prng_key=0, prng_key_B=1)
    with pytest.raises(UsageError, match="-split"):
        Recipe.parse("mt19937-f32-fused-split", prng_key=0)


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "another generator": ({"generator": "philox"}, "the recipe's generator contradicts its name"),
        "another rounding": ({"rounding": "separate"}, "the recipe's rounding contradicts its name"),
        "another dtype": ({"drawn_dtype": "float64"}, "the recipe's drawn_dtype contradicts its name"),
        "another cast": ({"rounded_through": "float16"}, "the recipe's rounded_through contradicts its name"),
        "a half sampling": ({"half_sampling": "opmath"}, "the recipe's half_sampling contradicts its name"),
        "no such name": ({"name": "mt19937"}, "not a recipe"),
        "a name that is no text": ({"name": 5}, "not a recipe"),
        "a key of B": ({"prng_key_B": 4}, "-split"),
        "a key out of range": ({"prng_key": 2**64}, "not a PRNG key"),
        "a key that is true": ({"prng_key": True}, "not a PRNG key"),
    }.values(),
)
def test_a_recipe_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(FormatError, match=re.escape(words)) as caught:
        Recipe.from_dict({**Recipe(prng_key=3).to_dict(), **change}, where="manifest: recipe")
    assert caught.value.where == "manifest: recipe"


@pytest.mark.parametrize("missing", ["name", "prng_key", "generator", "drawn_dtype", "rounding"])
def test_a_recipe_that_lacks_a_key_is_refused(missing):
    data = Recipe(prng_key=3).to_dict()
    del data[missing]
    with pytest.raises(FormatError):
        Recipe.from_dict(data)


def test_recipes_are_values():
    recipe = Recipe(prng_key=3)
    assert recipe.replace(rounding="separate") == Recipe(prng_key=3, rounding="separate")
    assert {recipe: 1}[Recipe(prng_key=3)] == 1
    with pytest.raises(AttributeError):
        recipe.prng_key = 4


def test_a_method_is_pefts_unless_said_otherwise():
    assert Method() == Method.named("mt19937-f32-fused")
    assert Method().is_peft_order
