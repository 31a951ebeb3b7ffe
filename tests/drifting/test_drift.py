"""`drift` on this machine: real subprocesses, real CPU capabilities, and PEFT itself as the witness."""

from __future__ import annotations

import ast
import json
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import FIXTURES
from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, base_of, edit, take_as_live
from tests.command import run_cli, run_json
from tests.machine import FUSED_X86, x86
from tests.projections import torch_draws
from vera_tools import drift, record, verify
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.drifting import drift as drifting
from vera_tools.drifting import effect, environments, probe
from vera_tools.drifting.comparison import compare_reports, load
from vera_tools.errors import FormatError, UnprovenError, UsageError
from vera_tools.platforms.streams import Draw, identify_stream
from vera_tools.projections import philox
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

#: This interpreter, as a shell takes it: its path may hold spaces.
PYTHON = shlex.quote(sys.executable)

pytestmark = pytest.mark.capability

#: What `drift` exits with where nothing but the kernels of this process decides.
NATIVE_CODE = 0 if torch_draws.rounding() == "fused" else 1
#: The kernels on x86-64. Only the first round separately.
LADDER = ("default", "avx2", "avx512")
OTHER_PYTHON = "/usr/bin/python3"


def has_torch(executable: str) -> bool:
    return subprocess.run([executable, "-c", "import torch"], capture_output=True, check=False).returncode == 0


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def here():
    """One real run, shared: this interpreter by itself and under every weaker capability."""
    return drift()


