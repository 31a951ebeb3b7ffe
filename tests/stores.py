"""Object stores in tests: one in this process's memory, and what tests put into it and change in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.adapters import files_of
from vera_tools.files import store_client
from vera_tools.files.ranges import RangedFile


class Bucket:
    """A place in a store, which fsspec's own client fills and looks into."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.system, self._path = fsspec.core.url_to_fs(address)

    def __truediv__(self, name: str) -> str:
        return f"{self.address}/{name}"

    def put(self, name: str, content: Path | bytes | Mapping[str, bytes]) -> str:
        """Put a file, or a folder's files, below a name; its address."""
        if isinstance(content, bytes):
            self.system.pipe_file(f"{self._path}/{name}", content)
            return self / name
        for path, data in (files_of(content) if isinstance(content, Path) else content).items():
            self.system.pipe_file(f"{self._path}/{name}/{path}", data)
        return self / name

    def files(self, name: str = "") -> dict[str, bytes]:
        """Every file below a name: its path, and its content."""
        top = f"{self._path}/{name}".rstrip("/")
        self.system.invalidate_cache()
        return {path[len(top) + 1 :]: self.system.cat_file(path) for path in self.system.find(top)}

    def remove(self, name: str) -> None:
        """Remove a file."""
        self.system.rm_file(f"{self._path}/{name}")


@contextlib.contextmanager
def s3() -> Iterator[str]:
    """moto's S3 server on loopback, while the block runs; its address. Skips where moto or s3fs is not installed."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def ask_s3(address: str, patch: pytest.MonkeyPatch, *, key: str, secret: str) -> None:
    """Have s3:// mean this server."""
    patch.setenv("AWS_ENDPOINT_URL", address)
    patch.setenv("AWS_ACCESS_KEY_ID", key)
    patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # whatever the environment was then


@contextlib.contextmanager
def at_moments(act: Callable[[int], object]) -> Iterator[None]:
    """Within the block, `act` is called with a number before each listing and each range that a store is asked for."""
    count = iter(range(10**6))

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            act(next(count))
            return function(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_client, "listing", before(store_client.listing))
        patch.setattr(RangedFile, "_fetch", before(RangedFile._fetch))
        yield
