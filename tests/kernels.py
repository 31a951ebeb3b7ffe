"""Functions of these tests, called where torch has other kernels than here.

Which kernels it has is settled when torch is loaded, from the CPU and ATEN_CPU_CAPABILITY, so that takes a process of
its own. What such a process costs is importing torch and PEFT, so one answers every call of a session: a line on its
standard input names a function and its arguments, and a line on its standard output is what the function returns.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from tests import ROOT

Call = Callable[..., Any]


@contextlib.contextmanager
def under(capability: str) -> Iterator[Call]:
    """A process whose torch has the kernels of `capability`: ``call(function, *arguments)``, all of them JSON."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels"],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    )

    def call(function: Call, *arguments: Any) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([function.__module__, function.__name__, arguments], default=os.fspath) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the process with {capability} kernels has ended"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    with process:
        yield call


def main() -> None:
    """Answer until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        try:
            answer = {"result": getattr(importlib.import_module(module), function)(*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
