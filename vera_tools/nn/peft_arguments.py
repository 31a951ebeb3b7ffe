"""The keyword arguments that code written for PEFT passes on, where they mean something else here or nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from vera_tools.errors import UsageError
from vera_tools.files.opening import is_remote


class _Argument(NamedTuple):
    """The values of an argument for which vera-tools does what PEFT does, and what to do about the others."""

    same: tuple[object, ...] | None
    hint: str = ""


#: `same` is None where any value is: an adapter is always loaded straight from the file and onto its layer's device.
LOADING = {
    "config": _Argument((None,), "the checkpoint's own adapter_config.json counts; edit it there"),
    "autocast_adapter_dtype": _Argument(
        (True,), "the vectors are always float32 at least, so that they can be trained"
    ),
    "low_cpu_mem_usage": _Argument(None),
    "torch_device": _Argument(None),
    "ephemeral_gpu_offload": _Argument((False,), "move the model with .to()"),
    "key_mapping": _Argument((None,), "rename the tensors of the checkpoint"),
}
SAVING = {
    "safe_serialization": _Argument((True,), "adapters are written as safetensors only"),
}


def check(arguments: Mapping[str, Any], known: Mapping[str, _Argument]) -> None:
    """Refuse what would be done otherwise than PEFT does it.

    Raises:
        UsageError: a value that is not supported.
        TypeError: no argument of PEFT's, in Python's words.
    """
    for name, value in arguments.items():
        if name not in known:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        same, hint = known[name]
        if same is not None and not any(value is one or (isinstance(one, str) and value == one) for one in same):
            expected = " or ".join(map(repr, same))
            raise UsageError("is not supported", where=name, expected=expected, found=repr(value), hint=hint)


def located(
    checkpoint: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> str | os.PathLike[str]:
    """The reference to a checkpoint whose revision and subfolder are given beside it.

    Raises:
        UsageError: a revision of something that is not on the Hub, or a second one.
    """
    if revision is not None:
        from vera_tools.files.hub_client import Reference

        reference = Reference.parse(os.fspath(checkpoint)) if is_remote(checkpoint) else None
        if reference is None or reference.revision not in (None, revision):
            raise UsageError(
                "has no such revision",
                where=checkpoint,
                found=f"revision={revision!r}",
                hint=f"write hf://owner/name@{revision}" + (f"/{subfolder}" if subfolder else ""),
            )
        checkpoint = str(dataclasses.replace(reference, revision=revision))
    return f"{os.fspath(checkpoint).rstrip('/')}/{subfolder}" if subfolder else checkpoint
