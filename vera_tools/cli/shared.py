"""What commands share: output and recipe options, the console, warnings, and progress."""

from __future__ import annotations

import contextlib
import functools
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import click
from click.core import ParameterSource

from vera_tools import parts
from vera_tools.cli import completion, settings
from vera_tools.dtypes import FLOATS, HALVES
from vera_tools.errors import UsageError, VeraToolsWarning
from vera_tools.parts import Part
from vera_tools.report import Progress, Report, printable

if TYPE_CHECKING:
    from rich.console import Console

Function = TypeVar("Function", bound=Callable[..., Any])

#: The exit code where nobody reads the output any more, as shells give it for a program that SIGPIPE ended.
CLOSED = 141
#: Seconds between two states of a progress bar.
_REDRAWN = 0.1


@dataclass(frozen=True)
class Output:
    """How a command shows what it has to say.

    Attributes:
        json: One JSON document on stdout, and nothing else there.
        quiet: Nothing but errors.
        verbose: More detail.
        defaults: What the environment or pyproject.toml set.
    """

    json: bool
    quiet: bool
    verbose: bool
    defaults: tuple[settings.Setting, ...] = ()

    def emit(self, report: Report, show: Callable[[Console], None]) -> int:
        """Show a report and return its exit code. `show` prints its human form on a rich console."""
        if self.json:
            sys.stdout.writelines(report.json_pieces(defaults=self.defaults))
            print()
        elif not self.quiet:
            show(console())
        return report.exit_code

    @contextlib.contextmanager
    def progress(self, description: str, *, unit: str = "items") -> Iterator[Progress | None]:
        """A progress bar on stderr, on a terminal only. `unit` is "items" or "bytes"."""
        if self.quiet or self.json or not sys.stderr.isatty():
            yield None
            return
        from rich import progress as bars

        amount = bars.DownloadColumn() if unit == "bytes" else bars.MofNCompleteColumn()
        rate: tuple[bars.ProgressColumn, ...] = (bars.TransferSpeedColumn(),) if unit == "bytes" else ()
        columns = (
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            amount,
            *rate,
            bars.TimeRemainingColumn(),
        )
        # Without a thread that redraws it: a process with several cannot be copied (see `processes.forking`).
        with bars.Progress(*columns, console=_console(stderr=True), transient=True, auto_refresh=False) as bar:
            task, drawn = bar.add_task(description, total=None), 0.0

            def update(done: int, total: int, what: str) -> None:
                nonlocal drawn
                bar.update(task, completed=done, total=total or None, description=what or description)
                if (now := time.monotonic()) - drawn >= _REDRAWN:
                    drawn = now
                    bar.refresh()

            yield update


def console() -> Console:
    """The console for human text on stdout. NO_COLOR and TERM are honoured; the text never depends on colour."""
    return _console(soft_wrap=not sys.stdout.isatty())


def _console(**options: Any) -> Console:
    """A console that takes text as it is, and shows what it cannot show, or what would steer it, as escapes."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class PlainConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            # A string is one line: a name that holds a line break cannot begin another.
            super().print(*(printable(item) if isinstance(item, str) else item for item in objects), **options)

        def on_broken_pipe(self) -> None:
            raise  # rich would exit with 1, which is drift here

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control or segment.text.isprintable() or segment.text == "\n":
                    yield segment
                else:
                    lines = "\n".join(map(printable, segment.text.split("\n")))
                    yield Segment(lines, segment.style)

    return PlainConsole(highlight=False, emoji=False, markup=False, **options)


def labelled(console: Console, label: str, message: str, *, style: str = "dim") -> None:
    """A label and its text, wrapped beside it to the console's width: the form in which reports list their facts."""
    from rich.text import Text

    lines = wrapped(printable(message), text_width(console) - 12)
    console.print(Text.assemble("  ", (f"{label:9}", style), " ", lines[0]))
    for line in lines[1:]:
        console.print(Text(" " * 12 + line))


