"""The projections that commands write, against those that PEFT draws with the kernels of either rounding."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.adapters import CHECKPOINTS, SEED_ONLY, base_of, tensors_of
from tests.command import run_json
from tests.peers import drawn_digests, save_drawn_pair
from tests.projections import torch_draws
from vera_tools import embed_projections

pytestmark = pytest.mark.capability


@pytest.mark.parametrize("kernels", ["here", "separate"])
@pytest.mark.parametrize(("key", "shape"), [(42, (16, 100, 60)), (-3, (7, 33, 129))])
def test_digests_are_what_peft_draws(request, kernels, key, shape):
    if kernels == "here":
        rounding, drawn = torch_draws.rounding(), drawn_digests(key, *shape)
    else:
        rounding, drawn = "separate", request.getfixturevalue("separate_kernels")(drawn_digests, key, *shape)
    r, in_features, out_features = shape
    code, document = run_json(
        *("regenerate", "--key", key, "--rank", r, "--in-features", in_features, "--out-features", out_features),
        *("--rounding", rounding),
    )
    assert code == 0
    assert [document["vera_A"]["sha256"], document["vera_B"]["sha256"]] == drawn
    assert document["vera_A"]["shape"] == [r, in_features]
    assert document["recipe"]["rounding"] == rounding
    assert document["assumed"] is False


@pytest.mark.parametrize(
    ("name", "rounding", "recipe"),
    [
        (SEED_ONLY, "fused", None),
        ("peft-0.21.2-llama-bf16-seedonly", "fused", None),
        ("peft-0.21.2-llama-f32-seedonly-noavx", "separate", "mt19937-f32-separate"),
    ],
)
@pytest.mark.filterwarnings("ignore::vera_tools.errors.AssumedRecipeWarning")
def test_the_embedded_pair_is_what_peft_draws(name, rounding, recipe, tmp_path, request):
    drawn = tmp_path / "drawn.safetensors"
    if rounding == torch_draws.rounding():
        save_drawn_pair(name, drawn)
    elif rounding == "separate":
        request.getfixturevalue("separate_kernels")(save_drawn_pair, name, drawn)
    else:
        pytest.skip("this process has no fused kernels")
    embed_projections(CHECKPOINTS / name, tmp_path / "out", base=base_of(name), recipe=recipe)
    embedded, expected = tensors_of(tmp_path / "out"), load_file(drawn)
    for key in ("vera_A", "vera_B"):
        assert np.array_equal(embedded[f"base_model.{key}"], expected[key])
