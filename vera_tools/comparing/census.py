"""`inspect -R`: what many checkpoints are together: whose pairs are the same, who is whose copy, what stripping saves.

Configs, headers and manifests are read, and no tensor but of files that look like copies of each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.presence import find, nothing_found
from vera_tools.dtypes import BITS, CODES
from vera_tools.errors import FormatError, NotVeraError, RemoteError, UsageError, VeraToolsError, escaped
from vera_tools.files import opening
from vera_tools.projections.key import seed
from vera_tools.report import Document, Progress, Report, worst

#: Where the pair is: in the file; made again by a recipe that was recorded from the pair itself; by one that somebody
#: assumed or stated; or nowhere, and nothing says how it was made.
Holding = Literal["stored", "recorded", "assumed", "unrecorded"]
HOLDINGS: tuple[Holding, ...] = ("stored", "recorded", "assumed", "unrecorded")


@dataclass(frozen=True)
class CensusEntry(Document):
    """One checkpoint.

    Attributes:
        path: What it is called.
        prng_key: The key of its config.
        r: The rank of its config.
        in_max: Columns of vera_A; None where nothing says it.
        out_max: Rows of vera_B; None where nothing says it.
        dtype: Dtype of the pair, as stored or recorded.
        pair: Where the pair is: stored, recorded, assumed or unrecorded.
        base: The base model that its config names.
        layers: How many layers it adapts.
        vector_parameters: Elements of all vera_lambda_b and vera_lambda_d.
        file_bytes: Size of the weights file.
        pair_bytes: Bytes of the pair in it, which stripping saves where `verify` proves the pair; 0 where it has none.
        manifest: Whether there is a manifest.
    """

    path: str
    prng_key: int
    r: int
    in_max: int | None
    out_max: int | None
    dtype: str
    pair: Holding
    base: str | None
    layers: int
    vector_parameters: int
    file_bytes: int
    pair_bytes: int
    manifest: bool

    @property
    def identity(self) -> Hashable:
        """What is the same for all whose configs and shapes ask for the same pair."""
        return seed(self.prng_key), self.r, self.in_max, self.out_max, self.dtype


@dataclass(frozen=True, repr=False)
class CensusReport(Report):
    """What many checkpoints are.

    Attributes:
        checkpoints: Those of VeRA, in the order of the search.
        duplicates: Groups of checkpoints whose weights files are the same, byte for byte.
        skipped: (path, kind) of adapters of other kinds.
        failed: (path, error) of what cannot be read.
    """

    name: ClassVar[str] = "census"

    checkpoints: tuple[CensusEntry, ...]
    duplicates: tuple[tuple[str, ...], ...]
    skipped: tuple[tuple[str, str], ...]
    failed: tuple[tuple[str, VeraToolsError], ...]

    @property
    def exit_code(self) -> int:
        """0 where all can be read, else the most severe failure's code."""
        return worst(error.exit_code for _, error in self.failed)

    @property
    def pairs(self) -> list[tuple[CensusEntry, int]]:
        """Each distinct pair, by one that has it, and how many have it; the most frequent first."""
        first = {entry.identity: entry for entry in reversed(self.checkpoints)}
        return [(first[identity], count) for identity, count in self._by_pair().most_common()]

    def _by_pair(self) -> Counter[Hashable]:
        return Counter(entry.identity for entry in self.checkpoints)

    @property
    def summary(self) -> dict[str, int]:
        """Counts and bytes over all."""
        kinds = Counter(entry.pair for entry in self.checkpoints)
        return {
            "checkpoints": len(self.checkpoints),
            **{kind: kinds[kind] for kind in HOLDINGS},
            "with_manifest": sum(entry.manifest for entry in self.checkpoints),
            "bases": len({entry.base for entry in self.checkpoints if entry.base}),
            "distinct_pairs": len(self._by_pair()),
            "duplicates": sum(len(group) - 1 for group in self.duplicates),
            "bytes": sum(entry.file_bytes for entry in self.checkpoints),
            "stripping_saves": sum(entry.pair_bytes for entry in self.checkpoints),
            "skipped": len(self.skipped),
            "failed": len(self.failed),
        }

    def body(self) -> dict[str, Any]:
        """The census/v1 document's own part."""
        return {
            "checkpoints": [entry.to_dict() for entry in self.checkpoints],
            "pairs": [
                {
                    "prng_key": entry.prng_key,
                    "r": entry.r,
                    "in_max": entry.in_max,
                    "out_max": entry.out_max,
                    "dtype": entry.dtype,
                    "checkpoints": count,
                }
                for entry, count in self.pairs
            ],
            "duplicates": [list(group) for group in self.duplicates],
            "skipped": [{"path": path, "kind": kind} for path, kind in self.skipped],
            "failed": [{"path": path, "error": error.to_dict()} for path, error in self.failed],
            "summary": self.summary,
        }


