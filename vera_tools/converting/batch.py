"""One conversion over every checkpoint below a folder, taking up again where it was interrupted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vera_tools.checkpoints.checkpoint import PICKLE_NAME, WEIGHTS_NAME
from vera_tools.checkpoints.config import CONFIG_NAME
from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.checkpoints.presence import find, nothing_found
from vera_tools.converting.output import ConversionReport
from vera_tools.errors import NothingToDoError, NotVeraError, UsageError, VeraToolsError, escaped
from vera_tools.files import opening
from vera_tools.report import Progress, Report, worst

Status = Literal["converted", "damaged", "up to date", "unchanged", "skipped", "failed"]
STATUSES: tuple[Status, ...] = ("converted", "damaged", "up to date", "unchanged", "skipped", "failed")

#: (checkpoint, output, or None for in place) -> report.
Convert = Callable[[Path, Path | None], ConversionReport]


@dataclass(frozen=True)
class BatchItem:
    """What became of one checkpoint.

    Attributes:
        path: The checkpoint.
        output: Where it goes.
        status: converted; damaged (converted, and something of it was damaged or
            missing before); up to date (an earlier run did it); unchanged (it has the asked form already);
            skipped (another kind of adapter); failed.
        report: Of a converted or damaged one.
        error: Of a failed, skipped or unchanged one.
    """

    path: str
    output: str
    status: Status
    report: ConversionReport | None = None
    error: VeraToolsError | None = None


@dataclass(frozen=True, repr=False)
class BatchReport(Report):
    """What became of every checkpoint below a folder. The exit code is that of the most severe failure.

    With `dry_run` it tells of what would become of it, and nothing was written.
    """

    name: ClassVar[str] = "batch"

    command: str
    root: str
    items: tuple[BatchItem, ...]
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        """0 where nothing failed and nothing is damaged, else the most severe code."""
        failed = (item.error.exit_code for item in self.items if item.status == "failed" and item.error)
        return worst([*failed, *(item.report.exit_code for item in self.items if item.report)])

    @property
    def summary(self) -> dict[str, int]:
        """How many checkpoints have each status."""
        counts = Counter(item.status for item in self.items)
        return {status.replace(" ", "_"): counts[status] for status in STATUSES}

    def body(self) -> dict[str, Any]:
        """The batch/v1 document's own part."""
        return {
            "command": self.command,
            "root": self.root,
            **({"dry_run": True} if self.dry_run else {}),
            "checkpoints": [
                {
                    "path": item.path,
                    "output": item.output,
                    "status": item.status,
                    "report": item.report.to_dict() if item.report else None,
                    "error": item.error.to_dict() if item.error else None,
                }
                for item in self.items
            ],
            "summary": self.summary,
        }


def convert_all(
    root: str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None,
    convert: Convert,
    *,
    command: str,
    overwrite: bool = False,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> BatchReport:
    """Convert every checkpoint at or below a folder; one that fails does not stop the others.

    An output appears whole or not at all, so one that is there and no older than its source is done, and a run that
    was interrupted can simply be started again.

    Args:
        root: Where to look.
        out_dir: Where the outputs go, under the same relative paths; None converts in place.
        convert: What to do with each.
        command: The conversion's name, for the report.
        overwrite: Do those again that are up to date.
        progress: Called with each checkpoint.
        dry_run: `convert` writes nothing.

    Raises:
        FormatError: no checkpoint in this folder.
        UsageError: `root` or `out_dir` is empty or not on disk, or `root` is not there.
    """
    if out_dir is not None and not os.fspath(out_dir):
        raise UsageError("the output is empty", hint="name the folder that the outputs go to")
    opening.require(root)
    top, to = opening.local_path(root), None if out_dir is None else opening.local_path(out_dir)
    if top is None or (to is None and out_dir is not None):
        where = opening.spelled(root if top is None or out_dir is None else out_dir)
        raise UsageError("many are converted from a folder to another, both on disk", where=where, hint="copy it first")
    own = None if to is None else to.resolve()
    # Listed before anything is written, so that outputs below the root are not taken for inputs.
    folders = [f for f in find(top) if own is None or not f.resolve().is_relative_to(own)]
    if not folders:
        raise nothing_found(top)
    items = []
    for done, folder in enumerate(folders):
        if progress:
            progress(done, len(folders), str(folder.relative_to(top)))
        output = None if to is None else to / folder.relative_to(top)
        items.append(_convert_one(folder, output, convert, overwrite=overwrite))
    return BatchReport(command, str(top), tuple(items), dry_run)


def _convert_one(folder: Path, output: Path | None, convert: Convert, *, overwrite: bool) -> BatchItem:
    path, to = str(folder), str(output or folder)
    if output is not None and not overwrite and _is_up_to_date(folder, output):
        return BatchItem(path, to, "up to date")
    try:
        report = convert(folder, output)
        return BatchItem(path, to, "damaged" if report.exit_code else "converted", report=report)
    except NothingToDoError as error:
        return BatchItem(path, to, "unchanged", error=error)
    except NotVeraError as error:
        return BatchItem(path, to, "skipped", error=error)
    except VeraToolsError as error:
        return BatchItem(path, to, "failed", error=error)
    except Exception as error:
        if os.environ.get("VERA_TOOLS_DEBUG") == "1":
            raise
        return BatchItem(path, to, "failed", error=escaped(error, where=path))


def _is_up_to_date(folder: Path, output: Path) -> bool:
    if not (os.path.exists(output / CONFIG_NAME) and os.path.exists(output / MANIFEST_NAME)):
        return False
    read = [folder / name for name in (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, MANIFEST_NAME)]
    newest = max((file.stat().st_mtime_ns for file in read if os.path.exists(file)), default=None)
    return newest is not None and (output / MANIFEST_NAME).stat().st_mtime_ns >= newest
