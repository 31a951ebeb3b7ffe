"""What somebody meets in the first minutes: help, its examples, names that are nearly right, and paths that are not."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vera_tools
from tests import ROOT
from tests.adapters import CHECKPOINTS, KEPT, base_of, drop_pair, edit, files_of, set_config
from tests.command import run_cli, run_json
from vera_tools.cli import COMMANDS
from vera_tools.errors import UsageError
from vera_tools.report import Report

pytestmark = [
    pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning"),
    # The client passes raw bytes as `data`, which its HTTP library advises against.
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


def examples(*command: str) -> list[list[str]]:
    """The examples of a command's help, as arguments."""
    text = run_cli(*command, "--help").stdout
    assert "\n  Examples:\n" in text
    lines = re.findall(r"^ +vera-tools (.*)$", text.partition("\n  Examples:\n")[2], re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What the examples name: an adapter and its base, without its pair too, two of its checkpoints, a registry."""
    for name in ("my-adapter", "seed-only", "checkpoint-100", "checkpoint-200", "registry/one"):
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    shutil.copytree(base_of(KEPT), tmp_path / "my-base")
    drop_pair(tmp_path / "seed-only")
    set_config(tmp_path / "seed-only", save_projection=False)
    edit(tmp_path / "checkpoint-200", lambda tensors: [tensors[n].__imul__(2) for n in tensors if "lambda" in n])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_every_help_has_two_examples_that_work(name, desk, request, monkeypatch):
    if name in ("push", "pull"):
        hub = request.getfixturevalue("hub")
        monkeypatch.setenv("HF_TOKEN", hub.add_user("you"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        if name == "pull":
            hub.add_repo("you/my-adapter", files_of(CHECKPOINTS / KEPT))
    if name == "summarize":
        for adapter, log in (("my-adapter", "one.jsonl"), ("registry/one", "two.jsonl")):
            run_cli("verify", adapter, "--log", log)
    if name == "drift":
        pytest.importorskip("torch")
        monkeypatch.setattr("vera_tools.drifting.drift.ask", request.getfixturevalue("probes").ask)
    found = examples(*([name] if name else []))
    assert len(found) >= 2
    for arguments in found:
        assert arguments[0] == name or not name
        result = run_cli(*arguments)
        expected = 0
        if name == "diff":
            expected = 1
        elif name == "drift":  # the truth on a machine without AVX2
            from tests.projections import torch_draws

            expected = int(torch_draws.rounding() != "fused")
        assert result.returncode == expected, (arguments, result.stdout, result.stderr)
        assert "error:" not in result.stderr


def test_a_bare_call_prints_help():
    """With the exit code of a wrong call: a script whose variable is empty must not take it for a proof."""
    result = run_cli()
    assert result.returncode == 2
    assert result.stdout == run_cli("--help").stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("strip", "strip-projections"),
        ("embed", "embed-projections"),
        ("verfy", "verify"),
        ("Verify", "verify"),
        ("projections", "strip-projections"),
        ("inspct", "inspect"),
    ],
)
def test_a_name_that_is_nearly_right(typed, meant):
    result = run_cli(typed, "my-adapter")
    assert result.returncode == 2
    assert result.stderr == f"error: there is no command '{typed}'; did you mean `vera-tools {meant}`?\n"


def test_a_name_that_means_nothing():
    assert "`vera-tools --help` lists them" in run_cli("xyzzy").stderr
    assert "--require" in run_cli("verify", str(CHECKPOINTS / KEPT), "--requre", "drift").stderr


COMMANDS_WITH_A_PATH = [
    ["verify", "{}"],
    ["verify", "-R", "{}"],
    ["verify", KEPT, "{}"],
    ["verify", KEPT, "--base", "{}"],
    ["inspect", "{}"],
    ["record", "{}"],
    ["regenerate", "--checkpoint", "{}"],
    ["strip-projections", "{}", "-o", "out"],
    ["strip-projections", "-R", "{}", "--out-dir", "out"],
    ["embed-projections", "{}", "-o", "out"],
    ["convert", "{}", "--to", "lora", "-o", "out"],
    ["diff", KEPT, "{}"],
    ["merge", "{}", "--base", f"{KEPT}-base", "-o", "out"],
    ["merge", KEPT, "--base", "{}", "-o", "out"],
    ["push", "{}", "you/x"],
]


@pytest.mark.parametrize("arguments", COMMANDS_WITH_A_PATH, ids=" ".join)
@pytest.mark.parametrize("path", ["not-there", "not/there/at all", "weird://bucket/x", "https://example.org/ann/x"])
def test_a_path_that_is_not_there_is_wrong_usage(arguments, path, monkeypatch, tmp_path):
    monkeypatch.chdir(CHECKPOINTS)
    result = run_cli(*[argument.replace("{}", path) for argument in arguments])
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert path in result.stderr
    assert not (CHECKPOINTS / "out").exists()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("ann/my-adapter", "no such file or folder; if it is on the Hub, write hf://ann/my-adapter"),
        ("https://example.org/ann/x", "download it first"),
        ("weird://bucket/adapter", "unknown scheme weird:// (expected a folder, a file, hf://owner/name"),
    ],
)
def test_what_may_be_meant_for_the_hub_gets_its_form(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("verify", "inspect"):
        result = run_cli(command, path)
        assert (result.returncode, result.stdout) == (2, "")
        assert words in result.stderr
        if "write hf://" in words:
            assert result.stderr.rstrip().endswith(words.split("; ")[-1])


def test_nothing_is_done_before_every_path_is_found(tmp_path):
    log = tmp_path / "log.jsonl"
    code, document = run_json("verify", CHECKPOINTS / KEPT, tmp_path / "gone", "--log", log)
    assert (code, document["error"]["type"]) == (2, "UsageError")
    assert not log.exists()
    with pytest.raises(UsageError, match="no such file or folder"):
        vera_tools.verify(CHECKPOINTS / KEPT, tmp_path / "gone")
    with pytest.raises(UsageError, match="no such file or folder"):
        vera_tools.verify(CHECKPOINTS / KEPT, base=tmp_path / "gone")


def test_one_of_a_list_that_is_not_there_is_failed_and_the_others_are_verified(tmp_path):
    listed = f"{CHECKPOINTS / KEPT}\n{tmp_path}/gone\n"
    code, document = run_json("verify", "-", input=listed)
    assert code == 4
    assert [entry["path"] for entry in document["checkpoints"]] == [str(CHECKPOINTS / KEPT)]
    (failed,) = document["failed"]
    assert failed["path"] == f"{tmp_path}/gone"
    assert failed["error"]["exit_code"] == 4
    shown = run_cli("verify", "-", input=listed).stdout.splitlines()
    assert shown[-3] == "FAILED, not verified: 1"
    assert shown[-1] == "2 checkpoints: 1 NOT VERIFIED; verdicts: 1 reproducible"


def test_one_that_vanishes_is_failed(tmp_path, monkeypatch):
    """Between the search and its turn."""
    for name in "ab":
        shutil.copytree(CHECKPOINTS / KEPT, tmp_path / name)
    from vera_tools.verifying.verifier import Verifier

    verify = Verifier.verify

    def vanishing(self, path, **options):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        return verify(self, path, **options)

    monkeypatch.setattr(Verifier, "verify", vanishing)
    report = vera_tools.verify(tmp_path, recursive=True)
    assert [found.path for found in report.checkpoints] == [str(tmp_path / "a")]
    assert [path for path, _ in report.failed] == [str(tmp_path / "b")]
    assert report.exit_code == 4


def test_a_folder_without_adapters_stays_4(tmp_path):
    assert run_cli("verify", "-R", tmp_path).returncode == 4


def test_a_base_where_an_adapter_is_asked():
    result = run_cli("inspect", base_of(KEPT))
    assert result.returncode == 4
    assert "this looks like a base model: name the adapter, and the base with --base" in result.stderr
    assert "name the adapter, and the base with --base" in run_cli("verify", base_of(KEPT)).stdout


def test_a_report_is_one_line_in_an_interpreter(desk):
    reports = [
        vera_tools.verify("my-adapter"),
        vera_tools.verify("my-adapter").checkpoints[0],
        vera_tools.inspect("my-adapter"),
        vera_tools.record("my-adapter"),
        vera_tools.strip_projections("my-adapter", "small"),
        vera_tools.to_lora("my-adapter", "lora"),
        vera_tools.diff("checkpoint-100", "checkpoint-200"),
        vera_tools.regenerate("my-adapter"),
        vera_tools.merge("my-adapter", base="my-base", output="merged"),
    ]
    for report in reports:
        assert re.fullmatch(r"<\w+[^\n]{0,150}>", repr(report)), repr(report)
    assert repr(reports[0]) == "<VerifyReport: 1 reproducible; exit code 0>"
    assert repr(reports[1]) == "<CheckpointReport 'my-adapter': reproducible>"


def test_no_report_has_a_long_repr():
    """dataclass writes one for every class that does not say repr=False."""

    def below(kind: type) -> list[type]:
        return [kind, *(each for child in kind.__subclasses__() for each in below(child))]

    for path in (ROOT / "vera_tools").rglob("*.py"):
        if "Report)" in path.read_text("utf-8") and "nn" not in path.parts and "cli" not in path.parts:
            __import__(".".join(path.relative_to(ROOT).with_suffix("").parts))
    kinds = [kind for kind in below(Report) if kind.__module__.startswith("vera_tools.")]
    assert len(kinds) > 10
    assert {kind.__repr__.__module__ for kind in kinds} <= {"vera_tools.report", "vera_tools.verifying.report"}
    assert all(kind.__repr__.__code__.co_filename.endswith("report.py") for kind in kinds)


def test_without_torch_the_model_says_what_to_install(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    script = """
import vera_tools
for name in ("VeraModel", "load_adapter", "save_adapter"):
    try:
        getattr(vera_tools, name)
    except ImportError as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": str(Path(sys.executable).parent)},
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0] == "vera_tools.VeraModel needs torch: pip install 'vera-tools[torch]'"
    assert len(lines) == 3
