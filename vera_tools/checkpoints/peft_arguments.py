"""The keyword arguments that code written for PEFT passes on, where they mean something else here or nothing."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from vera_tools.errors import UsageError
from vera_tools.files.hub_reference import Reference
from vera_tools.files.opening import is_on_hub


class _Argument(NamedTuple):
    """The values of an argument for which vera-tools does what PEFT does, and what to do about the others.

    `same` is None where it does with any value.
    """

    same: tuple[object, ...] | None
    hint: str = ""


_ANY = _Argument(None)
#: How PEFT asks the Hub; ours is asked as the environment says.
HUB = {
    "token": _Argument((None, True), "set HF_TOKEN, or log in with `hf auth login`"),
    "use_auth_token": _Argument((None, True), "set HF_TOKEN, or log in with `hf auth login`"),
    "cache_dir": _Argument((None,), "set HF_HUB_CACHE"),
    "local_files_only": _Argument((False,), "set HF_HUB_OFFLINE=1"),
    "endpoint": _Argument((None,), "set HF_ENDPOINT"),
    "proxies": _Argument((None,), "set HTTPS_PROXY"),
    "local_dir": _Argument((None,), "fetch it with `vera-tools pull owner/name -o FOLDER`, and load the folder"),
    "repo_type": _Argument((None, "model"), "an adapter is a model repository"),
    "force_download": _Argument((False,), "vera-tools reads the files that the Hub has now"),
    **dict.fromkeys(("resume_download", "etag_timeout", "user_agent"), _ANY),
}
CREATING = {"mixed": _Argument((False,), "put adapters of other kinds on with PEFT")}
LOADING = {
    **HUB,
    "ephemeral_gpu_offload": _Argument((False,), "move the model with .to()"),
    "use_safetensors": _Argument((None, True), "pass allow_pickle=True for an adapter_model.bin"),
    "ignore_mismatched_sizes": _Argument(
        (False,),
        "a checkpoint is loaded whole or not at all; load what fits of it with "
        "vera_tools.nn.set_peft_model_state_dict(..., ignore_mismatched_sizes=True)",
    ),
    # How PEFT spreads a base that accelerate has put on several devices already; the vectors follow their layers.
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"), _ANY),
}
SAVING = {
    "safe_serialization": _Argument((True,), "adapters are written as safetensors only, which runs no code"),
    "path_initial_model_for_weight_conversion": _Argument((None,), "VeRA does not change the base when it begins"),
    "push_to_hub": _Argument((False,), "save it, then `vera-tools push FOLDER owner/name`"),
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
        reference = Reference.parse(os.fspath(checkpoint)) if is_on_hub(checkpoint) else None
        if reference is None or reference.revision not in (None, revision):
            raise UsageError(
                "has no such revision",
                where=checkpoint,
                found=f"revision={revision!r}",
                hint=f"write hf://owner/name@{revision}" + (f"/{subfolder}" if subfolder else ""),
            )
        checkpoint = str(dataclasses.replace(reference, revision=revision))
    return f"{os.fspath(checkpoint).rstrip('/')}/{subfolder}" if subfolder else checkpoint
