"""Sphinx's configuration: `sphinx-build -W --keep-going -n -c docs/site . build/site`.

The sources are the project's Markdown files where they lie, so that a link works on GitHub and on the site alike. What
a page of the reference shows is made from the code (`generated`), in the place of a comment that GitHub does not show.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import generated  # noqa: E402

from vera_tools import __version__  # noqa: E402

project = "vera-tools"
release = version = __version__
author = copyright = "vera-tools maintainers"
root_doc = "docs/README"
include_patterns = [
    "*.md",
    "docs/*.md",
    "docs/**/*.md",
    "fixtures/README.md",
    "fixtures/platforms/README.md",
    "fuzz/README.md",
]
# Whole folders, so that they are not even looked into.
exclude_patterns = ["**/.*", "**/__pycache__", "build", "dist", "fixtures/[!pR]*", "schemas", "tests", "vera_tools"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
myst_heading_anchors = 4  # the anchors that GitHub makes
myst_enable_extensions = ["attrs_block"]
smartquotes = False  # --base is no dash
default_role = "code"  # docstrings have single backticks around code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_use_unqualified_type_names = True
# -n finds every link and cross-reference that leads nowhere. A type in a signature need have no page: most are of other
# projects, whose lists of names would have to be fetched, or reports, whose fields the schemas describe.
nitpick_ignore_regex = [("py:(class|obj|exc|data)", ".*")]
suppress_warnings = ["myst.header"]  # the changelog begins at its second level anew with each version

html_theme = "furo"
html_title = f"vera-tools {__version__}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
templates_path = ["templates"]
html_additional_pages = {"index": "to_the_root.html"}


def _complete(app: Any, docname: str, source: list[str]) -> None:
    """Put what is made from the code into a page; make the list of pages a table of contents."""
    source[0] = re.sub(r"^<!-- site: (\w+) -->$", lambda found: getattr(generated, found[1])(), source[0], flags=re.M)
    if docname in (root_doc, "docs/decisions/README"):
        source[0] = generated.with_contents(source[0])


def _folders(app: Any, doctree: Any) -> None:
    """A link to a folder becomes its path in the repository: there is nothing here that it could lead to."""
    from docutils import nodes
    from sphinx import addnodes

    here = (ROOT / app.env.docname).parent
    for link in list(doctree.findall(addnodes.pending_xref)):
        target = link.get("reftarget", "").split("#")[0]
        if link.get("reftype") == "myst" and target and (here / target).is_dir():
            path = (here / target).resolve().relative_to(ROOT).as_posix()
            named = [] if link.astext() == path else [nodes.Text(" ("), nodes.literal("", path), nodes.Text(")")]
            link.replace_self([*link.children, *named])


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _complete)
    app.connect("doctree-read", _folders)
