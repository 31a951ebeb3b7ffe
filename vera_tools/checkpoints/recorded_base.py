"""The base that a manifest describes, against the base that is at hand: is this the one the adapter was trained on?

Tensors are compared and not files, so that a base that was laid out in other files is the same base. Shapes and dtypes
are in the headers; digests cost a pass over the weights, and exist only where the base lay on disk when the manifest
was written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from vera_tools.checkpoints.base import BaseModel, find_renaming
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.errors import CheckFailedError


@dataclass(frozen=True)
class RecordedBase:
    """What a manifest says of the adapted weights of a base that is at hand.

    Attributes:
        count: How many weights are recorded.
        unlike: Those that the base does not have, or in another shape or dtype, by their recorded names.
        sha256: Recorded digests of those that it has, by the base's own names.
        digests: How many digests are recorded.
    """

    count: int
    unlike: tuple[str, ...]
    sha256: dict[str, str]
    digests: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, base: BaseModel) -> RecordedBase | None:
        """Compare from headers; None where nothing is recorded of the base's weights.

        Raises:
            CheckFailedError: the base does not fit the checkpoint.
        """
        weights = checkpoint.manifest.base.weights if checkpoint.manifest else {}
        if not weights:
            return None
        found = {part.info.name: part.info for linear in checkpoint.linears(base) for part in linear.parts}
        names = _names(weights, found)
        unlike, sha256 = [], {}
        for recorded, record in weights.items():
            info = found.get(names[recorded])
            if info is None or (info.shape, info.dtype) != (record.shape, record.dtype):
                unlike.append(recorded)
            elif record.sha256 is not None:
                sha256[info.name] = record.sha256
        digests = sum(record.sha256 is not None for record in weights.values())
        return cls(len(weights), tuple(sorted(unlike)), sha256, digests)

    def warning(self, adapter: str, base: BaseModel) -> str:
        """What is to be said where the base has other shapes or dtypes than the one that was recorded."""
        return (
            f"{base.label} is another base than {adapter} was recorded with, or another copy of it: {self.unlike[0]} "
            f"is not in it, or of another shape or dtype ({len(self.unlike)} of {self.count} weights)"
        )

    def refuse_another(self, name: str, sha256: str, *, adapter: str, base: BaseModel) -> None:
        """Refuse a weight of the base whose digest is not the recorded one.

        Args:
            name: The base's own name of it.
            sha256: Its digest.
            adapter: Whose manifest this is, for the message.
            base: The base, for the message.

        Raises:
            CheckFailedError: it is another one.
        """
        expected = self.sha256.get(name, sha256)
        if expected != sha256:
            raise CheckFailedError(
                "this weight is not that of the base that the adapter was recorded with",
                where=f"{base.label}: {name}",
                expected=f"sha256 {expected}, from the manifest of {adapter}",
                found=sha256,
                hint="name the base that it was trained on; if this one is meant, record the adapter with it: "
                "`vera-tools record --base`",
            )


def _names(recorded: Iterable[str], found: Collection[str]) -> dict[str, str]:
    """The base's name for each recorded one: the same, or with another outermost module, as a model's without head."""
    same = {name: name for name in recorded}
    if any(name in found for name in same):
        return same
    modules = [name.removesuffix(".weight") for name in same]
    try:
        renaming = find_renaming(modules, found, where="")
    except CheckFailedError:
        return same
    return {name: renaming(name) for name in same}
