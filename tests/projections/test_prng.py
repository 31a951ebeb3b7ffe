"""The generator against every source of truth there is: recorded digests, plain Python, and the torch at hand."""

from __future__ import annotations

import hashlib
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import FIXTURES, X86
from tests.memory import traced_peak
from tests.projections import plain, torch_draws
from vera_tools.dtypes import FLOATS, np_dtype
from vera_tools.projections import prng
from vera_tools.projections.floats import fma
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import blocks, digests, generate
from vera_tools.projections.recipe import Recipe, candidates

pytestmark = pytest.mark.capability

CASES = json.loads((FIXTURES / "golden" / "streams.json").read_text())["cases"]
STREAMS = [
    pytest.param(case, stream, id=f"{case['drawn_dtype']}-{case['prng_key']}-r{case['r']}x{case['in_max']}-{number}")
    for case in CASES
    for number, stream in enumerate(case["streams"])
]
KEYS = st.one_of(
    st.integers(0, 2**32 - 1), st.integers(-(2**63), 2**64 - 1), st.sampled_from([-(2**63), -1, 2**32, 2**64 - 1])
)
SHAPES = st.builds(PairShape, st.integers(1, 24), st.integers(1, 300), st.integers(1, 300))


def recipe_of(build: str, case: dict) -> Recipe:
    """What PROJECTIONS' rules say this build draws by: torch's version and the CPU's kernels decide."""
    _, version, *machine = build.split("-")
    new = tuple(map(int, version.split(".")[:2])) >= (2, 12)
    half = ("opmath" if new else "scalar") if case["drawn_dtype"] in ("bfloat16", "float16") else None
    return Recipe(
        prng_key=case["prng_key"],
        drawn_dtype=case["drawn_dtype"],
        half_sampling=half,
        rounding="separate" if machine[-1] == "default" else "fused",
    )


def shape_of(case: dict) -> PairShape:
    return PairShape(case["r"], case["in_max"], case["out_max"])


def sha256(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, str]:
    return {name: hashlib.sha256(a.tobytes()).hexdigest() for name, a in zip(("vera_A", "vera_B"), pair, strict=True)}


def test_the_golden_file_covers_all_dtypes_and_both_roundings():
    recipes = {recipe_of(b, c).name for c in CASES for s in c["streams"] for b in s["builds"]}
    assert recipes == {
        *(f"mt19937-{dtype}-{rounding}" for dtype in ("f32", "f64") for rounding in ("fused", "separate")),
        *(
            f"mt19937-{dtype}-{half}-{rounding}"
            for dtype in ("bf16", "f16")
            for half in ("scalar", "opmath")
            for rounding in ("fused", "separate")
        ),
    }


@pytest.mark.parametrize(("case", "stream"), STREAMS)
def test_every_stream_of_every_real_build(case, stream):
    expected = {"vera_A": stream["sha256_A"], "vera_B": stream["sha256_B"]}
    for recipe in {recipe_of(build, case) for build in stream["builds"]}:
        assert digests(recipe, shape_of(case), stored_dtype=case["drawn_dtype"]) == expected, recipe.name


SMALL = [(c, s) for c in CASES for s in c["streams"] if c["r"] == 4 or (c["r"] == 16 and c["prng_key"] == -1)]


@pytest.mark.parametrize(("case", "stream"), SMALL)
def test_plain_python_gives_the_recorded_streams_too(case, stream):
    for recipe in {recipe_of(build, case) for build in stream["builds"]}:
        pair = plain.pair(
            case["prng_key"],
            (case["r"], case["in_max"], case["out_max"]),
            drawn_dtype=recipe.drawn_dtype,
            half_sampling=recipe.half_sampling,
            rounding=recipe.rounding,
            stored=case["drawn_dtype"],
        )
        found = {name: hashlib.sha256(data).hexdigest() for name, data in pair.items()}
        assert found == {"vera_A": stream["sha256_A"], "vera_B": stream["sha256_B"]}


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("recipe", candidates(2**32 + 7), ids=lambda recipe: recipe.name)
def test_every_candidate_is_what_plain_python_computes(recipe, stored):
    expected = plain.pair(
        recipe.prng_key,
        (5, 23, 31),
        drawn_dtype=recipe.drawn_dtype,
        half_sampling=recipe.half_sampling,
        rounding=recipe.rounding,
        through=recipe.rounded_through,
        stored=stored,
    )
    vera_A, vera_B = generate(recipe, PairShape(5, 23, 31), stored_dtype=stored)
    assert (vera_A.shape, vera_B.shape) == ((5, 23), (31, 5))
    assert vera_A.dtype.name == vera_B.dtype.name == stored
    assert {"vera_A": vera_A.tobytes(), "vera_B": vera_B.tobytes()} == expected


