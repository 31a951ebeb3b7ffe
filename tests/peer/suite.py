"""PEFT's tests: taken out of its source archive, which pip fetches, and run under our plugin."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests import ROOT

VERSION = "0.21.2"
_SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
#: The modules that have tests about VeRA.
_MODULES = [
    *("config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "helpers"),
    *("initialization", "low_level_api", "other", "quantization", "seq_classifier", "token_classification_qa"),
    *("torch_compile", "tuners_utils", "vera", "common_gpu"),
]
#: Those whose tests are collected and run in a moment.
FAST = ["config", "custom_models", "initialization", "low_level_api", "other", "vera"]

Outcomes = dict[str, dict[str, str]]


def fetch(folder: Path) -> Path:
    """Put PEFT's tests into a folder, unless they are there.

    Args:
        folder: Where to.

    Returns:
        The folder that holds them.

    Raises:
        SystemExit: another PEFT is installed than the one whose tests these are.
    """
    if (installed := importlib.metadata.version("peft")) != VERSION:
        raise SystemExit(f"PEFT {installed} is installed, and these are the tests of {VERSION}: install that one")
    tests = folder / f"peft_{VERSION.replace('.', '_')}"
    if not tests.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"peft=={VERSION} --hash=sha256:{_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        subprocess.run([*pip, "-d", folder, "-r", wanted], check=True)
        with tarfile.open(folder / f"peft-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        (folder / f"peft-{VERSION}" / "tests").rename(tests)
        (tests / "__init__.py").touch()  # they import one another from their package
    return tests


def run(tests: Path, hub: Path, *, ours: bool, fast: bool) -> Outcomes:
    """Run the tests about VeRA.

    Args:
        tests: The folder from `fetch`.
        hub: The cache with the models that they ask the Hub for.
        ours: On `VeraModel`, not on PEFT's model.
        fast: Only those of `FAST`, and of those that run for each config, one of each kind.

    Returns:
        For each test its "outcome" (passed, failed, skipped) and "why".
    """
    outcomes = tests.parent / ("ours.json" if ours else "peft.json")
    outcomes.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PEER_OURS": "1" if ours else "",
        "PEER_LEAVE_OUT": "Vanilla MLP [1-4] VeRA" if fast else "",
        "PEER_OUTCOMES": str(outcomes),
    }
    modules = [tests / f"test_{name}.py" for name in (FAST if fast else _MODULES)]
    options = ["-q", "-p", "tests.peer.plugin", "-p", "no:cacheprovider", "-c", os.devnull]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", tests.parent, *modules],
        env=environment,
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode not in (0, 1) or not outcomes.exists():
        raise SystemExit(f"pytest exited {result.returncode}:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    found = json.loads(outcomes.read_text("utf-8"))
    return {name.partition("/")[2]: outcome for name, outcome in found.items()}
