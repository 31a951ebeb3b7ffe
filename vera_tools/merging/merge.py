"""`merge`: bake adapters into a base on disk, tensor by tensor, without loading the model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Collection, Sequence
from concurrent.futures import Executor, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vera_tools import parts
from vera_tools.checkpoints import destination
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.placement import Placement, place
from vera_tools.checkpoints.resolution import Assumptions, resolve
from vera_tools.errors import LoadingWarning, UsageError, VeraToolsError
from vera_tools.files import local, opening
from vera_tools.files.store_client import Address
from vera_tools.merging import execution, loading, record, rehearsal, staging, task_heads, verification
from vera_tools.merging.adapters import Adapter
from vera_tools.merging.changes import refuse_quantised
from vera_tools.merging.copying import OutputFile, copy_range
from vera_tools.merging.plan import Options, Plan, Shard, make, portion
from vera_tools.report import Progress, Report
from vera_tools.verifying.recorded import refuse_changed
from vera_tools.verifying.refusals import refuse_contradictions, refuse_drift


@dataclass(frozen=True, repr=False)
class MergeReport(Report):
    """What was merged.

    Attributes:
        path: The output folder.
        base: What the user called the base.
        finished: The output is there; false after a part of a shared merge.
        adapters: As in the merge record.
        shards: Names of the files that this process wrote.
        resumed: Names of the files that were there already.
        merged: Names of the weights that a product was added to.
        replaced: Names of the tensors that an adapter's saved ones replace.
        added: Names of the tensors that only an adapter has.
        cast: Number of other tensors that were cast to another dtype.
        copied: Number of tensors that were copied byte for byte.
        parameters: Elements of the merged weights.
        bytes_written: Bytes of weights that this process wrote.
        bytes_total: Bytes of the result's weights.
        seconds: From the call to its end.
        verified: What reading back has proven, or None.
        loading: What was proven of how it loads.
        notes: What remains to be set in the result's config.json, and what else is to be known of it.
        dry_run: Nothing was written: it tells of what would be, and `shards` are the files.
    """

    name: ClassVar[str] = "merge"

    path: str
    base: str
    finished: bool
    adapters: tuple[dict[str, Any], ...]
    shards: tuple[str, ...]
    resumed: tuple[str, ...]
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    cast: int
    copied: int
    parameters: int
    bytes_written: int
    bytes_total: int
    seconds: float
    verified: verification.Verification | None
    loading: loading.Loading
    notes: tuple[str, ...]
    dry_run: bool = False

    def body(self) -> dict[str, Any]:
        """The merge/v1 document's own part."""
        proven = self.verified
        return {
            "path": self.path,
            "base": self.base,
            "finished": self.finished,
            **({"dry_run": True} if self.dry_run else {}),
            "adapters": list(self.adapters),
            "counts": {
                "merged": len(self.merged),
                "replaced": len(self.replaced),
                "added": len(self.added),
                "cast": self.cast,
                "copied": self.copied,
            },
            "merged": list(self.merged),
            "replaced": list(self.replaced),
            "added": list(self.added),
            "parameters": self.parameters,
            "shards": list(self.shards),
            "resumed": list(self.resumed),
            "bytes": {"written": self.bytes_written, "total": self.bytes_total},
            "seconds": self.seconds,
            "verified": None
            if proven is None
            else {
                "copied": proven.copied,
                "computed": proven.computed,
                "elements": proven.elements,
                "off": proven.off,
                "sha256": proven.sha256,
            },
            "loading": self.loading.to_dict(),
            "notes": list(self.notes),
        }


