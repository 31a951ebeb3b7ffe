"""Which projections a checkpoint was trained with: stored, recorded and proven, or assumed with one warning."""

from __future__ import annotations

import hashlib
import re
import warnings

import numpy as np
import pytest

from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, base_of, edit, edit_manifest, set_config
from tests.checkpoints.bases import make_base
from vera_tools.checkpoints import writing
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.resolution import Assumptions, arrays, resolve, stored_pair
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    FormatError,
    UnprovenError,
    UsageError,
    VeraToolsWarning,
)
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import digests, generate
from vera_tools.projections.recipe import Recipe

BF16 = "peft-0.21.2-llama-bf16-seedonly"
SHAPE = PairShape(16, 96, 64)


def assumes(name: str, **options):
    """Resolve a seed-only checkpoint, and see that exactly one warning says so."""
    with Checkpoint.open(CHECKPOINTS / name) as checkpoint, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resolved = resolve(checkpoint, Assumptions(**options))
    assert [warning.category for warning in caught] == [AssumedRecipeWarning]
    return resolved, str(caught[0].message)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        (KEPT, "mt19937-f32-fused"),
        ("peft-0.21.2-llama-f32-kept-noavx", "mt19937-f32-separate"),
        ("peft-0.21.2-llama-bf16-kept", "mt19937-f32-fused-via-bf16"),
        ("peft-0.11.1-llama-bf16-kept", "mt19937-f32-fused-via-bf16"),
    ],
)
def test_a_stored_pair_is_taken_as_it_is_and_identified(name, recipe):
    with Checkpoint.open(CHECKPOINTS / name) as checkpoint:
        resolved = resolve(checkpoint, Assumptions(strict=True))
        stored = [checkpoint.weights.read(f"base_model.{tensor}") for tensor in ("vera_A", "vera_B")]
        found = arrays(checkpoint, resolved)
    assert (resolved.origin, resolved.record.assumed, resolved.record.recipe.name) == ("stored", False, recipe)
    assert resolved.identification.exact
    assert resolved.record.dtype == stored[0].dtype.name
    for array, other, tensor in zip(stored, found, ("vera_A", "vera_B"), strict=True):
        assert array.tobytes() == other.tobytes()
        assert resolved.record.sha256[tensor] == hashlib.sha256(array.tobytes()).hexdigest()


def test_a_rank_that_contradicts_the_stored_pair_is_said(checkpoint):
    folder = checkpoint(KEPT)
    set_config(folder, r=17)
    with Checkpoint.open(folder) as opened, pytest.warns(VeraToolsWarning, match="r is 17, and the projections' 16"):
        assert resolve(opened).record.shape.r == 16


def test_a_stored_pair_that_no_recipe_makes_has_none(checkpoint):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), 1))
    with Checkpoint.open(folder) as opened:
        resolved = resolve(opened)
        assert resolved.record.recipe is None
        assert resolved.identification.recipe.name == "mt19937-f32-fused"  # the nearest, which is not what made it
        assert arrays(opened, resolved)[0][0, 0] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "only A": (lambda t: t.pop("base_model.vera_B"), "vera_A is stored and vera_B is not"),
        "only B": (lambda t: t.pop("base_model.vera_A"), "vera_B is stored and vera_A is not"),
        "two dtypes": (
            lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"].astype(np.float16)}),
            "found vera_A float16 and vera_B float32",
        ),
        "integers": (
            lambda t: t.update({name: np.ones_like(t[name], np.int8) for name in PAIR}),
            "expected both float32 or float64 or bfloat16 or float16",
        ),
        "shapes": (
            lambda t: t.update({"base_model.vera_B": t["base_model.vera_B"].T.copy()}),
            "vera_A and vera_B do not fit each other",
        ),
    }.values(),
)
def test_a_stored_pair_that_is_none_is_an_error_and_not_assumed_away(checkpoint, change, words):
    folder = checkpoint(KEPT)
    edit(folder, change)
    with Checkpoint.open(folder) as opened, pytest.raises(FormatError, match=re.escape(words)):
        resolve(opened, Assumptions(in_features=64))


def test_nothing_stored_is_no_pair():
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint:
        assert stored_pair(checkpoint) is None


@pytest.mark.parametrize(("name", "recipe"), [(SEED_ONLY, "mt19937-f32-fused"), (BF16, "mt19937-f32-fused-via-bf16")])
def test_with_a_base_pefts_recipe_is_assumed_for_its_dtype(name, recipe):
    with BaseModel.open(base_of(name)) as base:
        resolved, words = assumes(name, base=base)
    assert (resolved.origin, resolved.record.assumed, resolved.record.recipe.name) == ("assumed", True, recipe)
    assert words.endswith(f"nothing records which recipe made the projections; assuming {recipe}")
    assert resolved.record.sha256 == digests(resolved.record.recipe, resolved.record.shape)


def test_without_a_base_the_warning_says_what_a_half_precision_one_would_have_done():
    resolved, words = assumes(SEED_ONLY, in_features=96)
    assert resolved.record.shape == SHAPE
    assert resolved.record.recipe == Recipe(prng_key=102)
    assert words.endswith("(a half-precision base would have rounded them: name it with --base)")


def test_the_dtypes_of_a_base_in_memory_decide_as_one_on_disk_does():
    resolved, words = assumes(SEED_ONLY, in_features=96, weight_dtypes=frozenset({"float32", "bfloat16"}))
    assert resolved.record.recipe.rounded_through == "bfloat16"
    assert "--base" not in words


