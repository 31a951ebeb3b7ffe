"""--require-loads and --against-loads: what a SPEC says, which checkpoints pass, and which a move changes."""

from __future__ import annotations

import shutil
from xml.etree import ElementTree

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit
from tests.command import run_cli, run_json
from vera_tools.errors import UsageError
from vera_tools.platforms.names import ENDED, PLATFORMS
from vera_tools.platforms.rows import spans
from vera_tools.verifying.gates import LoadSpec
from vera_tools.verifying.loads import BASE_DTYPES, OLD_PEFT, PEFT, VERA_TOOLS

pytestmark = pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning")

BF16 = "peft-0.21.2-llama-bf16-kept"


@pytest.fixture
def stripped(tmp_path, monkeypatch):
    """A float32 and a bfloat16 adapter without their projections, proven, and the first one with them."""
    monkeypatch.chdir(tmp_path)
    vera_tools.strip_projections(CHECKPOINTS / KEPT, "f32")
    vera_tools.strip_projections(CHECKPOINTS / BF16, "bf16")
    (tmp_path / "stored").symlink_to(CHECKPOINTS / KEPT)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "loaders"),
    [
        ("vera-tools", (VERA_TOOLS,)),
        ("peft", (OLD_PEFT, PEFT)),
        ("peft>=0.21", (PEFT,)),
        ("peft>=0.11,<0.21", (OLD_PEFT,)),
        ("peft<0.21", (OLD_PEFT,)),
        ("peft<=0.11", (OLD_PEFT,)),
        ("peft<=0.21", (OLD_PEFT, PEFT)),
        ("peft<=0.21.0", (OLD_PEFT, PEFT)),
        ("peft>0.20", (OLD_PEFT, PEFT)),
        ("peft==0.20.0", (OLD_PEFT,)),
        ("peft==0.21", (PEFT,)),
        ("peft==0.30.1", (PEFT,)),
        ("PEFT >= 0.15, < 0.22", (OLD_PEFT, PEFT)),
    ],
)
def test_which_loaders_a_requirement_means(text, loaders):
    assert LoadSpec.parse(text).loaders == loaders


def test_parts_may_be_left_out():
    assert {stack.base_dtype for stack in LoadSpec.parse("peft>=0.21").stacks()} == set(BASE_DTYPES)
    assert {stack.platform for stack in LoadSpec.parse("peft>=0.21").stacks()} == set(PLATFORMS)
    spec = LoadSpec.parse("peft>=0.21:bfloat16:macos-arm64:torch==2.1")
    assert (spec.base_dtype, spec.platform, spec.torch) == ("bfloat16", "macos-arm64", (2, 1))
    assert LoadSpec.parse("peft>=0.21::windows-x86_64").platform == "windows-x86_64"
    assert LoadSpec.parse("vera-tools:integer").base_dtype == "integer"
    with pytest.raises(UsageError):  # which kind of quantised, a gate has to know: some round the pair
        LoadSpec.parse("peft>=0.21:quantised")
    late = {stack.platform for stack in LoadSpec.parse("peft:torch==2.12.1").stacks()}
    assert late == set(PLATFORMS) - {"macos-x86_64"}  # which has no such build


def test_the_last_builds_of_a_platform_are_the_atlas_s():
    for platform, last in ENDED.items():
        assert max(minor for span in spans() if span.platform == platform for minor in span.minors) == last


@pytest.mark.parametrize(
    "text",
    [
        "",
        "torch",
        "peft>=0.21:float8",
        "peft>=0.21:float32:linux",
        "peft>=0.21:torch>=2.1",
        "peft>=0.21:torch==new",
        "peft~=0.21",
        "peft>=",
        "peft<0.11",
        "peft>=0.22,<0.21",
        "peft>0.20,<=0.20",
        "peft:float32:bfloat16",
        "peft==0.20:low_cpu_mem_usage=True",
    ],
)
def test_a_malformed_spec_is_usage_and_names_what_is_valid(text):
    with pytest.raises(UsageError) as caught:
        vera_tools.verify(CHECKPOINTS / KEPT, require_loads=text)
    assert text == "peft==0.20:low_cpu_mem_usage=True" or "windows-x86_64" in str(caught.value)
    result = run_cli("verify", CHECKPOINTS / KEPT, "--require-loads", text)
    assert (result.returncode, result.stdout) == (2, "")
    assert run_cli("verify", "nowhere", "--require-loads", "peft", "--against-loads", text).returncode == 2


