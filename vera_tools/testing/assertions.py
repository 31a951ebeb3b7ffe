"""`assert_reproducible`, for any test framework."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import vera_tools

if TYPE_CHECKING:
    from vera_tools.verifying.findings import Verdict
    from vera_tools.verifying.report import CheckpointReport, VerifyReport


def assert_reproducible(
    checkpoint: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    require: Verdict = "reproducible",
    require_loads: str | Sequence[str] = (),
    require_recorded: bool = False,
    allow_pickle: bool = False,
) -> CheckpointReport:
    """Verify one checkpoint, and return its report where `vera-tools verify` would exit with 0.

    Args:
        checkpoint: A folder, an adapter_model.safetensors file, or ``hf://owner/name[@revision][/subfolder]``.
        base: The base model that it has to fit.
        require: The worst verdict that passes.
        require_loads: Loaders that have to compute with exactly the trained projections, as for `verify`.
        require_recorded: A manifest has to cover its tensors.
        allow_pickle: Read a legacy adapter_model.bin file, by torch with weights_only.

    Raises:
        AssertionError: anything else; the message says why, and what to do.
        UsageError: there is no such checkpoint, or an argument is unknown.
        FormatError: the base cannot be read.
        RemoteError: the Hub or a store cannot be reached.
    """
    __tracebackhide__ = True
    report = vera_tools.verify(
        checkpoint,
        base=base,
        require=require,
        require_loads=require_loads,
        require_recorded=require_recorded,
        allow_pickle=allow_pickle,
    )
    (one,) = report.checkpoints
    if report.exit_code:
        raise AssertionError("\n".join(reasons(one, report)))
    return one


def reasons(checkpoint: CheckpointReport, report: VerifyReport) -> list[str]:
    """What is wrong with one of the report's checkpoints, and what to do, in lines."""
    from vera_tools.verifying.findings import MATCH

    failed = [check for check in checkpoint.failed if check.id != MATCH]
    title = f"FAILED {', '.join(check.id for check in failed)}" if failed else checkpoint.verdict.upper()
    lines = [f"{checkpoint.path}: {title}"]
    if checkpoint.cause not in [check.message for check in failed]:
        lines.append(f"  {checkpoint.cause}")
    lines += [f"  {check.id}: {check.message}" for check in failed]
    lines += [f"  {name}: {words}" for name, words in report.gates(checkpoint) if words]
    lines.append(f"  {checkpoint.safety}")
    if step := checkpoint.next_step:
        lines += [f"  next: {step.words}", f"    {step.command}"]
    return lines