@pytest.fixture(scope="module")
def saved(here, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "here.json"
    path.write_text(here.to_json())
    return path


def rounding(capability: str) -> str:
    """How kernels of this name round on x86-64."""
    return "separate" if capability == "default" else "fused"


class TestStreams:
    @x86
    def test_fused_and_separate_side_by_side(self, here):
        native, plainest, *between = here.environments
        assert (native.native, native.exact, native.streams["float32"].recipe.name) == (True, True, "mt19937-f32-fused")
        assert native.gets == "PEFT's usual projections, bit for bit"
        assert (plainest.native, plainest.exact, plainest.cpu_capability) == (False, False, "default")
        assert plainest.streams["float32"].recipe.name == "mt19937-f32-separate"
        assert {match.match for match in plainest.projections.values()} == {"ulp"}
        assert [row.cpu_capability for row in between] == list(LADDER[1 : LADDER.index(native.cpu_capability)])
        for row in between:
            assert (row.native, row.exact, row.streams["float32"].recipe.name) == (False, True, "mt19937-f32-fused")
        assert here.exit_code == 0

    @x86
    def test_the_command_line_and_its_document(self, tmp_path):
        path = tmp_path / "out.json"
        code, document = run_json("drift", "--dtype", "float32", "--save", path)
        assert code == 0
        rows = document["environments"]
        native = rows[0]["cpu_capability"]
        assert [(row["native"], row["cpu_capability"], row["exact"]) for row in rows] == [
            (True, native, True),
            *((False, weaker, rounding(weaker) == "fused") for weaker in LADDER[: LADDER.index(native)]),
        ]
        assert rows[0]["streams"]["float32"]["name"] == "mt19937-f32-fused"
        assert rows[0]["torch"] == __import__("torch").__version__
        assert rows[0]["machine"] == platform.machine()
        assert json.loads(path.read_text()) == document

    @x86
    def test_a_native_row_that_is_not_exact_exits_1(self):
        result = run_cli("drift", "--dtype", "float32", env={"ATEN_CPU_CAPABILITY": "default"})
        assert result.returncode == 1
        assert "DRIFT" in result.stdout
        assert "mt19937-f32-separate" in result.stdout

    def test_every_dtype_is_identified(self, here):
        for row in here.environments:
            assert {dtype: stream.error for dtype, stream in row.streams.items()} == dict.fromkeys(drifting.FLOATS)
            for dtype, stream in row.streams.items():
                assert stream.recipe.drawn_dtype == dtype

    def test_the_local_build_is_in_the_atlas_or_said_not_to_be(self, here):
        for row in here.environments:
            assert row.known is None or row.known["agrees"]
        if __import__("torch").__version__.startswith("2.13.0") and FUSED_X86:
            assert here.environments[0].known == {"entry": "torch-2.13.0-x86_64", "agrees": True}

    @pytest.mark.skipif(not has_torch(OTHER_PYTHON), reason="Debian's python3-torch is not installed")
    def test_a_second_interpreter(self):
        report = drift(python=[OTHER_PYTHON], dtype=["float32", "bfloat16"])
        ours, theirs = (next(r for r in report.environments if r.interpreter == i) for i in (None, OTHER_PYTHON))
        assert theirs.torch != ours.torch
        assert theirs.native
        assert ours.streams["float32"].digests == theirs.streams["float32"].digests
        if theirs.torch.startswith("1."):
            assert theirs.streams["bfloat16"].recipe.half_sampling == "scalar"
            assert ours.streams["bfloat16"].recipe.half_sampling == "opmath"

    def test_what_matches_no_recipe_is_left_unnamed(self):
        draw = Draw(5, 3, 11, 7)
        stream = identify_stream("float32", [{"vera_A": "0" * 64, "vera_B": "1" * 64}], [draw])
        assert (stream.recipe, stream.generator, stream.label) == (None, None, "unknown")

    @pytest.mark.parametrize("pair", [0, 1])
    @pytest.mark.parametrize("tensor", ["vera_A", "vera_B"])
    def test_one_wrong_tensor_is_enough_to_refuse_a_recipe(self, here, pair, tensor):
        digests = [dict(pair) for pair in here.environments[0].streams["float32"].digests]
        assert identify_stream("float32", digests, here.draws).recipe is not None
        digests[pair][tensor] = "0" * 64
        assert identify_stream("float32", digests, here.draws).recipe is None

    def test_cuda_streams_are_named_by_the_device_that_draws_them(self):
        draws = [Draw(5, 16, 4096, 512), Draw(-1, 4, 7, 5)]
        drawn = [philox.digests(d.prng_key, d.shape, dtype="float32", multiprocessors=6, threads=1024) for d in draws]
        stream = identify_stream("float32", drawn, draws, threads=[6, 1024])
        assert stream.label == "philox4x32-10, 6 multiprocessors of 1024 threads"
        other = identify_stream("float32", drawn, draws, device="GPU X", threads=[4, 1024])
        assert (other.recipe, other.label) == (None, "own generator of GPU X")


def runs(state: Path) -> bool:
    """Whether the process with this /proc/PID/stat is still there, and more than a zombie."""
    try:
        return state.read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class TestProbes:
    def test_the_script_needs_nothing_but_python_3_7_and_torch(self):
        tree = ast.parse(Path(probe.__file__).read_text(), feature_version=(3, 7))
        imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names} | {
            node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
        }
        assert imported - {"torch"} <= set(sys.stdlib_module_names)

    def test_it_runs_by_path_from_anywhere(self, tmp_path):
        request = json.dumps({"pairs": [[1, 2, 3, 4]], "dtypes": ["float32"], "device": "cpu", "values": None})
        result = subprocess.run(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-E", probe.__file__, request],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=True,
        )
        drawn, devices = map(json.loads, result.stdout.splitlines())
        assert drawn["streams"]["float32"] == [torch_draws.digests({"key": 1, "r": 2, "in_max": 3, "out_max": 4})]
        assert "cpu" in devices["devices"]

    def test_a_probe_that_crashes_is_a_row(self, tmp_path):
        crash = script(tmp_path / "crash", f"exec {PYTHON} -c 'import ctypes; ctypes.string_at(0)'")
        code, document = run_json("drift", "--device", "cpu", "--dtype", "float32", "--python", crash)
        row = document["environments"][-1]
        assert (row["status"], row["error"], row["exact"]) == ("failed", "ended by SIGSEGV", None)
        assert document["environments"][0]["status"] == "ok"
        assert code == 1

    def test_a_probe_that_hangs_is_a_row_and_its_children_end(self, tmp_path):
        mark = tmp_path / "pid"
        hang = script(tmp_path / "hang", f"sleep 40 & echo $! > '{mark}'; wait")
        start = time.monotonic()
        answer = environments.ask(environments.python(hang), [], dtypes=[], timeout=3)
        assert time.monotonic() - start < 20
        assert (answer.status, answer.error) == ("timeout", "no answer within 3 seconds")
        state = Path(f"/proc/{mark.read_text().strip()}/stat")
        # A signal that was sent has not necessarily arrived.
        while time.monotonic() - start < 20 and runs(state):
            time.sleep(0.05)
        assert not runs(state)

    def test_an_interpreter_without_torch_is_a_row(self, tmp_path):
        bare = script(tmp_path / "bare", f'exec {PYTHON} -I -S "$@"')
        answer = environments.ask(environments.python(bare), [], dtypes=[], timeout=60)
        assert (answer.status, answer.error) == ("failed", "ModuleNotFoundError: No module named 'torch'")

    def test_a_device_that_is_not_there_is_a_row(self):
        if __import__("torch").xpu.is_available():
            pytest.skip("this machine has an xpu")
        report = drift(device=["xpu"], dtype=["float32"])
        (row,) = report.environments
        assert (row.device, row.native, row.exact) == ("xpu", True, None)
        assert row.error or row.streams["float32"].error
        assert report.exit_code == 1

    def test_a_torch_that_was_not_built_for_the_device_says_so(self):
        version = __import__("torch").version
        if version.cuda or version.hip:
            pytest.skip("this torch has CUDA")
        result = run_cli("drift", "--device", "cuda", "--dtype", "float32")
        assert result.returncode == 1
        assert "unknown: this torch has no CUDA\n" in result.stdout
        assert "Error" not in result.stdout + result.stderr

    def test_a_virtual_environment(self):
        assert environments.venv(sys.prefix).command == (str(Path(sys.prefix) / "bin" / "python"),)
        with pytest.raises(UsageError, match="not a virtual environment"):
            environments.venv(FIXTURES)

    def test_a_torch_release_goes_through_uv(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UsageError, match="uv"):
            drift(torch=["2.6.0"])
        uv = script(tmp_path / "uv", f'echo "$@" > "{tmp_path}/said"; shift 8; exec {PYTHON} "$@"')
        interpreter = environments.torch_release("2.6.0")
        assert interpreter.command[0] == str(uv)
        answer = environments.ask(interpreter, [(1, 2, 3, 4)], dtypes=["float32"], timeout=60)
        assert (
            (tmp_path / "said")
            .read_text()
            .startswith("run --quiet --isolated --no-project --with torch==2.6.0 -- python ")
        )
        assert answer.streams["float32"]

    def test_wrong_usage(self, tmp_path):
        for options, word in (
            ({"device": ["tpu"]}, "device"),
            ({"dtype": ["int8"]}, "dtype"),
            ({"python": [tmp_path / "nothing"]}, "no such program"),
        ):
            with pytest.raises(UsageError, match=word):
                drift(**options)

    def test_without_any_torch_it_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UsageError, match="no torch to probe"):
            drift()


