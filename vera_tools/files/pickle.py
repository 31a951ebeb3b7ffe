"""adapter_model.bin, which PEFT wrote before safetensors: a pickle, read on request by torch's weights_only loader.

The one place outside `vera_tools.nn` that needs torch, imported when it is called for.
"""

from __future__ import annotations

import io
import struct

from vera_tools.dtypes import CODES, np_dtype
from vera_tools.errors import FormatError, UsageError
from vera_tools.files import local, safetensors
from vera_tools.files.local import Folder, MemoryFile

#: A pickle is read into memory whole; no VeRA adapter comes near this.
MAX_PICKLE = 8 << 30


def read_pickle(folder: Folder, name: str) -> MemoryFile:
    """The tensors of a pickled state dict, as a safetensors file in memory, so that one reader reads everything.

    Raises:
        UsageError: torch is not installed.
        FormatError: not a plain dict of tensors, or it holds anything that weights_only refuses.
    """
    where = folder.path_of(name)
    try:
        import torch
    except ImportError as error:
        raise UsageError("reading a pickle needs torch", where=where, hint="pip install 'vera-tools[torch]'") from error
    file = folder.open(name)
    try:
        data = local.read_all(file, limit=MAX_PICKLE)
    finally:
        file.close()
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the pickle machine does
        reason = str(error).strip().split("\n", 1)[0]
        raise FormatError(f"torch's weights_only loader refuses it: {reason}", where=where) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FormatError("not a state dict", where=where, expected="a dict of tensors", found=type(state).__name__)
    arrays = {}
    for key, tensor in state.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in CODES:
            raise FormatError("safetensors has no such dtype", where=f"{where}: {key}", found=dtype)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        arrays[str(key)] = flat.view(np_dtype(dtype)).reshape(tuple(tensor.shape))
    infos = safetensors.layout({key: (array.dtype.name, array.shape) for key, array in arrays.items()})
    header = safetensors.encode_header(infos, {})
    body = b"".join(arrays[key].tobytes() for key in infos)
    return MemoryFile(where, struct.pack("<Q", len(header)) + header + body)
