"""A census as one page: what each checkpoint is, who else has its pair or its file, and what stripping saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vera_tools import listing
from vera_tools.comparing.census import CensusEntry, CensusReport
from vera_tools.listing import Filter, Row, State
from vera_tools.pages import Made
from vera_tools.projections.key import seed

#: What a row may be: where the pair of a checkpoint is, or why there is none.
_STATES = (
    State("stored", "✓", "good"),
    State("recorded", "✓", "good"),
    State("assumed", "≈", "unsure"),
    State("unrecorded", "?", "unsure"),
    State("failed", "!", "bad"),
    State("skipped", "–", "plain"),
)
_BY_NAME = {state.name: state for state in _STATES}
_NO_BASE = "no base named"
_MANIFEST = {"yes": "with a manifest", "no": "without a manifest"}
_COPIES = {"yes": "byte for byte another's file", "no": "a file of its own"}
#: Copies that are named in a row.
_NAMED = 3


def render(report: CensusReport, *, made: Made | None = None) -> str:
    """The page of a census."""
    total = report.summary
    tiles = [
        listing.tile(f"{total['distinct_pairs']:,}", "distinct pairs"),
        listing.tile(f"{total['bases']:,}", "base models named"),
        listing.tile(f"{total['with_manifest']:,}", "with a manifest"),
        listing.tile(f"{total['duplicates']:,}", "copies of another's file"),
        listing.tile(listing.human(total["bytes"]), "in weights files"),
        listing.tile(listing.human(total["stripping_saves"]), "saved by stripping, at most"),
    ]
    said = (
        "Where each adapter's pair of vera_A and vera_B is: stored in its file; recorded, to be made again; "
        "recorded on an assumption; or unrecorded. Configs, headers and manifests were read, and nothing was proven: "
        "verify does that."
    )
    failed = len(report.failed)
    return listing.render(
        "vera-tools inspect",
        heading=f"{total['checkpoints']:,} VeRA adapters: what they are, and what they share",
        said=said,
        banner=(False, f"✗ {failed:,} cannot be read") if failed else None,
        rows=sorted(_rows(report), key=_rank),
        states=_STATES,
        tiles=tiles,
        state_label="where the pair is",
        filters=[
            Filter("kind", "kind of adapter"),
            Filter("base", "base model"),
            Filter("pair", "pair"),
            Filter("manifest", "manifest", _MANIFEST),
            Filter("copy", "copies", _COPIES),
        ],
        made=made,
    )


def _rank(row: Row) -> tuple[object, ...]:
    """What cannot be read first, what is skipped last, the rest as they were found."""
    return row.good, row.state.name == "skipped"


def _rows(report: CensusReport) -> Iterator[Row]:
    for path, error in report.failed:
        yield Row(path, _BY_NAME["failed"], good=False, chosen={"kind": "unreadable"}, words=[str(error)])
    shared = Counter(entry.identity for entry in report.checkpoints)
    copies = {path: group for group in report.duplicates for path in group}
    for entry in report.checkpoints:
        count, group = shared[entry.identity], copies.get(entry.path, ())
        chosen = {
            "kind": "VERA",
            "base": entry.base or _NO_BASE,
            "pair": _pair(entry) if count > 1 else "a pair that no other has",
            "manifest": "yes" if entry.manifest else "no",
            "copy": "yes" if group else "no",
        }
        saves = [f"strip saves up to {listing.human(entry.pair_bytes)}"] if entry.pair_bytes else []
        facts = [
            entry.base or _NO_BASE,
            _pair(entry),
            f"{entry.layers:,} layers",
            f"{entry.vector_parameters:,} parameters in vectors",
            listing.human(entry.file_bytes),
            _MANIFEST[chosen["manifest"]],
            *saves,
        ]
        yield Row(entry.path, _BY_NAME[entry.pair], chosen=chosen, facts=facts, words=_copies(entry.path, group))
    for path, kind in report.skipped:
        yield Row(path, _BY_NAME["skipped"], chosen={"kind": kind or "unknown"}, facts=[kind or "unknown"])


def _pair(entry: CensusEntry) -> str:
    """What is the same for all that ask for the same pair."""
    return f"key {seed(entry.prng_key)}, r {entry.r}, {entry.in_max or '?'} x {entry.out_max or '?'}, {entry.dtype}"


def _copies(path: str, group: tuple[str, ...]) -> list[str]:
    if not group:
        return []
    others = [other for other in group if other != path]
    rest = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
    return [f"the same file as {', '.join(others[:_NAMED])}{rest}"]