def text_width(console: Console) -> int:
    """How wide text may be: as the terminal is; a pipe gets one fact a line."""
    return max(console.width, 40) if not console.soft_wrap else 10**6


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, no word of it broken; at least one line."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def human_bytes(count: int) -> str:
    """A size for people: decimal units, as disks and the Hub use them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} bytes"


def write_line(text: str) -> None:
    """One line on stderr."""
    print(printable(text), file=sys.stderr, flush=True)


def examples(*lines: str) -> str:
    """The end of a command's help: command lines that can be copied, and that a test runs."""
    return "\b\nExamples:\n" + "\n".join(f"  vera-tools {line}" for line in lines)


def output_options(function: Function) -> Function:
    """--json, -q and -v; the command receives an `Output` as its first argument, and its return value is the exit code.

    Warnings raised inside become lines on stderr.
    """

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
    @click.option("-v", "--verbose", is_flag=True, help="Print more detail.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> int:
        with warnings.catch_warnings(record=True) as caught, _logs(quiet=quiet):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", VeraToolsWarning)
            defaults = settings.used(click.get_current_context())
            for line in settings.told(defaults) if not quiet else ():
                write_line(line)
            try:
                code: int = function(Output(as_json, quiet, verbose, defaults), *args, **kwargs)
            except BrokenPipeError:  # click would exit with 1 too
                raise click.exceptions.Exit(CLOSED) from None
            finally:
                if not quiet:
                    for warning in caught:
                        write_line(f"warning: {warning.message}")
        return code

    return wrapper  # type: ignore[return-value]


@contextlib.contextmanager
def _logs(*, quiet: bool) -> Iterator[None]:
    """Log nothing but errors while a command is quiet, whoever logs: the Hub's client tells of every wait."""
    import logging  # late: help and completion log nothing

    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING) if quiet else before)
    try:
        yield
    finally:
        logging.disable(before)


class Once(click.Option):
    """An option that is refused where it is given twice: click takes the last one, and says nothing of the others."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser keep every value."""
        parser.add_option(obj=self, opts=self.opts, dest=self.name, action="append", nargs=self.nargs)

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """The one value.

        Raises:
            UsageError: there are several.
        """
        given = opts.get(self.name or "")
        if isinstance(given, list):
            if len(given) > 1 and not ctx.resilient_parsing:  # as completion does
                raise UsageError(f"{self.opts[0]} is given {len(given)} times", expected="once", found=" ".join(given))
            opts = {**opts, str(self.name): given[0]}
        return super().consume_value(ctx, opts)


def base_option(function: Function) -> Function:
    """--base."""
    option = click.option(
        "--base",
        cls=Once,
        type=completion.REFERENCE,
        metavar="BASE",
        help="Base model: a folder, a safetensors file, hf://owner/name or s3://... Headers are enough.",
    )
    return option(function)


def strict_option(function: Function) -> Function:
    """--strict."""
    option = click.option(
        "--strict", is_flag=True, help="Refuse (exit 3) a recipe that is assumed, or was when it was recorded."
    )
    return option(function)


def page_option(function: Function) -> Function:
    """--report."""
    path = click.Path(dir_okay=False, path_type=Path)
    return click.option("--report", "page", type=path, metavar="FILE.html", help="Write one HTML page too.")(function)


def part_option(*names: str, help: str) -> Callable[[Function], Function]:
    """--part I/N, as a pair of numbers."""

    def parsed(context: click.Context, parameter: click.Parameter, value: str | None) -> Part | None:
        return None if value is None else parts.parse(value)

    return click.option("--part", *names, metavar="I/N", callback=parsed, help=help)


def in_features_option(function: Function) -> Function:
    """--in-features."""
    option = click.option(
        "--in-features",
        type=click.IntRange(1),
        metavar="N",
        help="Largest in_features of the adapted layers, where no base is at hand.",
    )
    return option(function)


def overwrite_option(function: Function) -> Function:
    """--overwrite."""
    option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
    return option(function)