class TestAgainst:
    def test_the_same_machine_agrees_with_itself(self, here, saved):
        report = drift(against=[saved], capability=[], dtype=["float32"])
        assert report.comparison.agree
        assert report.exit_code == NATIVE_CODE
        assert {name for name, _ in report.comparison.rows} == {"this run", str(saved)}

    @x86
    def test_two_machines_that_disagree_exit_1(self, tmp_path):
        other = tmp_path / "other.json"
        first = run_cli("drift", "--dtype", "float32", "--save", other, "-q", env={"ATEN_CPU_CAPABILITY": "default"})
        assert first.returncode == 1
        code, document = run_json("drift", "--against", other, "--dtype", "float32")
        assert code == 1
        assert not document["comparison"]["agree"]
        assert document["comparison"]["groups"]["float32"] == [[0], [1]]
        assert document["environments"][0]["exact"]

    @x86
    def test_an_upgrade_is_gated_on_the_dtypes_in_use(self, here):
        old = FIXTURES / "atlas" / "torch-2.11.0-x86_64.json"
        result = run_cli("drift", "--against", old, "--dtype", "float32")
        assert result.returncode == 0
        assert "the reports agree" in result.stdout
        every = compare_reports(here.draws, here.environments, [("old", load(old))])
        changed = {dtype for dtype, groups in every.groups.items() if len(groups) > 1}
        new = tuple(map(int, __import__("torch").__version__.split(".")[:2])) >= (2, 12)
        assert changed == ({"bfloat16", "float16"} if new else set())

    def test_not_a_report(self, tmp_path):
        file = tmp_path / "other.json"
        for text in ("{}", "not JSON", '{"schema": "vera-tools/drift/v1"}'):
            file.write_text(text)
            with pytest.raises(FormatError, match=r"other\.json"):
                drift(against=[file])
        absent = tmp_path / "absent.json"
        with pytest.raises(FormatError) as caught:
            drift(against=[absent])
        assert str(caught.value) == f"{absent}: no such file"

    def test_a_report_that_shares_no_stream_does_not_agree(self, here, saved, tmp_path):
        empty, other = json.loads(saved.read_text()), json.loads(saved.read_text())
        empty["environments"] = []
        for row in other["environments"]:  # a report of one default dtype, which this run does not draw
            for streams in (row["streams"], row["digests"]):
                for dtype in set(streams) - {"float64"}:
                    del streams[dtype]
        for name, document in (("empty", empty), ("other", other)):
            file = tmp_path / f"{name}.json"
            file.write_text(json.dumps(document))
            code, found = run_json("drift", "--against", file, "--against", saved, "--dtype", "float32")
            assert code == 1
            assert (found["comparison"]["agree"], found["comparison"]["apart"]) == (False, [str(file)])
        result = run_cli("drift", "--against", file, "--dtype", "float32")
        assert result.returncode == 1
        assert f"nothing to compare: {file} shares no stream with this run\n" in result.stdout
        assert "reports agree" not in result.stdout

    def test_a_baseline_is_not_written_over(self, saved, tmp_path):
        for option, name in (("--save", "baseline.json"), ("--report", "page.html")):
            file = tmp_path / name
            file.write_text("kept")
            result = run_cli("drift", "--dtype", "float32", option, file)
            assert result.returncode == 2
            assert f"{file}: already exists" in result.stderr
            assert file.read_text() == "kept"
        arguments = ("drift", "--dtype", "float32", "--capability", "default", "--save", tmp_path / "baseline.json")
        assert run_cli(*arguments, "--overwrite").returncode == NATIVE_CODE
        load(tmp_path / "baseline.json")


