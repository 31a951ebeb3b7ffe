"""The sentence on where a checkpoint is safe to load, what to do next, and the report that shows them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import vera_tools
from tests.adapters import (
    CHECKPOINTS,
    CONFIG,
    KEPT,
    MANIFEST,
    PAIR,
    SEED_ONLY,
    WEIGHTS,
    base_of,
    edit,
    edit_manifest,
    flip,
    set_config,
    take_as_live,
)
from tests.command import run_cli, run_json
from tests.verifying.reports import failed, message_of, one
from vera_tools.errors import AssumedRecipeWarning, CheckFailedError
from vera_tools.projections.identification import share
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.advice import gate_step, next_step, safety
from vera_tools.verifying.findings import Check
from vera_tools.verifying.loads import BASE_KINDS, OLD_PEFT, PEFT, Load, Trained, loader_table

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")

BF16 = "peft-0.21.2-llama-bf16-kept"
SEPARATE = "peft-0.21.2-llama-f32-kept-noavx"
PLACES = "on Linux (AVX2 or Arm) and Apple silicon (torch >=2.2)"


def stripped(name: str, folder: Path) -> Path:
    vera_tools.strip_projections(CHECKPOINTS / name, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "stored", "seed_only"),
    [
        (
            KEPT,
            "vera-tools and PEFT 0.21 or newer (default options) everywhere; with PEFT before 0.21 only "
            f"{PLACES} with a float32 or bnb 8-bit base",
            f"vera-tools everywhere; with any PEFT only {PLACES} with a float32 or bnb 8-bit base",
        ),
        (
            BF16,
            "vera-tools and PEFT 0.21 or newer everywhere; with PEFT before 0.21 only with a bfloat16 base",
            "vera-tools everywhere; with any PEFT only with a bfloat16 base",
        ),
    ],
)
def test_the_sentence_names_loaders_and_platforms_that_people_know(name, stored, seed_only, tmp_path):
    silent = "; elsewhere PEFT silently uses other projections."
    assert one(CHECKPOINTS / name).safety == f"Safe to load, if its vectors are right, with {stored}{silent}"
    assert one(stripped(name, tmp_path / "s")).safety == f"Safe to load with {seed_only}{silent}"


def test_windows_and_intel_macs_are_named_where_the_pair_is_theirs(tmp_path):
    sentence = one(stripped(SEPARATE, tmp_path / "s")).safety
    assert "only on Windows, Apple silicon (torch <2.2), Intel Mac and Linux without AVX2 with a float32" in sentence


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("rounding", ["fused", "separate"])
def test_no_sentence_promises_a_place_where_the_table_says_no(stored, dtype, rounding):
    """Each loader's places are read back from the sentence and compared with the table's."""
    through = dtype if dtype == "bfloat16" else None
    drawn = "float64" if dtype == "float64" else "float32"
    recipe = Recipe(prng_key=3, rounding=rounding, rounded_through=through, drawn_dtype=drawn)
    held = frozenset({dtype, *(["float32"] if dtype != "float64" else [])})
    table = loader_table(Trained(stored, stored, 3, (recipe,), "float32" if dtype != "float64" else dtype, held))
    sentence = safety("reproducible", table, (), stored=stored, whole=True)
    assert not re.search("fused|separate", sentence)
    for loader, name in ((PEFT, "PEFT 0.21 or newer"), (OLD_PEFT, "PEFT before 0.21")):
        exact = {
            (load.rounding, load.base_dtype)
            for load in table
            if (load.loader, load.options, load.exact) == (loader, {}, True)
        }
        clause = next((c for c in sentence.rstrip(".").split("; ") if name in c or "any PEFT" in c), None)
        if clause is None:
            assert not exact
            continue
        everywhere = "everywhere" in clause
        dtypes = re.search(r"with a ([\w ,-]+) base", clause)
        kinds = set(re.split(r", | or ", dtypes[1])) if dtypes else set(BASE_KINDS.values())
        bases = {dtype for dtype, kind in BASE_KINDS.items() if kind in kinds}
        assert len(bases) == len(kinds)
        fused = everywhere or "Linux (AVX2 or Arm)" in clause or " on " not in clause
        separate = everywhere or "Windows" in clause or " on " not in clause
        promised = {("fused", base) for base in bases if fused} | {("separate", base) for base in bases if separate}
        assert promised == exact


def test_a_drift_says_why_beside_the_verdict_and_in_junit(checkpoint, tmp_path):
    folder = checkpoint(KEPT)
    set_config(folder, projection_prng_key=101)
    edit(folder, lambda tensors: tensors[PAIR[0]].__setitem__((1, 3), 0.5))
    result = run_cli("verify", folder, "--junit", tmp_path / "report.xml")
    cause = "vera_A differs from what key 101 gives in 1 place: [1, 3]"
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: DRIFT, {cause}"
    assert lines[1].startswith("  Not safe to load with any loader")
    assert "warned" not in result.stdout
    assert "  nearest   mt19937-f32-fused, key 101" in lines
    (failure,) = ElementTree.parse(tmp_path / "report.xml").iter("failure")
    assert failure.get("message") == f"drift: {cause}"
    assert shlex.join(["vera-tools", "verify", str(folder)]) in failure.text
    assert not list(ElementTree.parse(tmp_path / "report.xml").iter("system-out"))
    many = run_cli("verify", folder, CHECKPOINTS / KEPT).stdout.splitlines()
    assert many[0] == "DRIFT: 1"
    assert many[1] == f"  {folder}: {cause}"
    assert many[-1] == "2 checkpoints: 1 reproducible, 1 drift"


def test_both_projections_and_shares_in_words(checkpoint):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: [tensors[name].fill(0.25) for name in PAIR])
    words = message_of(one(folder), "projections.match")
    assert words == "vera_A and vera_B differ from what key 101 gives in all elements"
    edit(folder, lambda tensors: [tensors[PAIR[0]].__setitem__((n, n), 7) for n in range(5)])
    assert [share(part) for part in (1, 0.9999, 0.512, 0.0004)] == [
        "all elements",
        "over 99.9% of the elements",
        "51.2% of the elements",
        "under 0.1% of the elements",
    ]


def test_ulps_stand_where_nothing_but_a_rounding_differs(checkpoint):
    folder = checkpoint(KEPT)

    def nudge(tensors):
        tensors[PAIR[0]][:12] = np.nextafter(tensors[PAIR[0]][:12], np.float32(9))

    edit(folder, nudge)
    assert "by at most 1 ulp" in message_of(one(folder), "projections.match")
    edit(folder, lambda tensors: tensors[PAIR[0]].__setitem__((slice(12), 0), 3))
    assert "ulp" not in message_of(one(folder), "projections.match")


def test_a_headline_leads_with_what_failed(checkpoint):
    folder = checkpoint(KEPT)
    vector = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d"
    edit(folder, lambda tensors: tensors[vector].__setitem__(5, np.nan))
    result = run_cli("verify", folder)
    lines = result.stdout.splitlines()
    assert lines[0] == f"{folder}: FAILED tensors.finite; projections REPRODUCIBLE"
    assert lines[1] == "  Not safe to load with any loader: the adapter is damaged or incomplete."
    assert lines[-1].endswith("docs/checks.md#tensorsfinite explains tensors.finite)")
    many = run_cli("verify", folder, CHECKPOINTS / KEPT).stdout.splitlines()
    assert many[0] == "FAILED tensors.finite: 1"
    assert many[1].startswith(f"  {folder}: NaN or infinity in {vector}[5]")
    assert many[-1] == "2 checkpoints: 1 FAILED a check; verdicts: 2 reproducible"


def test_the_good_ones_of_many_are_counted_and_the_others_come_last_by_reason(tmp_path):
    for n in range(3):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / f"z-good-{n}")
        shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / f"seeds-{n}")
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "a-cut")
    (tmp_path / "a-cut" / "adapter_model.safetensors").write_bytes(b"")
    lines = run_cli("verify", "-R", tmp_path).stdout.splitlines()
    assert lines[0] == "UNPROVEN: 3"
    assert lines[1:4] == [f"  {tmp_path}/seeds-{n}" for n in range(3)]
    assert lines[6] == "FAILED tensors.file, INVALID: 1"
    assert lines[-1] == "7 checkpoints: 1 FAILED a check; verdicts: 3 reproducible, 3 unproven, 1 invalid"
    assert not any("z-good" in line for line in lines)
    verbose = run_cli("verify", "-v", "-R", tmp_path).stdout
    assert f"{tmp_path}/z-good-1: REPRODUCIBLE" in verbose


def broken(change):
    def make(folder: Path) -> Path:
        shutil.copytree(CHECKPOINTS / KEPT, folder)
        change(folder)
        return folder

    return make


def recorded(folder: Path) -> Path:
    shutil.copytree(CHECKPOINTS / SEED_ONLY, folder)
    vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
    return folder


def lost(folder: Path) -> Path:
    take_as_live(recorded(folder))
    edit_manifest(folder, lambda manifest: manifest["projections"]["vera_A"].update(sha256="0" * 64))
    return folder


def trained_on(folder: Path) -> Path:
    shutil.copytree(CHECKPOINTS / KEPT, folder)
    vera_tools.record(folder)
    edit(folder, lambda tensors: [tensors[name].__iadd__(1) for name in tensors if "lambda" in name])
    return folder


CASES = {
    "stale": (trained_on, "vera-tools record stale"),
    "lost": (lost, "vera-tools verify lost"),
    "assumed": (recorded, "vera-tools drift --checkpoint assumed"),
    "seeds": (
        lambda folder: shutil.copytree(CHECKPOINTS / SEED_ONLY, folder),
        "vera-tools record seeds --base BASE",
    ),
    "other-key": (
        broken(lambda folder: set_config(folder, projection_prng_key=100)),
        "vera-tools verify other-key",
    ),
    "a lora": (
        broken(lambda folder: [(folder / CONFIG).write_text('{"peft_type": "LORA"}'), (folder / WEIGHTS).unlink()]),
        "vera-tools verify -R 'a lora'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_green_ends_with_a_command_to_copy(name, tmp_path, monkeypatch):
    make, command = CASES[name]
    make(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    result = run_cli("verify", name)
    assert result.returncode != 0
    lines = result.stdout.splitlines()
    place = lines.index(f"            {command}")
    assert lines[place - 1].startswith("  next:     ")
    code, document = run_json("verify", name)
    assert code == result.returncode
    assert document["checkpoints"][0]["next"]["command"] == command
    assert document["checkpoints"][0]["safety"] == lines[1].strip()
    program, verb, *_ = shlex.split(command)
    assert program == "vera-tools"
    assert run_cli(verb, "--help").returncode == 0


def test_the_next_step_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained_on(tmp_path / "stale")
    step = one(Path("stale")).next_step
    assert run_cli(*shlex.split(step.command)[1:]).returncode == 0
    assert one(Path("stale")).next_step is None


def test_a_base_that_was_named_stands_in_the_next_step(tmp_path):
    folder = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "seeds")
    set_config(folder, base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    assert one(folder).next_step.command.endswith("--base hf://meta-llama/Llama-2-7b-hf")
    assert one(folder, base=base_of(SEED_ONLY)).next_step.command.endswith(
        shlex.join(["--base", str(base_of(SEED_ONLY))])
    )


@pytest.mark.parametrize("name", ["./bases/mine", "bases/mine"])
def test_a_base_on_disk_is_no_repository(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_of(SEED_ONLY), "bases/mine")
    assert one(CHECKPOINTS / SEED_ONLY, base=name).next_step.command.endswith(f"--base {name}")


def test_a_base_that_does_not_fit_is_to_blame_and_is_not_named_again(tmp_path):
    other = "peft-0.21.2-gpt2-conv1d-kept"
    report = one(CHECKPOINTS / KEPT, base=base_of(other))
    assert report.safety.startswith("Not safe to load on this base: it is another one")
    assert report.next_step.command.endswith("--base BASE")


def test_what_passes_has_no_next_step_and_what_is_accepted_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one(CHECKPOINTS / KEPT).next_step is None
    recorded(tmp_path / "assumed")
    assert "next:" not in run_cli("verify", "assumed", "--require", "assumed").stdout


@pytest.mark.parametrize(
    ("exact", "command"), [(False, "embed-projections"), (None, "embed-projections"), (True, "convert")]
)
def test_what_is_embedded_is_what_a_newer_peft_draws_wrongly(exact, command):
    table = [Load(PEFT, {}, "fused", "float32", exact, "why"), Load(OLD_PEFT, {}, "fused", "float32", False, "why")]
    step = gate_step("adapter", table, stored=False, base=None)
    assert step.command.startswith(f"vera-tools {command} adapter ")


BF16_SEEDS = "peft-0.21.2-llama-bf16-seedonly"


class TestAssumedForAnotherDtype:
    """What was recorded without its base, which is bfloat16, is recorded anew by what the next step says."""

    @pytest.fixture
    def guessed(self, checkpoint):
        folder = checkpoint(BF16_SEEDS)
        with pytest.warns(AssumedRecipeWarning):
            vera_tools.record(folder, in_features=96)
        return folder

    @pytest.mark.parametrize("named", ["", WEIGHTS])
    def test_the_next_step_replaces_the_record(self, guessed, named):
        base = base_of(BF16_SEEDS)
        forget, record = one(guessed / named, base=base).next_step.command.split(" && ")
        assert shlex.split(forget) == ["rm", str(guessed / MANIFEST)]
        (guessed / MANIFEST).unlink()
        assert run_cli(*shlex.split(record)[1:]).returncode == 0
        report = one(guessed, base=base)
        assert (report.ok, report.verdict, report.recipe.rounded_through) == (True, "assumed", "bfloat16")

    def test_recording_over_it_is_refused_and_writes_nothing(self, guessed):
        before = (guessed / MANIFEST).read_bytes()
        with pytest.raises(CheckFailedError, match=r"not rounded, while this base is bfloat16.* delete vera_manifest"):
            vera_tools.record(guessed, base=base_of(BF16_SEEDS))
        assert (guessed / MANIFEST).read_bytes() == before

    def test_a_damaged_adapter_is_not_recorded_anew(self, guessed):
        flip(guessed / WEIGHTS, -5)
        report = one(guessed, base=base_of(BF16_SEEDS))
        assert failed(report) == {"manifest.tensors", "base.dtype"}
        assert report.next_step.command == shlex.join(["vera-tools", "verify", str(guessed)])

    def test_a_record_that_the_weights_hold_is_not_deleted_with_the_manifest(self, guessed, tmp_path):
        vera_tools.embed_projections(guessed, tmp_path / "embedded")
        vera_tools.strip_projections(tmp_path / "embedded", tmp_path / "stripped")
        step = one(tmp_path / "stripped", base=base_of(BF16_SEEDS)).next_step
        assert "take it again from there" in step.words
        assert "rm " not in step.command

    def test_a_width_that_was_stated_wrongly_is_replaced_too(self, checkpoint):
        folder = checkpoint(SEED_ONLY)
        vera_tools.record(folder, in_features=128, recipe="mt19937-f32-fused")
        report = one(folder, base=base_of(SEED_ONLY))
        assert failed(report) == {"base.pair"}
        assert "the width was stated wrongly" in message_of(report, "base.pair")
        assert report.next_step.command.startswith(f"rm {shlex.quote(str(folder / MANIFEST))} && vera-tools record ")


@pytest.mark.parametrize(
    ("path", "command"),
    [
        (
            "hf://a/b",
            "vera-tools pull hf://a/b -o pulled && rm pulled/vera_manifest.json && vera-tools record pulled --base b",
        ),
        ("s3://bucket/one", "rm COPY/vera_manifest.json && vera-tools record COPY --base b"),
        ("a {b}", "rm 'a {b}/vera_manifest.json' && vera-tools record 'a {b}' --base b"),
    ],
)
def test_a_record_that_lies_elsewhere_is_replaced_in_a_copy(path, command):
    checks = [Check("base.dtype", "fail", "...")]
    assert next_step(path, "assumed", checks, stored=False, key=None, base="b").command == command


def test_another_base_is_blamed_before_a_record_is_replaced_or_a_lora_made():
    pair = Check("base.pair", "fail", "PEFT saved this adapter beside a first, wider one")
    for first in (pair, Check("base.dtype", "fail", "...")):
        checks = [first, Check("base.digests", "fail", "...")]
        command = next_step("one", "assumed", checks, stored=False, key=None, base="b").command
        assert command == "vera-tools verify one --base BASE"


@pytest.mark.parametrize("base", [None, base_of(KEPT)])
def test_the_lora_that_a_gate_proposes_has_the_base_for_its_widths(base, tmp_path, monkeypatch):
    report = vera_tools.verify(CHECKPOINTS / KEPT, base=base, require_loads="peft<0.21:bfloat16:linux-x86_64")
    command = report.next_of(report.checkpoints[0]).command
    name = shlex.quote(str(base)) if base else "BASE"
    assert command.endswith(f" --to lora --base {name} -o {KEPT}-lora")
    monkeypatch.chdir(tmp_path)
    result = run_cli(*shlex.split(command.replace("BASE", shlex.quote(str(base_of(KEPT)))))[1:])
    assert (result.returncode, result.stderr) == (0, "")  # no width was assumed, of which a warning would tell
