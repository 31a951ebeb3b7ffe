"""The interpreters, CPU capabilities and devices that can be tried here, and one run of the probe in each.

What a kernel does is settled when torch is loaded, so each combination is a process of its own, which runs
`vera_tools.drifting.probe` by path. A probe that crashes or hangs is an answer too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vera_tools.drifting import probe
from vera_tools.errors import UsageError

#: What ATEN_CPU_CAPABILITY takes on each machine, weakest first.
CAPABILITIES = {
    "x86_64": ("default", "avx2", "avx512"),
    "amd64": ("default", "avx2", "avx512"),
    "aarch64": ("default", "sve128", "sve256"),
    "arm64": ("default", "sve128", "sve256"),
    "ppc64le": ("default", "vsx"),
    "s390x": ("default", "zvector"),
}


@dataclass(frozen=True)
class Interpreter:
    """A Python to probe.

    Attributes:
        label: What the user called it; None for the interpreter that runs vera-tools.
        command: How it is started.
    """

    label: str | None
    command: tuple[str, ...]


def this_interpreter() -> Interpreter:
    """The one that runs this code."""
    return Interpreter(None, (sys.executable,))


def python(executable: str | os.PathLike[str]) -> Interpreter:
    """``--python EXE``.

    Raises:
        UsageError: there is no such program.
    """
    name = os.fspath(executable)
    found = shutil.which(name)
    if found is None:
        raise UsageError("no such program", where=name, hint="--python takes a Python interpreter's path or name")
    return Interpreter(name, (found,))


def venv(folder: str | os.PathLike[str]) -> Interpreter:
    """``--venv DIR``.

    Raises:
        UsageError: not a virtual environment.
    """
    for place in (Path("bin", "python"), Path("Scripts", "python.exe")):
        if (path := Path(folder) / place).exists():
            return Interpreter(os.fspath(folder), (str(path),))
    raise UsageError("not a virtual environment", where=folder, expected="bin/python in it")


def torch_release(version: str) -> Interpreter:
    """``--torch VERSION``, through uv, which fetches that release into its own cache.

    Raises:
        UsageError: uv is not here.
    """
    uv = shutil.which("uv")
    if uv is None:
        raise UsageError(
            "--torch needs uv, which is not installed here",
            where=f"torch {version}",
            hint="install uv, or make a virtual environment with that torch and name it with --venv",
        )
    command = (uv, "run", "--quiet", "--isolated", "--no-project", "--with", f"torch=={version}", "--", "python")
    return Interpreter(f"torch {version} (uv)", command)


@dataclass(frozen=True)
class Answer:
    """What one run of the probe said.

    Attributes:
        facts: python, torch, system, machine, cpu_model, cpu_capability, device_name, device_threads; empty where the
            probe failed.
        streams: Default dtype to one {tensor: sha256} for each pair, or to the reason why it was not drawn.
        devices: The devices that are there.
        status: "ok", "failed" or "timeout".
        error: Why it failed, in one line.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, list[dict[str, str]] | str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu",)
    status: str = "ok"
    error: str | None = None


def ask(
    interpreter: Interpreter,
    pairs: Sequence[tuple[int, int, int, int]],
    *,
    dtypes: Sequence[str],
    device: str = "cpu",
    capability: str | None = None,
    values: Path | None = None,
    timeout: float,
) -> Answer:
    """Run the probe once.

    Args:
        interpreter: Which Python.
        pairs: (prng_key, r, in_max, out_max) of each pair to draw.
        dtypes: torch's default dtypes to draw them under.
        device: Where to draw them.
        capability: What to set ATEN_CPU_CAPABILITY to; None leaves the environment as it is.
        values: A folder for the drawn tensors' bytes, as ``<dtype>-<pair>-<tensor>``.
        timeout: Seconds after which the probe is ended.
    """
    request = {
        "pairs": pairs,
        "dtypes": dtypes,
        "device": device,
        "values": None if values is None else str(values),
    }
    environment = dict(os.environ)
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    try:
        code, output, errors = _run([*interpreter.command, probe.__file__, json.dumps(request)], environment, timeout)
    except OSError as error:
        return Answer(status="failed", error=f"could not be started: {error.strerror or error}")
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not lines:
        return Answer(status="timeout" if code is None else "failed", error=_reason(code, errors, timeout))
    facts = lines[0]
    streams = facts.pop("streams")
    devices = tuple(lines[1]["devices"]) if len(lines) > 1 else (device,)
    return Answer(facts, streams, devices)


def weaker_capabilities(machine: str, native: str) -> tuple[str, ...]:
    """The capabilities below the one that torch chose by itself: those that this CPU can be made to use as well."""
    ladder = CAPABILITIES.get(machine.lower(), ("default",))
    return ladder[: ladder.index(native)] if native in ladder else tuple(c for c in ("default",) if c != native)


def _run(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int | None, str, str]:
    """Exit code (None: it ran out of time), stdout and stderr."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(process)
            output, errors = process.communicate()
            return None, output, errors
        except BaseException:
            _end(process)
            raise
    return process.returncode, output, errors


def _end(process: subprocess.Popen[str]) -> None:
    # uv and wrapper scripts start the real interpreter as a child, which must end too.
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _reason(code: int | None, errors: str, timeout: float) -> str:
    if code is None:
        return f"no answer within {timeout:g} seconds"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:200] if lines else f"exit code {code}, and nothing drawn"
