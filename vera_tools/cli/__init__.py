"""The command line: each command parses, makes one call into the library, shows the report, and exits with its code.

One module a command, loaded when it is called; what they share is in `shared`. Errors are turned into text or an
``error/v1`` document, and into an exit code, in `main` alone.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from itertools import pairwise
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from vera_tools._version import __version__
from vera_tools.cli import settings
from vera_tools.cli.shared import CLOSED, examples, write_line
from vera_tools.errors import UsageError, VeraToolsError, was_interrupt
from vera_tools.report import error_document

# Command: its module and its one line of help, so that `vera-tools --help` loads none of them.
COMMANDS = {
    "verify": ("verify", "Is this what the key regenerates, is it intact, does it fit its base?"),
    "summarize": ("summarize", "The logs of several runs of verify as one report."),
    "inspect": ("inspect", "What a checkpoint is: config, layers, shapes, parameter and byte counts."),
    "record": ("record", "Write or renew a checkpoint's manifest, so that it can be proven from now on."),
    "regenerate": ("regenerate", "Draw vera_A and vera_B from the key, without torch."),
    "strip-projections": ("strip", "Take vera_A and vera_B out, once it is proven that they can be made again."),
    "embed-projections": ("embed", "Put vera_A and vera_B into a seed-only checkpoint."),
    "convert": ("convert", "Write a checkpoint as exact LoRA, or bring in another program's VeRA."),
    "diff": ("diff", "Two checkpoints, tensor by tensor, and how far apart their weight updates are."),
    "env": ("env", "Versions, CPU capability, which platform this machine is, and what its torch draws."),
    "drift": ("drift", "What each torch, CPU and device here really draws, and what that does to an adapter."),
    "merge": ("merge", "Bake adapters into a base on disk, one tensor at a time."),
    "push": ("push", "Verify a checkpoint and upload it to the Hub, with a manifest and a card."),
    "pull": ("pull", "Fetch a checkpoint from the Hub, every digest checked, and verify it."),
}

EPILOG = (
    "Exit codes: 0 all well; 1 drift, or a check failed; 2 wrong usage; 3 unproven or assumed; 4 unreadable or not "
    "VeRA; 5 Hub.\n\n" + examples("verify my-adapter", "strip-projections my-adapter -o small")
)


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of a checkpoint's life."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import one command."""
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"vera_tools.cli.{COMMANDS[name][0]}").command
        settings.attach(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command, or say which one may be meant."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"there is no command {args[0]!r}", hint=_meant(args[0]))
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Complete a command's name without importing any."""
        found = [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]
        return found or super().shell_complete(ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _meant(name: str) -> str:
    """Which command a mistyped or shortened name may stand for."""
    import difflib

    lower = name.lower()
    meant = [command for command in COMMANDS if lower and command.startswith(lower)]
    meant = (
        meant
        or difflib.get_close_matches(lower, COMMANDS, n=1)
        or [c for c in COMMANDS if len(lower) > 2 and lower in c]
    )
    return f"did you mean `vera-tools {meant[0]}`?" if meant else "`vera-tools --help` lists them"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(__version__, prog_name="vera-tools")
@click.pass_context
def cli(context: click.Context) -> None:
    """Verify, convert, merge and ship VeRA adapters, bit for bit."""
    settings.apply(context)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: the one place that turns errors into messages and exit codes."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by the shell's >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8, or a path that is not
    try:
        code = _run(sys.argv[1:] if args is None else args)
        sys.stdout.flush()
    except BrokenPipeError:
        _abandon_stdout()
        code = CLOSED
    except OSError as error:
        if error.filename is not None or os.environ.get("VERA_TOOLS_DEBUG") == "1":
            raise
        _abandon_stdout()
        if sys.platform == "win32" and error.errno == errno.EINVAL:  # what Windows says of a pipe that nobody reads
            sys.exit(CLOSED)
        write_line(f"error: the output could not be written: {error.strerror}")
        code = VeraToolsError.exit_code
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    as_json = "--json" in arguments or "--format=json" in arguments or ("--format", "json") in pairwise(arguments)
    try:
        code: Any = cli.main(args=arguments, prog_name="vera-tools", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except VeraToolsError as error:
        return _fail(error, as_json=as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())  # which is the help
        return UsageError.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "vera-tools"
        what, where = error.format_message().rstrip("."), settings.blamed(error)
        return _fail(UsageError(what, where=where, hint=f"see `{command} --help`"), as_json=as_json)
    except (click.Abort, KeyboardInterrupt):
        write_line("interrupted")
        return 130
    except Exception as error:
        if was_interrupt(error):
            write_line("interrupted")
            return 130
        # An error without a file's name is the output's own: every other file is read and written through the library.
        if (isinstance(error, OSError) and error.filename is None) or os.environ.get("VERA_TOOLS_DEBUG") == "1":
            raise
        what = f"internal error: {type(error).__name__}: {error}"
        return _fail(
            VeraToolsError(what, hint="please report it, with the traceback that VERA_TOOLS_DEBUG=1 shows"),
            as_json=as_json,
        )


def _fail(error: VeraToolsError, *, as_json: bool) -> int:
    if os.environ.get("VERA_TOOLS_DEBUG") == "1":
        raise error
    write_line(f"error: {error}")
    if as_json:
        print(error_document(error))
    return error.exit_code


def _abandon_stdout() -> None:
    # Nobody takes our output any more; Python would complain once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
