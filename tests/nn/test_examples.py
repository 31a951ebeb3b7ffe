"""The example runs, and shows what it says."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import ROOT


def test_digits():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "examples" / "digits.py", "--epochs", "12", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = {row["method"]: row for row in json.loads(result.stdout)}
    assert rows["no adaptation"]["accuracy"] < 0.3
    assert rows["full fine-tuning"]["accuracy"] > 0.85
    assert rows["LoRA"]["accuracy"] > 0.8
    assert rows["VeRA"]["accuracy"] > 0.75
    # Three layers with d of 128 and b of 128 each.
    assert rows["VeRA"]["trainable"] == 3 * (128 + 128)
    for figure in ("trainable", "checkpoint_bytes"):
        assert rows["VeRA"][figure] < rows["LoRA"][figure] < rows["full fine-tuning"][figure]
