"""Who does the work of `verify` and `merge`, where that is not this machine's processors: --dask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from vera_tools.cli.shared import Function
from vera_tools.errors import RemoteError, UsageError

if TYPE_CHECKING:
    from concurrent.futures import Executor

#: Seconds that the scheduler has to answer in.
PATIENCE = 30


def dask_option(function: Function) -> Function:
    """--dask."""
    option = click.option(
        "--dask",
        metavar="ADDRESS",
        help="Work on the workers of this dask scheduler, which see the same files (needs vera-tools[dask]).",
    )
    return option(function)


@contextlib.contextmanager
def executor_of(address: str | None) -> Iterator[Executor | None]:
    """The workers of the dask scheduler at this address, as an executor; None where none was named.

    Raises:
        UsageError: dask.distributed is not installed, or this is no address.
        RemoteError: nobody answers there.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise UsageError(
            "--dask needs dask.distributed, which is not installed here", hint="pip install 'vera-tools[dask]'"
        ) from error
    if "://" not in address:
        address = f"tcp://{address}"
    try:
        client = Client(address, timeout=PATIENCE, set_as_default=False)
    except ValueError as error:
        raise UsageError(f"no address of a scheduler: {error}", where=address, expected="tcp://host:8786") from error
    except OSError as error:
        raise RemoteError(
            "no dask scheduler answers", where=address, hint="dask scheduler prints its address"
        ) from error
    with contextlib.closing(client):
        if not client.scheduler_info()["workers"]:
            raise RemoteError("the dask scheduler has no workers", where=address, hint=f"dask worker {address}")
        with client.get_executor(pure=False, retries=0) as executor:
            yield executor