def dry_run_option(function: Function) -> Function:
    """--dry-run."""
    option = click.option(
        "--dry-run", is_flag=True, help="Say what would be written, refuse what would be refused, and write nothing."
    )
    return option(function)


@dataclass(frozen=True)
class RecipeOptions:
    """What the recipe options say; None where they say nothing."""

    drawn_dtype: str | None
    half_sampling: str | None
    rounding: str | None
    rounded_through: str | None
    stored_dtype: str | None
    recipe: str | None

    @property
    def name(self) -> str | None:
        """The name of the recipe that the options describe, or None where none was given.

        Raises:
            UsageError: no such recipe, or it was both named and described.
        """
        if not any((self.drawn_dtype, self.half_sampling, self.rounding, self.rounded_through)):
            return self.recipe
        if self.recipe is not None:
            raise UsageError("--recipe says it all: the options that describe a recipe do not go with it")
        from vera_tools.projections.recipe import Recipe

        drawn = self.drawn_dtype or "float32"
        return Recipe(
            prng_key=0,  # a name does not hold the key
            drawn_dtype=drawn,
            half_sampling=self.half_sampling or ("opmath" if drawn in HALVES else None),  # type: ignore[arg-type]
            rounding=self.rounding or "fused",  # type: ignore[arg-type]
            rounded_through=None if self.rounded_through == "none" else self.rounded_through,
        ).name


def recipe_options(function: Function) -> Function:
    """--recipe, the options that describe one instead, and --stored-dtype, as one `RecipeOptions`."""

    @click.option("--recipe", metavar="NAME", help="The recipe by its name, such as mt19937-f32-fused-via-bf16.")
    @click.option("--drawn-dtype", type=click.Choice(FLOATS), help="torch's default dtype at the draw.")
    @click.option(
        "--half-sampling",
        type=click.Choice(["scalar", "opmath"]),
        help="Half types: torch <= 2.11 or >= 2.12.",
    )
    @click.option("--rounding", type=click.Choice(["fused", "separate"]), help="How the kernel's affine map rounds.")
    @click.option(
        "--rounded-through",
        type=click.Choice(["none", *HALVES]),
        help="The base's dtype, which PEFT rounds through.",
    )
    @click.option(
        "--stored-dtype",
        type=click.Choice(FLOATS),
        default="float32",
        show_default=True,
        help="Dtype of the result.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        drawn_dtype: str | None,
        half_sampling: str | None,
        rounding: str | None,
        rounded_through: str | None,
        stored_dtype: str | None,
        recipe: str | None,
        **kwargs: Any,
    ) -> Any:
        options = RecipeOptions(drawn_dtype, half_sampling, rounding, rounded_through, stored_dtype, recipe)
        return function(*args, recipe_options=options, **kwargs)

    return wrapper  # type: ignore[return-value]


class AssumptionArguments(TypedDict):
    """What the library's functions take of what is known of projections that a checkpoint does not hold."""

    base: str | None
    in_features: int | None
    recipe: str | None
    stored_dtype: str
    strict: bool


@dataclass(frozen=True)
class Resolving:
    """What the options say about projections that a checkpoint does not hold."""

    base: str | None
    in_features: int | None
    recipe: RecipeOptions
    strict: bool

    @property
    def arguments(self) -> AssumptionArguments:
        """The same, as the library's functions take it."""
        return {
            "base": self.base,
            "in_features": self.in_features,
            "recipe": self.recipe.name,
            "stored_dtype": self.recipe.stored_dtype or "float32",
            "strict": self.strict,
        }


def resolving_options(function: Function) -> Function:
    """--base, --in-features, the recipe options and --strict, as one `Resolving`."""

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        base: str | None,
        in_features: int | None,
        recipe_options: RecipeOptions,
        strict: bool,
        **kwargs: Any,
    ) -> Any:
        return function(*args, resolving=Resolving(base, in_features, recipe_options, strict), **kwargs)

    return base_option(in_features_option(recipe_options(strict_option(wrapper))))  # type: ignore[return-value]
