"""A manifest that was changed, or cannot be read: `verify` names it, and nothing that relies on it goes on."""

from __future__ import annotations

import json
import shutil

import pytest

import vera_tools
from tests import FIXTURES
from tests.adapters import KEPT, MANIFEST, base_of, edit_json, files_of
from tests.command import run_json
from tests.verifying.reports import failed, message_of, one, statuses
from vera_tools.errors import CheckFailedError, FormatError, UnprovenError, VeraToolsWarning
from vera_tools.files import canonical_json

WIDTHS = "model.layers.0.self_attn.q_proj.weight"


def narrower(manifest):
    manifest["base"]["weights"][WIDTHS]["shape"][1] -= 8


def other_header(manifest):
    manifest["original"]["header"] = manifest["original"]["header"][:-8] + "ICAgICAg"[:8]


def other_config(manifest):
    manifest["original"]["config"] = manifest["original"]["config"].replace('"bias": "none"', '"bias": "all"')


#: What is compared with nothing else, and how it is changed.
CHANGES = {
    "a width of the base": narrower,
    "the original header": other_header,
    "the original config": other_config,
    "who wrote it": lambda manifest: manifest.update(tool={"name": "vera-tools", "version": "9"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A kept checkpoint and what was stripped from it, both recorded with the base."""
    top = tmp_path_factory.mktemp("made")
    kept = shutil.copytree(base_of(KEPT).with_name(KEPT), top / "kept")
    vera_tools.record(kept, base=base_of(KEPT))
    vera_tools.strip_projections(kept, top / "stripped")
    return top


@pytest.fixture
def stripped(made, tmp_path):
    return shutil.copytree(made / "stripped", tmp_path / "stripped")


@pytest.fixture
def kept(made, tmp_path):
    return shutil.copytree(made / "kept", tmp_path / "kept")


@pytest.mark.parametrize("what", CHANGES)
def test_what_nothing_else_tells_is_seen(stripped, what):
    assert statuses(one(stripped))["manifest.digest"] == "pass"
    edit_json(stripped / MANIFEST, CHANGES[what])
    report = one(stripped)
    assert failed(report) == {"manifest.digest"}
    assert "changed after it was written" in message_of(report, "manifest.digest")
    assert report.scope == "vectors not covered: the manifest cannot be used (see the failed checks)"
    assert vera_tools.verify(stripped).exit_code == 1


def break_it(folder):
    (folder / MANIFEST).write_text("{")


def change_it(folder):
    edit_json(folder / MANIFEST, narrower)


HOW = pytest.mark.parametrize(
    ("spoil", "error", "code"),
    [(change_it, CheckFailedError, 1), (break_it, FormatError, 4)],
    ids=["changed", "broken"],
)

COMMANDS = {
    "embed": lambda folder, out: vera_tools.embed_projections(folder, out),
    "embed in place": lambda folder, _: vera_tools.embed_projections(folder, in_place=True),
    "convert": lambda folder, out: vera_tools.to_lora(folder, out),
    "convert with a base": lambda folder, out: vera_tools.to_lora(folder, out, base=base_of(KEPT)),
    "merge": lambda folder, out: vera_tools.merge(folder, base=base_of(KEPT), output=out),
    "record": lambda folder, _: vera_tools.record(folder, base=base_of(KEPT)),
    "regenerate": lambda folder, out: vera_tools.regenerate(checkpoint=folder, output=out),
    "push": lambda folder, _: vera_tools.push(folder, "ann/x"),
}


@HOW
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_goes_on_with_it(stripped, tmp_path, command, spoil, error, code, hub):
    spoil(stripped)
    before = files_of(tmp_path)
    # `push` verifies first, and says which check failed.
    with pytest.raises(CheckFailedError if command == "push" else error, match=r"manifest"):
        COMMANDS[command](stripped, tmp_path / "out")
    assert files_of(tmp_path) == before
    assert command != "push" or not hub.repos


@HOW
def test_the_commands_exit_with_its_code(stripped, tmp_path, spoil, error, code):
    spoil(stripped)
    found, document = run_json("embed-projections", stripped, "-o", tmp_path / "out")
    assert found == code
    assert MANIFEST in document["error"]["where"]
    assert not (tmp_path / "out").exists()


@HOW
def test_strip_hands_nothing_of_it_on(kept, tmp_path, spoil, error, code):
    spoil(kept)
    with pytest.raises(error):
        vera_tools.strip_projections(kept, tmp_path / "out")
    with pytest.raises(error):
        vera_tools.merge(kept, base=base_of(KEPT), output=tmp_path / "out")


@HOW
def test_it_is_renewed_where_the_file_says_everything(kept, spoil, error, code):
    spoil(kept)
    with pytest.raises((error, UnprovenError)):
        vera_tools.record(kept, strict=True)  # who says that it was not assumed?
    with pytest.warns(VeraToolsWarning, match="nothing tells what changed since"):
        report = vera_tools.record(kept, base=base_of(KEPT))
    assert report.renewed
    assert not failed(one(kept))
    assert vera_tools.verify(kept).exit_code == 0


def test_pull_refuses_it(stripped, tmp_path, hub):
    edit_json(stripped / MANIFEST, narrower)
    hub.add_repo("ann/x", files_of(stripped))
    with pytest.raises(CheckFailedError, match=r"manifest\.digest"):
        vera_tools.pull("ann/x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_diff_and_inspect_take_the_file_for_itself(kept, tmp_path):
    edit_json(kept / MANIFEST, narrower)
    same = vera_tools.diff(kept, base_of(KEPT).with_name(KEPT))
    assert same.exit_code == 0
    assert not vera_tools.inspect(kept).manifest


RELEASED = sorted((FIXTURES / "released").glob("*/stripped"))


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.parent.name)
def test_a_manifest_of_a_release_that_wrote_no_digest_is_read_and_not_covered(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "x")
    report = one(copied)
    assert "digest" not in json.loads((copied / MANIFEST).read_text())
    assert statuses(report)["manifest.digest"] == "skip"
    assert "vectors and config are covered; the manifest, which has no digest, is not; in_max not" in report.scope
    assert vera_tools.verify(copied).exit_code == 0
    vera_tools.record(copied)
    document = json.loads((copied / MANIFEST).read_text())
    assert document.pop("digest") == canonical_json.sha256(document)
    assert one(copied).scope.startswith("projections, vectors and config are covered; in_max ")
