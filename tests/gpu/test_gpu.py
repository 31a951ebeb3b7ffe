"""The script that measures on a CUDA device, run there; and its own logic, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.gpu import measure
from tests.peers import QUIET_PEERS

pytestmark = QUIET_PEERS

RESULTS = sorted((Path(__file__).parent / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_what_was_measured_is_right_and_its_page_says_so(file):
    report = json.loads(file.read_text("utf-8"))
    assert all(section.get("ok", True) and "error" not in section for section in report["sections"].values())
    assert file.with_suffix(".md").read_text("utf-8") == measure.markdown(report)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_everything_is_pefts_on_cuda(tmp_path):
    assert measure.main(["-o", str(tmp_path)]) == 0


@pytest.mark.slow
def test_the_script_measures_what_it_says(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    assert measure.main(["-o", str(tmp_path), "--device", "cpu"]) == 0
    (report,) = (json.loads(path.read_text()) for path in Path(tmp_path).glob("*.json"))
    sections = report["sections"]
    assert all(section.get("ok", True) and "error" not in section for section in sections.values())
    drawn = sections["generator"]["streams"]["float32"]
    assert drawn["made by"].startswith("mt19937")
    assert len(drawn["drawn"]) > 3
    assert sections["performance"]["figures"]["float32"]["forward, ms"].keys() == {
        "products alone",
        "vera-tools",
        "PEFT",
    }
    (page,) = (path.read_text() for path in Path(tmp_path).glob("*.md"))
    assert "| float32 |" in page
    assert "not ok" not in page


@pytest.mark.slow
def test_what_differs_is_seen(tmp_path, monkeypatch):
    """An adapter that is not loaded as it was saved; the others of the sections take no part."""
    monkeypatch.setattr(measure, "save_adapter", lambda model, folder: _spoilt(model, folder))
    result = measure.beside_peft("float32", measure.llama, tmp_path, "cpu")
    assert not result["ok"]
    assert result["differences"]["ours loaded in PEFT"] > result["limit"]
    assert result["differences"]["logits"] <= result["limit"]


def _spoilt(model, folder):
    from vera_tools.nn import save_adapter

    layer = next(iter(model.vera_layers().values()))
    with torch.no_grad():
        layer.vera_lambda_b["default"].add_(0.5)
        save_adapter(model, folder)
        layer.vera_lambda_b["default"].sub_(0.5)
