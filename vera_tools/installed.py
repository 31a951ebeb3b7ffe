"""Which version of a distribution is installed, told by the name of its folder.

That is {name}-{version}.dist-info, says the specification "Recording installed projects" of packaging.python.org.
`importlib.metadata` would say it too, and takes 20 ms to be imported, which is longer than reading a checkpoint's
headers. It is asked where the folders do not say it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys

# What tells of an installed distribution, today's kind and older ones.
_KINDS = (".dist-info", ".egg-info", ".egg", ".egg-link")


@functools.cache
def version(name: str) -> str | None:
    """The version of an installed distribution, which is not imported; None where there is none.

    Args:
        name: Of the distribution, and of its module: "torch".
    """
    for folder in sys.path:
        try:
            entries = os.listdir(folder or os.curdir)
        except NotADirectoryError:  # an archive, which may hold anything
            return _asked(name)
        except OSError:
            continue
        found = [entry for entry in entries if entry.startswith((f"{name}-", f"{name}.")) and entry.endswith(_KINDS)]
        if len(found) == 1 and os.path.isfile(os.path.join(folder, found[0], "METADATA")):
            kept, _, kind = found[0].rpartition(".")
            if kind == "dist-info":
                return kept.removeprefix(f"{name}-")
        if found:
            return _asked(name)
    return None if importlib.util.find_spec(name) is None else _asked(name)


def _asked(name: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