@pytest.mark.parametrize("changes", [{"prng_key_B": 12}, {"b_first": True}, {"b_first": True, "prng_key_B": 12}])
@pytest.mark.parametrize("drawn", ["float32", "float64"])
def test_the_other_orders_are_what_plain_python_computes(changes, drawn):
    recipe = Recipe(prng_key=11, drawn_dtype=drawn, **changes)
    expected = plain.pair(
        11, (4, 9, 6), drawn_dtype=drawn, key_B=changes.get("prng_key_B"), b_first=changes.get("b_first", False)
    )
    vera_A, vera_B = generate(recipe, PairShape(4, 9, 6))
    assert {"vera_A": vera_A.tobytes(), "vera_B": vera_B.tobytes()} == expected


@settings(max_examples=60, deadline=None)
@given(key=KEYS, shape=SHAPES, drawn=st.sampled_from(FLOATS), through=st.sampled_from([None, "bfloat16", "float16"]))
@example(key=5, shape=PairShape(16, 4096, 2048), drawn="float32", through=None)
@example(key=5, shape=PairShape(16, 4096, 2048), drawn="bfloat16", through=None)
@example(key=5, shape=PairShape(16, 4096, 2048), drawn="float16", through="bfloat16")
@example(key=5, shape=PairShape(16, 2048, 1024), drawn="float64", through="bfloat16")
def test_torch_here_draws_the_same(key, shape, drawn, through):
    recipe = Recipe(
        prng_key=key,
        drawn_dtype=drawn,
        half_sampling=torch_draws.half_sampling(drawn),
        rounding=torch_draws.rounding(),
        rounded_through=through,
    )
    stored = "float64" if drawn == "float64" else "float32"
    expected = torch_draws.digests(request(key, shape, drawn, through, stored))
    assert sha256(generate(recipe, shape, stored_dtype=stored)) == expected
    assert digests(recipe, shape, stored_dtype=stored) == expected


@pytest.mark.skipif(not X86, reason="only x86-64 has kernels without fused")
@settings(max_examples=60, deadline=None)
@given(key=KEYS, shape=SHAPES, drawn=st.sampled_from(FLOATS), through=st.sampled_from([None, "bfloat16", "float16"]))
@example(key=5, shape=PairShape(16, 4096, 2048), drawn="float32", through="bfloat16")
@example(key=5, shape=PairShape(16, 2048, 1024), drawn="float64", through=None)
def test_torch_without_avx_draws_the_separate_streams(separate_kernels, key, shape, drawn, through):
    recipe = Recipe(
        prng_key=key,
        drawn_dtype=drawn,
        half_sampling=torch_draws.half_sampling(drawn),
        rounding="separate",
        rounded_through=through,
    )
    stored = "float64" if drawn == "float64" else "float32"
    expected = separate_kernels(torch_draws.digests, request(key, shape, drawn, through, stored))
    assert digests(recipe, shape, stored_dtype=stored) == expected


def request(key, shape, drawn, through, stored):
    return {
        "key": key,
        "r": shape.r,
        "in_max": shape.in_max,
        "out_max": shape.out_max,
        "dtype": drawn,
        "through": through,
        "stored": stored,
    }


def test_peft_itself_draws_the_same():
    import torch
    from peft.tuners.vera.model import _kaiming_init

    generator = torch.Generator(device="cpu").manual_seed(-3)
    vera_A = _kaiming_init((32, 768), generator=generator)
    vera_B = _kaiming_init((3072, 32), generator=generator)
    found = generate(Recipe(prng_key=-3, rounding=torch_draws.rounding()), PairShape(32, 768, 3072))
    np.testing.assert_array_equal(found[0].view(np.uint32), vera_A.numpy().view(np.uint32))
    np.testing.assert_array_equal(found[1].view(np.uint32), vera_B.numpy().view(np.uint32))


