"""`assert_reproducible`: passes with the report, or fails with what `verify` has to say."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit
from vera_tools.errors import UsageError
from vera_tools.testing import assert_reproducible


def test_what_passes_gives_its_report():
    report = assert_reproducible(CHECKPOINTS / KEPT, base=base_of(CHECKPOINTS / KEPT), require_loads="peft>=0.21")
    assert (report.verdict, report.ok) == ("reproducible", True)
    assert assert_reproducible(CHECKPOINTS / SEED_ONLY, require="unproven").verdict == "unproven"


def test_what_does_not_says_why_and_what_to_do(tmp_path):
    with pytest.raises(AssertionError, match=r"(?s)UNPROVEN.*no recipe is recorded.*next: .*vera-tools record"):
        assert_reproducible(CHECKPOINTS / SEED_ONLY)
    with pytest.raises(AssertionError, match=r"(?s)REPRODUCIBLE\n.*peft<0.21:bfloat16: not exact"):
        assert_reproducible(CHECKPOINTS / KEPT, require_loads="peft<0.21:bfloat16")
    folder = shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "edited")
    edit(folder, lambda arrays: arrays["base_model.vera_A"].view(np.uint32).__setitem__((0, 0), 0))
    with pytest.raises(AssertionError, match=r"(?s)edited: DRIFT\n.*in 1 place: .*next: "):
        assert_reproducible(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AssertionError, match=r"edited: FAILED tensors.file\n  tensors.file: "):
        assert_reproducible(folder)


def test_what_is_asked_wrongly_is_no_failed_assertion(tmp_path):
    with pytest.raises(UsageError, match="no such file or folder"):
        assert_reproducible(tmp_path / "nothing")
