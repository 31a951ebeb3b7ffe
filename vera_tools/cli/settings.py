"""Defaults that a user's environment or a project's pyproject.toml sets, and where each came from.

The command line wins over the environment, and the environment over the file. A setting replaces one option's default
and nothing else; what cannot be set is not looked for. So nothing in an environment or a file can name what is read or
written, let a command run code, or replace what is there; and a file cannot make a gate looser, because a file may lie
in what is being verified.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from vera_tools.errors import UsageError, VeraToolsError, cut
from vera_tools.report import Document
from vera_tools.serving import VARIABLES

FILE_NAME = "pyproject.toml"
PREFIX = "VERA_TOOLS_"
#: Variables of that prefix that are no option's.
_OTHERS = {"VERA_TOOLS_DEBUG", *VARIABLES}

#: What can be set: a command's options by their long names, and the TOML type of each.
KINDS = {
    "base": "a string",
    "jobs": "an integer",
    "max-shard-size": "a string",
    "private": "a boolean",
    "require": "a string",
    "require-loads": "an array of strings",
    "require-recorded": "a boolean",
    "strict": "a boolean",
    "sync": "a boolean",
    "verify": "a boolean",
}
OPTIONS: dict[str, tuple[str, ...]] = {
    "verify": ("base", "jobs", "require", "require-loads", "require-recorded"),
    "summarize": ("require", "require-loads", "require-recorded"),
    "inspect": ("base",),
    "record": ("base", "strict"),
    "regenerate": ("base", "strict"),
    "embed-projections": ("base", "strict"),
    "convert": ("base", "strict"),
    "diff": ("base", "strict"),
    "drift": ("base", "strict"),
    "merge": ("base", "jobs", "max-shard-size", "strict", "sync", "verify"),
    "push": ("base", "private", "strict"),
    "pull": ("base", "strict"),
}
#: What can make a gate looser. The environment is the user's own; a file may be a stranger's.
NOT_IN_A_FILE = {"require"}

#: Of which calls a setting is no part, by what was given: `inspect` looks at a base for one checkpoint alone.
_UNUSED: dict[tuple[str, str], Callable[[Mapping[str, Any]], bool]] = {
    ("inspect", "base"): lambda given: given["recursive"] or len(given["checkpoints"]) > 1,
}

#: A project's file is no larger.
_MOST = 1 << 20
#: What makes a folder a checkpoint: a pyproject.toml in it came with the checkpoint.
_CHECKPOINT = "adapter_config.json"


@dataclass(frozen=True)
class Setting(Document):
    """A value that was not given on the command line.

    Attributes:
        option: The option that it is of, such as "--base".
        value: The value.
        origin: The environment variable, or the file and its table.
    """

    option: str
    value: Any
    origin: str

    def __str__(self) -> str:
        if isinstance(self.value, bool):
            return self.option if self.value else f"no {self.option}"
        return f"{self.option} {' '.join(self.value) if isinstance(self.value, list) else self.value}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in reports."""
        return {"option": self.option, "value": self.value, "from": self.origin}


def variable(command: str, option: str) -> str:
    """The environment variable of an option."""
    return f"{PREFIX}{command}_{option}".upper().replace("-", "_")


def attach(command: click.Command) -> None:
    """Let the options of a command that can be set be set by the environment."""
    for option in OPTIONS.get(command.name or "", ()):
        parameter_of(command, option).envvar = variable(command.name or "", option)


def parameter_of(command: click.Command, option: str) -> click.Option:
    """A command's option by its long name."""
    return next(p for p in command.params if isinstance(p, click.Option) and f"--{option}" in p.opts)


