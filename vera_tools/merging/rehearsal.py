"""A merge without its output: everything is computed, so that whatever would be refused is, and nothing is written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from vera_tools.merging.entries import Computed, Copied, Merged
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

    def compute(shard: Shard, entry: Computed) -> None:
        digest = hashlib.sha256() if isinstance(entry, Merged) else None
        for block in blocks(plan.base, entry, workspace=workspace, digest=digest, allow_nonfinite=allow_nonfinite):
            meter.add(block.nbytes, shard.name)
        if digest is not None and entry.origin is not None:
            plan.refuse_another_base(entry.origin.info.name, digest.hexdigest())

    pool = ThreadPoolExecutor(jobs)
    try:
        entries = [(shard, entry) for shard in shards for entry in shard.entries if not isinstance(entry, Copied)]
        for future in [pool.submit(compute, *one) for one in entries]:
            future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
