"""A merge without its output: everything is computed, so that whatever would be refused is, and nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from vera_tools.merging.crew import Tell, crew
from vera_tools.merging.entries import Copied, Merged
from vera_tools.merging.execution import Meter
from vera_tools.merging.plan import Plan, Shard
from vera_tools.merging.values import blocks
from vera_tools.merging.workspace import Workspace


def rehearse(plan: Plan, shards: Sequence[Shard], *, jobs: int, allow_nonfinite: bool, meter: Meter) -> None:
    """Compute every tensor of `shards` that is not copied, as `execution.write_shards` does.

    Raises:
        CheckFailedError: NaN or infinity; or a weight is not that of the base which an adapter was recorded with.
        FormatError: the base cannot be read, or was changed meanwhile.
    """
    workspace = Workspace()

    def perform(task: tuple[int, int], tell: Tell) -> None:
        shard = shards[task[0]]
        entry = shard.entries[task[1]]
        assert not isinstance(entry, Copied)
        digest = hashlib.sha256() if isinstance(entry, Merged) else None
        for block in blocks(plan.base, entry, workspace=workspace, digest=digest, allow_nonfinite=allow_nonfinite):
            tell(block.nbytes, shard.name)
        if digest is not None and entry.origin is not None:
            plan.refuse_another_base(entry.origin.info.name, digest.hexdigest())

    tasks = [
        (place, number)
        for place, shard in enumerate(shards)
        for number, entry in enumerate(shard.entries)
        if not isinstance(entry, Copied)
    ]
    with crew(perform, plan, shards, jobs=jobs, tell=meter.add) as give:
        for future in [give(task) for task in tasks]:
            future.result()
