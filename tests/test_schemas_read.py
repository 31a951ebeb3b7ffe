"""Whatever passes a schema, or nearly does, is read or refused by name: Hypothesis over every file that is read."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.schemas import documents, nearly
from vera_tools import schema
from vera_tools.architectures import data
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import Manifest, ProjectionRecord
from vera_tools.drifting import comparison
from vera_tools.errors import VeraToolsError
from vera_tools.verifying.log import Log
from vera_tools.verifying.runs import Run


def log(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "log").write_text(text + "\n")
        Log(Path(folder) / "log", Run("0" * 64))


def report(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "report").write_text(text)
        comparison.load(Path(folder) / "report")


def base(name: str):
    def read(text: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_text(text)
            (Path(folder) / "model-1.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
            with BaseModel.open(folder) as model:
                data.architecture(model.config)

    return read


def metadata(text: str) -> None:
    ProjectionRecord.from_metadata({"vera_tools": text}, where="memory")


#: Each schema of a file that is read, and what reads it.
READERS = {
    "adapter_config.v1": VeraConfig.from_json,
    "manifest.v1": Manifest.from_json,
    "projections.v1": metadata,
    "verify-line.v1": log,
    "verify-run.v1": log,
    "drift.v1": report,
    "model_config.v1": base("config.json"),
    "model_index.v1": base("model.safetensors.index.json"),
}
_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("made", [documents, nearly], ids=["valid", "nearly valid"])
def test_whatever_a_schema_passes_is_read_or_refused_by_name(made, name):
    passed = []

    @_SETTINGS
    @given(made(name))
    def read(document):
        passed.append(not schema.problems(document, name))
        with contextlib.suppress(VeraToolsError):
            READERS[name](json.dumps(document))

    read()
    if made is documents:
        assert sum(passed) >= len(passed) // 4  # or else the generator makes other documents than the schema's
