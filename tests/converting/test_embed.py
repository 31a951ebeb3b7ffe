"""Embedding: the original bytes where recorded, the recorded pair, else PEFT's recipe said aloud."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.adapters import (
    CHECKPOINTS,
    CONFIG,
    KEPT,
    KEPT_NAMES,
    SEED_ONLY,
    SEED_ONLY_NAMES,
    WEIGHTS,
    base_of,
    config_of,
    edit,
    edit_manifest,
    put_pickle,
    set_config,
    tensors_of,
)
from tests.command import run_cli, run_json
from tests.memory import traced_peak
from vera_tools import embed_projections, record, strip_projections, verify
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    NothingToDoError,
    UnprovenError,
    UsageError,
    VeraToolsWarning,
)

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (WEIGHTS, CONFIG))


@pytest.mark.parametrize("name", KEPT_NAMES)
def test_the_original_files_come_back_byte_for_byte(name, tmp_path):
    strip_projections(CHECKPOINTS / name, tmp_path / "stripped")
    report = embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert same_files(tmp_path / "embedded", CHECKPOINTS / name)
    assert (report.byte_exact, report.config_exact, report.notes) == (True, True, ())
    assert verify(tmp_path / "embedded").exit_code == 0


def test_a_foreign_header_comes_back_byte_for_byte(checkpoint, tmp_path):
    """Odd order, odd spacing, metadata of its own, CRLF in the config."""
    source = checkpoint(KEPT)
    arrays = tensors_of(source)
    header, position = {"__metadata__": {"z": "1", "a": "2", "format": "pt"}}, 0
    names = sorted(arrays, reverse=True)
    for name in names:
        header[name] = {"shape": list(arrays[name].shape), "data_offsets": [position, position + arrays[name].nbytes]}
        header[name]["dtype"] = "F32"
        position += arrays[name].nbytes
    text = json.dumps(header, indent=1).encode() + b" " * 11
    data = len(text).to_bytes(8, "little") + text + b"".join(arrays[name].tobytes() for name in names)
    (source / WEIGHTS).write_bytes(data)
    config = (source / CONFIG).read_text().replace("\n", "\r\n")
    (source / CONFIG).write_bytes(config.encode())
    strip_projections(source, tmp_path / "stripped")
    assert json.loads((tmp_path / "stripped" / CONFIG).read_text())["save_projection"] is False
    embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert same_files(tmp_path / "embedded", source)


def test_changed_vectors_are_embedded_and_said(tmp_path):
    source = CHECKPOINTS / KEPT
    strip_projections(source, tmp_path / "stripped")

    def train(tensors):
        for tensor in tensors.values():
            tensor += 1

    # PEFT drops the metadata on saving again.
    edit(tmp_path / "stripped", train, metadata={"format": "pt"})
    changed = tensors_of(tmp_path / "stripped")
    with pytest.warns(VeraToolsWarning, match="saved again after training on"):
        report = embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert (report.byte_exact, report.config_exact) == (False, True)
    assert "does not come back byte for byte" in report.notes[0]
    embedded, original = tensors_of(tmp_path / "embedded"), tensors_of(source)
    assert all(np.array_equal(embedded[key], changed.get(key, original[key])) for key in original)


def test_a_changed_config_is_kept_and_said(tmp_path):
    source = CHECKPOINTS / KEPT
    strip_projections(source, tmp_path / "stripped")
    set_config(tmp_path / "stripped", base_model_name_or_path="owner/renamed")
    report = embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    assert (report.byte_exact, report.config_exact) == (True, False)
    assert "adapter_config.json changed" in report.notes[0]
    config = config_of(tmp_path / "embedded")
    assert (config["base_model_name_or_path"], config["save_projection"]) == ("owner/renamed", True)


@pytest.mark.parametrize("name", SEED_ONLY_NAMES)
def test_seed_only_without_a_record_assumes_peft_with_the_base(name, tmp_path):
    with pytest.warns(AssumedRecipeWarning, match="assuming mt19937-f32-fused"):
        report = embed_projections(CHECKPOINTS / name, tmp_path / "out", base=base_of(name))
    assert report.projections.assumed
    assert report.origin == "assumed"
    assert (report.byte_exact, report.config_exact) == (None, None)
    assert json.loads((tmp_path / "out" / "vera_manifest.json").read_text())["assumed"] is True
    via = "bfloat16" if "bf16" in name else None
    assert report.projections.recipe is not None
    assert report.projections.recipe.rounded_through == via


def test_in_features_does_for_a_base(tmp_path):
    with pytest.warns(AssumedRecipeWarning):
        embed_projections(CHECKPOINTS / SEED_ONLY, tmp_path / "a", base=base_of(SEED_ONLY))
    width = tensors_of(tmp_path / "a")["base_model.vera_A"].shape[1]
    with pytest.warns(AssumedRecipeWarning, match="name it with --base"):
        embed_projections(CHECKPOINTS / SEED_ONLY, tmp_path / "b", in_features=width)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


def test_an_assumption_is_not_forgotten_by_converting_again(tmp_path):
    with pytest.warns(AssumedRecipeWarning):
        embed_projections(CHECKPOINTS / SEED_ONLY, tmp_path / "embedded", base=base_of(SEED_ONLY))
    assert strip_projections(tmp_path / "embedded", tmp_path / "stripped").projections.assumed
    assert embed_projections(tmp_path / "stripped", tmp_path / "again").projections.assumed


def test_a_pickle_is_read_on_request_only(checkpoint, tmp_path):
    """torch is imported for it, and the pair comes back as a safetensors file: a pickle's bytes are not kept."""
    source = checkpoint(KEPT)
    arrays = tensors_of(source)
    pickle = put_pickle(source)
    result = run_cli("strip-projections", source, "-o", tmp_path / "stripped")
    assert result.returncode == 4
    assert "--allow-pickle" in result.stderr
    result = run_cli("strip-projections", source, "--in-place", "--allow-pickle")
    assert result.returncode == 0, result.stderr
    assert not pickle.exists()
    report = embed_projections(source, tmp_path / "embedded")
    assert report.byte_exact is None
    embedded = tensors_of(tmp_path / "embedded")
    assert all(np.array_equal(embedded[key], arrays[key]) for key in arrays)


