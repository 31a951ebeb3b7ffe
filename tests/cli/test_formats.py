"""verify's forms of output: lines, JUnit and annotations on stdout, paths alone, and outputs that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, edit
from tests.command import run_cli
from vera_tools import schema


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """One that is good, one that drifts, one without a proof, one that cannot be read."""
    for name, source in (("good", KEPT), ("drift", KEPT), ("seeds", SEED_ONLY), ("cut", KEPT)):
        shutil.copytree(CHECKPOINTS / source, tmp_path / "r" / name)
    edit(tmp_path / "r" / "drift", lambda tensors: tensors[PAIR[0]].__setitem__((1, 3), 0.5))
    (tmp_path / "r" / "cut" / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "r"


def test_json_has_a_long_name(registry):
    for arguments in (("--format", "json"), ("--format=json",), ("--json",), ("--json", "--format", "json")):
        result = run_cli("verify", "r/good", *arguments)
        assert result.returncode == 0
        schema.validate(json.loads(result.stdout), "verify.v1", where="stdout")
        result = run_cli("verify", "r/gone", *arguments)
        assert json.loads(result.stdout)["error"]["exit_code"] == result.returncode == 2


def test_lines(registry):
    result = run_cli("verify", "-R", "r", "--format", "jsonl")
    assert result.returncode == 4
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    for line in lines:
        schema.validate(line, "verify-line.v1", where="line")
        assert "loads" not in line["checkpoint"]
    assert sorted(line["path"] for line in lines) == ["r/cut", "r/drift", "r/good", "r/seeds"]
    assert max(map(len, result.stdout.splitlines())) < 6000


def test_junit_on_stdout(registry):
    result = run_cli("verify", "-R", "r", "--format", "junit", "--junit", "report.xml")
    assert result.returncode == 4
    assert result.stdout == (registry.parent / "report.xml").read_text()
    assert len(ElementTree.fromstring(result.stdout)) == 4


def test_github(registry, monkeypatch):
    summary = registry.parent / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    result = run_cli("verify", "-R", "r", "--format", "github")
    assert result.returncode == 4
    lines = result.stdout.splitlines()
    assert [line.split("::")[1] for line in lines] == [
        "error title=FAILED tensors.file",
        "error title=DRIFT",
        "warning title=UNPROVEN",
    ]
    assert lines[1] == (
        "::error title=DRIFT::r/drift: vera_A differs from what key 101 gives in 1 place: [1, 3]; "
        "next: a few elements were changed: copy it again from where it was trained: vera-tools verify r/drift"
    )
    text = summary.read_text()
    assert text.startswith("before\n### vera-tools verify\n")
    assert "4 checkpoints: 1 FAILED a check; verdicts: 1 reproducible, 1 unproven, 1 drift, 1 invalid\n" in text
    assert "| r/drift | DRIFT | vera\\_A differs" in text
    assert "r/good" not in text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(registry / "no" / "such"))
    assert run_cli("verify", "r/good", "--format", "github").returncode == 2


def test_a_name_begins_no_command_of_githubs(registry, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(registry.parent / "summary.md"))
    hostile = "x\n::set-output name=a::b%0A::error::|<b>`"
    (registry / "drift").rename(registry / hostile)
    lines = run_cli("verify", registry / hostile, "--format", "github").stdout.splitlines()
    assert len(lines) == 1
    assert "%250A" in lines[0]
    rows = [line for line in (registry.parent / "summary.md").read_text("utf-8").splitlines() if "set-output" in line]
    assert len(rows) == 1
    assert "\\|&lt;b>\\`" in rows[0]


def test_paths_alone(registry):
    result = run_cli("verify", "-R", "r", "--failed-only")
    assert (result.returncode, result.stdout) == (4, "r/cut\nr/drift\nr/seeds\n")
    result = run_cli("verify", "-R", "r", "--failed-only", "--require", "unproven")
    assert result.stdout == "r/cut\nr/drift\n"
    assert run_cli("verify", "r/good", "--failed-only").stdout == ""
    assert run_cli("verify", "-", "--failed-only", input="r/good\nr/gone\n").stdout == "r/gone\n"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such names")
def test_paths_alone_are_those_of_the_system(registry):
    """A name may hold a line that is another's path, and bytes that are no text."""
    for name in (b"x\nr/good", b"\xff", b"esc\x1b[31m"):
        (registry / os.fsdecode(name)).parent.mkdir(exist_ok=True)
        shutil.copytree(registry / "cut", registry / os.fsdecode(name))
    result = run_cli("verify", "-R", "r", "--failed-only")
    listed = [os.fsencode(line) for line in result.stdout.splitlines()]
    assert listed == [b"r/cut", b"r/drift", b"r/esc\x1b[31m", b"r/seeds", b"r/\xff"]
    assert result.stderr.count("line break") == 1
    assert "r/x\\nr/good: not in the list" in result.stderr


