"""Where an output may go: checked before any work is done. How it gets there is `files.atomic`'s business."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vera_tools.errors import UsageError
from vera_tools.files.atomic import errors, refuse_existing
from vera_tools.files.opening import is_remote

#: What the top of a folder that may be replaced holds; weights as safetensors will do too.
_KNOWN = ("adapter_config.json", "config.json")


def refuse_output(
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    is_file: bool = False,
) -> Path:
    """Check where a command is asked to write to, before any work is done.

    Args:
        output: The folder, or with `is_file` the file, to be written.
        overwrite: Replace it where it exists, if it is empty or holds what vera-tools, PEFT or transformers write.
        inputs: What is read, local or on the Hub; None for one that was not named.
        is_file: One file is written, not a folder.

    Returns:
        `output` as a path.

    Raises:
        UsageError: it is empty or on the Hub, exists and may not be replaced, would replace or lie inside an input, or
            lies below something that is not a folder.
    """
    if not os.fspath(output):
        raise UsageError("the output is empty", hint="name the file" if is_file else "name the folder to write")
    if is_remote(output):
        raise UsageError("is on the Hub", where=output, hint="name a local path, and upload what was written there")
    path = Path(output)
    _refuse_inputs(path, [Path(x) for x in inputs if x is not None and os.fspath(x) and not is_remote(x)])
    for parent in path.absolute().parents:
        if os.path.lexists(parent):
            if not os.path.isdir(parent):
                raise UsageError("is not a folder", where=parent, hint=f"nothing can be written below it: {path}")
            break
    refuse_existing(path, overwrite=overwrite)
    if is_file and os.path.isdir(path):
        raise UsageError("is a folder, and a file is to be written", where=path, hint="choose another output")
    if not is_file and os.path.lexists(path):
        _refuse_strange(path)
    return path


def nearest(path: Path) -> Path:
    """The nearest folder above `path` that is there: its disk is the one that an output comes to lie on."""
    return next(parent for parent in path.absolute().parents if os.path.isdir(parent))


def _refuse_inputs(path: Path, inputs: list[Path]) -> None:
    resolved = path.resolve()
    for given in inputs:
        here = given.resolve()
        if resolved == here or resolved in here.parents:
            raise UsageError(
                "the output would replace an input", where=path, found=str(given), hint="choose another output"
            )
        if here in resolved.parents and here.is_dir():
            raise UsageError(
                "the output lies inside an input's folder",
                where=path,
                found=str(given),
                hint="choose an output outside it",
            )


def _refuse_strange(path: Path) -> None:
    """Refuse to replace what no tool of this kind can have written: it is hardly meant."""
    if not path.is_symlink() and not path.is_dir():
        raise UsageError("is a file, and a folder is to be written", where=path, hint="choose another output")
    with errors(path):
        names = os.listdir(path) if path.is_dir() else []
    if names and not any(name in _KNOWN or name.endswith(".safetensors") for name in names):
        raise UsageError(
            "holds neither an adapter nor a model, so it is not replaced",
            where=path,
            hint="choose another output, or delete it yourself",
        )
