"""vera-tools: checkpoint toolkit and reproducibility verifier for VeRA adapters (arXiv 2310.11454).

Importing this package is cheap: names are resolved on first use, and torch is imported by `VeraModel`, `load_adapter`
and `save_adapter` alone.
"""

# Whatever is imported here is imported before an interrupt has somebody who ends the command in one line.
from vera_tools._version import __version__

TYPE_CHECKING = False  # the name is enough for type checkers; an interrupt while typing is imported is a traceback
if TYPE_CHECKING:
    from typing import Any

    from vera_tools.checkpoints.config import VeraConfig as VeraConfig
    from vera_tools.comparing.diff import diff as diff
    from vera_tools.comparing.inspect import inspect as inspect
    from vera_tools.converting.embed import embed_projections as embed_projections
    from vera_tools.converting.foreign import from_foreign as from_foreign
    from vera_tools.converting.llama_cpp import to_gguf as to_gguf
    from vera_tools.converting.lora import to_lora as to_lora
    from vera_tools.converting.regenerate import regenerate as regenerate
    from vera_tools.converting.strip import strip_projections as strip_projections
    from vera_tools.drifting.drift import drift as drift
    from vera_tools.hub.pull import pull as pull
    from vera_tools.hub.push import push as push
    from vera_tools.merging.merge import merge as merge
    from vera_tools.nn import VeraModel as VeraModel
    from vera_tools.nn import load_adapter as load_adapter
    from vera_tools.nn import save_adapter as save_adapter
    from vera_tools.projections.identification import identify as identify
    from vera_tools.projections.recipe import Recipe as Recipe
    from vera_tools.verifying.record import record as record
    from vera_tools.verifying.summary import summarize as summarize
    from vera_tools.verifying.verify import verify as verify

# Public name: the module it lives in. No module may bear a public function's name, or importing it would shadow that.
_HOMES = {
    "Recipe": "projections.recipe",
    "VeraConfig": "checkpoints.config",
    "VeraModel": "nn",
    "census": "comparing.census",
    "diff": "comparing.diff",
    "embed_projections": "converting.embed",
    "drift": "drifting.drift",
    "from_foreign": "converting.foreign",
    "identify": "projections.identification",
    "inspect": "comparing.inspect",
    "load_adapter": "nn",
    "merge": "merging.merge",
    "pull": "hub.pull",
    "push": "hub.push",
    "record": "verifying.record",
    "regenerate": "converting.regenerate",
    "save_adapter": "nn",
    "strip_projections": "converting.strip",
    "summarize": "verifying.summary",
    "to_gguf": "converting.llama_cpp",
    "to_lora": "converting.lora",
    "verify": "verifying.verify",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module 'vera_tools' has no attribute {name!r}")
    import importlib

    try:
        value = getattr(importlib.import_module(f"vera_tools.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ModuleNotFoundError(
            f"vera_tools.{name} needs torch: pip install 'vera-tools[torch]'", name=error.name, path=error.path
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
