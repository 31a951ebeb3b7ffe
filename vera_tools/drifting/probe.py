"""Which projections the torch of this interpreter really draws, as JSON: a script that needs nothing but torch.

Run by path, under any Python >= 3.7 that has torch; vera-tools need not be installed there::

    python probe.py '{"pairs": [[42, 8, 64, 48]], "dtypes": ["float32"], "device": "cpu", "values": null}'

A pair is [prng_key, r, in_max, out_max]; ``values`` names a folder that the drawn tensors' bytes go to. What the
kernels do is fixed when torch is loaded (the CPU, ATEN_CPU_CAPABILITY), so every capability and device is a process of
its own.

The answer is up to two lines on stdout: first what was drawn, then which devices are there. Looking for devices starts
their drivers, which may hang; by then the first line is out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))


def main() -> None:
    """Answer the request in the first argument."""
    # A script's folder leads sys.path; this one's neighbours must not pass for modules that torch imports.
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != HERE]
    # Whatever libraries print goes to stderr, so that stdout holds the answer alone.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    request = json.loads(sys.argv[1])
    import torch

    device = torch.device(request["device"])
    missing = _missing(torch, device.type)
    if missing:
        sys.exit(missing)
    streams: dict[str, Any] = {}
    for name in request["dtypes"]:
        try:
            streams[name] = [
                _draw(torch, device, name, n, pair, request["values"]) for n, pair in enumerate(request["pairs"])
            ]
        except Exception as error:  # a device may lack a dtype; the others still count
            streams[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    print(json.dumps(dict(_facts(torch, device), streams=streams)), file=answer, flush=True)
    print(json.dumps({"devices": _devices(torch)}), file=answer, flush=True)


def _missing(torch: Any, kind: str) -> str | None:
    """Why nothing can be drawn on this kind of device, or None where torch sees one."""
    if kind == "cpu":
        return None
    backend = getattr(torch.backends if kind == "mps" else torch, kind, None)
    if backend is not None and backend.is_available():
        return None
    if kind == "mps":
        built = backend is not None and backend.is_built()
    else:
        built = getattr(torch.version, kind, None) or (kind == "cuda" and getattr(torch.version, "hip", None))
    name = kind.upper()
    return f"torch finds no {name} device on this machine" if built else f"this torch has no {name}"


def _draw(torch: Any, device: Any, name: str, number: int, pair: list[int], folder: str | None) -> dict[str, str]:
    """Draw one pair as PEFT does, and return the sha256 of its tensors."""
    key, r, in_max, out_max = pair
    torch.set_default_dtype(getattr(torch, name))
    generator = torch.Generator(device=device).manual_seed(key)
    digests = {}
    for tensor_name, shape in (("vera_A", (r, in_max)), ("vera_B", (out_max, r))):
        # PEFT's _kaiming_init, in its own order of operations.
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        with torch.no_grad():
            tensor = torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
        data = _little_endian(tensor.cpu())
        digests[tensor_name] = hashlib.sha256(data).hexdigest()
        if folder is not None:
            with open(os.path.join(folder, f"{name}-{number}-{tensor_name}"), "wb") as file:
                file.write(data)
    return digests


def _little_endian(tensor: Any) -> bytes:
    """The tensor's bytes; numpy may not be there, and has no bfloat16."""
    import ctypes

    width = tensor.element_size()
    data = ctypes.string_at(tensor.data_ptr(), tensor.numel() * width)
    if sys.byteorder == "little":
        return data
    swapped = bytearray(len(data))
    for byte in range(width):
        swapped[byte::width] = data[width - 1 - byte :: width]
    return bytes(swapped)


def _facts(torch: Any, device: Any) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_model": _cpu_model(),
        "cpu_capability": _capability(torch),
        "device_name": _device_name(torch, device),
        "device_threads": _device_threads(torch, device),
    }


def _capability(torch: Any) -> str:
    """Which set of CPU kernels torch has chosen: "default", "avx2", "avx512", "sve256", ..."""
    try:
        name = torch.backends.cpu.get_cpu_capability()
    except AttributeError:  # torch < 2.0
        line = [line for line in torch.__config__.show().splitlines() if "CPU capability usage" in line]
        name = line[0].split(":")[1].strip() if line else "unknown"
    return "default" if name in ("DEFAULT", "NO AVX") else name.lower()


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                # An emulator shows its host's "model name", so only x86 is asked for that.
                if line.startswith(("model name",) if _x86() else ("Hardware", "cpu model")):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def _x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _device_name(torch: Any, device: Any) -> str | None:
    if device.type in ("cuda", "xpu"):
        return str(getattr(torch, device.type).get_device_name(device))
    return None


def _device_threads(torch: Any, device: Any) -> list[int] | None:
    """[multiprocessors, threads on each]: how CUDA cuts a tensor into threads, and so what each one draws."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return [properties.multi_processor_count, getattr(properties, "max_threads_per_multi_processor", 2048)]


def _devices(torch: Any) -> list[str]:
    found = ["cpu"]
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            count = module.device_count()
            found += [name] if count == 1 else [f"{name}:{number}" for number in range(count)]
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        found.append("mps")
    return found


if __name__ == "__main__":
    main()