def test_the_assumed_pair_is_stored_in_the_dtype_that_was_asked_for():
    resolved, _ = assumes(SEED_ONLY, in_features=96, stored_dtype="bfloat16")
    assert resolved.record.dtype == "bfloat16"
    assert resolved.record.sha256 == digests(Recipe(prng_key=102), SHAPE, stored_dtype="bfloat16")
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint:
        vera_A, vera_B = arrays(checkpoint, resolved)
    expected = generate(Recipe(prng_key=102), SHAPE, stored_dtype="bfloat16")
    assert (vera_A.tobytes(), vera_B.tobytes()) == (expected[0].tobytes(), expected[1].tobytes())


def test_strict_refuses_to_assume():
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint:
        with pytest.raises(UnprovenError, match="nothing records which recipe made the projections") as caught:
            resolve(checkpoint, Assumptions(in_features=96, strict=True))
        assert caught.value.exit_code == 3
        assert resolve(
            checkpoint, Assumptions.stated(in_features=96, recipe="mt19937-f32-separate", strict=True)
        ).record.assumed


def test_a_recipe_that_the_user_names_is_taken_without_a_warning():
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint:
        resolved = resolve(checkpoint, Assumptions.stated(in_features=96, recipe="mt19937-f32-separate-via-f16"))
        assert resolved.record.recipe == Recipe(prng_key=102, rounding="separate", rounded_through="float16")
        with pytest.raises(UsageError, match="not a recipe's name"):
            resolve(checkpoint, Assumptions.stated(in_features=96, recipe="mt19937"))


def test_in_max_must_come_from_somewhere():
    with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint:
        with pytest.raises(UsageError, match=r"the layer width is unknown: pass --base; .*--in-features"):
            resolve(checkpoint)
        with BaseModel.open(base_of(SEED_ONLY)) as base, pytest.raises(UsageError, match="expected 96, found 95"):
            resolve(checkpoint, Assumptions(base=base, in_features=95))


def test_a_base_that_does_not_fit_is_an_error(tmp_path):
    with (
        Checkpoint.open(CHECKPOINTS / SEED_ONLY) as checkpoint,
        BaseModel.open(make_base(tmp_path, {"other.weight": (4, 4)})) as base,
        pytest.raises(CheckFailedError, match="the base has no such module"),
    ):
        resolve(checkpoint, Assumptions(base=base))


def test_without_a_layer_nothing_can_be_assumed(checkpoint):
    folder = checkpoint(SEED_ONLY)
    edit(folder, lambda tensors: (tensors.clear(), tensors.update({"other": np.zeros(1, np.float32)})))
    with Checkpoint.open(folder) as opened, pytest.raises(CheckFailedError, match="nothing is adapted"):
        resolve(opened, Assumptions(in_features=96))


@pytest.fixture
def recorded(checkpoint):
    """A seed-only checkpoint with a manifest."""
    folder = checkpoint(SEED_ONLY)
    with Checkpoint.open(folder) as opened:
        resolved = resolve(opened, Assumptions.stated(in_features=96, recipe="mt19937-f32-separate"))
    writing.write_manifest(folder, resolved.record)
    return folder


def test_a_recorded_pair_is_regenerated_and_proven(recorded):
    with Checkpoint.open(recorded) as opened:
        resolved = resolve(opened)
        assert (resolved.origin, resolved.record.origin, resolved.record.recipe.name) == (
            "recorded",
            "stated",
            "mt19937-f32-separate",
        )
        assert resolved.record.shape == SHAPE
        assert [a.shape for a in arrays(opened, resolved)] == [(16, 96), (64, 16)]
        for strict in (False, True):
            stated = Assumptions.stated(recipe="mt19937-f32-separate", strict=strict)
            assert resolve(opened, stated).record == resolved.record
        with pytest.raises(UnprovenError, match="was stated when it was recorded, and nothing proves it"):
            resolve(opened, Assumptions(strict=True))


def test_another_recipe_than_the_recorded_one_is_refused(recorded):
    words = "another recipe is recorded already (expected mt19937-f32-separate, found mt19937-f32-fused)"
    with Checkpoint.open(recorded) as opened, pytest.raises(UsageError, match=re.escape(words)):
        resolve(opened, Assumptions.stated(recipe="mt19937-f32-fused"))


@pytest.mark.parametrize("tensor", ["vera_A", "vera_B"])
def test_a_digest_that_was_changed_is_no_proof(recorded, tensor):
    edit_manifest(recorded, lambda document: document["projections"][tensor].update(sha256="0" * 64))
    words = f"the regenerated {tensor} is not the recorded one .*sha256 0000"
    with Checkpoint.open(recorded) as opened, pytest.raises(CheckFailedError, match=words):
        resolve(opened)


def test_a_recipe_that_was_changed_is_no_proof(recorded):
    other = Recipe(prng_key=102).to_dict()
    edit_manifest(recorded, lambda document: document.update(recipe=other))
    # At in_max 96 the bound is a power of two, and both ways of rounding give the same vera_A.
    with Checkpoint.open(recorded) as opened, pytest.raises(CheckFailedError, match="regenerated vera_B is not"):
        resolve(opened)


def test_a_record_without_a_recipe_brings_nothing_back(recorded):
    edit_manifest(recorded, lambda document: document.update(recipe=None))
    with Checkpoint.open(recorded) as opened, pytest.raises(CheckFailedError, match="they are lost unless"):
        resolve(opened)
