"""Paths that others chose: which stay in their folder, and that none other is taken."""

from __future__ import annotations

import pytest

from vera_tools.errors import FormatError, HubError
from vera_tools.files.relative import fault_of, refuse_path

STAYS = ["a", "adapter_config.json", "a/b/c.json", "..a", "a..", "...", "a b", "é", "ab:c", ".hidden", "-", "C"]
LEAVES = {
    "/home/u/x.json": "is absolute",
    "//host/share": "is absolute",
    "../x": "holds an empty part",
    "a/../../x": "holds an empty part",
    "..": "holds an empty part",
    ".": "holds an empty part",
    "a//b": "holds an empty part",
    "a/": "holds an empty part",
    "a/./b": "holds an empty part",
    "a\\b": "holds a backslash",
    "..\\x": "holds a backslash",
    "a\0b": "holds a NUL",
    "C:x": "names a drive",
    "c:/x": "names a drive",
    "": "is empty",
    "\udc80": "holds half a character",
}


@pytest.mark.parametrize("path", STAYS)
def test_a_path_that_stays(path):
    assert fault_of(path) is None
    assert refuse_path(path, where="x") == path


@pytest.mark.parametrize("path", LEAVES, ids=ascii)
def test_a_path_that_leaves(path):
    with pytest.raises(HubError, match=LEAVES[path]) as caught:
        refuse_path(path, where="listing", error=HubError)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("path", [None, 1, True, ["a"], {"a": 1}, b"a"])
def test_what_is_no_text(path):
    with pytest.raises(FormatError, match="is no text"):
        refuse_path(path, where="x")
