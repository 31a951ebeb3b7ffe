"""Which version of a distribution is installed: what importlib.metadata says, without it."""

from __future__ import annotations

import importlib.metadata
import sys
import zipfile

import pytest

from vera_tools import installed

NAMES = ("click", "numpy", "peft", "pytest", "safetensors", "torch", "transformers")


@pytest.fixture(autouse=True)
def anew():
    installed.version.cache_clear()
    yield
    installed.version.cache_clear()


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An empty folder that is all there is on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def make(folder, name, version, kind="dist-info"):
    path = folder / f"{name}-{version}.{kind}"
    path.mkdir()
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (path / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_standard_library_says(name):
    assert installed.version(name) == importlib.metadata.version(name)


def test_folders_alone_are_looked_at(monkeypatch):
    monkeypatch.setattr(installed, "_asked", lambda name: pytest.fail("was asked"))
    assert installed.version("numpy") == importlib.metadata.version("numpy")
    assert installed.version("nothing-of-this-name") is None


def test_the_first_on_the_path(path, monkeypatch):
    make(path, "torch", "2.0.0+cu118")
    (path / "torch_other-3.dist-info").mkdir()
    (path / "later").mkdir()
    make(path / "later", "torch", "1.0.0")
    monkeypatch.setattr(sys, "path", [str(path / "absent"), str(path), str(path / "later")])
    assert installed.version("torch") == importlib.metadata.version("torch") == "2.0.0+cu118"


def test_where_folders_do_not_say_it_the_standard_library_is_asked(path, monkeypatch):
    make(path, "torch", "1.2", kind="egg-info")
    assert installed.version("torch") == importlib.metadata.version("torch") == "1.2"
    installed.version.cache_clear()
    archive = path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("torch-3.4.dist-info/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 3.4\n")
    monkeypatch.setattr(sys, "path", [str(archive), str(path)])
    assert installed.version("torch") == importlib.metadata.version("torch") == "3.4"


def test_a_folder_that_was_left_behind_says_nothing(path):
    make(path, "torch", "1.0")
    make(path, "torch", "2.0")
    assert installed.version("torch") == importlib.metadata.version("torch")
    installed.version.cache_clear()
    for entry in list(path.iterdir()):
        for file in entry.iterdir():
            file.unlink()
    (path / "torch-1.0.dist-info").rmdir()
    (path / "torch-2.0.dist-info" / "RECORD").touch()
    assert installed.version("torch") == importlib.metadata.version("torch")