class TestEffect:
    @x86
    def test_on_an_adapter(self, drift_report):
        native, plainest, *between = drift_report.environments
        for row in (native, *between):
            assert (row.exact, row.effect, row.gets) == (True, None, "the assumed projections, bit for bit")
        change = plainest.effect
        assert 0 < change["differing"] < 1
        assert len(change["layers"]) == 6
        assert change["worst"]["relative_change"] == max(layer["relative_change"] for layer in change["layers"])
        assert 0 < change["logits"]["max_abs"] < 1e-5
        assert change["logits"]["argmax_changed"] == 0

    def test_the_worst_layer_by_the_plain_definition(self):
        """Against weight-sized matrices in float64, for another key's projections, where nothing is small."""
        with Checkpoint.open(CHECKPOINTS / "peft-0.21.2-llama-f32-kept") as adapter:
            shape = adapter.pair_shape()
            trained = (adapter.weights.read("base_model.vera_A"), adapter.weights.read("base_model.vera_B"))
            loaded = generate(Recipe(prng_key=1), shape)
            measured = effect.measure(adapter, trained, loaded)
            for change in measured.layers:
                name = f"base_model.model.{change.module}.vera_lambda"
                b, d = (adapter.weights.read(f"{name}_{vector}").astype(float) for vector in "bd")
                old, new = (
                    (b[:, None] * pair[1].astype(float)[: b.size]) @ (d[:, None] * pair[0].astype(float))
                    for pair in (trained, loaded)
                )
                expected = np.linalg.norm(new - old) / np.linalg.norm(old)
                assert change.relative_change == pytest.approx(expected, rel=1e-10)
            assert measured.differing > 0.99
            assert effect.measure(adapter, trained, trained).worst.relative_change == 0

    def test_in_features_of_each_layer_come_from_the_base(self):
        from vera_tools.checkpoints.base import BaseModel

        with Checkpoint.open(CHECKPOINTS / SEED_ONLY) as adapter, BaseModel.open(base_of(SEED_ONLY)) as base:
            trained = generate(Recipe(prng_key=102), adapter.pair_shape(base))
            widths = {c.module: c.in_features for c in effect.measure(adapter, trained, trained, base=base).layers}
        assert {width for module, width in widths.items() if module.endswith("down_proj")} == {trained[0].shape[1]}
        assert {width for module, width in widths.items() if module.endswith("q_proj")} == {64}

    def test_an_untrained_layer_has_no_relative_change(self, checkpoint):
        folder = checkpoint(KEPT)
        edit(folder, lambda tensors: [value.fill(0) for name, value in tensors.items() if "lambda_b" in name])
        with Checkpoint.open(folder) as adapter:
            trained = tuple(map(adapter.weights.read, PAIR))
            measured = effect.measure(adapter, trained, generate(Recipe(prng_key=1), adapter.pair_shape()))
        assert measured.worst is None
        assert {layer.relative_change for layer in measured.layers} == {None}

    @pytest.mark.long
    @pytest.mark.parametrize("name", ["peft-0.21.2-llama-f32-kept", "peft-0.21.2-gpt2-conv1d-kept"])
    @pytest.mark.filterwarnings("ignore")
    def test_the_logits_are_pefts(self, name):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with Checkpoint.open(CHECKPOINTS / name) as adapter:
            trained = (adapter.weights.read("base_model.vera_A"), adapter.weights.read("base_model.vera_B"))
            loaded = generate(Recipe(prng_key=1), adapter.pair_shape())
            change, why_not = effect.logits_change(adapter, str(base_of(name)), trained, loaded, timeout=120)
        assert why_not is None
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_of(name)), CHECKPOINTS / name)
        inputs = (torch.arange(change["positions"]) * 7919 % model.config.vocab_size)[None]
        logits = []
        for a, b in (trained, loaded):
            model.base_model.vera_A["default"].data.copy_(torch.from_numpy(a))
            model.base_model.vera_B["default"].data.copy_(torch.from_numpy(b))
            with torch.no_grad():
                logits.append(model(input_ids=inputs).logits)
        assert change["max_abs"] == pytest.approx((logits[1] - logits[0]).abs().max().item(), rel=1e-3)
        assert change["max_abs"] > 1e-3
        assert change["largest"] == pytest.approx(logits[0].abs().max().item(), rel=1e-4)
        assert change["argmax_changed"] == (logits[0].argmax(-1) != logits[1].argmax(-1)).sum()

    def test_strict_refuses_to_assume(self):
        with pytest.raises(UnprovenError):
            drift(checkpoint=CHECKPOINTS / SEED_ONLY, base=base_of(SEED_ONLY), strict=True)

    @x86
    def test_stored_projections_of_another_rounding_are_not_exact_here(self):
        report = drift(checkpoint=CHECKPOINTS / "peft-0.21.2-llama-f32-kept-noavx", dtype=["float32"])
        assert [row.exact for row in report.environments] == [
            rounding(row.cpu_capability) == "separate" for row in report.environments
        ]
        assert {row.exact for row in report.environments} == {False, True}
        assert report.exit_code == 1
        assert report.target.recipe.name == "mt19937-f32-separate"
        assert report.environments[0].effect["logits_why_not"] == "no base model was named"


