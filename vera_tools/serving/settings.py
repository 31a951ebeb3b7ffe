"""What the environment says of serving: where adapters lie, where their LoRA goes, and what may be served.

Without a folder of adapters, nothing is served.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vera_tools.errors import UsageError
from vera_tools.serving import ADAPTERS, CACHE, CACHE_BYTES, PREFIX, REQUIRE, VARIABLES

#: Bytes that the cache may take where nothing is said.
MOST_BYTES = 20_000_000_000


@dataclass(frozen=True)
class Settings:
    """What a server was told.

    Attributes:
        adapters: The folder below which adapters are looked up by name.
        cache: The folder for their LoRA.
        cache_bytes: The bytes that it may take.
        require: The worst verdict that is served.
    """

    adapters: Path
    cache: Path
    cache_bytes: int = MOST_BYTES
    require: Literal["reproducible", "assumed"] = "reproducible"

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Settings | None:
        """The settings; None where no folder of adapters is named. An empty variable sets nothing.

        Raises:
            UsageError: a variable is misspelt, or its value is wrong; or others are set and no folder is.
        """
        found = {name: value for name, value in environment.items() if name.startswith(PREFIX) and value}
        for name in found:
            if name not in VARIABLES:
                raise UsageError("no setting of vera-tools has this name", where=name, expected=" or ".join(VARIABLES))
        if not found:
            return None
        if ADAPTERS not in found:
            raise UsageError("is not set, and others are", where=ADAPTERS, found=", ".join(sorted(found)))
        adapters = Path(found[ADAPTERS])
        if not adapters.is_dir():
            raise UsageError("no such folder", where=f"{ADAPTERS}={adapters}")
        require = found.get(REQUIRE, "reproducible")
        if require not in ("reproducible", "assumed"):
            raise UsageError("cannot be served", where=REQUIRE, expected="reproducible or assumed", found=require)
        most = found.get(CACHE_BYTES, str(MOST_BYTES))
        if not (most.isascii() and most.isdigit() and int(most)):
            raise UsageError("not a number of bytes", where=CACHE_BYTES, expected="such as 20000000000", found=most)
        cache = Path(found[CACHE]) if CACHE in found else _home(environment) / "vera-tools" / "vllm"
        return cls(
            adapters.absolute(), cache.absolute(), int(most), "assumed" if require == "assumed" else "reproducible"
        )


def _home(environment: Mapping[str, str]) -> Path:
    """Where a user's programs keep what they can make again."""
    return Path(environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
