"""The better witness: the transformers that is installed here, asked about one class and one configuration.

It is asked in a process of its own. Importing torch and transformers takes seconds and a gigabyte, changes what the
process does with signals and threads, and can fail in ways that end it; a tool that works without them stays free of
all that, and one hung import can be ended. The process builds the class on torch's meta device and answers in JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vera_tools.architectures import probe
from vera_tools.architectures.architecture import Architecture, Tie
from vera_tools.architectures.data import Config
from vera_tools.architectures.renaming import Step
from vera_tools.architectures.trees import Tree
from vera_tools.errors import UnprovenError


def is_there() -> bool:
    """Whether this interpreter has a transformers and a torch to ask; neither is imported for it."""
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", "torch"))


def ask_transformers(
    config: Config, name: str, *, python: str = sys.executable, timeout: float = 300.0
) -> Architecture:
    """What a transformers says of a class under a configuration: exactly this model, every parameter by its own name.

    Args:
        config: Parsed config.json.
        name: The class.
        python: The interpreter whose transformers is asked.
        timeout: Seconds to wait.

    Raises:
        UnprovenError: there is no transformers 5, it has no such class, or cannot build it; the message says which.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(json.dumps(config).encode())
        command = [python, probe.__file__, name, str(path)]
        try:
            answer = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnprovenError("transformers cannot be asked", where=name, found=str(error)) from error
    if answer.returncode != 0:
        reason = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise UnprovenError("transformers does not build the class", where=name, found=reason)
    return from_document(json.loads(answer.stdout.splitlines()[-1]))


def from_document(document: dict[str, Any]) -> Architecture:
    """The architecture that an answer of probe.py describes."""
    prefix = document["base_model_prefix"]
    steps = [
        Step.from_document(step, scope=group["scope"], prefix=prefix if group["scope"] is not None else "")
        for group in document["conversions"]
        for step in group["steps"]
    ]
    steps += [Step.from_document(step, scope=None, prefix="") for step in document["legacy"]]
    ties = [Tie("", target, source) for tie in document["ties"] for target, source in tie["keys"]]
    ties += [Tie("", other, group[0], fixed=True) for group in document["shared"] for other in group[1:]]
    return Architecture(
        name=document["class"],
        origin=f"transformers {document['transformers']}",
        model_type=document["model_type"],
        base_model_prefix=prefix,
        input_embeddings=document["input_embeddings"],
        output_embeddings=document["output_embeddings"],
        steps=tuple(steps),
        ties=tuple(ties),
        varying=(),
        ignored_missing=tuple(document["ignored"]["missing"]),
        ignored_unexpected=tuple(document["ignored"]["unexpected"]),
        tree=Tree(document["modules"], {}),
        _heads=document["heads"],
        parameters={name: tuple(shape) for name, shape in document["parameters"].items()},
        switches=tuple(document["switches"]),
        place=document["place"],
    )
