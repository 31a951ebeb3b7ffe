"""What PEFT makes of an adapter_config.json: it checks few of the values that it reads, and takes them as Python does.

Everything here was seen by loading such configs with PEFT 0.21.2; where older releases differ, with 0.11.1 to 0.20.0.
What PEFT takes is brought to the value that it means (`Reading.document`), with a remark; what it refuses and what can
be understood all the same is in `Reading.refused`. The rest is left as it is, for the schema to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vera_tools.files.loose_json import Loose, is_beyond_floats, parse_loosely, plain
from vera_tools.files.strict_json import uncollected
from vera_tools.schema import shown

#: The keys of PEFT 0.11's VeraConfig. Releases before 0.14 refuse a config that holds any other.
_FIRST_KEYS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
        *("fan_in_fan_out", "bias", "modules_to_save", "init_weights", "layers_to_transform", "layers_pattern"),
    }
)
#: Keys that PEFT cannot pass on, because its own functions have arguments of these names.
_CLASHES = frozenset({"self", "cls"})


@dataclass(frozen=True)
class Reading:
    """One adapter_config.json as PEFT reads it.

    Attributes:
        document: Its keys with the values that PEFT takes them for, as plain JSON; it can be written again.
        refused: Why no release of PEFT reads the file, one clause each; empty where PEFT does.
        refused_before_21: Why releases before 0.21 do not, beside `refused`.
        tolerated: What PEFT reads although it is not what its own files hold, one clause each.
        unknown_before_14: Keys for which releases before 0.14 refuse it.
    """

    document: Any
    refused: tuple[str, ...] = ()
    refused_before_21: tuple[str, ...] = ()
    tolerated: tuple[str, ...] = ()
    unknown_before_14: tuple[str, ...] = ()

    @property
    def is_odd(self) -> bool:
        """Whether PEFT would have written it otherwise."""
        return bool(self.refused or self.refused_before_21 or self.tolerated)


def read(text: str, *, where: str) -> Reading:
    """Read the text of an adapter_config.json as PEFT does.

    Args:
        text: The file's text.
        where: The file.

    Raises:
        FormatError: nothing can be made of it.
    """
    return _reading(parse_loosely(text, where=where))


def meaning(data: Any) -> Any:
    """A parsed config with the values that PEFT takes its values for."""
    return _reading(Loose(data, (), ())).document


def _reading(loose: Loose) -> Reading:
    tolerated = dict.fromkeys(loose.tolerated)
    if not isinstance(loose.document, dict):
        return Reading(plain(loose.document, tolerated), loose.refused, (), tuple(tolerated))
    refused, before_21 = list(loose.refused), list[str]()
    document = dict(loose.document)
    kind = document.get("peft_type")
    if isinstance(kind, str) and kind != "VERA" and kind.upper() == "VERA":
        refused.append(f"peft_type is {kind!r}, and PEFT knows 'VERA' in capitals only")
        document["peft_type"] = "VERA"
    for key in sorted(_CLASHES & document.keys()):
        refused.append(f"the key {key!r} is an argument of PEFT's own")
        del document[key]
    for key, understand in _MEANINGS.items():
        if key in document:
            value = document[key]
            document[key] = understand(value)
            if _is_other(value, document[key]):
                tolerated[f"{key} is {shown(value)}, which PEFT takes for {shown(document[key])}"] = None
    initial = document.get("d_initial")
    if isinstance(initial, int | float) and _is_too_large(initial):
        refused.append(f"d_initial {shown(initial)} is too large for a float32")
        document["d_initial"] = 0.1  # PEFT's default: a loaded adapter does not use it
    bias = document.get("bias")
    if isinstance(bias, str) and bias.endswith("_only") and bias != "vera_only":
        before_21.append(f"bias is {bias!r}, which is 'vera_only' to PEFT from 0.21 on and unknown before")
        document["bias"] = "vera_only"
    unknown = tuple(sorted(str(key) for key in document.keys() - _FIRST_KEYS))
    # What is not finite here was understood by none of the above, and PEFT refuses it: so does the schema.
    not_understood = {
        key: _as_float(value) for key in _FIRST_KEYS & document.keys() if _is_infinite(value := document[key])
    }
    with uncollected():
        document = plain(document, tolerated) | not_understood
    return Reading(document, tuple(refused), tuple(before_21), tuple(tolerated), unknown)


def _hashable_truth(value: Any) -> Any:
    return value if isinstance(value, list | dict) else bool(value)  # PEFT puts it into a set


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else None  # PEFT does not look at it when it loads a local folder


def _mapping(value: Any) -> Any:
    return value if isinstance(value, dict) else None


def _dropout(value: Any) -> Any:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and not value > 0:  # PEFT asks whether it is above 0
        return 0.0 if value != 0 else value
    return value


def _initial(value: Any) -> Any:
    if isinstance(value, bool):
        return float(value)
    return 0.1 if isinstance(value, float) and not math.isfinite(value) else value


def _targets(value: Any) -> Any:
    if isinstance(value, str) and value.lower() == "all-linear":
        return "all-linear"
    return list(value) if isinstance(value, dict) else value


def _saved(value: Any) -> Any:
    if isinstance(value, list):
        return value
    if isinstance(value, str | dict):
        return list(value) or None  # a text is as many names as it has letters
    return value if value else None


def _layers(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, list):
        return value
    # A layer's number is looked for in the list, where 1.0 and true equal 1; what is no layer's number never matches.
    found = [int(item) for item in value if isinstance(item, int | float) and 0 <= item < 2**63 and item == item // 1]
    return found or value


def _patterns(value: Any) -> Any:
    if isinstance(value, dict):
        value = list(value)
    if isinstance(value, list):
        return [item if isinstance(item, str) else str(item) for item in value]
    return value if value else None


_MEANINGS: dict[str, Callable[[Any], Any]] = {
    "inference_mode": bool,  # set anew on loading
    "fan_in_fan_out": bool,
    "init_weights": bool,
    "ensure_weight_tying": bool,
    "save_projection": _hashable_truth,
    "base_model_name_or_path": _text,
    "revision": _text,
    "peft_version": _text,
    "auto_mapping": _mapping,
    "vera_dropout": _dropout,
    "d_initial": _initial,
    "target_modules": _targets,
    "modules_to_save": _saved,
    "layers_to_transform": _layers,
    "layers_pattern": _patterns,
}


def _is_other(value: Any, meant: Any) -> bool:
    """Whether a value was brought to another; 1 and true, and 0.0 and 0, are not the same."""
    return type(value) is not type(meant) or value != meant


def _as_float(value: float) -> float:
    return value if isinstance(value, float) else math.inf if value > 0 else -math.inf


def _is_infinite(value: Any) -> bool:
    return is_beyond_floats(value) or (isinstance(value, float) and not math.isfinite(value))


def _is_too_large(value: float) -> bool:
    if isinstance(value, int):
        return not -(2**63) <= value < 2**64
    return abs(value) > 3.4028234663852886e38
