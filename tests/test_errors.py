"""Errors and reports cross from one process to another, and errors come back from the documents that hold them."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import shutil

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, PAIR, SEED_ONLY, edit
from vera_tools.errors import FormatError, NotVeraError, VeraToolsError
from vera_tools.verifying.report import CheckpointReport, Failed, Skipped


def every_class():
    """Every class of error, wherever in the package it stands."""
    for module in pkgutil.walk_packages(vera_tools.__path__, "vera_tools."):
        if not module.name.startswith(("vera_tools.nn", "vera_tools.__main__")):
            importlib.import_module(module.name)
    found, waiting = [], [VeraToolsError]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return found


def one_of(kind):
    if issubclass(kind, NotVeraError):
        return kind("this holds LORA", kind="LORA", where="a/b", hint="pass VeRA's")
    return kind("wrong", where="a/b", expected="this", found="that", hint="do so")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_is_pickled(protocol):
    kinds = every_class()
    assert len(kinds) >= 8
    for kind in kinds:
        error = one_of(kind)
        error.add_note("in the second file") if hasattr(error, "add_note") else None
        back = pickle.loads(pickle.dumps(error, protocol))
        assert (type(back), back.args, vars(back), str(back)) == (kind, error.args, vars(error), str(error))


def test_every_error_comes_back_from_its_document():
    for kind in every_class():
        error = one_of(kind)
        back = VeraToolsError.from_dict(error.to_dict())
        assert (type(back), back.args, vars(back)) == (kind, error.args, vars(error))
        assert back.to_dict() == error.to_dict()
    newer = {**FormatError("wrong").to_dict(), "type": "NewError"}
    assert type(VeraToolsError.from_dict(newer)) is FormatError


def test_reports_are_pickled(tmp_path):
    for name, source in (("good", KEPT), ("drift", KEPT), ("seeds", SEED_ONLY), ("cut", KEPT)):
        shutil.copytree(CHECKPOINTS / source, tmp_path / name)
    edit(tmp_path / "drift", lambda tensors: tensors[PAIR[0]].__setitem__((1, 3), 0.5))
    (tmp_path / "cut" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    found = vera_tools.verify(tmp_path, recursive=True, require_loads="peft>=0.21")
    gone = vera_tools.verify(tmp_path / "good", listed=[tmp_path / "gone"], require_loads="peft>=0.21")
    inside = (found.checkpoints[0], found.skipped[0], gone.failed[0])
    assert [type(outcome) for outcome in inside] == [CheckpointReport, Skipped, Failed]
    assert [checkpoint.verdict for checkpoint in found.checkpoints] == ["invalid", "drift", "reproducible", "unproven"]
    for report in (found, gone):
        back = pickle.loads(pickle.dumps(report))
        assert (back.checkpoints, back.skipped) == (report.checkpoints, report.skipped)
        assert back.to_dict() == report.to_dict()
        assert (back.exit_code, back.to_junit()) == (report.exit_code, report.to_junit())
    good = tmp_path / "good"
    for report in (
        vera_tools.inspect(good),
        vera_tools.diff(good, tmp_path / "drift"),
        vera_tools.strip_projections(good, output=tmp_path / "small"),
        vera_tools.record(tmp_path / "small"),
    ):
        assert pickle.loads(pickle.dumps(report)).to_dict() == report.to_dict()
