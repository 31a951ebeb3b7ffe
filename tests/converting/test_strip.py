"""Stripping: what is proven first, what is kept, what is recorded, and what a caller is told."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.adapters import (
    BERT,
    CHECKPOINTS,
    GPT2,
    KEPT,
    KEPT_NAMES,
    PAIR,
    SEED_ONLY,
    config_of,
    edit,
    files_of,
    set_config,
)
from tests.command import run_cli, run_json
from tests.peers import base_model, distance
from vera_tools import embed_projections, record, strip_projections, verify
from vera_tools.checkpoints.manifest import Manifest
from vera_tools.converting.strip import exact_in_peft
from vera_tools.errors import (
    CheckFailedError,
    FormatError,
    LoadingWarning,
    NothingToDoError,
    UsageError,
    VeraToolsWarning,
)
from vera_tools.files.safetensors import TensorFile

VECTOR = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")


def facts(path: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Name to dtype, shape and digest."""
    with TensorFile.open(path / "adapter_model.safetensors") as file:
        return {name: (info.dtype, info.shape, file.sha256(name)) for name, info in file.tensors.items()}


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_everything_but_the_pair_stays(name, tmp_path):
    out = tmp_path / "out"
    report = strip_projections(CHECKPOINTS / name, out)
    before, after = facts(CHECKPOINTS / name), facts(out)
    assert {key: value for key, value in before.items() if key not in PAIR} == after
    assert report.input_bytes == (CHECKPOINTS / name / "adapter_model.safetensors").stat().st_size
    assert report.output_bytes == (out / "adapter_model.safetensors").stat().st_size
    assert report.saved_bytes == report.input_bytes - report.output_bytes
    assert config_of(out) == {**config_of(CHECKPOINTS / name), "save_projection": False}
    assert verify(out).exit_code == 0


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda tensors: tensors[VECTOR].__setitem__(2, np.nan), "tensors.finite"),
        (lambda tensors: tensors.pop(VECTOR), "tensors.layers"),
    ],
)
def test_what_is_damaged_loads_exactly_nowhere(checkpoint, tmp_path, change, check):
    folder = checkpoint(KEPT)
    edit(folder, change)
    with pytest.warns(LoadingWarning, match=rf"damaged or incomplete: {check}: "):
        report = strip_projections(folder, tmp_path / "out")
    assert [found.id for found in report.damage] == [check]
    assert {load.exact for load in report.loads} == {False}
    code, document = run_json("strip-projections", folder, "-o", tmp_path / "again")
    assert code == report.exit_code == 1
    assert [found["id"] for found in document["damage"]] == [check]
    shown = run_cli("strip-projections", folder, "-o", tmp_path / "third").stdout
    assert "loads exactly nowhere: the adapter is damaged or incomplete" in shown
    for stripped in (folder, tmp_path / "out"):
        (found,) = verify(stripped).checkpoints
        assert {load.exact for load in found.loads} == {False}
        assert found.safety == "Not safe to load with any loader: the adapter is damaged or incomplete."


def table(loads):
    return {(load.loader, str(load.options), load.rounding, load.base_dtype): load.exact for load in loads}


def test_vectors_that_the_config_does_not_adapt_are_dropped_by_peft(checkpoint, tmp_path):
    """It says of what it wrote what `verify` says of it."""
    folder = checkpoint(KEPT)
    set_config(folder, layers_to_transform=[0])
    with pytest.warns(LoadingWarning, match="exactly nowhere: it drops the vectors of 2 layers"):
        report = strip_projections(folder, tmp_path / "out")
    (found,) = verify(tmp_path / "out").checkpoints
    assert table(report.loads) == table(found.loads)
    assert {load.exact for load in report.loads if load.loader != "vera-tools"} == {False}


def test_vectors_that_do_not_fit_the_pair_keep_it(checkpoint, tmp_path):
    """The record would not be believed of them, and nothing could put the pair back."""
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: tensors.update({VECTOR: tensors[VECTOR.replace("_d", "_b")]}))
    with pytest.raises(CheckFailedError, match="what is stripped could not be put back"):
        strip_projections(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = strip_projections(folder, tmp_path / "out", force=True)
    assert (report.exit_code, [found.id for found in report.damage]) == (1, ["tensors.shapes"])
    with pytest.raises(CheckFailedError, match="the record does not fit the vectors"):
        embed_projections(tmp_path / "out", tmp_path / "back")


@pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning")
@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda folder: set_config(folder, r=8), "tensors.shapes"),
        (lambda folder: edit(folder, lambda t: t.update({VECTOR: t[VECTOR].astype(np.int32)})), "tensors.dtypes"),
    ],
)
def test_what_verify_calls_invalid_is_damage(checkpoint, tmp_path, change, check):
    folder = checkpoint(KEPT)
    change(folder)
    report = strip_projections(folder, tmp_path / "out")
    assert (report.exit_code, [found.id for found in report.damage]) == (1, [check])
    assert {load.exact for load in report.loads} == {False}
    assert verify(tmp_path / "out").checkpoints[0].verdict == "invalid"


