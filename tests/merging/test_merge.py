"""What a merge writes: layout, names, other files, record and card; and what it refuses before it writes anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import vera_tools
from tests.adapters import CHECKPOINTS, base_of, edit, files_of, put_pickle
from tests.command import run_cli, run_json
from tests.merging.models import LAYERS, exact_delta, make_adapter, make_base, rounded_once, weights
from vera_tools import parts, schema
from vera_tools.cli.merge import parse_size
from vera_tools.errors import (
    AssumedRecipeWarning,
    CheckFailedError,
    FormatError,
    LoadingWarning,
    UnprovenError,
    UsageError,
)
from vera_tools.files.safetensors import TensorFile
from vera_tools.hub import card

Q0 = "model.layers.0.self_attn.q_proj"
MODEL = "model.safetensors"


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return make_adapter(tmp_path / "adapter")


class TestLayout:
    @pytest.mark.parametrize("files", [1, 3])
    def test_files_headers_index_and_other_files_are_the_bases(self, files, adapter, tmp_path):
        base = make_base(tmp_path / "base", files=files)
        before = files_of(base)
        report = vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        after = files_of(tmp_path / "out")
        assert files_of(base) == before
        assert set(after) == set(before) | {"README.md", "vera_merge.json"}
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if name.endswith(".safetensors")}
        for name in changed:
            with TensorFile.open(base / name) as old, TensorFile.open(tmp_path / "out" / name) as new:
                assert old.header == new.header
        assert report.copied == 2
        assert sorted(report.merged) == sorted(f"{name}.weight" for name in LAYERS)

    def test_a_single_file_brings_the_files_beside_it_only_where_a_config_is_among_them(self, base, adapter, tmp_path):
        vera_tools.merge(adapter, base=base / "model.safetensors", output=tmp_path / "out")
        assert (tmp_path / "out/tokenizer.json").is_file()
        lone = tmp_path / "downloads"
        lone.mkdir()
        shutil.copy(base / "model.safetensors", lone / "x.safetensors")
        (lone / "letter.txt").write_text("private")
        vera_tools.merge(adapter, base=lone / "x.safetensors", output=tmp_path / "lone")
        assert left_in(tmp_path / "lone") == ["README.md", "vera_merge.json", "x.safetensors"]

    def test_weights_in_other_formats_are_not_copied(self, base, adapter, tmp_path):
        for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", "vera_manifest.json"):
            (base / name).write_bytes(b"stale")
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        expected = ["README.md", "config.json", "model.safetensors", "modeling_custom.py", "tokenizer.json"]
        assert left_in(tmp_path / "out") == [*expected, "vera_merge.json"]

    def test_the_further_chat_templates_of_a_tokenizer_are_copied(self, hub, base, adapter, tmp_path):
        """Where transformers writes them, and looks for them."""
        transformers = pytest.importorskip("transformers")
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
        tokenizer.chat_template = {"default": "a", "rag": "{{ 1 }}", "tool_use": "{{ 2 }}"}
        tokenizer.save_pretrained(base)
        (base / "other").mkdir()
        (base / "other/notes.txt").write_text("x")
        hub.add_repo("ann/base", files_of(base))
        for number, reference in enumerate((base, base / "model.safetensors", "hf://ann/base")):
            out = tmp_path / f"out{number}"
            vera_tools.merge(adapter, base=reference, output=out)
            loaded = transformers.AutoTokenizer.from_pretrained(out)
            assert loaded.chat_template == tokenizer.chat_template
            assert [path.name for path in out.iterdir() if path.is_dir()] == ["additional_chat_templates"]

    def test_resharding(self, adapter, tmp_path):
        base = make_base(tmp_path / "base", files=2)
        vera_tools.merge(adapter, base=base, output=tmp_path / "whole")
        limit = 2 * 48 * 32 * 2 + 10
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", max_shard_size=limit, verify=True)
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert [file.name for file in files] == [f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)]
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        for file in files:
            held = load_file(file)
            assert sum(tensor.nbytes for tensor in held.values()) <= limit
            assert {index["weight_map"][name] for name in held} == {file.name}
        one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
        assert all(np.array_equal(one[name], other[name]) for name in one)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
        vera_tools.merge(adapter, base=base, output=tmp_path / "one", max_shard_size=10**9)
        assert "model.safetensors" in left_in(tmp_path / "one")
        assert "model.safetensors.index.json" not in left_in(tmp_path / "one")
        with safe_open(tmp_path / "one/model.safetensors", "np") as file:
            assert file.metadata() == {"format": "pt"}

    def test_cast_updates_the_index(self, adapter, tmp_path):
        base = make_base(tmp_path / "base", files=2)
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", dtype="float32")
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(tmp_path / "out").values())

    def test_mixed_dtypes_keep_theirs(self, tmp_path):
        base = make_base(tmp_path / "base", extra={f"{Q0}.weight": np.ones((48, 32), np.float32)})
        vera_tools.merge(make_adapter(tmp_path / "adapter"), base=base, output=tmp_path / "out", verify=True)
        before, after = weights(base), weights(tmp_path / "out")
        assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}


class TestNames:
    @pytest.mark.parametrize(
        ("theirs", "ours"),
        [("model.layers.0.q", "layers.0.q"), ("layers.0.q", "model.layers.0.q"), ("transformer.h.0.c", "h.0.c")],
    )
    def test_prefixes_that_differ(self, theirs, ours, tmp_path):
        base = make_base(tmp_path / "base", {ours: (48, 32)})
        adapter = make_adapter(tmp_path / "adapter", {theirs: (48, 32)})
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        exact = weights(base)[f"{ours}.weight"].astype(np.float64) + exact_delta(adapter, theirs)
        assert np.array_equal(weights(tmp_path / "out")[f"{ours}.weight"], rounded_once(exact, "bfloat16"))

    def test_biases_and_saved_modules_take_the_bases_place(self, tmp_path):
        rng = np.random.default_rng(0)
        bias, head = rng.standard_normal(48).astype(np.float32), rng.standard_normal((2, 32)).astype(np.float32)
        zeros = {f"{Q0}.bias": np.zeros(48), "model.norm.bias": np.zeros(48), "score.weight": np.zeros((2, 32))}
        base = make_base(tmp_path / "base", dtype="float16", extra={n: a.astype(np.float16) for n, a in zeros.items()})
        extra = {f"{Q0}.base_layer.bias": bias, "model.norm.bias": bias, "score.weight": head}
        adapter = make_adapter(
            tmp_path / "adapter",
            extra={f"base_model.model.{name}": array for name, array in extra.items()},
            config={"bias": "all", "modules_to_save": ["score"]},
        )
        report = vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
        assert list(report.replaced) == [f"{Q0}.bias", "model.norm.bias", "score.weight"]
        after = weights(tmp_path / "out")
        assert np.array_equal(after[f"{Q0}.bias"], bias.astype(np.float16))
        assert np.array_equal(after["score.weight"], head.astype(np.float16))
        vera_tools.merge(adapter, base=base, output=tmp_path / "half", weights=[0.25], verify=True)
        found = weights(tmp_path / "half")["score.weight"]
        assert np.array_equal(found, (0.25 * head.astype(np.float64)).astype(np.float16))

    @pytest.mark.parametrize("weight", [1.0, 2.0])
    def test_a_saved_module_of_another_magnitude_than_the_bases(self, weight, tmp_path):
        """With weight 1 the saved number itself, though float64 does not hold its difference from the base's."""
        base = make_base(tmp_path / "base", extra={"score.weight": np.full((2, 32), 1e30, np.float32)})
        adapter = make_adapter(
            tmp_path / "adapter",
            extra={"base_model.model.score.weight": np.full((2, 32), 3.0, np.float32)},
            config={"modules_to_save": ["score"]},
        )
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", weights=[weight])
        expected = 3 if weight == 1 else np.float32(-float(np.float32(1e30)))
        assert (weights(tmp_path / "out")["score.weight"] == expected).all()

    def test_a_square_weight_of_a_class_that_nobody_knows(self, tmp_path):
        """Its neighbour lies the other way round than fan_in_fan_out says, so that it may lie so too."""
        shapes = {"h.0.c": (48, 32), "h.0.d": (32, 32)}
        base = make_base(tmp_path / "base", shapes, transposed=True)
        for fan_in_fan_out in (False, True):
            adapter = make_adapter(tmp_path / "adapter", shapes, config={"fan_in_fan_out": fan_in_fan_out})
            if fan_in_fan_out:
                assert len(vera_tools.merge(adapter, base=base, output=tmp_path / "out").merged) == 2
            else:
                with pytest.raises(CheckFailedError, match="which way round this square weight is stored"):
                    vera_tools.merge(adapter, base=base, output=tmp_path / "out")
            shutil.rmtree(adapter)

    def test_a_head_that_the_base_lacks_is_added(self, tmp_path):
        head = np.ones((2, 32), np.float32)
        base = make_base(tmp_path / "base", files=2)
        adapter = make_adapter(
            tmp_path / "adapter",
            extra={"base_model.model.score.weight": head},
            config={"modules_to_save": ["classifier", "score"]},
        )
        with pytest.warns(LoadingWarning, match="the base has no score"):
            report = vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
        assert "architectures to the class that has it" in report.notes[0]
        assert list(report.added) == ["score.weight"]
        assert np.array_equal(weights(tmp_path / "out")["score.weight"], head)
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"]["score.weight"] == "model-00002-of-00002.safetensors"
        with pytest.raises(UsageError, match="cannot be weighted"):
            vera_tools.merge(adapter, base=base, output=tmp_path / "other", weights=[0.5])

    def test_an_output_layer_that_is_tied_is_untied(self, tmp_path):
        shapes = {**LAYERS, "lm_head": (64, 32)}
        embedding = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
        base = make_base(
            tmp_path / "base",
            dtype="float32",
            extra={"model.embed_tokens.weight": embedding},
            config={"tie_word_embeddings": True},
        )
        adapter = make_adapter(tmp_path / "adapter", shapes)
        report = vera_tools.merge(adapter, base=base, output=tmp_path / "out", verify=True)
        after = weights(tmp_path / "out")
        assert "lm_head.weight" in report.merged
        assert np.array_equal(after["model.embed_tokens.weight"], embedding)
        assert np.abs(after["lm_head.weight"] - embedding - exact_delta(adapter, "lm_head")).max() < 1e-5
        assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_a_pickle_is_merged_on_request(base, adapter, tmp_path):
    vera_tools.merge(adapter, base=base, output=tmp_path / "expected")
    put_pickle(adapter)
    code, document = run_json("merge", adapter, "--base", base, "-o", tmp_path / "out")
    assert code == document["error"]["exit_code"] != 0
    assert "--allow-pickle" in document["error"]["hint"]
    code, _ = run_json("merge", adapter, "--base", base, "-o", tmp_path / "out", "--allow-pickle")
    assert code == 0
    assert (tmp_path / "out" / MODEL).read_bytes() == (tmp_path / "expected" / MODEL).read_bytes()
    assert "--allow-pickle" in json.loads((tmp_path / "out/vera_merge.json").read_text())["redo"].split()
    assert "--allow-pickle" not in json.loads((tmp_path / "expected/vera_merge.json").read_text())["redo"]