def test_only_the_low_32_bits_of_the_key_matter():
    shape = PairShape(3, 40, 20)
    same = [digests(Recipe(prng_key=key), shape) for key in (5, 2**32 + 5, 5 - 2**32, 2**40 + 5)]
    assert same == same[:1] * 4
    assert digests(Recipe(prng_key=-1), shape) == digests(Recipe(prng_key=2**64 - 1), shape)
    assert digests(Recipe(prng_key=6), shape) != same[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_opmath_turns_the_upper_end_into_the_lower(dtype):
    shape = PairShape(64, 1024, 1024)
    bound = np.array([prng.bound(1024)], np.float32).astype(np_dtype(dtype)).astype(np.float32)[0]
    rounded, _ = generate(Recipe(prng_key=1, rounded_through=dtype), shape)
    opmath, _ = generate(Recipe(prng_key=1, drawn_dtype=dtype, half_sampling="opmath"), shape)
    scalar, _ = generate(Recipe(prng_key=1, drawn_dtype=dtype, half_sampling="scalar"), shape)
    assert (rounded == bound).any()
    np.testing.assert_array_equal(opmath, np.where(rounded == bound, -bound, rounded))
    assert scalar.min() == -bound
    assert scalar.max() < bound


@pytest.mark.parametrize("block", [1, 7, 64])
@pytest.mark.parametrize(
    "recipe", [*candidates(3), Recipe(prng_key=3, b_first=True), Recipe(prng_key=3, prng_key_B=4)], ids=lambda r: r.name
)
def test_the_block_size_changes_no_bit(monkeypatch, recipe, block):
    shape = PairShape(3, 50, 17)
    whole = sha256(generate(recipe, shape))
    monkeypatch.setattr(prng, "BLOCK", block)
    assert sha256(generate(recipe, shape)) == whole
    assert digests(recipe, shape) == whole


@pytest.mark.parametrize("in_max", [prng.BLOCK - 1, prng.BLOCK, prng.BLOCK + 1, 2 * prng.BLOCK])
@pytest.mark.parametrize("drawn", ["float32", "float64"])
def test_torch_agrees_at_the_edges_of_a_block(in_max, drawn):
    shape = PairShape(1, in_max, 3)
    recipe = Recipe(prng_key=8, drawn_dtype=drawn, rounding=torch_draws.rounding())
    assert digests(recipe, shape, stored_dtype=drawn) == torch_draws.digests(request(8, shape, drawn, None, drawn))


def test_blocks_cover_both_tensors_once_and_in_order():
    shape = PairShape(5, prng.BLOCK // 4, prng.BLOCK // 5)
    seen = {"vera_A": 0, "vera_B": 0}
    order = []
    for block in blocks([Recipe(prng_key=0)], shape):
        assert block.start == seen[block.tensor]
        assert block.values[Recipe(prng_key=0)].shape == (block.stop - block.start,)
        seen[block.tensor] = block.stop
        order.append(block.tensor)
    assert seen == {"vera_A": 5 * (prng.BLOCK // 4), "vera_B": 5 * (prng.BLOCK // 5)}
    assert order == sorted(order)


def test_a_recipe_that_is_no_longer_wanted_is_not_computed_and_disturbs_no_other():
    recipes = candidates(9)
    shape = PairShape(4, prng.BLOCK, prng.BLOCK // 2)
    wanted = set(recipes)
    hashes = {name: hashlib.sha256() for name in ("vera_A", "vera_B")}
    last = recipes[-1]
    for number, block in enumerate(blocks(recipes, shape, wanted=wanted)):
        assert set(block.values) == wanted
        hashes[block.tensor].update(block.values[last].tobytes())
        if number < len(recipes) - 1:
            wanted.discard(recipes[number])
        if number == 2:
            wanted -= {recipe for recipe in recipes if recipe.drawn_dtype == "float64"}
    assert {name: digest.hexdigest() for name, digest in hashes.items()} == digests(last, shape)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(prng_key=1),
        Recipe(prng_key=1, rounding="separate"),
        Recipe(prng_key=1, drawn_dtype="float64"),
        Recipe(prng_key=1, rounded_through="bfloat16"),
    ],
    ids=lambda recipe: recipe.name,
)
def test_memory_stays_near_the_size_of_the_result(recipe):
    shape = PairShape(128, 8192, 8192)
    generate(recipe, PairShape(1, 1, 1))  # imports are not counted
    assert traced_peak(lambda: generate(recipe, shape))[0] < 1.05 * shape.elements * 4 + 40 * prng.BLOCK * 4
    assert traced_peak(lambda: digests(recipe, shape))[0] < 40 * prng.BLOCK * 4


@settings(max_examples=200, deadline=None)
@given(
    a=st.floats(1e-30, 1e30) | st.integers(0, 2**53 - 1).map(lambda n: n * 2.0**-53),
    b=st.floats(-1e30, -1e-30) | st.floats(1e-3, 8),
    c=st.floats(-1e30, 1e30, allow_subnormal=False),
)
@example(a=0.0, b=1.5, c=-0.75)
@example(a=1 + 2.0**-52, b=1 + 2.0**-52, c=2.0**-53)  # the product's tail decides a tie
@example(a=1 + 2.0**-27, b=1 + 2.0**-27, c=-(2.0**-54))
@example(a=3.0, b=2.0**-55, c=1.0)
@example(a=1 + 511 * 2.0**-52, b=1 + 2.0**-52, c=1024.0)  # above a tie by less than the tail has bits for
@example(a=1 + 513 * 2.0**-52, b=1 - 2.0**-52, c=1024.0)  # and below
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    assert fma(np.array([a]), b, c)[0] == exact.numerator / exact.denominator


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(0, 2**53 - 1), fan_in=st.integers(1, 200_000))
def test_fma_rounds_once_where_the_generator_uses_it(bits, fan_in):
    bound = prng.bound(fan_in)
    x = bits * 2.0**-53
    exact = Fraction(x) * Fraction(2 * bound) - Fraction(bound)
    assert fma(np.array([x]), 2 * bound, -bound)[0] == exact.numerator / exact.denominator
    # and so it does on the bits as they are drawn, the power of two moved into the scale
    assert fma(np.array([float(bits)]), 2 * bound * 2.0**-53, -bound)[0] == exact.numerator / exact.denominator
