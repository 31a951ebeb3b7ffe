"""The loader table against real PEFT, loading the same adapters on both kinds of kernels and onto every base dtype."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.adapters import BERT, CHECKPOINTS, GPT2, KEPT, PAIR, SEED_ONLY, base_of, edit, set_config, take_as_live
from tests.machine import FUSED_X86
from tests.projections import torch_draws
from tests.verifying import peft_loads
from vera_tools import verify
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.loads import (
    BASE_DTYPES,
    OLD_PEFT,
    OPTIONS,
    PEFT,
    ROUNDINGS,
    VERA_TOOLS,
    Trained,
    loader_table,
)
from vera_tools.verifying.record import record

pytestmark = pytest.mark.capability

# The seed-only ones are recorded first, with what they were trained with; that is all that sets them apart from "kept".
RECIPES = {
    SEED_ONLY: "mt19937-f32-fused",
    "peft-0.21.2-llama-f32-seedonly-noavx": "mt19937-f32-separate",
    "peft-0.21.2-llama-bf16-seedonly": "mt19937-f32-fused-via-bf16",
}
STORED = [
    "peft-0.11.1-llama-bf16-kept",
    "peft-0.20.0-llama-f32-kept",
    BERT,
    GPT2,
    "peft-0.21.2-llama-bf16-kept",
    KEPT,
    "peft-0.21.2-llama-f32-kept-noavx",
]


def edit_pair(folder: Path, change) -> None:
    """Put `change` of each projection in its place."""
    edit(folder, lambda tensors: tensors.update({name: change(tensors[name]) for name in PAIR}))


# Adapters that nobody has trained, for the rows that the others do not reach.
CHANGES = {
    "edited": lambda folder: edit_pair(folder, lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, 0.123, a)),
    "float64": lambda folder: edit_pair(folder, lambda a: a.astype(np.float64) * (1 + 2.0**-40)),
    "float64-of-float32": lambda folder: edit_pair(folder, lambda a: a.astype(np.float64)),
    "in-float16": lambda folder: edit_pair(folder, lambda a: a.astype(np.float16)),
    "ignored": lambda folder: set_config(folder, save_projection=False),
    "other-key": lambda folder: set_config(folder, projection_prng_key=9),
    "wide-key": lambda folder: set_config(folder, projection_prng_key=101 + 2**32),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Every adapter of this module, by name, with its base."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name in (*STORED, *RECIPES, *CHANGES):
        source = KEPT if name in CHANGES else name
        folder = Path(shutil.copytree(CHECKPOINTS / source, root / name))
        found[name] = folder, base_of(source)
        if name in CHANGES:
            CHANGES[name](folder)
        if name in RECIPES:
            record(folder, base=base_of(name), recipe=RECIPES[name])
            take_as_live(folder)
    return found


@pytest.fixture(scope="module")
def seen(adapters, request) -> dict[str, dict[str, list]]:
    """What PEFT loaded, by the kernels' rounding and the adapter's name."""
    rows = {torch_draws.rounding(): peft_loads.all_loaded(adapters)}
    if FUSED_X86:
        rows["separate"] = request.getfixturevalue("separate_kernels")(peft_loads.all_loaded, adapters)
    return rows


def run_script(adapters, **environment: str) -> dict[str, list]:
    root = str(Path(__file__).parent / "peft_loads.py")
    arguments = [f"{adapter}={base}" for adapter, base in adapters.values()]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", root, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    answer: dict[str, list] = json.loads(result.stdout)
    return answer


def trained(folder: Path, base: Path) -> list[str]:
    """Digests, over float64 values, of the pair that the adapter was trained with."""
    with Checkpoint.open(folder) as checkpoint, BaseModel.open(base) as model:
        if checkpoint.projections:
            pair = [checkpoint.weights.read(f"base_model.{name}") for name in ("vera_A", "vera_B")]
        else:
            recipe = Recipe.parse(RECIPES[folder.name], prng_key=checkpoint.config.projection_prng_key)
            pair = list(generate(recipe, checkpoint.pair_shape(model)))
    return [hashlib.sha256(array.astype(np.float64).tobytes()).hexdigest() for array in pair]


@pytest.mark.parametrize("name", [*STORED, *RECIPES, *CHANGES])
def test_every_row_about_todays_peft_is_what_peft_does(adapters, seen, name):
    folder, base = adapters[name]
    expected = trained(folder, base)
    table = {
        (load.rounding, load.base_dtype, str(load.options)): load
        for load in verify(folder).checkpoints[0].loads
        if load.loader == PEFT
    }
    compared = 0
    for rounding, adapters_seen in seen.items():
        for row in adapters_seen[name]:
            load = table[rounding, row["base_dtype"], str(row["options"])]
            assert load.exact == (row["digests"] == expected), load
            compared += 1
    assert compared == 9 * len(seen)


def test_the_adapters_reach_both_answers(adapters):
    answers = {
        name: {load.exact for load in verify(folder).checkpoints[0].loads} for name, (folder, _) in adapters.items()
    }
    assert all(answer == {True, False} for answer in answers.values()), answers


OLD = [path for path in os.environ.get("TESTS_OLD_PEFT", "").split(os.pathsep) if path]


@pytest.mark.skipif(not OLD, reason="TESTS_OLD_PEFT names no folders with PEFT before 0.21 in them")
@pytest.mark.parametrize("peft", OLD or [None])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_row_about_older_peft_is_what_it_does(adapters, peft, rounding):
    environment = {"PYTHONPATH": peft, **({"ATEN_CPU_CAPABILITY": "default"} if rounding == "separate" else {})}
    wanted = {name: adapters[name] for name in (*RECIPES, *STORED, "other-key", "wide-key")}
    answers = run_script(wanted, **environment)
    assert set(answers) >= {"peft-0.11.1-llama-bf16-kept", "peft-0.20.0-llama-f32-kept"}
    for name, rows in answers.items():
        table = {
            (load.rounding, load.base_dtype): load
            for load in verify(adapters[name][0]).checkpoints[0].loads
            if load.loader == OLD_PEFT
        }
        for row in rows:
            load = table[rounding, row["base_dtype"]]
            assert load.exact == (row["digests"] == trained(*adapters[name])), load


def make(**changes) -> Trained:
    fields = {
        "stored": True,
        "save_projection": True,
        "prng_key": 3,
        "recipes": (Recipe(prng_key=3),),
        "dtype": "float32",
    }
    return Trained(**{**fields, **changes})


def test_the_table_has_every_combination_once():
    rows = [(row.loader, str(row.options), row.rounding, row.base_dtype) for row in loader_table(make())]
    loaders = [(OLD_PEFT, "{}"), *((PEFT, str(options)) for options in OPTIONS), (VERA_TOOLS, "{}")]
    assert rows == [(*loader, rounding, dtype) for loader in loaders for rounding in ROUNDINGS for dtype in BASE_DTYPES]


def exact(table, loader, **wanted):
    found = {
        row.exact for row in table if row.loader == loader and all(getattr(row, k) == v for k, v in wanted.items())
    }
    assert len(found) == 1, found
    return found.pop()


def test_where_nothing_is_known_nobody_can_know():
    table = loader_table(make(stored=False, save_projection=False, recipes=None))
    assert {row.exact for row in table} == {None}
    assert all(row.why for row in table)


@pytest.mark.parametrize("stored", [True, False])
def test_what_rests_on_an_assumption_is_not_known(stored):
    """Not that a loader is right, and not that it is wrong: the trained pair may be what it draws."""
    table = loader_table(make(stored=stored, save_projection=stored, assumed=True))
    assert {row.exact for row in table} == {None}
    assert all("if the recorded pair is the trained one, which nothing proves" in row.why for row in table)
    sizes = loader_table(make(stored=stored, save_projection=stored, assumed=True, fits=False))
    assert exact(sizes, PEFT) is False
    assert exact(sizes, VERA_TOOLS) is None


def test_where_no_recipe_makes_the_pair_only_what_is_stored_helps():
    table = loader_table(make(recipes=()))
    assert exact(table, OLD_PEFT) is False
    assert exact(table, PEFT, options={}) is True
    assert exact(table, VERA_TOOLS) is True
    lost = loader_table(make(stored=False, save_projection=False, recipes=()))
    assert {row.exact for row in lost} == {False}


def test_integer_weights_are_not_cast_to():
    table = loader_table(make(stored=False, save_projection=False))
    for loader in (OLD_PEFT, PEFT):
        assert exact(table, loader, rounding="fused", base_dtype="integer") is True
        assert exact(table, loader, rounding="separate", base_dtype="integer") is False
        assert exact(table, loader, rounding="fused", base_dtype="bfloat16") is False
    assert exact(table, VERA_TOOLS) is True


@pytest.mark.parametrize(
    ("recipe", "rounding", "base_dtype", "words"),
    [
        (Recipe(prng_key=3), "fused", "float32", "draws the same pair from the key"),
        (Recipe(prng_key=3), "separate", "float32", "such a machine rounds otherwise than the one that trained it"),
        (Recipe(prng_key=3), "fused", "bfloat16", "rounded through bfloat16 where it was trained unrounded"),
        (
            Recipe(prng_key=3, rounded_through="bfloat16"),
            "fused",
            "float32",
            "not rounded where it was trained through",
        ),
        (Recipe(prng_key=0), "fused", "float32", "the trained one was made with key 0"),
        (Recipe(prng_key=3, prng_key_B=4), "fused", "float32", "was drawn in another order"),
        (Recipe(prng_key=3, b_first=True), "fused", "float32", "was drawn in another order"),
        (Recipe(prng_key=3, drawn_dtype="float64"), "fused", "float32", "was drawn in float64"),
    ],
)
def test_the_reason_says_what_is_different(recipe, rounding, base_dtype, words):
    rows = loader_table(make(stored=False, save_projection=False, recipes=(recipe,)))
    row = next(r for r in rows if (r.loader, r.rounding, r.base_dtype) == (PEFT, rounding, base_dtype))
    assert words in row.why
    assert row.exact == (words == "draws the same pair from the key")


def test_the_reason_is_what_differs_from_the_nearest_of_recipes_with_the_same_bits():
    """Rounding through bfloat16 may hide the affine rounding: then nobody knows which it was trained with."""
    recipes = [Recipe(prng_key=3, rounding=rounding, rounded_through="bfloat16") for rounding in ROUNDINGS]
    rows = loader_table(make(stored=False, save_projection=False, recipes=recipes))
    reasons = {row.why for row in rows if row.loader == PEFT and row.base_dtype == "float32"}
    assert reasons == {"draws another pair from the key: not rounded where it was trained through bfloat16"}


@pytest.mark.parametrize("key", [3 + 2**32, 3 - 2**32])
def test_a_key_that_is_the_same_modulo_2_to_the_32_draws_the_same(key):
    table = loader_table(make(stored=False, save_projection=False, prng_key=key))
    assert exact(table, PEFT, rounding="fused", base_dtype="float32") is True


def test_a_pair_stored_in_bfloat16_is_redrawn_on_a_bfloat16_base_only():
    recipes = (Recipe(prng_key=3, rounded_through="bfloat16"), Recipe(prng_key=3))
    table = loader_table(make(stored=False, save_projection=False, dtype="bfloat16", recipes=recipes))
    assert exact(table, PEFT, rounding="fused", base_dtype="bfloat16") is True
    assert exact(table, PEFT, rounding="fused", base_dtype="float32") is False