class TestRecordAndCard:
    def test_what_is_said_of_a_recorded_pair_is_what_the_schemas_say(self, base, adapter, tmp_path):
        vera_tools.record(adapter)
        vera_tools.strip_projections(adapter, tmp_path / "seed")
        code, document = run_json("merge", tmp_path / "seed", "--base", base, "-o", tmp_path / "out")
        assert (code, document["adapters"][0]["origin"]) == (0, "recorded")  # run_json holds it against its schema
        record = json.loads((tmp_path / "out/vera_merge.json").read_text())
        schema.validate(record, "merge_record.v1", where="vera_merge.json")

    def test_the_record_says_how_to_do_it_again(self, base, tmp_path):
        make_adapter(tmp_path / "one")
        make_adapter(tmp_path / "two", seed=2)
        options = ["--weight", "0.5", "--weight", "-1", "--dtype", "float16"]
        result = run_cli("merge", "one", "two", "--base", "base", "-o", "out", *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        record = json.loads((tmp_path / "out/vera_merge.json").read_text())
        schema.validate(record, "merge_record.v1", where="vera_merge.json")
        assert [adapter["weight"] for adapter in record["adapters"]] == [0.5, -1]
        assert [adapter["recipe"]["name"] for adapter in record["adapters"]] == ["mt19937-f32-fused"] * 2
        with TensorFile.open(base / "model.safetensors") as file:
            assert record["base"]["weights"][f"{Q0}.weight"]["sha256"] == file.sha256(f"{Q0}.weight")
        words = record["redo"].split()
        assert words[0] == "vera-tools"
        again = subprocess.run(
            [sys.executable, "-m", *[w.replace("vera-tools", "vera_tools") for w in words[:-1]], "again"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert again.returncode == 0, again.stderr
        assert files_of(tmp_path / "out") == files_of(tmp_path / "again")

    def test_the_record_says_which_recipe_was_assumed(self, base, tmp_path):
        make_adapter(tmp_path / "seed", save_projection=False)
        options = ["--rounding", "separate", "--stored-dtype", "float16", "-q"]
        run_cli("merge", "seed", "--base", "base", "-o", "out", *options, cwd=tmp_path)
        run_cli("merge", "seed", "--base", "base", "-o", "usual", "-q", cwd=tmp_path)
        words = json.loads((tmp_path / "out/vera_merge.json").read_text())["redo"].split()
        again = run_cli(*words[1:-1], "again", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert "assuming" not in again.stderr
        assert files_of(tmp_path / "out") == files_of(tmp_path / "again")
        assert files_of(tmp_path / "out")[MODEL] != files_of(tmp_path / "usual")[MODEL]

    def test_the_card_keeps_what_the_base_says_of_its_licence(self, base, tmp_path):
        (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags:\n- x\n---\n# Base\n")
        adapter = make_adapter(tmp_path / "adapter", config={"base_model_name_or_path": "ann/base"})
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        card = (tmp_path / "out/README.md").read_text()
        front = card.split("---")[1].splitlines()
        assert "license: apache-2.0" in front
        assert front[front.index("language:") + 1 :][:2] == ["- en", "- de"]
        assert "- x" not in front
        assert "base_model_relation: merge" in front
        assert "6 merged" in card

    @pytest.mark.parametrize(
        ("named", "expected"),
        [("ann/base", "ann/base"), ("gpt2", "gpt2"), (None, None), ("./local/path", None), ("/mnt/base", None)],
    )
    def test_the_card_names_what_the_hub_knows(self, named, expected, base, tmp_path):
        """The Hub refuses a card whose base_model is a path."""
        adapter = make_adapter(tmp_path / "a|b", config={"base_model_name_or_path": named})
        vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        text = (tmp_path / "out/README.md").read_text()
        card.check(text)
        metadata, body = card.split(text)
        assert metadata.get("base_model") == expected
        assert ("base_model_relation" in metadata) == (expected is not None)
        assert f"`{tmp_path}/a\\|b` | 1 | 8 |" in body

    def test_json_report(self, base, adapter, tmp_path):
        code, document = run_json("merge", adapter, "--base", base, "-o", tmp_path / "out", "--verify")
        assert code == 0
        assert document["counts"] == {"merged": 6, "replaced": 0, "added": 0, "cast": 0, "copied": 2}
        assert document["verified"]["computed"] == 6
        assert document["verified"]["off"] == 0
        assert document["parameters"] == 6 * 48 * 32
        with TensorFile.open(tmp_path / "out/model.safetensors") as file:
            assert document["verified"]["sha256"] == {name: file.sha256(name) for name in file.tensors}

    def test_text_report(self, base, adapter, tmp_path):
        result = run_cli("merge", adapter, "--base", base, "-o", tmp_path / "out", "--verify", "-v")
        assert result.returncode == 0
        assert "6 merged" in result.stdout
        assert Q0 in result.stdout

    def test_a_seed_only_adapter_is_assumed_aloud_or_refused(self, base, tmp_path):
        adapter = make_adapter(tmp_path / "adapter", save_projection=False)
        with pytest.raises(UnprovenError):
            vera_tools.merge(adapter, base=base, output=tmp_path / "out", strict=True)
        with pytest.warns(AssumedRecipeWarning, match="mt19937-f32-fused-via-bf16"):
            report = vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        assert report.adapters[0]["assumed"] is True
        assert json.loads((tmp_path / "out/vera_merge.json").read_text())["adapters"][0]["assumed"] is True
        assert "(assumed)" in (tmp_path / "out/README.md").read_text()

    def test_torch_is_not_imported(self, base, adapter, tmp_path):
        code = f"import sys, vera_tools; vera_tools.merge({str(adapter)!r}, base={str(base)!r}, output='o'); " + (
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def _pack(base, beside, dtype=np.uint8):
    edit(base, lambda tensors: tensors.update({beside: np.zeros(4, dtype)}), file=MODEL)


def _quantise(base, method):
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))


def _drop(adapter, *vectors):
    endings = tuple(f".layers.0.self_attn.q_proj.{vector}" for vector in vectors) if len(vectors) == 1 else vectors
    edit(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(endings)])


# What is done to a base or an adapter, and what the refusal says.
REFUSALS = {
    "the base lacks a target": (
        lambda b, a: make_adapter(a, {"model.layers.9.q_proj": (48, 32)}),
        CheckFailedError,
        "no such module",
    ),
    "a shape that does not fit": (lambda b, a: make_adapter(a, {Q0: (40, 32)}), CheckFailedError, "does not fit"),
    "projections too small": (
        lambda b, a: make_adapter(a, {Q0: (48, 32)}, extra={"base_model.vera_A": np.zeros((8, 16), np.float32)}),
        FormatError,
        "too small",
    ),
    "rank contradicts": (
        lambda b, a: make_adapter(a, extra={f"base_model.model.{Q0}.vera_lambda_d": np.zeros(4, np.float32)}),
        FormatError,
        "rank's length",
    ),
    "a vector is missing": (lambda b, a: _drop(make_adapter(a), "vera_lambda_d"), FormatError, "is missing"),
    "the other vector is missing": (lambda b, a: _drop(make_adapter(a), "vera_lambda_b"), FormatError, "is missing"),
    "a tensor that belongs nowhere": (
        lambda b, a: make_adapter(a, extra={"base_model.model.extra.weight": np.zeros(4, np.float32)}),
        CheckFailedError,
        "modules_to_save does not name it",
    ),
    "a resized head": (
        lambda b, a: make_adapter(a, extra={"base_model.model.model.norm.weight": np.zeros(40, np.float32)}),
        CheckFailedError,
        "does not fit the base",
    ),
    "bitsandbytes": (lambda b, a: (make_adapter(a), _pack(b, f"{Q0}.weight.absmax")), CheckFailedError, "quantised"),
    "gptq": (lambda b, a: (make_adapter(a), _pack(b, f"{Q0}.qweight", np.int32)), CheckFailedError, "quantised"),
    "float8 scales": (
        lambda b, a: (make_adapter(a), _pack(b, f"{Q0}.weight_scale_inv")),
        CheckFailedError,
        "scale_inv",
    ),
    "awq by config": (lambda b, a: (make_adapter(a), _quantise(b, "awq")), CheckFailedError, "awq"),
    "no layer": (lambda b, a: _drop(make_adapter(a), "vera_lambda_b", "vera_lambda_d"), FormatError, "no layer"),
}


class TestRefusals:
    @pytest.mark.parametrize("case", REFUSALS)
    def test_refused_before_anything_is_written(self, case, base, tmp_path):
        prepare, error, message = REFUSALS[case]
        prepare(base, tmp_path / "a")
        before = files_of(base)
        with pytest.raises(error, match=message):
            vera_tools.merge(tmp_path / "a", base=base, output=tmp_path / "new/out")
        assert left_in(tmp_path) == ["a", "base"]
        assert files_of(base) == before

    def test_two_adapters_that_replace_the_same_tensor(self, base, tmp_path):
        norm = {"base_model.model.model.norm.weight": np.zeros(32, np.float32)}
        adapters = [make_adapter(tmp_path / f"a{n}", seed=n, extra=norm) for n in range(2)]
        with pytest.raises(UsageError, match="changes this tensor too"):
            vera_tools.merge(adapters, base=base, output=tmp_path / "out")

    def test_an_existing_output_needs_overwrite(self, base, adapter, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/precious").write_text("x")
        (tmp_path / "out/config.json").write_text("{}")
        with pytest.raises(UsageError, match="already exists"):
            vera_tools.merge(adapter, base=base, output=tmp_path / "out")
        assert left_in(tmp_path / "out") == ["config.json", "precious"]
        vera_tools.merge(adapter, base=base, output=tmp_path / "out", overwrite=True)
        assert "precious" not in left_in(tmp_path / "out")
        assert left_in(tmp_path) == ["adapter", "base", "out"]

    @pytest.mark.parametrize("where", ["base", "adapter", "."])
    def test_an_output_that_would_replace_an_input(self, where, base, adapter, tmp_path):
        with pytest.raises(UsageError, match="would replace an input"):
            vera_tools.merge(adapter, base=base, output=tmp_path / where, overwrite=True)

    @pytest.mark.parametrize("where", ["base/out", "adapter/deep/out"])
    def test_an_output_inside_an_input(self, where, base, adapter, tmp_path):
        before = files_of(tmp_path)
        with pytest.raises(UsageError, match="inside an input's folder"):
            vera_tools.merge(adapter, base=base, output=tmp_path / where)
        assert files_of(tmp_path) == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": [1, 2]}, "do not fit"),
            ({"weights": [float("nan")]}, "must be finite"),
            ({"dtype": "int8"}, "cannot be cast"),
            ({"max_shard_size": 0}, "needs room"),
            ({"shard": (3, 2)}, "no such part"),
            ({"shard": (1, 2), "finish": True}, "comes by itself"),
            ({"finish": True}, "nothing to finish"),
        ],
    )
    def test_arguments_that_make_no_sense(self, options, message, base, adapter, tmp_path):
        with pytest.raises(UsageError, match=message):
            vera_tools.merge(adapter, base=base, output=tmp_path / "out", **options)
        assert left_in(tmp_path) == ["adapter", "base"]

    def test_errors_of_the_command_line(self, base, adapter, tmp_path):
        code, document = run_json("merge", adapter, "--base", tmp_path / "nowhere", "-o", tmp_path / "out")
        assert code == 2
        assert "nowhere" in document["error"]["where"]
        assert (
            run_cli("merge", adapter, "--base", base, "-o", tmp_path / "out", "--max-shard-size", "x").returncode == 2
        )
        assert run_cli("merge", adapter, "--base", base, "-o", tmp_path / "out", "--shard", "1").returncode == 2


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("2GiB", 2 << 30), ("1.5kb", 1500), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_parts():
    assert parts.parse("2/8") == (2, 8)


LAST = ["model.safetensors", "vera_merge.json"]


def test_a_base_on_the_hub(hub, tmp_path):
    name = "peft-0.21.2-llama-bf16-kept"
    hub.add_repo("ann/base", {path.name: path.read_bytes() for path in base_of(name).iterdir()})
    vera_tools.merge(CHECKPOINTS / name, base="hf://ann/base", output=tmp_path / "remote", verify=True)
    assert left_in(tmp_path / "remote") == ["README.md", "config.json", "generation_config.json", *LAST]
    assert card.split((tmp_path / "remote/README.md").read_text())[0]["base_model"] == "ann/base"
    vera_tools.merge(CHECKPOINTS / name, base=base_of(name), output=tmp_path / "local")
    a, b = (tmp_path / place / "model.safetensors" for place in ("remote", "local"))
    assert a.read_bytes() == b.read_bytes()