def merge(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    resize_vocabulary: bool = False,
    tokenizer: str = "base",
    recipe: str | None = None,
    stored_dtype: str = "float32",
    strict: bool = False,
    allow_nonfinite: bool = False,
    allow_pickle: bool = False,
    verify: bool = False,
    resume: bool = False,
    part: tuple[int, int] | None = None,
    shard: tuple[int, int] | None = None,
    finish: bool = False,
    overwrite: bool = False,
    sync: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    executor: Executor | None = None,
) -> MergeReport:
    """Merge adapters into a base: W + sum of weight * (lambda_b * B) @ (lambda_d * A), in float32, rounded once.

    Everything that can be refused is refused before anything is written. The output folder appears whole or not at
    all; what is under way lies in a hidden folder beside it.

    Args:
        checkpoints: One adapter or several, each a folder, an adapter_model.safetensors file or ``hf://...``.
        base: A folder with one or more safetensors files, one file, or ``hf://...``. It is never written to.
        output: The folder to make.
        weights: One for each adapter, in their order. Default: 1 for all.
        dtype: Cast every floating-point tensor to "float32", "float16" or "bfloat16". Default: each keeps its own.
        max_shard_size: Lay the weights out in new files of at most so many bytes. Default: the base's files.
        resize_vocabulary: Make the base's embedding and output layer, and its vocab_size, as large as those that the
            adapter saved. Default: refuse where they differ.
        tokenizer: Whose tokenizer and chat templates go with the result: "base" or "adapter".
        recipe: Name of the recipe of seed-only checkpoints with nothing recorded. Default: PEFT's is assumed.
        stored_dtype: The dtype that an assumed pair was kept in.
        strict: Refuse to assume a recipe, one that was assumed or stated when it was recorded, and a stored pair that
            is not what its key gives, of which a warning tells else.
        allow_nonfinite: Merge NaN and infinity too.
        allow_pickle: Read legacy adapter_model.bin files too, by torch with weights_only.
        verify: Read the result back and prove it, before it appears.
        resume: Go on from the files that an interrupted merge has finished, after checking them.
        part: (I, N): write only the I-th of N parts of the files, 1 <= I <= N; other processes write the others.
        shard: The older name of `part`.
        finish: Check the files that the N processes wrote, and make the output appear.
        overwrite: Replace an existing output.
        sync: Flush the weights to disk before the output appears.
        jobs: Workers. Default: as many as BLAS has threads, up to 8.
        progress: Told of bytes done and to do.
        dry_run: Do all of it but writing, the computing too, so that what would be refused is refused.
        executor: Who writes the files, each a part of its own: any `concurrent.futures.Executor` whose workers see the
            same files. What they have written is checked and made to appear here. `jobs` is then for each part.

    Raises:
        CheckFailedError: the base is quantised, lacks a target, does not fit, or is not the one that an adapter was
            recorded with; a manifest was changed; NaN or infinity; `verify` failed.
        FormatError: something is unreadable, malformed or not VeRA, or the base was changed meanwhile.
        UsageError: the output exists or lies in an input, another merge is at work on it, or the arguments contradict
            each other.
        UnprovenError: seed-only with nothing recorded, and `strict`.
        VeraToolsError: the file system refused, or the disk has too little room.
    """
    started = time.perf_counter()
    options = Options(dtype, max_shard_size, resize_vocabulary, tokenizer)
    references = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    factors = [1.0] * len(references) if weights is None else [float(weight) for weight in weights]
    part = part or shard
    _check_arguments(references, factors, part=part, finish=finish, spread=executor is not None)
    if dry_run and (resume or finish):
        raise UsageError("a dry run goes on from nothing", hint="leave --resume and --finish out")
    if dry_run and executor is not None:
        raise UsageError("a dry run is made here: no executor goes with it")
    target = destination.refuse_folder(output, overwrite=overwrite, inputs=(base, *references))
    if not isinstance(target, Path) and (part is not None or resume or finish or executor is not None):
        hint = "merge to a folder, and copy it there"
        what = "--part, --resume, --finish and other processes' merging take a folder on disk"
        raise UsageError(what, where=str(target), hint=hint)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(destination.on_disk(target))
        model = stack.enter_context(BaseModel.open(base))
        refuse_quantised(model)
        assumptions = Assumptions.stated(model, recipe=recipe, stored_dtype=stored_dtype, strict=strict)
        adapters = []
        for reference, factor in zip(references, factors, strict=True):
            opened = stack.enter_context(Checkpoint.open(reference, allow_pickle=allow_pickle))
            opened.refuse_unusable_manifest()
            resolved = resolve(opened, assumptions)
            refuse_changed(opened)
            adapters.append(Adapter(opened, resolved, weight=factor, allow_nonfinite=allow_nonfinite))
        plan = make(_placement(model, adapters), adapters, options)
        for adapter in adapters:
            refuse_contradictions(adapter.checkpoint, model)
            refuse_drift(adapter.checkpoint, adapter.resolved, strict=strict)
        loads = loading.prove(plan)
        notes = [*task_heads.notes(plan), *plan.notes]
        mine = portion(plan.shards, part)
        _texts(plan, {})  # what cannot be written is refused before the weights are
        written: list[MergeReport] = []
        if executor is not None:
            arguments = {
                "checkpoints": [_anywhere(reference) for reference in references],
                "base": _anywhere(base),
                "output": _anywhere(output),
                "weights": factors,
                "dtype": dtype,
                "max_shard_size": max_shard_size,
                "resize_vocabulary": resize_vocabulary,
                "tokenizer": tokenizer,
                "recipe": recipe,
                "stored_dtype": stored_dtype,
                "strict": strict,
                "allow_nonfinite": allow_nonfinite,
                "allow_pickle": allow_pickle,
                "resume": resume,
                "overwrite": overwrite,
                "jobs": jobs,
            }
            try:
                written = _by_others(executor, min(len(mine), MOST_PARTS), arguments, progress)
            except Exception:
                if not resume and staging.place(path).is_dir():
                    with staging.enter(path, plan, resume=True, shared=False) as begun:
                        begun.discard()
                raise
            finish = True
        for adapter in adapters:
            adapter.load()
        if dry_run:
            staging.refuse(path, plan, shared=part is not None)
            _check_room(plan, mine, destination.nearest(path), where=path.parent)
            with execution.workers(jobs) as count:
                meter = execution.Meter(progress, sum(item.computed for item in mine))
                rehearsal.rehearse(plan, mine, jobs=count, allow_nonfinite=allow_nonfinite, meter=meter)
            model.check_unchanged()
            for adapter in adapters:
                adapter.checkpoint.check_unchanged()
            return _report(target, plan, loads, notes, started, todo=mine, dry_run=True)
        stage = stack.enter_context(staging.enter(path, plan, resume=resume, shared=part is not None, finish=finish))
        count = stack.enter_context(execution.workers(jobs))
        keep = verification.finished(plan, mine, stage, jobs=count)
        todo = [item for item in mine if item not in keep]
        names = {name for one in written for name in one.shards} or {item.name for item in todo}
        if finish and todo:
            raise UsageError(
                "not every file is finished",
                where=path,
                found=f"{len(todo)} of {len(mine)} missing or damaged, the first {todo[0].name}",
                hint="run the missing --part I/N again, then --finish",
            )
        whole = part is None
        _check_room(plan, todo, stage.folder, where=stage.folder.parent)
        expected = sum(item.size for item in todo) + (sum(item.size for item in mine) if verify and whole else 0)
        meter = execution.Meter(progress, expected)
        execution.write_shards(plan, todo, stage, jobs=count, allow_nonfinite=allow_nonfinite, meter=meter)
        proven = verification.verify(plan, stage, jobs=count, meter=meter) if verify and whole else None
        loads = loading.ask(plan, loads) if proven is not None else loads
        if whole:
            _write_others(plan, stage)
            model.check_unchanged()
            for adapter in adapters:
                adapter.checkpoint.check_unchanged()
            stage.publish(overwrite=overwrite, sync=sync)
        done = [item for item in mine if item.name in names]
        kept = [item for item in keep if item.name not in names]
        return _report(target, plan, loads, notes, started, todo=done, keep=kept, finished=whole, proven=proven)


