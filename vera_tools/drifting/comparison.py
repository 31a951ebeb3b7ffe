"""Drift reports from several machines, or from before and after an upgrade, side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vera_tools import schema
from vera_tools.errors import FormatError, UsageError
from vera_tools.files import local
from vera_tools.files.strict_json import parse_json
from vera_tools.platforms import atlas
from vera_tools.platforms.streams import Draw, Environment, shortened

#: What a run's own rows are called beside those of saved reports.
THIS_RUN = "this run"

#: Bytes of a saved report, of which this machine's takes ten thousand.
MOST_BYTES = 64 << 20

#: A saved report: the pairs that were drawn, and the rows.
Saved = tuple[tuple[Draw, ...], tuple[Environment, ...]]


@dataclass(frozen=True)
class Comparison:
    """Reports from several machines, side by side.

    Attributes:
        files: The saved reports.
        draws: The pairs that all of them drew.
        rows: (report, row) of every native environment; the first report is this run.
        groups: For each default dtype of this run, the rows (by position) that drew the same bits, one group a stream.
    """

    files: tuple[str, ...]
    draws: tuple[Draw, ...]
    rows: tuple[tuple[str, Environment], ...]
    groups: Mapping[str, tuple[tuple[int, ...], ...]]

    @property
    def apart(self) -> tuple[str, ...]:
        """The saved reports that hold no stream which this run drew too, so that they say nothing about it."""
        drawn = [{self.rows[n][0] for group in groups for n in group} for groups in self.groups.values()]
        return tuple(file for file in self.files if not any({THIS_RUN, file} <= names for names in drawn))

    @property
    def agree(self) -> bool:
        """Every saved report shares a stream with this run, and no default dtype has more than one stream."""
        return not self.apart and all(len(groups) <= 1 for groups in self.groups.values())

    @property
    def verdict(self) -> str:
        """In words."""
        if any(len(groups) > 1 for groups in self.groups.values()):
            return "the reports disagree"
        if self.apart:
            return f"nothing to compare: {', '.join(self.apart)} shares no stream with this run"
        return "the reports agree"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {
            "files": list(self.files),
            "agree": self.agree,
            "apart": list(self.apart),
            "pairs": [draw.to_dict() for draw in self.draws],
            "rows": [
                {
                    "report": report,
                    "environment": row.title,
                    "streams": {dtype: stream.label for dtype, stream in row.streams.items()},
                }
                for report, row in self.rows
            ],
            "groups": {dtype: [list(group) for group in groups] for dtype, groups in self.groups.items()},
        }


def load(file: str | os.PathLike[str]) -> Saved:
    """Read a saved report.

    Raises:
        FormatError: not there, or not a drift/v1 document.
    """
    path = Path(file)
    if not os.path.lexists(path):
        raise FormatError("no such file", where=file)
    text = local.read_text(local.LocalFolder(path.parent), path.name, limit=MOST_BYTES)
    document = parse_json(text, where=os.fspath(file))
    schema.validate(document, "drift.v1", where=os.fspath(file))
    entry = atlas.Entry.from_document(document, name=os.fspath(file))
    return entry.draws, entry.environments


def compare_reports(
    draws: Sequence[Draw], rows: Sequence[Environment], saved: Sequence[tuple[str, Saved]]
) -> Comparison:
    """Put a run's rows beside those of saved reports, on the pairs that all of them drew.

    Args:
        draws: The pairs that this run drew.
        rows: Its rows.
        saved: Each report's file name and content.

    Raises:
        UsageError: no pair was drawn by all.
    """
    everything = [(THIS_RUN, (tuple(draws), tuple(rows))), *saved]
    common = tuple(draw for draw in draws if all(draw in drawn for _, (drawn, _) in everything))
    if not common:
        raise UsageError("the reports drew no pair in common", where=", ".join(name for name, _ in saved))
    natives = tuple(
        (name, shortened(row, [drawn.index(draw) for draw in common]))
        for name, (drawn, environments) in everything
        for row in environments
        if row.native and row.status == "ok"
    )
    wanted = {dtype for row in rows for dtype in row.streams}
    groups: dict[str, dict[tuple[tuple[tuple[str, str], ...], ...], list[int]]] = {}
    for number, (_, row) in enumerate(natives):
        for dtype, stream in row.streams.items():
            if stream.digests and dtype in wanted:
                key = tuple(tuple(sorted(pair.items())) for pair in stream.digests)
                groups.setdefault(dtype, {}).setdefault(key, []).append(number)
    return Comparison(
        tuple(name for name, _ in saved),
        common,
        natives,
        {dtype: tuple(map(tuple, found.values())) for dtype, found in groups.items()},
    )
