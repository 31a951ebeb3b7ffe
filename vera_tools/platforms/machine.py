"""This machine: the CPU kernels that torch picks here, and which platform that is. torch itself is not imported."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vera_tools.platforms.names import machine_name, platform_of

#: What ATen asks of an x86-64 CPU, best first (aten/src/ATen/native/DispatchStub.cpp), in the words of /proc/cpuinfo.
_X86 = {
    "avx512": {"avx512vl", "avx512bw", "avx512dq", "fma"},
    "avx2": {"avx2", "fma"},
}
_CPUINFO, _VECTOR_LENGTH = Path("/proc/cpuinfo"), Path("/proc/sys/abi/sve_default_vector_length")


@dataclass(frozen=True)
class Capability:
    """A set of torch's CPU kernels.

    Attributes:
        name: "default", "avx2", "avx512", "sve256", ...; None where this system does not tell.
        source: "ATEN_CPU_CAPABILITY", where that is set to a set of kernels that this machine can have; else "cpu".
    """

    name: str | None
    source: str


def cpu_capability() -> Capability:
    """The kernels that torch picks on this machine, as far as the operating system tells."""
    machine = machine_name(platform.machine())
    forced = os.environ.get("ATEN_CPU_CAPABILITY", "").lower()
    if forced in {"x86_64": ("default", *_X86), "aarch64": ("default", "sve128", "sve256")}.get(machine, ("default",)):
        return Capability(forced, "ATEN_CPU_CAPABILITY")
    flags = set(_cpu_facts("flags" if machine == "x86_64" else "Features").split())
    if not flags:
        return Capability(None, "cpu")
    if machine == "x86_64":
        return Capability(next((name for name, wanted in _X86.items() if wanted <= flags), "default"), "cpu")
    return Capability(f"sve{8 * _vector_length()}" if "sve" in flags and _vector_length() else "default", "cpu")


def this_platform() -> str | None:
    """Which platform of the loader table this machine is, or None where torch has no known build for it."""
    return platform_of(platform.system(), platform.machine(), cpu_capability().name)


def cpu_model() -> str | None:
    """The CPU's name, where the operating system tells it."""
    return _cpu_facts("model name") or platform.processor() or None


def _cpu_facts(name: str) -> str:
    """What /proc/cpuinfo says of the first CPU under a name; "" elsewhere than on Linux."""
    return next((value for key, value in _cpuinfo() if key == name), "")


def _cpuinfo() -> Iterator[tuple[str, str]]:
    if platform.system() != "Linux":
        return
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _vector_length() -> int:
    """Bytes in an SVE register, as processes get it; 0 where the kernel does not say."""
    try:
        return int(_VECTOR_LENGTH.read_text("utf-8"))
    except (OSError, ValueError):
        return 0
