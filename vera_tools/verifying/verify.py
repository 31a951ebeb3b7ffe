"""`verify`: does this checkpoint hold what its key regenerates, is it intact, and does it fit its base?"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TextIO

from vera_tools import parts
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.presence import WEIGHTS_NAME, find, in_order, nothing_found, sign_of
from vera_tools.errors import UsageError, was_interrupt
from vera_tools.files import opening, store
from vera_tools.files.local import ByteSource
from vera_tools.files.store_client import Address
from vera_tools.parts import Part
from vera_tools.processes.workers import cpus
from vera_tools.report import Progress
from vera_tools.verifying import registry, runs
from vera_tools.verifying.findings import Verdict
from vera_tools.verifying.gathering import Gathered
from vera_tools.verifying.log import Conditions, Log
from vera_tools.verifying.registry import Registry
from vera_tools.verifying.report import Interrupted, VerifyReport
from vera_tools.verifying.runs import Run
from vera_tools.verifying.verifier import Verifier
from vera_tools.verifying.work import Job


def verify(
    *checkpoints: str | os.PathLike[str],
    recursive: bool = False,
    base: str | os.PathLike[str] | None = None,
    base_digests: bool | None = None,
    require: Verdict = "reproducible",
    require_loads: str | Sequence[str] = (),
    against_loads: str | None = None,
    require_recorded: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    log: str | os.PathLike[str] | TextIO | None = None,
    progress: Progress | None = None,
    listed: Iterable[str | os.PathLike[str]] = (),
    part: Part | None = None,
    executor: Executor | None = None,
    file_digests: bool = False,
) -> VerifyReport:
    """Verify checkpoints.

    A checkpoint that cannot be read, or is not VeRA, is a verdict ("invalid"), not an exception.

    Args:
        checkpoints: Folders, adapter_model.safetensors files, ``hf://owner/name[@revision][/subfolder]``, or addresses
            in a store such as ``s3://bucket/adapter``; ``hf://owner/*`` stands for every adapter of an owner's.
        recursive: Search the folders for checkpoints; adapters of other kinds are counted as skipped.
        base: A base model to check them against. It adds checks and never changes a verdict.
        base_digests: Hash its weights where a manifest has digests of them. Default: where it lies on disk.
        require: The worst verdict for which `VerifyReport.exit_code` is 0, where no check failed.
        require_loads: Loaders that have to compute with exactly the trained projections, each as ``peft>=0.21``,
            ``peft>=0.21:bfloat16`` or ``peft>=0.21:bfloat16:macos-arm64:torch==2.1`` (see `gates`): else the exit code
            is at least 1.
        against_loads: Loaders to move to from those of the one `require_loads`: the exit code is at least 1 where
            that changes a checkpoint's projections, or may change them.
        require_recorded: Add the check `manifest.required`, which fails where no manifest covers the tensors.
        jobs: Checkpoints verified side by side: by processes on disk, by threads elsewhere. Default: one for each CPU
            that this process may use. A few checkpoints are verified in this process all the same.
        allow_pickle: Read legacy adapter_model.bin files, by torch with weights_only.
        log: A file to append a JSON line to as each is done. What it says of a commit on the Hub is not verified again,
            nor what it says of files on disk that have the same names, sizes and times.
        progress: Called after each checkpoint.
        listed: Further checkpoints, from a list: one that is not there is reported as failed and stops nothing.
        part: (I, N): verify only the I-th of N parts, 1 <= I <= N; other machines verify the others. What is of which
            part depends on its path alone: below its root with `recursive`, else as it was given.
        executor: Who verifies what lies on disk, instead of processes of our own: any `concurrent.futures.Executor`
            whose workers see the same files.
        file_digests: Note the digests of the files that are read, for `attestation.statement`. What an earlier run
            has logged was not read by this one, so that a `log` does not go with it.

    Raises:
        FormatError: the base cannot be read, or a recursive search or a pattern finds no adapter.
        UsageError: no checkpoint given, or one that is not there or has no name; an unknown `require`,
            `require_loads` or `against_loads`; no such `part`.
        RemoteError: the only checkpoint, or the base, cannot be reached; of several, that one is reported as failed.
        Interrupted: a KeyboardInterrupt while several are verified, with the report on what was done by then.
    """
    gathered = Gathered(require, require_loads, against_loads, require_recorded=require_recorded)
    if part is not None:
        parts.check(part)
    if file_digests and log is not None:
        what = "what a log tells of was not read by this run, so that its digests are not known"
        raise UsageError(what, hint="leave the log out")
    for path in (*checkpoints, *([] if base is None else [base])):
        if not registry.is_pattern(os.fspath(path)):
            opening.require(path)
    checkpoints += tuple(listed)
    if not checkpoints:
        raise UsageError("no checkpoint given")
    paths = [os.fspath(path) for path in checkpoints]
    asked = runs.digest([*paths, recursive, None if base is None else os.fspath(base)])
    at = None if log is None else runs.digest([p if "://" in p else os.path.abspath(p) for p in paths])
    lines = Log(log, Run(asked, part, at=at), gathered.shared)
    wanted = registry.items(_search(checkpoints) if recursive else _listed(checkpoints), part)
    model = BaseModel.open(base) if base is not None else None
    verifier = Verifier(
        base=model,
        base_digests=base_digests,
        allow_pickle=allow_pickle,
        skip_others=recursive,
        file_digests=file_digests,
    )
    hashed = verifier.base_digests
    many = len(wanted.items) > 1 or log is not None or part is not None or bool(wanted.patterns)
    try:
        if not many:
            gathered.add(0, verifier.verify(next(iter(wanted.items)).path))
            if model:
                model.check_unchanged()
            return gathered.report()
        conditions = Conditions.of(base, model, base_digests=hashed, allow_pickle=allow_pickle)
        lines.begin(conditions, total=len(wanted.items), whole=wanted.whole)
        job = Job(
            run=uuid.uuid4().hex,
            base=None if base is None else os.fspath(base),
            base_digests=hashed,
            allow_pickle=allow_pickle,
            skip_others=recursive,
            states=lines.is_file,
            folder=os.getcwd(),
            file_digests=file_digests,
        )
        hands = jobs or min(cpus(), len(wanted.items)) or 1
        work = Registry(verifier, job, hands, lines, executor, whole=part is None)
        for place, result in work.run(wanted):
            done = gathered.add(place, result.outcome)
            if progress:
                progress(done, len(wanted.items), result.path)
        if model:
            model.check_unchanged()
        lines.end()
        return gathered.report(from_log=lines.taken)
    except BaseException as error:
        if many and was_interrupt(error):
            raise Interrupted(gathered.report(partial=True, from_log=lines.taken)) from error
        raise
    finally:
        lines.give_up()
        if model:
            model.close()


def _listed(checkpoints: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, str]]:
    """Each checkpoint, and the name that decides which part it is of."""
    for checkpoint in checkpoints:
        path = opening.shown(checkpoint)
        yield path, path if "://" in path else Path(path).as_posix()


def _search(roots: Iterable[str | os.PathLike[str]]) -> Iterator[tuple[str, str]]:
    """Every checkpoint below the roots, and the name that decides which part it is of: its path below its root.

    So machines that see the registry under different names share it out in the same way.
    """
    roots = tuple(roots)
    seen: set[str] = set()
    for root in roots:
        opening.refuse_empty(root)
        if address := opening.in_store(root):
            for there, name in _search_store(address):
                if there not in seen:
                    seen.add(there)
                    yield there, name
            continue
        text = opening.spelled(root)
        if opening.is_on_hub(text):
            yield text, text
            continue
        path, empty = Path(text), True
        if os.path.isfile(path):
            yield text, path.name
            continue
        for folder in find(path):
            empty = False
            if len(roots) > 1:  # below one, the search itself hands out none twice
                if (real := os.path.realpath(folder)) in seen:
                    continue
                seen.add(real)
            yield str(folder), folder.relative_to(path).as_posix()
        if empty:
            raise nothing_found(path)


def _search_store(root: Address) -> Iterator[tuple[str, str]]:
    """Every checkpoint below an address, as `_search` names those below a folder."""
    folders = store.folders(root)
    found = [there for there, files in folders.items() if not files or sign_of(files, _weights(there))]
    if not found:
        raise nothing_found(root)
    inside = {str(folder)[len(str(root)) :].strip("/"): str(folder) for folder in found}
    for name in sorted(inside, key=lambda name: [in_order(part) for part in name.split("/") if part]):
        yield inside[name], name or "."


def _weights(folder: Address) -> Callable[[], ByteSource]:
    """Opens the weights in a folder of a store."""
    return lambda: store.locate(folder)[0].open(WEIGHTS_NAME)
