"""Completion in real shells: the line that README documents, then TAB."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT

#: Shell: how it is started without anybody's settings, and what has to be there before the documented line.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "true"),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -D"),
}


def documented(shell: str) -> str:
    """The line that installs completion, as it stands in README."""
    text = (ROOT / "README.md").read_text("utf-8")
    (line,) = re.findall(rf"^\| {shell} \| `(.*?)` \|$", text, re.MULTILINE)
    return line


@pytest.fixture
def home(tmp_path):
    """A home with an adapter, vera-tools on the path, and what the documented lines expect."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vera-tools"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vera_tools "$@"\n', "utf-8")
    program.chmod(0o755)
    (tmp_path / "my-adapter").mkdir()
    (tmp_path / "my-adapter" / "weights").touch()
    (tmp_path / ".config" / "fish").mkdir(parents=True)
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    path = f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HOME": str(home), "PATH": path, "TERM": "dumb", "PYTHONPATH": str(ROOT)}


def until(terminal: int, words: str) -> str:
    """What the terminal shows until these words are there; all of it where they never come."""
    shown, end = "", time.monotonic() + 30
    while words not in shown and select.select([terminal], [], [], max(0, end - time.monotonic()))[0]:
        shown += os.read(terminal, 65536).decode(errors="replace").replace("\r", "")
    return shown


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_paths_options_and_commands(shell, home):
    import pty

    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    subprocess.run([shell, "-c", documented(shell)], env=environment(home), cwd=home, check=True)
    command, before = SHELLS[shell]
    terminal, follower = pty.openpty()
    with subprocess.Popen(
        command,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=home,
        env=environment(home),
        start_new_session=True,
    ) as process:
        os.close(follower)
        try:
            os.write(terminal, f"{before}; source ~/.{shell}rc; echo rea''dy\n".encode())
            assert "\nready" in until(terminal, "\nready")
            for typed, rest in (
                ("verify my-ad", "apter/"),
                ("verify --base my-ad", "apter/"),
                ("merge my-adapter --max-sh", "ard-size"),
                ("strip-p", "rojections"),
            ):
                os.write(terminal, f"vera-tools {typed}\t".encode())
                assert typed + rest in until(terminal, typed + rest), typed
                os.write(terminal, b"\x15")  # empty the line
        finally:
            process.kill()
            os.close(terminal)


def test_fish_completes_paths_options_and_commands(home):
    if shutil.which("fish") is None:
        pytest.skip("needs fish")

    def fish(script: str) -> str:
        result = subprocess.run(
            ["fish", "-c", script], env=environment(home), cwd=home, capture_output=True, text=True, check=True
        )
        return result.stdout

    fish(documented("fish"))
    for typed, found in (("verify my-ad", "my-adapter/"), ("diff --ba", "--base"), ("strip-p", "strip-projections")):
        assert fish(f'complete -C "vera-tools {typed}"').split("\t")[0].strip() == found


def test_what_cannot_be_completed_says_nothing(home):
    """An error would stand in the middle of the line that is typed."""
    for words in ("vera-tools verfy x", "vera-tools verify --part x y", "vera-tools --nothing verify"):
        variables = {"_VERA_TOOLS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
        result = subprocess.run(
            [home / "bin" / "vera-tools"],
            env=environment(home) | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stderr == ""
