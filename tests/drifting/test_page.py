"""The HTML report: what it says without pictures, that it is self-contained, and how a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.machine import x86
from tests.markup import Page
from vera_tools.drifting import page as drift_page
from vera_tools.pages import Made
from vera_tools.platforms.names import PLATFORMS

pytestmark = pytest.mark.capability

pytest.importorskip("matplotlib", reason="the pictures need matplotlib (the extra html)")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def report(drift_report):
    return drift_report


@pytest.fixture(scope="module")
def page(report):
    return drift_page.render(report)


def test_it_is_well_formed_and_self_contained(page):
    parsed = Page(page)
    assert not parsed.open
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed"}
    for tag, name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "data"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


@x86
def test_everything_is_said_in_words_too(page, report):
    text = Page(page).text
    for row in report.environments:
        assert row.gets in text
        assert row.device != "cpu" or f"{row.platform} ({PLATFORMS[row.platform]})" in text
        for stream in row.streams.values():
            assert stream.label.removeprefix("mt19937-") in text
    assert "✓ exact" in text
    assert "≠ differs" in text
    assert "f32-separate" in text
    assert report.environments[1].effect["worst"]["module"] in text
    assert f"{report.environments[1].effect['logits']['max_abs']:.1e}" in text
    assert page.count('role="img"') == 3


@x86
def test_the_map_has_signs_beside_its_colours(page, report):
    corner = report.samples[1].corner
    assert (page.count(">+</text>"), page.count(">−</text>")) == ((corner > 0).sum(), (corner < 0).sum())
    assert 0 < (corner != 0).sum() < corner.size


@x86
def test_the_same_report_gives_the_same_bytes(page, report):
    assert drift_page.render(report) == page


def test_nothing_that_a_user_names_can_break_out(report):
    from dataclasses import replace

    row = replace(report.environments[0], interpreter="<script>alert(1)</script>")
    text = drift_page.render(replace(report, environments=(row,), samples={}))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "no environment drew other values" in text


def test_many_layers_are_drawn_without_their_names(report):
    from dataclasses import replace

    layers = [
        {"module": f"layers.{n}.q", "in_features": 8, "out_features": 8, "relative_change": 1e-8 * (1 + n % 7)}
        for n in range(200)
    ]
    effect = {"differing": 0.5, "worst": layers[6], "layers": layers, "logits": None, "logits_why_not": "no base"}
    row = replace(report.environments[0], effect=effect)
    text = drift_page.render(replace(report, environments=(row,), samples={}))
    assert "layer, in the checkpoint" in text
    assert text.count("layers.6.q") == 1
    assert "layers.7.q" not in text


def test_legends_cover_no_dot_and_small_changes_are_told_apart(report):
    """One layer changes a million times as much as the others, which would all lie on the axis."""
    from dataclasses import replace

    layers = [
        {"module": f"layers.{n}.q", "in_features": 8, "out_features": 8, "relative_change": 1e-7 if n else 0.1}
        for n in range(3)
    ]
    effect = {"differing": 0.5, "worst": layers[0], "layers": layers, "logits": None, "logits_why_not": "no base"}
    row = replace(report.environments[0], effect=effect)
    text = drift_page.render(replace(report, environments=(row,), samples={}))
    dots = [float(x) for x in re.findall(r'<use xlink:href="#m\w+" x="([\d.]+)" y="[\d.]+" style="fill-opacity', text)]
    legend = text.index('id="legend_1"')
    assert len(dots) == 3 + 1  # the last one is the legend's own
    axis = float(re.search(r'id="patch_2">\s*<path d="M ([\d.]+)', text)[1])
    assert min(dots[:3]) - axis > 20
    assert legend > text.index('id="axes_1"')
    assert 'id="legend_1"' not in re.search(r'<g id="axes_1">.*?\n  </g>\n', text, re.DOTALL)[0]


def test_it_says_when_where_and_how_it_was_made(report):
    text = drift_page.render(report, made=Made("2026-01-02 03:04 UTC", "<host>", "vera-tools drift --report x.html"))
    assert "2026-01-02 03:04 UTC, on &lt;host&gt;, <code>vera-tools drift --report x.html</code>" in text
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text  # what is drawn takes the page's own colour
    assert "currentColor" in text


def test_without_matplotlib_it_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from vera_tools.cli import main; "
        f"main(['drift', '--report', {str(tmp_path / 'page.html')!r}])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'vera-tools[html]'" in result.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to look at the page with")
class TestBrowser:
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def pixels(cls, page, tmp_path_factory):
        """(height, width, 3) of the page as a browser shows it, 0 to 1."""
        from matplotlib.image import imread

        folder = tmp_path_factory.mktemp("browser")
        (folder / "page.html").write_text(page, "utf-8")
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1280,2000",
            f"--screenshot={folder / 'page.png'}",
            (folder / "page.html").as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=180)
        return imread(folder / "page.png")[..., :3]

    @staticmethod
    def share(pixels, colour: str) -> float:
        """Share of the picture that has this colour."""
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float((np.abs(pixels - wanted).max(-1) < 0.02).mean())

    @x86
    def test_verdict_matrix_and_pictures_are_there(self, pixels):
        assert pixels.shape == (2000, 1280, 3)
        assert self.share(pixels, "#dbeaf7") > 0.01  # the banner and the fused cells
        assert self.share(pixels, "#fdebd8") > 0.0005  # the separate cells
        assert self.share(pixels, "#0072b2") > 0.01  # the histogram's bars
        assert self.share(pixels, "#2d004b") + self.share(pixels, "#7f3b08") > 0.001  # both ends of the map

    def test_nothing_is_cut_off_at_the_right(self, pixels):
        margin = pixels[:, -8:]
        assert np.abs(margin - margin[0, 0]).max() < 0.02
