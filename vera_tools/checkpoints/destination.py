"""Where an output may go: checked before any work is done.

How it gets there is the business of `files.atomic`, and of `files.store_output`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vera_tools.errors import UsageError
from vera_tools.files import opening, store_output
from vera_tools.files.atomic import errors, refuse_existing
from vera_tools.files.store_client import Address

#: What the top of a folder that may be replaced holds; weights as safetensors will do too.
_KNOWN = ("adapter_config.json", "config.json")


def refuse_folder(
    output: str | os.PathLike[str], *, overwrite: bool, inputs: Iterable[str | os.PathLike[str] | None] = ()
) -> Path | Address:
    """Check where a command is asked to write a folder to, on disk or in a store, before any work is done.

    Args:
        output: The folder to be written.
        overwrite: Replace it where it exists, on disk alone.
        inputs: What is read; None for one that was not named.

    Returns:
        `output`, to be written to through `on_disk`.

    Raises:
        UsageError: as in `refuse_output`; or a store cannot have it appear whole.
        StoreError: the store refuses, or cannot be reached.
    """
    address = opening.in_store(output) if os.fspath(output) else None
    if address is None:
        return refuse_output(output, overwrite=overwrite, inputs=inputs)
    for given in inputs:
        here = opening.in_store(given) if given is not None and os.fspath(given) else None
        if here is not None and f"{address}/".startswith(f"{here}/"):
            hint = "choose an output outside it"
            raise UsageError("the output lies inside an input's folder", where=str(address), found=str(here), hint=hint)
    store_output.refuse(address, overwrite=overwrite)
    return address


@contextlib.contextmanager
def on_disk(output: Path | Address) -> Iterator[Path]:
    """The path to write a folder to, so that it comes to lie where it was asked for: at once, or at the end.

    Raises:
        UsageError: something has appeared in the store meanwhile.
        StoreError: the store refuses, or cannot be reached.
    """
    if isinstance(output, Path):
        yield output
        return
    with store_output.folder(output) as path:
        yield path


def refuse_output(
    output: str | os.PathLike[str],
    *,
    overwrite: bool,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
    is_file: bool = False,
) -> Path:
    """Check where a command is asked to write to on disk, before any work is done.

    Args:
        output: The folder, or with `is_file` the file, to be written.
        overwrite: Replace it where it exists, if it is empty or holds what vera-tools, PEFT or transformers write.
        inputs: What is read, wherever it is; None for one that was not named.
        is_file: One file is written, not a folder.

    Returns:
        `output` as a path.

    Raises:
        UsageError: it is empty or not on disk, exists and may not be replaced, would replace or lie inside an input, or
            lies below something that is not a folder.
    """
    if not os.fspath(output):
        raise UsageError("the output is empty", hint="name the file" if is_file else "name the folder to write")
    path = opening.local_path(output)
    if path is None:
        what = "is on the Hub" if opening.is_on_hub(output) else "is in a store"
        hint = "name a local path, and upload what was written there"
        raise UsageError(what, where=opening.spelled(output), hint=hint)
    given = (opening.local_path(x) for x in inputs if x is not None and os.fspath(x))
    _refuse_inputs(path, [x for x in given if x is not None])
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