def test_two_forms_on_one_stdout_are_refused(registry):
    for arguments in (
        ("--json", "--format", "junit"),
        ("--format", "junit", "--log", "-"),
        ("--json", "--log", "-"),
        ("--failed-only", "--json"),
        ("--failed-only", "--log", "-"),
        ("--format", "jsonl", "--log", "log.jsonl"),
    ):
        assert run_cli("verify", "r/good", *arguments).returncode == 2


def test_an_output_that_cannot_be_written_is_found_before_work(registry, monkeypatch):
    monkeypatch.setattr("vera_tools.verify", lambda *_, **__: pytest.fail("work was begun"))
    for path, words in (("no/such/report.xml", "no folder to write it to"), ("r", "is a directory")):
        result = run_cli("verify", "r/good", "--junit", path)
        assert result.returncode == 2
        assert words in result.stderr
    if os.name == "posix":
        result = run_cli("verify", "r/good", "--junit", "/proc/report.xml")
        assert result.returncode == 2


@pytest.mark.parametrize("option", ["--junit", "--report", "--log"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "notes.txt"])
def test_nothing_else_is_replaced_where_a_file_is_named_by_mistake(registry, option, name):
    """`--junit adapter/` reads like a flag; a last line that nobody ended is not the log's."""
    Path("r/good/notes.txt").write_text("mine\nno line's end", "utf-8")
    before = Path("r/good", name).read_bytes()
    result = run_cli("verify", "r/drift", option, f"r/good/{name}")
    assert result.returncode == 2
    assert "so it is not replaced" in result.stderr or "so nothing is written to it" in result.stderr
    assert Path("r/good", name).read_bytes() == before


def test_what_an_earlier_run_wrote_is_replaced(registry):
    for option, name in (("--junit", "report.xml"), ("--report", "page.html")):
        Path(name).touch()  # as mktemp does
        for adapter in ("r/drift", "r/good"):
            assert run_cli("verify", adapter, option, name).returncode in (0, 1)
            assert adapter in Path(name).read_text("utf-8")


@pytest.mark.parametrize("when", ["listed", "begun", "one", "ending"])
def test_an_interrupt_leaves_no_earlier_report(registry, monkeypatch, when):
    """One that stayed would be published as this run's, which found nothing wrong."""
    files = "--junit", "report.xml", "--report", "page.html"
    assert run_cli("verify", "-R", "r/good", *files).returncode == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    at = {"listed": "verify._search", "begun": "verify.Registry.run", "ending": "verify.Log.end"}
    monkeypatch.setattr(f"vera_tools.verifying.{at.get(when, 'verifier.Verifier.verify')}", interrupted)
    result = run_cli("verify", *(["r/good"] if when == "one" else ["-R", "r"]), "--json", *files)
    assert result.returncode == 130
    document = json.loads(result.stdout)
    schema.validate(document, "verify.v1", where="stdout")
    assert (document["partial"], len(document["checkpoints"])) == (True, 4 if when == "ending" else 0)
    suites = ElementTree.parse("report.xml").getroot()
    assert (suites.get("errors"), suites[-1].get("name")) == ("1", "interrupted")
    assert "interrupted" in Path("page.html").read_text("utf-8")
    result = run_cli("verify", "-R", "r", "--format", "github")
    assert result.returncode == 130
    assert "interrupted before all were verified" in result.stdout


@pytest.mark.skipif(os.name != "posix", reason="needs named pipes")
@pytest.mark.parametrize("option", ["--junit", "--report", "--attest", "--log"])
def test_no_file_takes_the_place_of_a_pipe_or_a_device(registry, option):
    """Who may write to /dev would replace /dev/null for every program."""
    os.mkfifo("pipe")
    for path in ("pipe", "/dev/vera-tools-report")[: 1 if option == "--log" else 2]:  # a log replaces nothing
        result = run_cli("verify", "r/good", option, path)
        assert result.returncode == 2, result.stderr
    assert Path("pipe").is_fifo()
    assert not Path("/dev/vera-tools-report").exists()
    result = run_cli("regenerate", "--checkpoint", "r/good", "-o", "pipe", "--overwrite")
    assert result.returncode == 2
    assert "is a named pipe, and a file is to be written" in result.stderr
    assert Path("pipe").is_fifo()
