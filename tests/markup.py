"""An HTML page as the tests look at it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: A name that would run, if a page let it.
HOSTILE = "<script>alert(1)</script>\"' onmouseover=x \u202e"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements opened and not closed, every attribute, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def assert_inert(text: str) -> None:
    """A page into which hostile names went has all elements closed, one script of its own, and loads nothing."""
    parsed = Page(text)
    assert not parsed.open
    assert not parsed.tags & {"link", "iframe", "object", "embed", "img"}
    assert not {name for _, name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")}
    assert text.count("<script>") == 1
    assert "\u202e" not in text
    assert "alert(1)" in parsed.text


_DRIVER = """<script>
const find = name => document.querySelector(`[name=${name}]`);
const said = [];
function set(name, value) {
  find(name).value = value;
  find(name).dispatchEvent(new Event("input", {bubbles: true}));
  said.push([...document.querySelectorAll(".rows li")].filter(row => row.offsetParent).length);
}
for (const [name, value] of STEPS) set(name, value);
said.push(document.documentElement.scrollWidth <= innerWidth);
document.title = JSON.stringify(said);
</script></body>"""


def in_a_browser(text, steps, *, size, folder):
    """Set a list's filters one after the other, in a window of this size.

    Returns:
        How many rows are seen after each step, and at last whether nothing is cut off on the right.
    """
    driver = _DRIVER.replace("STEPS", json.dumps(steps))
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", driver)
    (folder / "page.html").write_text(text, "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}", "--dump-dom"]
    command = [BROWSER, *options, (folder / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    (title,) = re.findall("<title>(.*?)</title>", shown)
    return json.loads(title)
