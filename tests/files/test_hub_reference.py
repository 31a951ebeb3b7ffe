"""References to the Hub: hf:// in every form that the client knows, and the addresses of the Hub's pages."""

from __future__ import annotations

from dataclasses import replace

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, WEIGHTS, base_of, files_of
from tests.command import run_cli
from vera_tools.errors import FormatError, UsageError
from vera_tools.files import opening
from vera_tools.files.hub_reference import Reference, name_of

SHA = "60a5c15a17c72420c95ecb32b3de72c8ae422a2c"

FORMS = {
    "hf://ann/x": Reference("ann/x"),
    "hf://ann/x/": Reference("ann/x"),
    "hf://models/ann/x": Reference("ann/x"),
    "hf://models/ann/x@v1/a/b": Reference("ann/x", "v1", "a/b"),
    "hf://ann/x@v1": Reference("ann/x", "v1"),
    f"hf://ann/x@{SHA}/a": Reference("ann/x", SHA, "a"),
    "hf://ann/x@refs/pr/3": Reference("ann/x", "refs/pr/3"),
    "hf://ann/x@refs/pr/3/a": Reference("ann/x", "refs/pr/3", "a"),
    "hf://ann/x@refs%2Fpr%2F3/a": Reference("ann/x", "refs/pr/3", "a"),
    "hf://ann/x@refs/convert/parquet-v2.1/a": Reference("ann/x", "refs/convert/parquet-v2.1", "a"),
    "hf://ann/x@topic%2Fone/a": Reference("ann/x", "topic/one", "a"),
    "hf://ann/x@100%25/a": Reference("ann/x", "100%", "a"),
    "hf://ann/x/a@b": Reference("ann/x", None, "a@b"),
    "https://huggingface.co/ann/x": Reference("ann/x"),
    "http://hf.co/ann/x/": Reference("ann/x"),
    "https://huggingface.co/models/ann/x": Reference("ann/x"),
    "huggingface.co/ann/x/tree/v1": Reference("ann/x", "v1"),
    "https://huggingface.co/ann/x/tree": Reference("ann/x"),
    "https://huggingface.co/ann/x/tree/main/a/b": Reference("ann/x", "main", "a/b"),
    "https://huggingface.co/ann/x/tree/refs%2Fpr%2F3/a": Reference("ann/x", "refs/pr/3", "a"),
    "https://huggingface.co/ann/x/tree/refs/pr/3/a": Reference("ann/x", "refs/pr/3", "a"),
    "https://huggingface.co/ann/x/tree/topic%2Fone/a%20b%23": Reference("ann/x", "topic/one", "a b#"),
    f"https://huggingface.co/ann/x/blob/v1/a/{WEIGHTS}": Reference("ann/x", "v1", f"a/{WEIGHTS}"),
    f"https://huggingface.co/ann/x/resolve/v1/{WEIGHTS}?download=true": Reference("ann/x", "v1", WEIGHTS),
    f"https://huggingface.co/ann/x/raw/v1/{WEIGHTS}#L1": Reference("ann/x", "v1", WEIGHTS),
    f"https://huggingface.co/ann/x/blame/v1/{WEIGHTS}": Reference("ann/x", "v1", WEIGHTS),
}


@pytest.mark.parametrize("text", FORMS)
def test_every_form_means_what_the_client_takes_it_for(text):
    expected = FORMS[text]
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected
    assert opening.is_on_hub(text)
    assert Reference.parse(opening.spelled(text)) == expected
    assert opening.spelled(text).startswith("hf://")
    assert opening.spelled(opening.spelled(text)) == opening.spelled(text)
    parse_hf_uri = getattr(__import__("huggingface_hub"), "parse_hf_uri", None)
    if parse_hf_uri is not None:  # of the newer releases that are allowed
        theirs = parse_hf_uri(text)
        assert (theirs.type, theirs.id, theirs.revision, theirs.path_in_repo) == (
            "model",
            expected.repo,
            expected.revision,
            expected.subfolder,
        )
        assert Reference.parse(theirs.to_uri()) == expected
        page = Reference.parse(theirs.to_url())  # which has a revision wherever it has a path
        assert page == (replace(expected, revision=expected.revision or "main") if expected.subfolder else expected)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/ann",
        "https://huggingface.co/ann/x/discussions/3",
        "https://huggingface.co/ann/x/commit/main",
        "https://huggingface.co/papers/2310.11454",
        "https://huggingface.co/docs/peft",
        "https://example.org/ann/x/tree/main",
        "https://huggingface.co.example.org/ann/x",
        "https://huggingface.co:bad/ann/x",
    ],
)
def test_other_pages_are_no_checkpoints(text):
    with pytest.raises(UsageError, match="a web address is no checkpoint"):
        opening.require(text)
    assert not opening.is_on_hub(text)


def test_the_pages_of_ones_own_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org:8443/hf")
    assert Reference.parse("https://hub.example.org:8443/hf/ann/x/tree/v1") == Reference("ann/x", "v1")
    assert Reference.parse("https://huggingface.co/hf/x/tree/v1") == Reference("hf/x", "v1")  # an owner's name there
    assert not opening.is_on_hub("https://hub.example.org/ann/x")
    assert not opening.is_on_hub("hub.example.org/ann")


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "huggingface.co" / "ann" / "x").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not opening.is_remote("huggingface.co/ann/x")
    assert opening.is_on_hub("huggingface.co/ann/y")


@pytest.mark.parametrize("text", ["hf://ann/x/a\0b", "hf://ann/x/../y", "hf://ann"])
def test_what_is_no_model_is_refused(text):
    with pytest.raises(UsageError, match="not a model repository"):
        Reference.parse(text)


@pytest.mark.parametrize("kind", ["datasets", "spaces", "kernels", "buckets"])
def test_what_else_the_hub_keeps_is_refused_by_its_name(kind):
    for text in (f"hf://{kind}/ann/x", f"https://huggingface.co/{kind}/ann/x/tree/main/a"):
        with pytest.raises(UsageError, match=f"only models are read from the Hub, and no {kind}"):
            opening.require(text)


def test_a_dataset_has_no_name_among_models():
    assert name_of("hf://datasets/ann/x") is None
    assert name_of("hf://ann/x@v1/a") == "ann/x"


def test_pages_and_files_are_read_from_the_hub(hub, tmp_path):
    other = {"en/other.safetensors": (CHECKPOINTS / SEED_ONLY / WEIGHTS).read_bytes()}
    hub.add_repo("ann/x", files_of(CHECKPOINTS / KEPT, "en/") | other)
    hub.add_repo("ann/base", files_of(base_of(KEPT)))
    page = "https://huggingface.co/ann/x/tree/main/en"
    out = run_cli("verify", page, "--base", "https://huggingface.co/ann/base", "--json")
    assert out.returncode == 0
    assert '"path": "hf://ann/x@main/en"' in out.stdout
    assert vera_tools.inspect(page).path == "hf://ann/x@main/en"
    assert vera_tools.verify(f"{page.replace('tree', 'blob')}/{WEIGHTS}").checkpoints[0].verdict == "reproducible"
    # The file that was named, and not the one that is usual.
    found = vera_tools.verify(f"{page.replace('tree', 'resolve')}/other.safetensors?download=true").checkpoints[0]
    assert (found.path, found.projections_stored) == ("hf://ann/x@main/en/other.safetensors", False)
    assert vera_tools.pull(page, tmp_path / "pulled").commit
    with pytest.raises(FormatError, match="not a checkpoint"):
        vera_tools.inspect("https://huggingface.co/ann/base")
