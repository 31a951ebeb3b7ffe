"""What `verify` and `summarize` share: what has to hold for exit code 0, and how stdout has the report."""

from __future__ import annotations

import functools
import io
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import click

from vera_tools.cli.shared import Function, Output, page_option, write_line
from vera_tools.errors import UsageError
from vera_tools.report import printable
from vera_tools.verifying.findings import VERDICTS, Verdict

if TYPE_CHECKING:
    from vera_tools.verifying.report import VerifyReport

FORMATS = ("human", "json", "jsonl", "github", "junit")


class Requirements(TypedDict):
    """What has to hold for exit code 0, as the library's functions take it."""

    require: Verdict
    require_loads: tuple[str, ...]
    against_loads: str | None
    require_recorded: bool


@dataclass(frozen=True)
class Form:
    """How the report is shown.

    Attributes:
        output: --json, -q and -v.
        name: One of FORMATS.
        junit: A file for JUnit XML, or None.
        page: A file for an HTML page, or None.
        failed_only: The paths alone of those that are not good.
    """

    output: Output
    name: str
    junit: Path | None
    page: Path | None
    failed_only: bool

    @classmethod
    def of(cls, output: Output, form: str | None, junit: Path | None, page: Path | None, *, failed_only: bool) -> Form:
        """From the options, before any work.

        Raises:
            UsageError: they contradict each other, or a file cannot be written.
        """
        if output.json and form not in (None, "json"):
            raise UsageError(f"--json and --format {form} would both write to stdout")
        name = "json" if output.json else form or "human"
        if failed_only and name != "human":
            raise UsageError("--failed-only prints paths alone, which is a form of its own")
        if junit or page:
            from vera_tools.files import atomic  # late: help and completion write nothing

            for file, sort in ((junit, atomic.JUNIT), (page, atomic.PAGE)):
                if file:
                    atomic.refuse_unwritable(file, sort)
        if name == "github":
            from vera_tools.cli import github

            github.refuse_unwritable_summary()
        return cls(replace(output, json=name == "json"), name, junit, page, failed_only)

    def show(self, report: VerifyReport) -> int:
        """Show a report, and return its exit code."""
        if self.junit:
            from vera_tools.files import atomic

            with atomic.file(self.junit) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                file.writelines(report.junit_pieces())
        if self.page:
            from vera_tools.files import atomic
            from vera_tools.pages import Made
            from vera_tools.verifying import page

            atomic.write_bytes(self.page, page.render(report, made=Made.now(sys.argv[1:])).encode())
        if self.name == "jsonl" or (self.output.quiet and self.name != "json"):
            return report.exit_code
        if self.failed_only:
            _print_paths(_not_good(report))
        elif self.name == "junit":
            sys.stdout.writelines(report.junit_pieces())
        elif self.name == "github":
            from vera_tools.cli import github

            for line in github.workflow_commands(report):
                print(line)
            github.write_summary(report)
        else:
            from vera_tools.cli.verdicts import show

            return self.output.emit(report, lambda console: show(report, console, verbose=self.output.verbose))
        return report.exit_code


def _print_paths(paths: list[str]) -> None:
    """One a line, for other programs, byte for byte as the system has them; on a terminal, as text."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
    for path in paths:
        if "\n" in path or "\r" in path:  # the second line would name something else
            write_line(f"error: {path}: not in the list, because there is a line break in its name; rename it")
        else:
            print(printable(path) if sys.stdout.isatty() else path)


def requirement_options(function: Function) -> Function:
    """--require, --require-loads, --against-loads and --require-recorded, as one `Requirements`."""

    @click.option(
        "--require",
        type=click.Choice(VERDICTS, case_sensitive=False),
        default="reproducible",
        show_default=True,
        help="The worst verdict that still exits 0.",
    )
    @click.option(
        "--require-loads",
        multiple=True,
        metavar="SPEC",
        help="Exit 1 where such a loader is not exact: peft>=0.21[:DTYPE][:PLATFORM][:torch==VERSION]. Repeatable.",
    )
    @click.option(
        "--against-loads",
        metavar="SPEC",
        help="Exit 1 where a move from --require-loads to SPEC changes the projections, and list which.",
    )
    @click.option(
        "--require-recorded/--no-require-recorded",
        default=False,
        help="Fail what no manifest covers: of its vectors and config nothing else tells that they changed.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        require: Verdict,
        require_loads: tuple[str, ...],
        against_loads: str | None,
        require_recorded: bool,
        **kwargs: Any,
    ) -> Any:
        if against_loads is not None and len(require_loads) != 1:
            what = "--against-loads goes with one --require-loads, to move from"
            raise UsageError(what, found=f"{len(require_loads)} of them")
        requirements = Requirements(
            require=require,
            require_loads=require_loads,
            against_loads=against_loads,
            require_recorded=require_recorded,
        )
        return function(*args, requirements=requirements, **kwargs)

    return wrapper  # type: ignore[return-value]


def file_options(function: Function) -> Function:
    """--junit and --report."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option("--junit", type=path, metavar="FILE", help="Write JUnit XML too.")(page_option(function))


def failed_only_option(function: Function) -> Function:
    """--failed-only."""
    option = click.option(
        "--failed-only", is_flag=True, help="Print the paths alone of those that are not good, one a line."
    )
    return option(function)


def _not_good(report: VerifyReport) -> list[str]:
    """The paths of those that are not good, as they were named, for another command to take."""
    found = [checkpoint.path for checkpoint in report.checkpoints if report.exit_code_of(checkpoint)]
    return [*found, *(path for path, _ in report.failed)]
