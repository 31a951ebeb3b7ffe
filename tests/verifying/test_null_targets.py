"""target_modules is null: what is adapted then depends on PEFT's default for the base's model type."""

from __future__ import annotations

import pytest

import vera_tools
from tests.adapters import KEPT, base_of, set_config
from tests.command import run_cli, run_json
from tests.merging.models import make_adapter, make_base
from tests.peers import base_model, distance, load_peft
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.checkpoints.default_targets import DEFAULT_TARGETS, since
from vera_tools.verifying.loads import OLD_PEFT, PEFT, VERA_TOOLS

#: On gate_proj, k_proj, o_proj and q_proj.
FOUR = "peft-0.21.2-llama-bf16-kept"


def exact(report, loader):
    """The answers of a loader with default options."""
    return {load.exact for load in report.loads if load.loader == loader and not load.options}


def test_without_a_base_nobody_knows(checkpoint):
    folder = checkpoint(KEPT)
    set_config(folder, target_modules=None)
    report = one(folder)
    assert statuses(report)["config.target_modules"] == "warn"
    assert (exact(report, VERA_TOOLS), exact(report, PEFT)) == ({True}, {None})
    assert exact(report, OLD_PEFT) == {None, False}  # it draws the pair again, which is wrong on some bases anyway
    assert report.safety.endswith(" with vera-tools everywhere; with PEFT it is not known, as the warning says.")
    code, document = run_json("verify", folder, "--require-loads", "peft>=0.21")
    assert code == 1
    assert document["checkpoints"][0]["required_loads"][0]["exact"] is None
    assert "doubts" in document["checkpoints"][0]["trained"]


def test_a_log_tells_the_same(checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    set_config(folder, target_modules=None)
    first, second = (vera_tools.verify(folder, log=tmp_path / "log") for _ in range(2))
    assert second.from_log == 1
    assert first.checkpoints[0].loads == second.checkpoints[0].loads


def test_where_the_default_is_what_is_adapted_peft_computes_the_same(checkpoint):
    folder = checkpoint(KEPT)
    set_config(folder, target_modules=None)
    report = one(folder, base=base_of(KEPT))
    assert report.exit_code() == 0
    assert message_of(report, "config.target_modules").endswith("takes q_proj, v_proj on a base of type llama")
    assert exact(report, PEFT) == {True}
    assert distance(load_peft(base_model(KEPT), folder), KEPT) <= 1e-5


def test_where_the_default_is_another_peft_does_not_load_it(checkpoint, tmp_path):
    folder = checkpoint(FOUR)
    assert one(folder, base=base_of(FOUR)).ok
    set_config(folder, target_modules=None)
    report = one(folder, base=base_of(FOUR))
    assert {"tensors.unexpected", "base.modules"} <= failed(report)
    assert "which is null: PEFT takes its default for llama" in message_of(report, "tensors.unexpected")
    assert "v_proj" in message_of(report, "base.modules")
    assert exact(report, PEFT) == exact(report, OLD_PEFT) == {False}
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_peft(base_model(FOUR), folder)
    result = run_cli("convert", folder, "--to", "lora", "--base", base_of(FOUR), "-o", tmp_path / "lora")
    assert result.returncode == 1
    assert "tensors.unexpected" in result.stderr


@pytest.mark.parametrize(("model_type", "first"), [("llama", None), ("gemma2", "0.13"), ("own", "never")])
def test_releases_without_a_default_refuse_it(model_type, first, tmp_path):
    base = make_base(tmp_path / "base", dtype="float32", config={"model_type": model_type})
    report = one(make_adapter(tmp_path / "a", config={"target_modules": None}), base=base)
    old = {load.why for load in report.loads if load.loader == OLD_PEFT and load.exact is False}
    if first == "never":
        assert failed(report) == {"config.target_modules"}
        assert exact(report, PEFT) == exact(report, OLD_PEFT) == {False}
        assert all("has no default for a base of type own" in why for why in old)
    else:
        assert report.ok
        assert exact(report, PEFT) == {True}
        assert any(f"before {first}" in why for why in old) is (first is not None)


def test_every_model_type_says_since_when():
    assert {since(model_type) for model_type in DEFAULT_TARGETS} == {
        None,
        "0.12",
        "0.13",
        "0.16",
        "0.18",
        "0.19",
        "0.20",
    }