@pytest.mark.parametrize(
    ("name", "spec", "exact"),
    [
        ("stored", "peft>=0.21", True),
        ("stored", "peft>=0.21:low_cpu_mem_usage=True", False),
        ("stored", "peft>=0.21:float32:low_cpu_mem_usage=True", True),
        ("stored", "peft>=0.21:torch==2.99", True),  # no draw, so that it does not matter what that would draw
        ("stored", "peft==0.20", False),
        ("stored", "peft==0.20:float32:linux-x86_64", True),
        ("f32", "vera-tools", True),
        ("f32", "peft>=0.21", False),
        ("f32", "peft>=0.21:float32:linux-x86_64", True),
        ("f32", "peft>=0.21:float32:linux-x86_64-without-avx2", False),
        ("f32", "peft>=0.21:float32:windows-x86_64", False),
        ("f32", "peft>=0.21:float32:macos-x86_64", False),
        ("f32", "peft>=0.21:float32:macos-arm64", False),  # before torch 2.2 it draws otherwise
        ("f32", "peft>=0.21:float32:macos-arm64:torch==2.1", False),
        ("f32", "peft>=0.21:float32:macos-arm64:torch==2.2.2", True),
        ("f32", "peft>=0.21:float32:linux-x86_64:torch==2.99", None),
        ("f32", "peft>=0.21:bfloat16:windows-x86_64:torch==2.99", False),  # wrong however it rounds
        ("bf16", "peft>=0.21:bfloat16", True),
        ("bf16", "peft>=0.21:float32", False),
    ],
)
def test_who_passes(stripped, name, spec, exact):
    code, document = run_json("verify", name, "--require-loads", spec)
    (answer,) = document["checkpoints"][0]["required_loads"]
    assert (answer["spec"], answer["exact"]) == (spec, exact)
    assert code == (0 if exact else 1)
    assert bool(answer["why"]) != bool(exact)
    assert vera_tools.verify(name, require_loads=[spec]).exit_code == code


def test_what_is_not_known_does_not_pass(checkpoint):
    folder = checkpoint(SEED_ONLY)
    for loader in ("peft", "vera-tools"):
        code, document = run_json("verify", folder, "--require-loads", loader, "--require", "unproven")
        assert document["checkpoints"][0]["required_loads"][0]["exact"] is None
        assert code == 1


def test_what_is_damaged_passes_no_gate(checkpoint):
    folder = checkpoint(KEPT)
    edit(folder, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), float("nan")))
    report = vera_tools.verify(folder, require="invalid", require_loads="vera-tools")
    assert report.answers(report.checkpoints[0])[0].exact is False
    (folder / "adapter_model.safetensors").write_bytes(b"")
    report = vera_tools.verify(folder, require="invalid", require_loads="vera-tools")
    assert report.answers(report.checkpoints[0])[0].exact is None