def test_memory_stays_within_twice_the_adapter(tmp_path):
    """Measured on allocations alone, for a recorded pair of 8 MB; imports are warmed up first."""
    width, r = 4096, 256
    (tmp_path / "vera").mkdir()
    module = "base_model.model.layers.0.q"
    vectors = {f"{module}.vera_lambda_b": np.ones(width, np.float32), f"{module}.vera_lambda_d": np.ones(r, np.float32)}
    save_file(vectors, tmp_path / "vera" / WEIGHTS, {"format": "pt"})
    config = {"peft_type": "VERA", "r": r, "target_modules": ["q"], "save_projection": False}
    (tmp_path / "vera" / CONFIG).write_text(json.dumps(config))
    record(tmp_path / "vera", in_features=width, recipe="mt19937-f32-fused")
    embed_projections(tmp_path / "vera", tmp_path / "warm-up")
    peak, report = traced_peak(lambda: embed_projections(tmp_path / "vera", tmp_path / "embedded"))
    assert report.output_bytes > 8 * 1024**2
    assert peak <= 2 * report.output_bytes
    peak, _ = traced_peak(lambda: strip_projections(tmp_path / "embedded", tmp_path / "stripped"))
    assert peak <= 2 * report.output_bytes


def test_without_a_width_it_refuses(tmp_path):
    with pytest.raises(UsageError, match="the layer width is unknown: pass --base"):
        embed_projections(CHECKPOINTS / SEED_ONLY, tmp_path / "out")


def test_strict_refuses_to_assume(tmp_path):
    with pytest.raises(UnprovenError):
        embed_projections(CHECKPOINTS / SEED_ONLY, tmp_path / "out", base=base_of(SEED_ONLY), strict=True)
    assert not (tmp_path / "out").exists()