@x86
@pytest.mark.parametrize(
    ("name", "recipe", "base"),
    [
        ("peft-0.21.2-llama-f32-seedonly", "mt19937-f32-fused", "bfloat16"),
        ("peft-0.21.2-llama-f32-seedonly-noavx", "mt19937-f32-separate", "float32"),
        ("peft-0.21.2-llama-bf16-seedonly", "mt19937-f32-fused-via-bf16", "bfloat16"),
    ],
)
def test_it_measures_what_the_loader_table_says(checkpoint, name, recipe, base):
    """test_loads proves the same adapters' tables by loading them with PEFT under the same capabilities."""
    bases = {"float32": "peft-0.21.2-llama-f32-seedonly", "bfloat16": "peft-0.21.2-llama-bf16-seedonly"}
    folder = checkpoint(name)
    record(folder, base=base_of(name), recipe=recipe)
    take_as_live(folder)
    table = verify(folder).checkpoints[0].loads
    report = drift(checkpoint=folder, base=base_of(bases[base]) / "model.safetensors", dtype=["float32"])
    assert {rounding(row.cpu_capability) for row in report.environments} == {"fused", "separate"}
    for row in report.environments:
        loads = [
            load
            for load in table
            if load.loader == "peft>=0.21" and (load.rounding, load.base_dtype) == (rounding(row.cpu_capability), base)
        ]
        assert {load.exact for load in loads} == {row.exact}
        assert all("torch 1.13 to 2.15" in load.cites for load in loads)
    assert report.environments[0].streams["float32"].recipe.rounding == "fused"