def test_several_gates_for_people_and_in_junit(stripped):
    specs = ("--require-loads", "vera-tools", "--require-loads", "peft>=0.21:float32:windows-x86_64")
    result = run_cli("verify", "f32", *specs, "--junit", "report.xml")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "f32: REPRODUCIBLE; NOT EXACT with peft>=0.21:float32:windows-x86_64"
    assert "  loads     vera-tools: exact" in lines
    step = lines.index("            vera-tools embed-projections f32 -o f32-embedded")
    assert lines[step - 1].startswith("  next:     ")
    cases = {case.get("name"): case for case in ElementTree.parse("report.xml").iter("testcase")}
    assert cases["loads: vera-tools"].find("failure") is None
    failure = cases["loads: peft>=0.21:float32:windows-x86_64"].find("failure")
    assert failure.get("message").startswith("not exact (peft>=0.21 on a float32 base, windows-x86_64): draws another")
    many = run_cli("verify", "f32", "stored", *specs).stdout.splitlines()
    assert many[0] == "NOT EXACT with peft>=0.21:float32:windows-x86_64: 1"
    assert many[-1] == "2 checkpoints: 2 reproducible; 1 NOT EXACT with peft>=0.21:float32:windows-x86_64"
    # and the way out that is named is one
    assert run_cli("embed-projections", "f32", "-o", "f32-embedded").returncode == 0
    assert run_cli("verify", "f32-embedded", *specs).returncode == 0


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ("peft==0.20", "peft==0.21", {"stored": True}),
        ("peft==0.20:float32:linux-x86_64", "peft==0.21:float32:linux-x86_64", {}),
        ("peft:float32:linux-x86_64", "peft:float32:windows-x86_64", {"f32": True, "stored": True, "bf16": None}),
        ("peft>=0.21:float32:linux-x86_64", "peft>=0.21:float32:windows-x86_64", {"f32": True, "bf16": None}),
        ("peft>=0.21:float32:linux-x86_64", "peft>=0.21:float32", {"f32": True, "bf16": None}),  # from one to any
        ("peft>=0.21:bfloat16:linux-x86_64", "peft>=0.21:bfloat16:windows-x86_64", {"f32": None}),
        ("peft:linux-x86_64:torch==2.11", "peft:linux-x86_64:torch==2.12", {}),
        ("peft:torch==2.11", "peft:torch==2.12", {}),
        ("peft:macos-arm64:torch==2.1", "peft:macos-arm64:torch==2.2", {"f32": True, "stored": True, "bf16": None}),
        ("peft>=0.21:float32", "peft>=0.21:bfloat16", {"f32": True, "bf16": True}),
        ("vera-tools:linux-x86_64", "vera-tools:windows-x86_64", {}),
        ("peft>=0.21", "vera-tools", {"f32": True, "bf16": True}),
        ("peft>=0.21", "peft>=0.21:low_cpu_mem_usage=True", {"stored": True}),
        ("peft:linux-x86_64:torch==2.12", "peft:linux-x86_64:torch==2.99", {"f32": None, "stored": None, "bf16": None}),
    ],
)
def test_what_a_move_changes(stripped, before, after, changed):
    names = ("f32", "bf16", "stored")
    code, document = run_json("verify", *names, "--require-loads", before, "--against-loads", after)
    found = {entry["path"]: entry["change"]["changes"] for entry in document["checkpoints"]}
    assert found == {name: changed.get(name, False) for name in names}
    assert code == (1 if changed else 0)
    assert all(entry["required_loads"] == [] for entry in document["checkpoints"])
    report = vera_tools.verify(*names, require_loads=before, against_loads=after)
    assert report.exit_code == code


def test_a_move_needs_one_place_to_come_from():
    for specs in ((), ("peft", "vera-tools")):
        with pytest.raises(UsageError, match="`against_loads` goes with one `require_loads`"):
            vera_tools.verify(CHECKPOINTS / KEPT, require_loads=specs, against_loads="peft")


@pytest.mark.parametrize("verdict", ["unproven", "assumed"])
def test_a_guess_is_not_made_exact_by_embedding_it(verdict, tmp_path):
    folder = shutil.copytree(CHECKPOINTS / SEED_ONLY, tmp_path / "seeds")
    if verdict == "assumed":
        vera_tools.record(folder, base=base_of(SEED_ONLY), recipe="mt19937-f32-fused")
    result = run_cli("verify", folder, "--require", verdict, "--require-loads", "peft>=0.21")
    assert result.returncode == 1
    assert "nothing proves which projections it was trained with" in result.stdout
    assert "embed-projections" not in result.stdout


@pytest.mark.parametrize(
    "options", [("--require-loads", "peft>=0.21"), ("--require-loads", "vera-tools", "--against-loads", "peft>=0.21")]
)
def test_many_are_told_what_to_do_as_one_is(stripped, options):
    """Two that are not exact, with one command for the first of them; the third passes."""
    words = (
        "with vera_A and vera_B in it, PEFT 0.21 or newer is exact; for older PEFT use `convert --to lora --base BASE`"
    )
    alone = run_cli("verify", "bf16", *options).stdout
    assert f"next:     {words}\n            vera-tools embed-projections bf16 -o bf16-embedded\n" in alone
    many = run_cli("verify", "-R", ".", *options, env={"COLUMNS": "200"}).stdout
    assert f"next:     {words}; the first:\n            vera-tools embed-projections bf16 -o bf16-embedded\n" in many


def test_what_to_do_is_said_once_for_each_sort(stripped):
    """A stored pair and one that is not there need other commands; a damaged one has its own, by its verdict."""
    damaged = shutil.copytree(CHECKPOINTS / KEPT, "damaged")
    edit(stripped / damaged, lambda tensors: tensors["base_model.vera_A"].fill(0))
    shown = run_cli("verify", "-R", ".", "--require-loads", "peft<0.21", env={"COLUMNS": "200"}).stdout
    gate = shown[shown.index("NOT EXACT with") :]
    assert gate.count("next:") == 2
    assert "vera-tools convert stored --to lora --base BASE -o stored-lora" in gate
    assert "vera-tools embed-projections bf16 -o bf16-embedded" in gate
    assert "--to lora -o damaged" not in gate