def _report(
    target: Path | Address,
    plan: Plan,
    loads: loading.Loading,
    notes: Sequence[str],
    started: float,
    *,
    todo: Sequence[Shard],
    keep: Collection[Shard] = (),
    finished: bool = False,
    proven: verification.Verification | None = None,
    dry_run: bool = False,
) -> MergeReport:
    """The report of what was written, or would be; its notes are warnings too."""
    for note in notes:
        warnings.warn(f"{target}: {note}", LoadingWarning, stacklevel=3)
    return MergeReport(
        path=str(target),
        base=plan.base.label,
        finished=finished,
        adapters=tuple(adapter.to_dict() for adapter in plan.adapters),
        shards=tuple(item.name for item in todo),
        resumed=tuple(item.name for item in keep),
        merged=tuple(plan.names("merged")),
        replaced=tuple(plan.names("replaced")),
        added=tuple(plan.names("added")),
        cast=len(plan.names("cast")),
        copied=len(plan.names("copied")),
        parameters=sum(entry.info.size for entry in plan.entries if entry.kind == "merged"),
        bytes_written=0 if dry_run else sum(item.size for item in todo),
        bytes_total=sum(item.size for item in plan.shards),
        seconds=time.perf_counter() - started,
        verified=proven,
        loading=loads,
        notes=tuple(notes),
        dry_run=dry_run,
    )


#: With an executor, the files are shared out in at most so many parts.
MOST_PARTS = 64


