"""Links in a folder that lead out of it: what they lead to is not sent, copied or taken over."""

from __future__ import annotations

import os
import sys

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, CONFIG, KEPT, WEIGHTS, files_of
from tests.command import run_process
from tests.merging.models import make_adapter, make_base
from vera_tools.errors import FormatError

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own"),
    pytest.mark.filterwarnings("ignore::vera_tools.errors.VeraToolsWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"),
]


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "home" / "secret"
    path.parent.mkdir()
    path.write_text('{"token": "quagga"}')
    return path


@pytest.fixture(params=["absolute", "relative", "of a link", "through a folder"])
def lead_out(request, secret, tmp_path):
    """Puts a link to the secret into the place of a file."""

    def put(path):
        path.unlink(missing_ok=True)
        if request.param == "absolute":
            path.symlink_to(secret)
        elif request.param == "relative":
            path.symlink_to(os.path.relpath(secret, path.parent))
        elif request.param == "of a link":
            (path.parent / ".step").symlink_to(secret)
            path.symlink_to(".step")
        else:
            (path.parent / ".home").symlink_to(secret.parent)
            path.symlink_to(".home/secret")

    return put


def convert(source, out, base):
    return vera_tools.to_lora(source, out, base=base)


COMMANDS = {
    "strip": lambda source, out, base: vera_tools.strip_projections(source, out),
    "convert": convert,
}


@pytest.mark.parametrize("name", ["NOTICE.txt", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_conversion_carries_no_such_file_over(tmp_path, lead_out, command, name):
    source, base = make_adapter(tmp_path / "adapter"), make_base(tmp_path / "base")
    lead_out(source / name)
    with pytest.raises(FormatError, match=f"{name}: this link leads out of the folder"):
        COMMANDS[command](source, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_nor_does_it_read_its_own_files_elsewhere(tmp_path, name):
    source = make_adapter(tmp_path / "adapter")
    (source / name).rename(tmp_path / name)
    (source / name).symlink_to(tmp_path / name)
    with pytest.raises(FormatError, match=f"{name}: this link leads out"):
        vera_tools.strip_projections(source, tmp_path / "out")
    assert vera_tools.verify(source).checkpoints[0].verdict == "reproducible"  # reading is another matter
    vera_tools.strip_projections(source, in_place=True)  # and where nothing goes elsewhere
    assert vera_tools.verify(source).checkpoints[0].verdict == "reproducible"


@pytest.mark.parametrize(
    "name",
    [
        "NOTICE.txt",
        "config.json",
        "tokenizer.json",
        "README.md",
        "additional_chat_templates/config.json",
        "additional_chat_templates",
    ],
)
def test_a_merge_takes_no_such_file_over(tmp_path, secret, name):
    source, base = make_adapter(tmp_path / "adapter"), make_base(tmp_path / "base")
    path = base / name
    if name == "additional_chat_templates":
        (secret.parent / "config.json").write_text("{}")
        path.symlink_to(secret.parent)
    else:
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
    with pytest.raises(FormatError, match="this link leads out of the folder"):
        vera_tools.merge(source, base=base, output=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "home"]


def test_a_base_whose_weights_are_kept_elsewhere(tmp_path):
    """As tools that share weights lay them out."""
    source, base = make_adapter(tmp_path / "adapter"), make_base(tmp_path / "base")
    (base / "model.safetensors").rename(tmp_path / "kept")
    (base / "model.safetensors").symlink_to(tmp_path / "kept")
    assert vera_tools.merge(source, base=base, output=tmp_path / "out").finished


@pytest.mark.parametrize("name", ["NOTICE.txt", CONFIG, WEIGHTS, "tokenizer.json", "README.md"])
def test_push_sends_no_such_file(hub, tmp_path, lead_out, secret, name):
    folder = tmp_path / "adapter"
    for file, content in files_of(CHECKPOINTS / KEPT).items():
        folder.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)
    lead_out(folder / name)
    with pytest.raises(FormatError, match=f"{name}: this link leads out of the folder"):
        vera_tools.push(folder, "ann/x")
    assert hub.requests == []
    result = run_process("push", folder, "ann/x")
    assert (result.returncode, "leads out of the folder" in result.stderr) == (4, True)
    assert "quagga" not in result.stderr


def test_links_that_stay_are_followed(tmp_path):
    source = make_adapter(tmp_path / "adapter")
    (source / "LICENSE").write_text("free")
    (source / "NOTICE.txt").symlink_to("LICENSE")
    (tmp_path / "alias").symlink_to(source)  # and the folder itself may be one
    vera_tools.strip_projections(tmp_path / "alias", tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE.txt").read_text() == "free"


def test_the_hubs_cache_keeps_links_to_its_blobs(hub, tmp_path):
    from huggingface_hub import snapshot_download

    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT) | {"NOTICE.txt": b"free"})
    folder = snapshot_download("ann/x")
    vera_tools.strip_projections(folder, tmp_path / "out")
    assert (tmp_path / "out" / "NOTICE.txt").read_bytes() == b"free"


def test_a_link_that_is_turned_after_it_was_looked_at(tmp_path, secret, monkeypatch):
    from vera_tools.files.local import LocalFolder

    source = make_adapter(tmp_path / "adapter")
    (source / "NOTICE.txt").write_text("free")
    open_ = LocalFolder.open

    def turn(self, name):
        if name == "NOTICE.txt":
            (source / name).unlink()
            (source / name).symlink_to(secret)
        return open_(self, name)

    monkeypatch.setattr(LocalFolder, "open", turn)
    with pytest.raises(FormatError, match="leads out"):
        vera_tools.strip_projections(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    adapter, source = make_adapter(tmp_path / "other"), make_base(tmp_path / "base")
    (source / "NOTICE.txt").write_text("free")
    monkeypatch.setattr(LocalFolder, "open", turn)
    with pytest.raises(FormatError, match="leads out"):
        vera_tools.merge(adapter, base=source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