def apply(context: click.Context) -> None:
    """Take up what the file sets. What is wrong with it is raised by `used`, so that --help helps with it too."""
    try:
        refuse_unknown_variables(os.environ)
        if found := load(_here()):
            context.obj, settings = found
            context.default_map = default_map(settings, context.obj)
    except UsageError as error:
        context.obj = error


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Refuse a variable that looks like a setting and is none: a gate that is misspelt is no gate.

    Raises:
        UsageError: names it.
    """
    known = {variable(command, option) for command, options in OPTIONS.items() for option in options}
    for name in environment:
        if name.startswith(PREFIX) and name not in known | _OTHERS:
            hint = "docs/settings.md lists what can be set; unset it, or give the option on the command line"
            raise UsageError("no setting of vera-tools has this name", where=name, hint=hint)


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        what = f"the current folder cannot be used: {error.strerror}"
        raise UsageError(what, hint="it may have been deleted: go to one that is there") from error


def load(start: Path) -> tuple[Path, dict[str, dict[str, Any]]] | None:
    """The nearest pyproject.toml with a table ``[tool.vera-tools]``, in `start` or above, and its settings.

    One beside an adapter_config.json came with a checkpoint and is passed over.

    Raises:
        UsageError: it cannot be read, or holds what cannot be set.
    """
    for folder in (start, *start.parents):
        path = folder / FILE_NAME
        if os.path.lexists(path) and not os.path.lexists(folder / _CHECKPOINT):
            table = _table(path)
            if table is not None:
                return path, _checked(path, table)
    return None


def default_map(settings: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """The settings of a file, as click looks for them. A base is relative to the file."""
    from vera_tools.files.opening import is_remote

    found: dict[str, dict[str, Any]] = {}
    for command, options in settings.items():
        found[command] = {option.replace("-", "_"): value for option, value in options.items()}
        base = options.get("base")
        if base is not None and not is_remote(base):
            found[command]["base"] = str(path.parent / base)
    return found


def used(context: click.Context) -> tuple[Setting, ...]:
    """The settings that took part in a command's call.

    Raises:
        UsageError: some are wrong.
    """
    path = context.find_root().obj
    if isinstance(path, UsageError):
        raise path
    found = []
    for option in OPTIONS.get(context.info_name or "", ()):
        parameter = parameter_of(context.command, option)
        origin = _origin(context, parameter, path)
        unused = _UNUSED.get((context.info_name or "", option))
        if origin is not None and parameter.name is not None and not (unused and unused(context.params)):
            value = context.params[parameter.name]
            found.append(Setting(f"--{option}", list(value) if isinstance(value, tuple) else value, origin))
    return tuple(found)


def told(found: Sequence[Setting]) -> list[str]:
    """What was set and not given, a line for each place that sets it."""
    places = dict.fromkeys(setting.origin for setting in found)
    return [f"using {', '.join(str(one) for one in found if one.origin == at)} (from {at})" for at in places]


def blamed(error: click.UsageError) -> str | None:
    """Where the value that click refuses was set; None for one from the command line."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return None
    return _origin(error.ctx, error.param, error.ctx.find_root().obj)


def _origin(context: click.Context, parameter: click.Parameter, path: object) -> str | None:
    source = context.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return str(parameter.envvar)
    if source is ParameterSource.DEFAULT_MAP:
        return f"{path}: [tool.vera-tools.{context.info_name}]"
    return None


def _table(path: Path) -> dict[str, Any] | None:
    """``[tool.vera-tools]``; None where the file has no such table. Others' files are not read as TOML at all."""
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=path, hint="it may hold settings") from error
    if b"vera-tools" not in data:
        return None
    if len(data) > _MOST:
        raise UsageError("too large for settings", where=path, expected=f"at most {_MOST} bytes")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not TOML: {error}", where=path) from error
    tool = document.get("tool")
    if not isinstance(tool, dict) or "vera-tools" not in tool:
        return None
    table = tool["vera-tools"]
    if not isinstance(table, dict):
        raise _wrong("not a table", path, "", table, "a table for each command")
    return table


def _checked(path: Path, table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for command, options in table.items():
        if command not in OPTIONS:
            raise _wrong("no command that has settings", path, command, options, ", ".join(OPTIONS))
        if not isinstance(options, dict):
            raise _wrong("not a table", path, command, options, "a table of options")
        for option, value in options.items():
            inside = f"{command}.{option}"
            if option not in OPTIONS[command]:
                can = [name for name in OPTIONS[command] if name not in NOT_IN_A_FILE]
                raise _wrong("cannot be set", path, inside, value, f"one of {', '.join(can) or 'none'}")
            if option in NOT_IN_A_FILE:
                raise UsageError(
                    "cannot be set in a file, which may lie in what is verified and would loosen the gate",
                    where=f"{path}: tool.vera-tools.{inside}",
                    hint=f"pass --{option}, or set {variable(command, option)}",
                )
            if not _is(value, KINDS[option]):
                raise _wrong("wrong type", path, inside, value, KINDS[option])
    return table


def _is(value: object, kind: str) -> bool:
    if kind == "an array of strings":
        return isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    if kind == "a string":
        return isinstance(value, str) and bool(value)
    return isinstance(value, bool) if kind == "a boolean" else isinstance(value, int) and not isinstance(value, bool)


def _wrong(what: str, path: Path, inside: str, value: object, expected: str) -> VeraToolsError:
    where = f"{path}: {'.'.join(filter(None, ('tool.vera-tools', inside)))}"
    return UsageError(what, where=where, expected=expected, found=cut(repr(value)))
