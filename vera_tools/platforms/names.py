"""The platforms that torch's wheels are built for, as far as they draw differently: their names, and who is which.

How float32 draws round is decided by the compiler of a build and by the CPU kernels that it picks, so a platform is an
operating system and a machine, and on Linux x86-64 whether there is AVX2 (docs/kernels.md).
"""

from __future__ import annotations

#: Platform: what people call it, in the order of tables.
PLATFORMS = {
    "linux-x86_64": "Linux",
    "linux-aarch64": "Linux",
    "windows-x86_64": "Windows",
    "macos-arm64": "Apple silicon",
    "macos-x86_64": "Intel Mac",
    "linux-x86_64-without-avx2": "Linux without AVX2",
}

#: Platform: the last minor release of torch that has a build for it.
ENDED = {"macos-x86_64": (2, 2)}

#: One name for each kind of machine, as operating systems spell it in lower case.
MACHINES = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def machine_name(machine: str | None) -> str:
    """One spelling of each machine: "x86_64" for Windows' "AMD64", "aarch64" for macOS' "arm64"."""
    name = (machine or "").lower()
    return MACHINES.get(name, name)


def platform_of(system: str | None, machine: str | None, capability: str | None) -> str | None:
    """The platform that a torch with these CPU kernels runs on, or None where torch has no known build for it.

    Args:
        system: As `platform.system()` says: "Linux", "Darwin", "Windows".
        machine: As `platform.machine()` says. A translated Python says what its own build is for.
        capability: torch's CPU kernels: "default", "avx2", ... Only Linux x86-64 needs to know them.
    """
    place = system or "", machine_name(machine)
    if place == ("Linux", "x86_64"):
        return None if capability is None else f"linux-x86_64{'-without-avx2' if capability == 'default' else ''}"
    return {
        ("Linux", "aarch64"): "linux-aarch64",
        ("Windows", "x86_64"): "windows-x86_64",
        ("Darwin", "aarch64"): "macos-arm64",
        ("Darwin", "x86_64"): "macos-x86_64",
    }.get(place)