def _by_others(
    executor: Executor, count: int, arguments: dict[str, Any], progress: Progress | None
) -> list[MergeReport]:
    """Have the parts written, wherever the executor does that.

    Raises:
        VeraToolsError: a part could not be written; or whoever wrote it is gone.
    """
    futures = [executor.submit(_part, (number, count), arguments) for number in range(1, count + 1)]
    reports: list[MergeReport] = []
    try:
        for future in as_completed(futures):
            reports.append(future.result())
            if progress is not None:
                written, total = sum(report.bytes_written for report in reports), reports[0].bytes_total
                progress(written, total, f"{len(reports)} of {count} parts")
    except VeraToolsError:
        raise
    except Exception as error:
        what = f"a part was not written: {type(error).__name__}: {error}"
        raise VeraToolsError(what, where=arguments["output"], hint="with resume, what is finished is kept") from error
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # none still writes where the next run will
    return reports


def _part(part: tuple[int, int], arguments: dict[str, Any]) -> MergeReport:
    return merge(**arguments, part=part)


def _anywhere(reference: str | os.PathLike[str]) -> str:
    """The reference as it is understood in a process that was started elsewhere."""
    path = opening.local_path(reference)
    return os.fspath(reference) if path is None else os.path.abspath(path)


def _placement(base: BaseModel, adapters: Sequence[Adapter]) -> Placement:
    """The class that all adapters are of."""
    checkpoints = [adapter.checkpoint for adapter in adapters]
    if len(checkpoints) == 1:
        return checkpoints[0].placement(base)
    modules = dict.fromkeys(module for checkpoint in checkpoints for module in checkpoint.layers)
    return place(base, [checkpoint.config for checkpoint in checkpoints], modules)


def _check_arguments(
    references: Sequence[object],
    weights: Sequence[float],
    *,
    part: tuple[int, int] | None,
    finish: bool,
    spread: bool,
) -> None:
    if not references:
        raise UsageError("there is nothing to merge", expected="at least one checkpoint")
    if len(weights) != len(references):
        raise UsageError(
            "the weights do not fit the checkpoints",
            expected=f"{len(references)}, one for each",
            found=str(len(weights)),
        )
    if part is not None:
        parts.check(part)
    if part is not None and finish:
        raise UsageError("--finish comes by itself, after every --part I/N has ended")
    if spread and (part is not None or finish):
        raise UsageError("an executor writes all parts and finishes them: no part and no finish go with it")


def _check_room(plan: Plan, todo: Sequence[Shard], folder: Path, *, where: Path) -> None:
    """Refuse where the disk cannot hold what is to be written, whatever the system shares between copies."""
    here = folder.stat().st_dev
    sources = [file.source for file in plan.base.files.values()]
    may_share = any(isinstance(file, local.LocalFile) and os.fstat(file.fileno()).st_dev == here for file in sources)
    needed = sum(item.computed if may_share else item.size for item in todo)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise VeraToolsError(
            "the disk has too little room",
            where=where,
            expected=f"{needed} bytes or more",
            found=f"{free} free",
            hint="nothing was written",
        )


def _write_others(plan: Plan, stage: staging.Staging) -> None:
    """Index, config, the base's other files, the merge record and the model card."""
    for name, folder in plan.copied_files.items():
        path = stage.output / name
        path.parent.mkdir(exist_ok=True)
        other = folder.open(path.name)
        try:
            folder.refuse_leaving(path.name)
            with OutputFile(path) as target:
                copy_range(other, 0, other.size, target, 0)
        finally:
            other.close()
    digests: dict[str, str] = {}
    for shard in plan.shards:
        journal = stage.journal(shard)
        digests |= journal.base_sha256 if journal else {}
    for weight, sha256 in digests.items():  # of files that an earlier process wrote, this one did not see them
        plan.refuse_another_base(weight, sha256)
    for text_name, content in _texts(plan, digests).items():
        (stage.output / text_name).write_bytes(content)


def _texts(plan: Plan, base_sha256: dict[str, str]) -> dict[str, bytes]:
    """Every file that is made of text, by its name.

    Raises:
        FormatError: the base's model card cannot be read.
        UsageError: a name that was given is no text.
    """
    texts = {
        **plan.indices,
        "config.json": plan.config,
        record.RECORD_NAME: json.dumps(record.merge_record(plan, base_sha256), indent=2, ensure_ascii=False) + "\n",
        record.CARD_NAME: record.model_card(plan),
    }
    encoded = {}
    for name, text in texts.items():
        if name is not None and text is not None:
            try:
                encoded[name] = text.encode()
            except UnicodeEncodeError as error:
                found = ascii(error.object[max(error.start - 30, 0) : error.end])
                hint = "rename it, or name it by another path"
                raise UsageError(
                    f"a name is not UTF-8, and {name} could not hold it", found=found, hint=hint
                ) from error
    return encoded
