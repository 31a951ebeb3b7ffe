"""The three names every dtype has: safetensors' code, the name users know, and numpy's dtype.

numpy and ml_dtypes (bfloat16 and the float8 family for numpy) are imported on first need only: the command line needs
names alone to say what it can do.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[Any]"

# safetensors code: (name, bits per element); every code that safetensors 0.8 defines.
_TABLE = {
    "F64": ("float64", 64),
    "F32": ("float32", 32),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I64": ("int64", 64),
    "I32": ("int32", 32),
    "I16": ("int16", 16),
    "I8": ("int8", 8),
    "U64": ("uint64", 64),
    "U32": ("uint32", 32),
    "U16": ("uint16", 16),
    "U8": ("uint8", 8),
    "BOOL": ("bool", 8),
    "C64": ("complex64", 64),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "F8_E8M0": ("float8_e8m0fnu", 8),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 8),
    "F6_E2M3": ("float6_e2m3fn", 6),
    "F6_E3M2": ("float6_e3m2fn", 6),
    "F4": ("float4_e2m1fn", 4),
}
NAMES = {code: name for code, (name, _) in _TABLE.items()}
CODES = {name: code for code, name in NAMES.items()}
BITS = {code: bits for code, (_, bits) in _TABLE.items()}

#: The dtypes that VeRA vectors and projections are kept in, and that PEFT casts projections to.
FLOATS = ("float32", "float64", "bfloat16", "float16")
HALVES = ("bfloat16", "float16")

#: The short forms used in recipe names.
SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
LONG = {short: name for name, short in SHORT.items()}


@functools.cache
def np_dtype(name: str) -> np.dtype[Any]:
    """The little-endian numpy dtype called `name` ("float32", "bfloat16", ...).

    Raises:
        TypeError, AttributeError: numpy and ml_dtypes have no such dtype, or files pack it more tightly than they do.
    """
    import numpy as np

    if name.startswith(("float6_", "float4_")):
        raise TypeError(f"{name} takes less than a byte in files, and a whole one in numpy")
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    else:
        dtype = np.dtype(name).newbyteorder("<")
    return dtype
