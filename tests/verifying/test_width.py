"""`verify` on a pair that is wider than the adapter's layers, which no vector tells: only a base, named or recorded.

PEFT saves every adapter of a model with the pair of the first. `test_checks` has it do so.
"""

from __future__ import annotations

import pytest

import vera_tools
from tests.adapters import BERT, GPT2, KEPT, PAIR, WEIGHTS, base_of, edit, edit_manifest
from tests.command import run_cli
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.errors import LoadingWarning, VeraToolsWarning
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

GATE = "peft>=0.21:float32:linux-x86_64"
NOT_CHECKED = "in_max not checked against a base"


def store(folder, in_max):
    """The same adapter as PEFT saves it where the pair is of this width; its layers are 64 wide."""
    pair = generate(Recipe(prng_key=101), PairShape(16, in_max, 64))
    edit(folder, lambda tensors: tensors.update(zip(PAIR, pair, strict=True)))
    return folder


@pytest.fixture
def wide(checkpoint):
    return store(checkpoint(KEPT), 96)


@pytest.fixture
def recorded(wide):
    with pytest.warns(VeraToolsWarning, match=r"it fails base.pair \(the recorded base gives in_max 64"):
        report = vera_tools.record(wide, base=base_of(KEPT))
    assert len(report.warned) == 1
    return wide


def exact(report):
    """What the loader table says of PEFT, and of vera-tools."""
    rows = [(load.loader.startswith("peft"), load.exact) for load in report.loads]
    return {answer for peft, answer in rows if peft}, {answer for peft, answer in rows if not peft}


def test_without_a_base_the_scope_says_that_it_is_not_known(wide):
    report = one(wide)
    assert (report.verdict, failed(report)) == ("reproducible", set())
    assert report.scope == f"vectors not covered: no manifest; {NOT_CHECKED}"
    named = one(wide, base=base_of(KEPT))
    assert failed(named) == {"base.pair"}
    assert NOT_CHECKED not in named.scope


def test_a_recorded_base_tells_it_without_one_that_is_named(recorded):
    report = one(recorded)
    assert (report.verdict, failed(report)) == ("reproducible", {"base.pair"})
    assert exact(report) == ({False}, {True})
    assert "in_max 96" in message_of(report, "base.pair")
    assert NOT_CHECKED not in report.scope
    shown = run_cli("verify", recorded, "--require-loads", GATE)
    assert shown.returncode == 1
    assert f"NOT EXACT with {GATE}" in shown.stdout
    assert "next:     save it again, alone in its model" in shown.stdout


def test_what_is_stripped_of_it_is_not_passed_for_peft(recorded, tmp_path):
    out, back, lora = tmp_path / "out", tmp_path / "back", tmp_path / "lora"
    with pytest.warns(LoadingWarning, match="exactly nowhere: it draws a pair of another size.*needs the LoRA export"):
        report = vera_tools.strip_projections(recorded, out)
    assert exact(report) == ({False}, {True})
    verified = vera_tools.verify(out, require_loads=[GATE])
    assert verified.exit_code == 1
    assert failed(verified.checkpoints[0]) == {"base.pair"}
    assert [answer.exact for answer in verified.answers(verified.checkpoints[0])] == [False]
    vera_tools.embed_projections(out, back)
    assert (back / WEIGHTS).read_bytes() == (recorded / WEIGHTS).read_bytes()
    assert failed(one(back)) == {"base.pair"}
    vera_tools.to_lora(out, lora)
    assert (lora / WEIGHTS).is_file()


@pytest.mark.parametrize("name", [KEPT, GPT2, BERT])
def test_a_recorded_base_of_that_width_passes(name, checkpoint):
    folder = checkpoint(name)
    vera_tools.record(folder, base=base_of(name))
    report = one(folder)
    assert not failed(report)
    assert statuses(report)["base.pair"] == "pass"
    assert report.scope == "projections, vectors and config are covered"


def test_where_a_layer_is_not_recorded_it_may_be_the_widest(recorded):
    edit_manifest(recorded, lambda manifest: manifest["base"]["weights"].popitem())
    report = one(recorded)
    assert "base.pair" not in statuses(report)
    assert NOT_CHECKED in report.scope


def test_packed_weights_tell_nothing(checkpoint):
    """Two 4-bit numbers a byte; manifests of version 0.1.0 have such shapes."""
    folder = checkpoint(KEPT)
    vera_tools.record(folder, base=base_of(KEPT))

    def pack(manifest):
        for record in manifest["base"]["weights"].values():
            record.update(dtype="uint8", shape=[record["shape"][0], record["shape"][1] // 2])

    edit_manifest(folder, pack)
    report = one(folder)
    assert not failed(report)
    assert NOT_CHECKED in report.scope


def test_a_layer_wider_than_the_pair_is_found_whatever_else_is_recorded(checkpoint):
    folder = checkpoint(KEPT)
    vera_tools.record(folder, base=base_of(KEPT))

    def widen(manifest):
        weights = manifest["base"]["weights"]
        weights.popitem()
        weights["model.layers.0.self_attn.q_proj.weight"]["shape"] = [64, 80]

    edit_manifest(folder, widen)
    assert "gives in_max 80, the projections have in_max 64" in message_of(one(folder), "base.pair")
    assert failed(one(folder)) == {"base.pair"}