def test_a_wrong_recorded_digest_is_refused(tmp_path):
    strip_projections(CHECKPOINTS / KEPT, tmp_path / "stripped")
    edit_manifest(tmp_path / "stripped", lambda manifest: manifest["projections"]["vera_B"].update(sha256="0" * 64))
    with pytest.raises(CheckFailedError, match="the regenerated vera_B is not the recorded one"):
        embed_projections(tmp_path / "stripped", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "said"), [("key", "put 101 back into adapter_config"), ("rank", "earlier adapter's")]
)
def test_an_earlier_adapters_record_is_refused(change, said, tmp_path):
    """PEFT leaves the manifest where it is when another adapter is saved into the folder."""
    strip_projections(CHECKPOINTS / KEPT, tmp_path / "stripped")
    config = config_of(tmp_path / "stripped")
    if change == "key":
        set_config(tmp_path / "stripped", projection_prng_key=config["projection_prng_key"] + 1)
    else:
        other = CHECKPOINTS / "peft-0.21.2-llama-bf16-seedonly"
        assert config_of(other)["r"] != config["r"]
        for name in (WEIGHTS, CONFIG):
            shutil.copy(other / name, tmp_path / "stripped" / name)
    with pytest.raises(CheckFailedError, match=said):
        embed_projections(tmp_path / "stripped", tmp_path / "out")


def test_a_single_file_is_enough(tmp_path):
    """Without manifest and config, the safetensors metadata says how the pair is made."""
    source = CHECKPOINTS / "peft-0.21.2-llama-f32-kept-noavx"
    strip_projections(source, tmp_path / "stripped")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "stripped" / WEIGHTS, tmp_path / "alone" / "adapter.safetensors")
    report = embed_projections(tmp_path / "alone" / "adapter.safetensors", tmp_path / "out")
    assert report.origin == "recorded"
    embedded, original = tensors_of(tmp_path / "out"), tensors_of(source)
    assert all(np.array_equal(embedded[key], original[key]) for key in original)


def test_stored_already():
    with pytest.raises(NothingToDoError, match="stored already"):
        embed_projections(CHECKPOINTS / KEPT, "unused")


def test_a_forced_strip_cannot_be_embedded(checkpoint, tmp_path):
    source = checkpoint(KEPT)
    edit(source, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), 9))
    strip_projections(source, tmp_path / "stripped", force=True)
    with pytest.raises(CheckFailedError, match="they are lost"):
        embed_projections(tmp_path / "stripped", tmp_path / "out")


def test_command(tmp_path):
    source = CHECKPOINTS / KEPT
    strip_projections(source, tmp_path / "stripped")
    code, document = run_json("embed-projections", tmp_path / "stripped", "-o", tmp_path / "out")
    assert (code, document["byte_exact"], document["origin"]) == (0, True, "recorded")
    name = "peft-0.21.2-llama-f32-seedonly-noavx"
    options = ("--base", base_of(name), "--rounding", "separate")
    code, document = run_json("embed-projections", CHECKPOINTS / name, "-o", tmp_path / "b", *options)
    assert (code, document["assumed"], document["recipe"]["name"]) == (0, True, "mt19937-f32-separate")
    options = ("--base", base_of(name), "--recipe", "mt19937-f32-separate")
    code, by_name = run_json("embed-projections", CHECKPOINTS / name, "-o", tmp_path / "d", *options)
    assert (code, by_name["projections"]) == (0, document["projections"])
    both = run_cli("embed-projections", CHECKPOINTS / name, "-o", tmp_path / "e", *options, "--rounding", "fused")
    assert both.returncode == 2
    result = run_cli("embed-projections", tmp_path / "stripped", "-o", tmp_path / "c")
    assert "byte for byte the one that was stripped" in result.stdout


def test_conversions_do_not_import_torch(tmp_path):
    code = (
        "import sys, vera_tools\n"
        f"vera_tools.strip_projections({str(CHECKPOINTS / 'peft-0.21.2-llama-f32-kept')!r}, 'a')\n"
        "vera_tools.embed_projections('a', 'b')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
