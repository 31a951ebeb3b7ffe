"""Every error that vera-tools raises on purpose: what is wrong, where, what was expected and found, what to do.

The classes differ in what the caller should do next, which is what a process exit code says too:

====  ==========================  =============================================================
code  class                       meaning
====  ==========================  =============================================================
1     `CheckFailedError`          the input could be read, and is not what it claims to be
2     `UsageError`                the call itself is wrong
3     `UnprovenError`             nothing to compare with, and the caller asked for proof
4     `FormatError`               unreadable, malformed, or not VeRA
5     `RemoteError`               the network, the Hub or a store refused
====  ==========================  =============================================================
"""

from __future__ import annotations

import copyreg
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar


class VeraToolsError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        what: What is wrong, one sentence without the file name.
        where: File, tensor or key, outermost first, e.g. ``"ckpt/adapter_config.json: r"``.
        expected: What would have been right.
        found: What was there instead.
        hint: What the user can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | os.PathLike[str] | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else os.fspath(where)
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        details = [
            f"{label} {value}"
            for label, value in (("expected", self.expected), ("found", self.found))
            if value is not None
        ]
        if details:
            text += f" ({', '.join(details)})"
        return text if self.hint is None else f"{text}; {self.hint}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # An exception is otherwise made again by calling its class, and no two of these take the same arguments.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, object]:
        """The error's fields for an ``error/v1`` document."""
        return {
            "type": type(self).__name__,
            "exit_code": self.exit_code,
            "message": str(self),
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "hint": self.hint,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> VeraToolsError:
        """The inverse of `to_dict`; a class that this version does not know becomes one with the same exit code."""
        kinds = {kind.__name__: kind for kind in _kinds(VeraToolsError)}
        by_code = next((kind for kind in kinds.values() if kind.exit_code == data["exit_code"]), VeraToolsError)
        kind = kinds.get(data["type"], by_code)
        error = kind.__new__(kind, data["what"])
        error.__dict__.update({name: data[name] for name in ("what", "where", "expected", "found", "hint")})
        if isinstance(error, NotVeraError):
            error.kind = data["found"] or ""
        return error


def _kinds(kind: type[VeraToolsError]) -> Iterator[type[VeraToolsError]]:
    """This class and all below it, each before its own."""
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


class CheckFailedError(VeraToolsError):
    """The input was read and is not what it claims to be (drift, a wrong digest, a shape that does not fit)."""

    exit_code = 1


class BrokenValuesError(CheckFailedError, ValueError):
    """Values that cannot be used in a live model. A ValueError too, which is what PEFT raises of them."""


class WrongSizeError(CheckFailedError, RuntimeError):
    """Tensors that a live model has in other sizes. A RuntimeError too, which is what torch and PEFT raise of them."""


class UsageError(VeraToolsError, ValueError):
    """The call itself is wrong: options that contradict each other, an output that exists already."""

    exit_code = 2


class WrongTypeError(UsageError, TypeError):
    """An argument or a layer of a type that cannot be taken. A TypeError too, which is what PEFT raises of it."""


class NothingToDoError(UsageError):
    """The checkpoint is already in the form that was asked for."""


class UnprovenError(VeraToolsError):
    """There is nothing to compare with, and the caller asked for proof (``strict=True``)."""

    exit_code = 3


class FormatError(VeraToolsError):
    """A file is missing, unreadable or malformed."""

    exit_code = 4


class NotVeraError(FormatError):
    """A well-formed adapter of another kind. ``kind`` names it (``"LORA"``, ``"PVERA"``, ...)."""

    def __init__(self, what: str, *, kind: str, where: str | os.PathLike[str] | None = None, hint: str | None = None):
        self.kind = kind
        super().__init__(what, where=where, expected="peft_type VERA", found=kind, hint=hint)


class RemoteError(VeraToolsError):
    """What lies elsewhere cannot be had or written: the network refused, or who keeps it."""

    exit_code = 5


class HubError(RemoteError):
    """The network or the Hub refused."""


class StoreError(RemoteError):
    """The network or an object store refused."""


def cut(text: str, most: int = 60) -> str:
    """The text, or its beginning where it is longer than what is quoted in a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def escaped(error: Exception, *, where: str) -> FormatError:
    """What is said of one of many where something else than an error of ours came up while it was worked on.

    Input that nobody thought of ends in such errors: nested too deeply, too large, not to be encoded. The others of the
    many go on.

    Raises:
        KeyboardInterrupt: the error stands in the place of one.
    """
    if was_interrupt(error):
        raise KeyboardInterrupt from error
    return FormatError(
        f"cannot be worked on: {type(error).__name__}: {str(error)[:200] or 'no message'}",
        where=where,
        hint="if the file is sound, please report it, with the traceback that VERA_TOOLS_DEBUG=1 shows",
    )


def was_interrupt(error: BaseException | None) -> bool:
    """Whether this is an interrupt, or came of one: what one meets may end in an error of its own.

    Before Python 3.12 a class that is being made ends in a RuntimeError, and so do parts of NumPy that are imported.
    """
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


class VeraToolsWarning(UserWarning):
    """Base of all warnings."""


class AssumedRecipeWarning(VeraToolsWarning):
    """Nothing records which recipe made a seed-only checkpoint's projections; PEFT's own was assumed."""


class AssumedShapeWarning(VeraToolsWarning):
    """Nothing says how wide each adapted layer is; all were taken to be as wide as vera_A."""


class UnrecordedWarning(VeraToolsWarning):
    """No manifest could be added, because nothing says what its projections are."""


class LoadingWarning(VeraToolsWarning):
    """What was written computes something else than what was trained, in some loader or on some machine."""


class LocalBaseWarning(VeraToolsWarning):
    """What is sent to others names its base by a path on this machine."""


class SignatureWarning(VeraToolsWarning):
    """A signature or checksum beside a checkpoint no longer holds, because the checkpoint was changed."""


class LeftoverWarning(VeraToolsWarning):
    """A run that was killed has left an unfinished output, which was removed, or which you may have to delete."""


#: Where a warning's own frames lie: this package, and what context managers and decorators put between.
_OWN = (os.path.dirname(__file__) + os.sep,)
_BETWEEN = ("contextlib.py", "_contextlib.py")


def warn(message: str, category: type[Warning] = VeraToolsWarning) -> None:
    """Warn of the line, outside of vera-tools, from which it was called, however deep inside this is found out."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_OWN) or os.path.basename(frame.f_code.co_filename) in _BETWEEN
    ):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, category, stacklevel=depth)
