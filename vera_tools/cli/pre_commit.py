"""``vera-tools-pre-commit``: what pre-commit calls with the files that changed, and with the options of the hook.

Two changed files of one adapter are one checkpoint, which is verified once. Adapters of other kinds are skipped.

pre-commit names no file that a commit deletes, so the hook asks git for those: an adapter that loses one of its files
is no adapter any more, and one that loses its manifest is one of which nobody can tell any more whether it was changed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from vera_tools.errors import FormatError, UsageError

#: The files that an adapter consists of, as .pre-commit-hooks.yaml names them.
CONFIG, WEIGHTS, PICKLE, MANIFEST = FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "vera_manifest.json",
)
#: The hook's id, by which pre-commit leaves it out.
HOOK = "vera-tools-verify"
#: pre-commit sets both where it is run between two commits, and what is staged is not meant.
_BETWEEN = ("PRE_COMMIT_FROM_REF", "PRE_COMMIT_TO_REF")


def arguments(given: Iterable[str]) -> list[str]:
    """The command line that verifies the adapters which the given files belong to."""
    files = [Path(argument) for argument in given if Path(argument).name in FILES]
    options = [argument for argument in given if Path(argument).name not in FILES]
    return ["verify", "--recursive", *options, "--", *dict.fromkeys(str(file.parent) for file in files)]


def losses() -> Iterator[str]:
    """What the commit deletes of adapters that it leaves in place, a line for each file, and how to get it back.

    Raises:
        UsageError: git cannot be asked.
    """
    _run("rev-parse", "--git-dir")  # which says in plain words where there is no repository
    ends = [os.environ[name] for name in _BETWEEN if os.environ.get(name)]
    between = len(ends) == len(_BETWEEN)
    since, before = ("...".join(ends), ends[0]) if between else ("--cached", "HEAD")
    gone: dict[Path, list[str]] = {}
    for path in _git("diff", since, "--name-only", "-z", "--no-relative", "--no-renames", "--diff-filter=D"):
        if (file := Path(path)).name in FILES:
            gone.setdefault(file.parent, []).append(file.name)
    for folder, names in gone.items():
        there = map(Path, _git("ls-files", "-z", "--full-name", "--cached", "--", f":(top,literal){folder.as_posix()}"))
        stays = [file.name for file in there if file.parent == folder and file.name in FILES]
        if not stays or not _is_vera(folder, names, stays, before):
            continue
        for name in names:
            if name in (WEIGHTS, PICKLE) and (WEIGHTS in stays or PICKLE in stays):
                continue  # the same weights in their other form
            path = (folder / name).as_posix()
            back = shlex.join(["git", "restore", "--staged", "--worktree", "--source", before, "--", path])
            why = f"deleted, and its adapter stays ({', '.join(stays)}){_WHY[name]}"
            yield f"{path}: {why}; {back} brings it back"


_STAYS = ", which is none without it"
_WHY = {
    CONFIG: _STAYS,
    WEIGHTS: _STAYS,
    PICKLE: _STAYS,
    MANIFEST: (
        ": nothing would tell any more whether the adapter was changed. If that is meant, delete the manifest in "
        f"a commit of its own, with SKIP={HOOK} in the environment"
    ),
}


def _is_vera(folder: Path, gone: list[str], stays: list[str], before: str) -> bool:
    """Whether what lies here is, or was until this commit, a VeRA adapter: by its config, else by its other files."""
    from vera_tools.checkpoints import presence
    from vera_tools.checkpoints.config import VeraConfig
    from vera_tools.errors import NotVeraError
    from vera_tools.files.local import MemoryFile

    if CONFIG in (*gone, *stays):
        revision = "" if CONFIG in stays else before  # nothing stands for what is staged
        text = _read(f"{revision}:{(folder / CONFIG).as_posix()}")
        try:
            VeraConfig.from_json(text.decode("utf-8", "replace"))
        except NotVeraError:
            return False
        except FormatError:
            return True
        return True
    weights = MemoryFile(WEIGHTS, _read(f":{(folder / WEIGHTS).as_posix()}") if WEIGHTS in stays else b"")
    return presence.sign_of([*gone, *stays], lambda: weights) is not None


def _git(*arguments: str) -> list[str]:
    """What git lists, from the top of the repository."""
    return [os.fsdecode(name) for name in _run(*arguments).split(b"\0") if name]


def _read(name: str) -> bytes:
    return _run("cat-file", "blob", name)


def _run(*arguments: str) -> bytes:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"git cannot be asked what is deleted: {error.strerror}") from error
    if result.returncode:
        said = result.stderr.decode("utf-8", "replace").strip().splitlines()
        what = "git cannot be asked what is deleted"
        raise UsageError(what, hint=said[0] if said else f"it ended with {result.returncode}")
    return result.stdout


def main() -> NoReturn:
    """Verify the adapters, and exit as `vera-tools verify` does, or with 1 where one lost a file.

    Without a file that changed, and with none that is missing, with 0.
    """
    command = arguments(sys.argv[1:])
    from vera_tools.cli.shared import write_line

    try:
        lost = list(losses())
    except UsageError as error:
        write_line(f"error: {error}")
        sys.exit(error.exit_code)
    for line in lost:
        write_line(f"error: {line}")
    if command[-1] == "--":
        sys.exit(1 if lost else 0)
    from vera_tools.cli import main as run

    try:
        run(command)
    except SystemExit as stop:
        sys.exit(stop.code or (1 if lost else 0))
