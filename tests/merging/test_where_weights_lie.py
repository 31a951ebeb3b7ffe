"""Bases whose weights have other names than transformers looks for: what is merged is found again, or it is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vera_tools
from tests.merging import live
from vera_tools.errors import FormatError

CLASS = transformers.LlamaForCausalLM


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, the state dict of it, an adapter, and what PEFT's live model says."""
    folder = tmp_path_factory.mktemp("made")
    live.save_base("LlamaForCausalLM", folder / "base")
    model = CLASS.from_pretrained(folder / "base")
    expected = live.outputs(live.train(model, folder / "adapter", target_modules=["q_proj", "v_proj"]))
    return folder, load_file(folder / "base/model.safetensors"), expected


def base_of(made, folder, files, index=None, **config):
    """The base with its weights in other files, each with the values times what stands beside its name."""
    source, tensors, _ = made
    folder.mkdir()
    text = json.loads((source / "base/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**text, **config}))
    names = sorted(tensors)
    weight_map = {}
    for number, (name, factor) in enumerate(files.items()):
        part = {key: tensors[key] * factor for key in names[number :: len(files)]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if index is not None:
        (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def check(made, base, out, **options):
    source, _, expected = made
    vera_tools.merge(source / "adapter", base=base, output=out, verify=True, **options)
    assert abs(live.outputs(CLASS.from_pretrained(out)) - expected).max() <= 2e-5 * abs(expected).max()


SHARDS = {"model-00001-of-00002.safetensors": 1, "model-00002-of-00002.safetensors": 1}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "index", "written"),
    [
        (SHARDS, None, [INDEX]),
        ({"weights.safetensors": 1}, None, [INDEX]),
        (SHARDS, "consolidated.safetensors.index.json", ["consolidated.safetensors.index.json", INDEX]),
        (SHARDS, INDEX, [INDEX]),
        ({"model.safetensors": 1}, None, []),
    ],
    ids=["shards without an index", "one file of another name", "another index", "as usual", "one file"],
)
def test_what_is_merged_is_found(made, files, index, written, tmp_path):
    base = base_of(made, tmp_path / "base", files, index)
    check(made, base, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.index.json")) == written


def test_files_of_a_class_that_transformers_does_not_have_stay_as_they_are(made, tmp_path):
    base = base_of(made, tmp_path / "base", SHARDS, architectures=["OfTomorrow"])
    shutil.copytree(made[0] / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": None}))
    vera_tools.merge(tmp_path / "adapter", base=base, output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors*")} == set(SHARDS)


@pytest.mark.parametrize("size", [None, 50_000])
def test_a_file_that_the_config_names(made, size, tmp_path):
    """transformers asks config.json first, also of a result whose files have other names."""
    base = base_of(made, tmp_path / "base", {"mine.safetensors": 1}, transformers_weights="mine.safetensors")
    check(made, base, tmp_path / "out", max_shard_size=size)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert ("transformers_weights" in config) == (size is None)


def test_another_file_than_the_config_names(made, tmp_path):
    base = base_of(made, tmp_path / "base", {"model.safetensors": 1}, transformers_weights="mine.safetensors")
    save_file({"x": torch.zeros(1)}, base / "mine.safetensors")
    check(made, base / "model.safetensors", tmp_path / "out")


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_old_shards_beside_what_transformers_loads(made, pickle, tmp_path):
    source, tensors, _ = made
    base = base_of(made, tmp_path / "base", dict.fromkeys(SHARDS, 2))
    torch.save(tensors, base / "pytorch_model.bin")
    if pickle.endswith(".json"):
        (base / "pytorch_model.bin").rename(base / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")}
        (base / pickle).write_text(json.dumps(index))
    assert torch.equal(CLASS.from_pretrained(base).lm_head.weight, tensors["lm_head.weight"])  # the pickle's
    with pytest.raises(FormatError, match=rf"transformers loads {pickle} here, and none of the safetensors files"):
        vera_tools.merge(source / "adapter", base=base, output=tmp_path / "out")
    assert vera_tools.verify(source / "adapter", base=base / "model-00001-of-00002.safetensors").exit_code == 1


def test_a_pickle_beside_safetensors_that_transformers_prefers(made, tmp_path):
    base = base_of(made, tmp_path / "base", {"model.safetensors": 1})
    torch.save({name: 2 * tensor for name, tensor in made[1].items()}, base / "pytorch_model.bin")
    check(made, base, tmp_path / "out")