def test_what_is_recorded_gives_the_original_back(checkpoint, tmp_path):
    source = checkpoint(BERT)
    weights = (source / "adapter_model.safetensors").read_bytes()
    strip_projections(source, tmp_path / "out")
    manifest = Manifest.from_json((tmp_path / "out" / "vera_manifest.json").read_text())
    assert manifest.original is not None
    assert base64.b64decode(manifest.original.header) == weights[8 : 8 + int.from_bytes(weights[:8], "little")]
    assert manifest.original.config == (source / "adapter_config.json").read_text()
    assert manifest.original.sha256 == hashlib.sha256(weights).hexdigest()
    assert manifest.projections.sha256["vera_A"] == facts(source)["base_model.vera_A"][2]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's, about save_projection
@pytest.mark.parametrize("name", [KEPT, GPT2])
def test_peft_goes_on_loading_it(name, tmp_path):
    from peft import PeftModel

    strip_projections(CHECKPOINTS / name, tmp_path / "out")
    assert distance(PeftModel.from_pretrained(base_model(name), tmp_path / "out"), name) <= 1e-5


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for out in ("a", "b"):
        strip_projections(CHECKPOINTS / KEPT, tmp_path / out)
    for name in ("adapter_model.safetensors", "adapter_config.json", "vera_manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_file_alone_says_how_its_pair_is_made(tmp_path):
    report = strip_projections(CHECKPOINTS / "peft-0.21.2-llama-f32-kept-noavx", tmp_path / "out")
    with TensorFile.open(tmp_path / "out" / "adapter_model.safetensors") as file:
        record = json.loads(file.metadata["vera_tools"])
    assert record["recipe"]["rounding"] == "separate"
    assert record["projections"]["vera_B"]["sha256"] == report.projections.sha256["vera_B"]


def test_foreign_metadata_stays(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: None, metadata={"format": "pt", "step": "1200"})
    strip_projections(source, tmp_path / "out")
    with TensorFile.open(tmp_path / "out" / "adapter_model.safetensors") as file:
        assert file.metadata["step"] == "1200"


def test_refuses_what_no_recipe_makes(checkpoint, tmp_path):
    source = checkpoint(KEPT)

    def nudge(tensors):
        vera_A = tensors["base_model.vera_A"]
        vera_A[3, 5] = np.nextafter(vera_A[3, 5], np.float32(1))

    edit(source, nudge)
    with pytest.raises(CheckFailedError, match=r"vera_A edited, different in 1 place: \[3, 5\]; .*--force"):
        strip_projections(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_force_strips_and_records_the_loss(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    rng = np.random.default_rng(1)
    edit(source, lambda tensors: tensors["base_model.vera_B"].__setitem__(..., rng.normal(size=(64, 16))))
    digest = facts(source)["base_model.vera_B"][2]
    with pytest.warns(LoadingWarning, match="the trained projections are lost"):
        report = strip_projections(source, tmp_path / "out", force=True)
    assert report.forced
    manifest = Manifest.from_json((tmp_path / "out" / "vera_manifest.json").read_text())
    assert manifest.projections.recipe is None
    assert manifest.projections.sha256["vera_B"] == digest
    assert report.to_dict()["matches"]["vera_B"]["match"] == "unrelated"
    assert not any(load.exact for load in report.loads)
    verified = verify(tmp_path / "out")
    assert (verified.exit_code, verified.checkpoints[0].verdict) == (1, "drift")


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        (KEPT, {("fused", "float32"), ("fused", "integer")}),
        ("peft-0.21.2-llama-f32-kept-noavx", {("separate", "float32"), ("separate", "integer")}),
        ("peft-0.20.0-llama-bf16-kept", {("fused", "bfloat16")}),
    ],
)
def test_says_where_plain_peft_loads_exactly(name, exact, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = strip_projections(CHECKPOINTS / name, tmp_path / "out")
    assert {place for place, is_exact in exact_in_peft(report.loads).items() if is_exact} == exact
    messages = [str(warning.message) for warning in caught]
    if name == KEPT:
        assert messages == []
    else:
        made = (
            "where torch draws as on Windows, Apple silicon (torch <2.2), Intel Mac or Linux without AVX2"
            if "noavx" in name
            else "on a bfloat16 base"
        )
        assert len(messages) == 1
        assert f"trained {made}, the stripped adapter will drift in plain PEFT on any other" in messages[0]
        assert "embedding makes it exact in PEFT >= 0.21 with default options" in messages[0]


@pytest.fixture
def of_another_key(checkpoint):
    """An adapter whose pair was made with key 101, and whose config says 102."""
    source = checkpoint(KEPT)
    assert config_of(source)["projection_prng_key"] == 101
    set_config(source, projection_prng_key=102)
    return source


def test_a_pair_of_another_key_is_refused_until_the_key_is_put_right(of_another_key, tmp_path):
    with pytest.raises(
        CheckFailedError, match=r"put 101 into projection_prng_key of adapter_config\.json first"
    ) as found:
        strip_projections(of_another_key, tmp_path / "out")
    assert (found.value.expected, found.value.found) == ("key 102", "made with key 101")
    assert not (tmp_path / "out").exists()
    set_config(of_another_key, projection_prng_key=101)
    strip_projections(of_another_key, tmp_path / "out")
    assert verify(tmp_path / "out").exit_code == 0


def test_what_is_said_of_a_pair_of_another_key_that_was_stripped_is_true(of_another_key, tmp_path):
    """vera-tools makes it again from its record, and PEFT does not; the key that is put right makes all well."""
    from vera_tools.nn import VeraModel

    with pytest.warns(LoadingWarning, match="exactly nowhere: .*made with key 101"):
        report = strip_projections(of_another_key, tmp_path / "out", force=True)
    assert not report.forced  # which says that it is lost
    (found,) = verify(tmp_path / "out").checkpoints
    assert found.verdict == "drift"
    assert [check.id for check in found.failed] == ["config.key"]
    assert found.failed[0].message == "projection_prng_key 102, and the recorded pair was made with key 101"
    assert {load.exact for load in found.loads if load.loader == "vera-tools"} == {True}
    assert {load.exact for load in found.loads if load.loader != "vera-tools"} == {False}
    assert found.safety == "Not safe to load before this is explained: config.key."
    model = VeraModel.from_pretrained(base_model(KEPT), tmp_path / "out")
    assert distance(model, KEPT) <= 1e-5
    embed_projections(tmp_path / "out", tmp_path / "embedded")
    assert facts(tmp_path / "embedded") == facts(of_another_key)
    set_config(tmp_path / "out", projection_prng_key=101)
    (found,) = verify(tmp_path / "out").checkpoints
    assert found.verdict == "reproducible"
    assert [check.id for check in found.failed] == ["manifest.config"]
    with pytest.warns(VeraToolsWarning, match="not what was recorded before: projection_prng_key"):
        record(tmp_path / "out")
    assert verify(tmp_path / "out").exit_code == 0


def test_a_key_that_was_changed_after_stripping_is_put_back_and_no_proof_is_given_up(checkpoint, tmp_path):
    from vera_tools.nn import VeraModel

    strip_projections(checkpoint(KEPT), tmp_path / "out")
    set_config(tmp_path / "out", projection_prng_key=102)
    (found,) = verify(tmp_path / "out").checkpoints
    assert [check.id for check in found.failed] == ["config.key", "manifest.config"]
    assert found.next_step is not None
    assert found.next_step.words == "put the key of the recorded pair back into adapter_config.json"
    assert "cannot be made again" not in found.safety
    assert {load.exact for load in found.loads} == {False}
    with pytest.raises(CheckFailedError, match=r"put 101 back into adapter_config\.json; only if another adapter"):
        record(tmp_path / "out")
    with pytest.raises(CheckFailedError, match="projection_prng_key 101 became 102"):
        VeraModel.from_pretrained(base_model(KEPT), tmp_path / "out")


def test_in_bulk_the_damaged_count_apart(checkpoint, tmp_path):
    damaged = checkpoint(KEPT)
    edit(damaged, lambda tensors: tensors[VECTOR].__setitem__(2, np.nan))
    checkpoint("peft-0.20.0-llama-f32-kept")
    result = run_cli("strip-projections", "-R", tmp_path, "--out-dir", tmp_path / "out")
    assert result.returncode == 1
    assert f"{damaged}: converted, and it is damaged, " in result.stdout
    assert result.stdout.endswith("2 checkpoints: 1 converted, 1 damaged\n")
    code, document = run_json("strip-projections", "-R", tmp_path, "--out-dir", tmp_path / "out", "--overwrite")
    assert code == 1
    assert (document["summary"]["converted"], document["summary"]["damaged"]) == (1, 1)


def test_a_wider_pair_than_the_layers_give_is_stripped_with_a_warning(tmp_path):
    """PEFT saves a second adapter with the first one's pair; alone, it draws another and refuses the embedded one."""
    import peft

    model = peft.get_peft_model(base_model(KEPT), peft.VeraConfig(r=4, target_modules="all-linear"))
    model.add_adapter("second", peft.VeraConfig(r=4, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.warns(LoadingWarning, match="exactly nowhere: it draws a pair of another size.*needs the LoRA export"):
        report = strip_projections(tmp_path / "second", tmp_path / "out")
    assert not any(exact_in_peft(report.loads).values())
    (found,) = verify(tmp_path / "out").checkpoints
    assert {load.exact for load in found.loads if load.loader != "vera-tools"} == {False}
    assert {load.exact for load in found.loads if load.loader == "vera-tools"} == {True}
    embed_projections(tmp_path / "out", tmp_path / "embedded")
    assert facts(tmp_path / "embedded") == facts(tmp_path / "second")


def test_nothing_to_strip():
    with pytest.raises(NothingToDoError, match="no projections are stored"):
        strip_projections(CHECKPOINTS / SEED_ONLY, "unused")


def test_half_a_pair(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors.pop("base_model.vera_B"))
    with pytest.raises(FormatError, match="vera_A is stored and vera_B is not"):
        strip_projections(source, tmp_path / "out")


def test_output_rules(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    with pytest.raises(UsageError, match="either where to write"):
        strip_projections(source)
    with pytest.raises(UsageError, match="either where to write"):
        strip_projections(source, tmp_path / "out", in_place=True)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="already exists"):
        strip_projections(source, tmp_path / "out")
    strip_projections(source, tmp_path / "out", overwrite=True)
    for output in (source, tmp_path):
        with pytest.raises(UsageError, match="would replace an input"):
            strip_projections(source, output, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", source.name]


def test_cards_come_along_and_signatures_do_not(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    for name in ("README.md", "tokenizer.json", "model.sig", "optimizer.pt"):
        (source / name).write_text(name)
    report = strip_projections(source, tmp_path / "out")
    assert report.carried_over == ("README.md", "expected_logits.json", "tokenizer.json")
    assert report.left_out == ("model.sig", "optimizer.pt")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (tmp_path / "out" / "model.sig").exists()


def test_from_the_hub(hub, tmp_path):
    source = CHECKPOINTS / KEPT
    hub.add_repo("ann/x", files_of(source))
    report = strip_projections("hf://ann/x", tmp_path / "hub")
    local = strip_projections(source, tmp_path / "local")
    assert report.carried_over == local.carried_over == ("expected_logits.json",)
    for name in ("adapter_model.safetensors", "adapter_config.json", "vera_manifest.json", "expected_logits.json"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    with pytest.raises(UsageError, match="only what is on disk is changed in place"):
        strip_projections("hf://ann/x", in_place=True)


def test_json(tmp_path):
    code, document = run_json("strip-projections", CHECKPOINTS / KEPT_NAMES[-1], "-o", tmp_path / "out")
    assert code == 0
    assert document["recipe"]["name"] == "mt19937-f32-separate"
    assert document["matches"]["vera_A"]["match"] == "identical"
    assert len(document["loads"]) == 40


def test_text(tmp_path):
    result = run_cli("strip-projections", CHECKPOINTS / KEPT, "-o", tmp_path / "out")
    assert result.returncode == 0
    assert "10.4 kB -> 2.6 kB, 7.8 kB saved, 4.0 times smaller" in result.stdout
    assert "PEFT on float32 and bnb 8-bit bases: Linux, Apple silicon (torch >=2.2)\n" in result.stdout
    assert result.stderr == ""


def test_a_refusal_is_one_line_and_exit_code_1(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors["base_model.vera_B"].fill(0))
    result = run_cli("strip-projections", source, "-o", tmp_path / "out")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
