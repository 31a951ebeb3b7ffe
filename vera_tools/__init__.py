"""vera-tools: checkpoint toolkit and reproducibility verifier for VeRA adapters (arXiv 2310.11454).

Importing this package is cheap: names are resolved on first use, and torch is imported by `VeraModel`, `load_adapter`
and `save_adapter` alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vera_tools._version import __version__

if TYPE_CHECKING:
    from vera_tools._diff import diff as diff
    from vera_tools._drift import drift as drift
    from vera_tools._embed import embed_projections as embed_projections
    from vera_tools._foreign import from_foreign as from_foreign
    from vera_tools._inspect import inspect as inspect
    from vera_tools._lora import to_lora as to_lora
    from vera_tools._merge import merge as merge
    from vera_tools._pull import pull as pull
    from vera_tools._push import push as push
    from vera_tools._record import record as record
    from vera_tools._regenerate import regenerate as regenerate
    from vera_tools._strip import strip_projections as strip_projections
    from vera_tools._verify import verify as verify
    from vera_tools.config import VeraConfig as VeraConfig
    from vera_tools.identification import identify as identify
    from vera_tools.recipe import Recipe as Recipe

# Public name: the module it lives in. No module may bear a public function's name, or importing it would shadow that.
_HOMES = {
    "Recipe": "recipe",
    "VeraConfig": "config",
    "diff": "_diff",
    "embed_projections": "_embed",
    "drift": "_drift",
    "from_foreign": "_foreign",
    "identify": "identification",
    "inspect": "_inspect",
    "merge": "_merge",
    "pull": "_pull",
    "push": "_push",
    "record": "_record",
    "regenerate": "_regenerate",
    "strip_projections": "_strip",
    "to_lora": "_lora",
    "verify": "_verify",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vera_tools' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vera_tools.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
