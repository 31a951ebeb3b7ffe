"""Architectures of the data, by the class's name and entries of config.json."""

from __future__ import annotations

from typing import Any

from vera_tools.architectures import data
from vera_tools.architectures.architecture import Architecture


def known(name: str, **entries: Any) -> Architecture:
    """What the data says of a class whose config.json holds these entries besides its name."""
    found = data.architecture({"architectures": [name], **entries})
    assert found is not None
    return found
