"""The page of `diff`: each layer's change, whatever else differs, and names that cannot break out."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, edit
from tests.command import run_cli
from tests.markup import Page
from vera_tools.comparing.page import render


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same adapter, and one of which all layers but the first moved, each by its place in per cent."""
    folder = tmp_path_factory.mktemp("pair")
    for name in "ab":
        shutil.copytree(CHECKPOINTS / KEPT, folder / name)

    def move(tensors):
        for place, name in enumerate(name for name in sorted(tensors) if "lambda_b" in name):
            tensors[name][:] *= 1 + place / 100

    edit(folder / "b", move)
    return folder / "a", folder / "b"


def test_each_layer_is_shown_with_its_change(pair):
    report = vera_tools.diff(*pair)
    text = render(report)
    words = Page(text).text
    assert "✗ not equal" in words
    widths = dict(re.findall(r'<tr><th>([^<]*)</th>.*?style="width: ([\d.]+)%"', text))
    largest = max(layer.relative_norm for layer in report.layers)
    moved = [layer for layer in report.layers if layer.relative_norm]
    assert len(moved) == len(report.layers) - 1 > 1
    assert widths == {layer.module: f"{100 * layer.relative_norm / largest:.1f}" for layer in moved}
    for layer in report.layers:
        assert f"{layer.module} {layer.relative_norm:.3g}" in words
    for tensor in report.tensors:
        assert tensor.name in words
    assert f"{report.equal_tensors} tensors are the same bit for bit" in words


def test_what_is_equal_and_what_cannot_be_known(pair):
    equal = vera_tools.diff(pair[0], pair[0])
    words = Page(render(equal)).text
    assert "✓ config and tensors are equal" in words
    assert "None: both make exactly the same updates" in words
    unknown = replace(vera_tools.diff(*pair), layers=None, why_not="<b>no base</b>")
    assert "Not known: <b>no base</b>" in Page(render(unknown)).text


def test_names_cannot_break_out(pair):
    report = vera_tools.diff(*pair)
    hostile = "</table><script>alert(1)</script>"
    layers = tuple(replace(layer, module=hostile) for layer in report.layers)
    tensors = tuple(replace(tensor, name=hostile) for tensor in report.tensors)
    config = (("target_modules", hostile, [hostile]),)
    text = render(replace(report, a=hostile, b=hostile, layers=layers, tensors=tensors, config=config))
    parsed = Page(text)
    assert not parsed.open
    assert "script" not in parsed.tags
    assert "script-src 'none'" in text


def test_the_command(pair, tmp_path):
    page = tmp_path / "diff.html"
    assert run_cli("diff", *pair, "--report", page).returncode == 1
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert run_cli("diff", *pair, "--report", tmp_path / "none" / "page.html").returncode == 2