def census(
    *checkpoints: str | os.PathLike[str],
    recursive: bool = False,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> CensusReport:
    """Look at many checkpoints' configs, headers and manifests.

    Args:
        checkpoints: Folders, adapter_model.safetensors files, or ``hf://owner/name[@revision][/subfolder]``.
        recursive: Search the folders for checkpoints.
        allow_pickle: Read legacy adapter_model.bin files too, by torch with weights_only.
        progress: Called after each checkpoint.

    Raises:
        FormatError: a recursive search finds no adapter.
        UsageError: no checkpoint given, or one that is not there.
    """
    if not checkpoints:
        raise UsageError("no checkpoint given")
    for path in checkpoints:
        opening.require(path)
    paths = list(_search(checkpoints)) if recursive else [os.fspath(path) for path in checkpoints]
    entries: list[CensusEntry] = []
    skipped: list[tuple[str, str]] = []
    failed: list[tuple[str, VeraToolsError]] = []
    alike: dict[Hashable, list[str]] = {}
    for number, path in enumerate(paths, start=1):
        try:
            with Checkpoint.open(path, allow_pickle=allow_pickle) as opened:
                entries.append(_entry(path, opened))
                header = hashlib.sha256(opened.weights.header).digest()
                alike.setdefault((opened.weights.size, header), []).append(path)
        except NotVeraError as error:
            skipped.append((path, error.kind))
        except (FormatError, RemoteError) as error:
            failed.append((path, error))
        except VeraToolsError:
            raise
        except Exception as error:  # whatever is wrong with one of many is a result
            failed.append((path, escaped(error, where=path)))
        if progress:
            progress(number, len(paths), path)
    groups = [group for same in alike.values() if len(same) > 1 for group in _same(same, allow_pickle=allow_pickle)]
    return CensusReport(tuple(entries), tuple(groups), tuple(skipped), tuple(failed))


def _search(roots: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    seen: set[str] = set()
    for root in roots:
        if opening.is_remote(root) or os.path.isfile(root):
            yield os.fspath(root)
            continue
        found = False
        for folder in find(Path(root)):
            found = True
            if (real := os.path.realpath(folder)) not in seen:
                seen.add(real)
                yield str(folder)
        if not found:
            raise nothing_found(root)


def _entry(path: str, opened: Checkpoint) -> CensusEntry:
    config, shape, record = opened.config, opened.pair_shape(None), opened.recorded
    pair = list(opened.projections.values())
    holding: Holding = "unrecorded"
    if len(pair) == 2:
        holding = "stored"
    elif record is not None and record.recipe is not None:
        holding = "assumed" if record.assumed else "recorded"
    return CensusEntry(
        path=path,
        prng_key=config.projection_prng_key,
        r=config.r,
        in_max=shape.in_max if shape else None,
        out_max=shape.out_max if shape else None,
        dtype=pair[0].dtype if pair else record.dtype if record else "float32",
        pair=holding,
        base=config.base_model_name_or_path,
        layers=len(opened.layers),
        vector_parameters=sum(info.size for info in opened.vector_infos.values()),
        file_bytes=opened.weights.size,
        pair_bytes=sum(info.size * BITS[CODES[info.dtype]] // 8 for info in pair) if len(pair) == 2 else 0,
        manifest=opened.manifest is not None,
    )


def _same(paths: list[str], *, allow_pickle: bool) -> Iterator[tuple[str, ...]]:
    """Groups of those that are the same to the last byte, of files of one size and header."""
    by_digest: dict[str, list[str]] = {}
    for path in paths:
        with contextlib.suppress(FormatError, RemoteError):  # it was there, and is nobody's copy any more
            with Checkpoint.open(path, allow_pickle=allow_pickle) as opened:
                digest = opened.weights.file_sha256(each=False)
            by_digest.setdefault(digest, []).append(path)
    return (tuple(group) for group in by_digest.values() if len(group) > 1)
