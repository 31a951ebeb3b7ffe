"""What the commands that convert share: where to write, and whole registries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click

from vera_tools.cli.completion import FOLDER
from vera_tools.cli.shared import Function, Output, human_bytes, write_line
from vera_tools.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from vera_tools.converting.batch import BatchItem, BatchReport
    from vera_tools.converting.output import ConversionReport

AnyReport = TypeVar("AnyReport", bound="ConversionReport")


class DestinationArguments(TypedDict):
    """What a conversion takes of what the options say about where to write."""

    in_place: bool
    overwrite: bool
    allow_pickle: bool


@dataclass(frozen=True)
class Where:
    """What the options say about where to write."""

    output: str | None
    in_place: bool
    recursive: bool
    out_dir: str | None
    overwrite: bool
    allow_pickle: bool

    @property
    def arguments(self) -> DestinationArguments:
        """What a conversion itself takes of them."""
        return {"in_place": self.in_place, "overwrite": self.overwrite, "allow_pickle": self.allow_pickle}

    def run(
        self,
        terminal: Output,
        command: str,
        checkpoint: str,
        convert: Callable[[str | Path, str | Path | None], AnyReport],
        show: Callable[[AnyReport, Console], None],
        *,
        dry_run: bool = False,
    ) -> int:
        """Convert one checkpoint, or with -R all below it, show the report, and return the exit code.

        Raises:
            UsageError: the options contradict each other.
        """
        if not self.recursive:
            if self.out_dir is not None:
                raise UsageError("--out-dir goes with -R", hint="name the output of one checkpoint with -o")
            report = convert(checkpoint, self.output)
            return terminal.emit(report, lambda console: show(report, console))
        if self.output is not None or (self.out_dir is None) != self.in_place:
            raise UsageError("-R goes with either --out-dir or --in-place")
        from vera_tools.converting.batch import convert_all

        with terminal.progress(command) as progress:
            batch = convert_all(
                checkpoint,
                self.out_dir,
                convert,
                command=command,
                overwrite=self.overwrite,
                progress=progress,
                dry_run=dry_run,
            )
        for item in batch.items:
            if item.status == "failed":
                write_line(f"error: {item.path}: {_without_path(item)}")
        return terminal.emit(batch, lambda console: _show_batch(batch, console))


def destination_options(function: Function) -> Function:
    """-o, --in-place, -R, --out-dir, --overwrite and --allow-pickle, as one `Where`."""

    @click.option("-o", "--output", type=FOLDER, metavar="OUT", help="Folder to write.")
    @click.option("--in-place", is_flag=True, help="Replace the checkpoint itself, in one step.")
    @click.option("-R", "--recursive", is_flag=True, help="Convert every checkpoint at or below CHECKPOINT.")
    @click.option(
        "--out-dir", type=FOLDER, metavar="DIR", help="With -R: where the outputs go, under the same relative paths."
    )
    @click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
    @click.option("--allow-pickle", is_flag=True, help="Read adapter_model.bin too, by torch with weights_only.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        output: str | None,
        in_place: bool,
        recursive: bool,
        out_dir: str | None,
        overwrite: bool,
        allow_pickle: bool,
        **kwargs: Any,
    ) -> Any:
        where = Where(output, in_place, recursive, out_dir, overwrite, allow_pickle)
        return function(*args, where=where, **kwargs)

    return wrapper  # type: ignore[return-value]


def show_common(report: ConversionReport, console: Console) -> None:
    """The lines that all conversions end with."""
    record = report.projections
    recipe = record.recipe.name if record.recipe else "none known"
    console.print(f"  recipe    {recipe}{f' ({record.origin})' if record.assumed else ''}")
    console.print(f"  manifest  {human_bytes(report.manifest_bytes)}, with the digests of all tensors")
    if report.carried_over and not report.in_place:
        console.print(f"  copied    {', '.join(report.carried_over)}, unchanged")
    if report.left_out:
        console.print(f"  left out  {', '.join(report.left_out)}")
    for note in report.notes:
        console.print(f"  note      {note}")


def _without_path(item: BatchItem) -> str:
    """The error, with a leading path of its checkpoint taken off."""
    text = str(item.error)
    return text.removeprefix(item.path).lstrip("/: ") if text.startswith(item.path) else text


def _show_batch(batch: BatchReport, console: Console) -> None:
    for item in batch.items:
        text: str = "converted, and it is damaged" if item.status == "damaged" else item.status
        text = f"would be {text}" if batch.dry_run and item.report else text
        if item.report:
            text += f", {human_bytes(item.report.input_bytes)} -> {human_bytes(item.report.output_bytes)}"
        elif item.error and item.status == "skipped":  # a failed one's is on stderr
            text += f": {item.error}"
        elif item.status == "unchanged" and item.output != item.path:
            text += f", and not written to {item.output}: it is that already"
        console.print(f"{item.path}: {text}")
    counts = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in batch.summary.items() if count)
    said = "; dry run, nothing was written" if batch.dry_run else ""
    console.print(f"{len(batch.items)} checkpoint{'s' * (len(batch.items) != 1)}: {counts}{said}")
