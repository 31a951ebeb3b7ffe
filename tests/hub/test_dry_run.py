"""`push --dry-run` sends nothing; what is left at home; and the card that is shown."""

from __future__ import annotations

import pytest

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, base_of, edit_json, files_of, flip
from tests.command import run_cli, run_json
from vera_tools.errors import LocalBaseWarning
from vera_tools.hub import card

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

STATE = (
    "optimizer.pt", "optimizer.safetensors", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth",
    "trainer_state.json", "training_args.bin", "training_args.json", "random_states_0.pkl", "zero_to_fp32.py", "latest",
    "events.out.tfevents.17.host",
)  # fmt: skip


@pytest.fixture
def ann(hub, monkeypatch):
    """The Hub, with ann signed in."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ann"))
    return hub


@pytest.fixture
def template():
    """What PEFT writes where nobody has written anything: the Hub client's template, with PEFT's lines."""
    from huggingface_hub import ModelCard, ModelCardData

    pytest.importorskip("jinja2")  # which the client fills templates in with
    text = ModelCard.from_template(ModelCardData(library_name="peft")).content
    return text + "\n### Framework versions\n\n- PEFT 0.21.2\n"


def test_nothing_is_sent_and_what_is_said_is_done(ann, checkpoint):
    folder = checkpoint(KEPT)
    code, planned = run_json("push", folder, "ann/x", "--private", "--dry-run")
    assert code == 0
    assert ann.repos == {}
    assert {request.method for request in ann.requests} == {"GET"}
    assert (planned["dry_run"], planned["committed"], planned["commit"], planned["created"]) == (
        True,
        False,
        None,
        False,
    )
    result = run_cli("push", folder, "ann/x", "--private", "--dry-run")
    assert result.stdout.startswith(f"{ann.url}/ann/x: nothing was sent\n  create    the private repository ann/x\n")
    assert "    ### Which loaders compute with exactly these projections\n" in result.stdout
    _, done = run_json("push", folder, "ann/x", "--private")
    assert done["files"] == planned["files"]
    assert done["card"] == planned["card"]
    head = ann.repos["ann/x"].head
    assert head.files["README.md"].path.read_text("utf-8") == planned["card"]
    _, again = run_json("push", folder, "ann/x", "--private", "--dry-run")
    assert again["commit"] == head.oid
    assert {file["status"] for file in again["files"]} == {"unchanged"}
    (folder / "LICENSE").write_text("free")
    result = run_cli("push", folder, "ann/x", "--private", "--dry-run")
    assert "added     LICENSE (4 bytes)" in result.stdout
    assert ann.repos["ann/x"].head.oid == head.oid


def test_it_refuses_what_a_push_refuses(ann, checkpoint, monkeypatch):
    folder = checkpoint(KEPT)
    vera_tools.push(folder, "ann/public")
    flip(folder / "adapter_model.safetensors", -5000)
    for token, arguments, code in (
        ("ann", (folder, "ann/x"), 1),
        ("ann", (CHECKPOINTS / SEED_ONLY, "ann/x", "--strict"), 3),
        ("ann", (CHECKPOINTS / KEPT, "ann/public", "--private"), 2),
        ("ann", (CHECKPOINTS / KEPT, "ann/x", "--no-create"), 5),
        ("ann", (CHECKPOINTS / KEPT, "carl/x"), 5),
        ("reader", (CHECKPOINTS / KEPT, "reader/x"), 5),
        ("", (CHECKPOINTS / KEPT, "ann/x"), 5),
    ):
        role = {"role": "read"} if token == "reader" else {}
        monkeypatch.setenv("HF_TOKEN", ann.add_user(token, **role) if token else "")
        for options in ((), ("--dry-run",)):
            assert run_cli("push", *arguments, *options).returncode == code, (arguments, options)
    assert set(ann.repos) == {"ann/public"}


def test_training_state_stays_at_home(ann, checkpoint):
    folder = checkpoint(KEPT)
    for name in (*STATE, "special_tokens_map.json"):
        (folder / name).write_text("x")
    before = files_of(folder)
    report = vera_tools.push(folder, "ann/x")
    assert set(report.left_out) == set(STATE)
    assert not set(STATE) & set(ann.repos["ann/x"].head.files)
    assert "special_tokens_map.json" in ann.repos["ann/x"].head.files
    assert files_of(folder) == before
    report = vera_tools.push(folder, "ann/x", include=["trainer_state.json", "optimizer.pt"])
    assert "trainer_state.json" in ann.repos["ann/x"].head.files  # asked for by its name, and no pickle
    assert "optimizer.pt" in report.left_out
    assert "left out  " in run_cli("push", folder, "ann/x").stdout


@pytest.mark.parametrize("path", ["/home/ann/llama", "./llama", "models/"])
def test_a_base_that_is_a_local_path(ann, checkpoint, path):
    folder = checkpoint(KEPT)
    edit_json(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path=path))
    (folder / "README.md").write_text(
        f"---\nbase_model: {path}\ntags:\n- base_model:adapter:{path}\n- mine\n---\nMine.\n"
    )
    with pytest.warns(LocalBaseWarning, match=f"names its base by a path, which nobody else has: {path}"):
        report = vera_tools.push(folder, "ann/x")
    metadata, body = card.split(report.card)
    assert "base_model" not in metadata
    assert metadata["tags"] == ["mine", "vera", "vera-tools"]
    assert "Mine." in body


def test_a_base_that_lies_here_under_a_name_like_the_hubs(ann, checkpoint, tmp_path, monkeypatch):
    folder = checkpoint(KEPT)
    edit_json(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path="models/llama"))
    assert "base_model: models/llama\n" in vera_tools.push(folder, "ann/x").card
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(LocalBaseWarning, match="models/llama"):
        assert "base_model:" not in vera_tools.push(folder, "ann/y").card


def test_an_empty_template_is_left_out(ann, checkpoint, template):
    folder = checkpoint(KEPT)
    (folder / "README.md").write_text(template, "utf-8")
    assert card.is_empty_template(template)
    report = vera_tools.push(folder, "ann/x")
    assert "[More Information Needed]" not in report.card
    assert report.card.endswith("### Framework versions\n\n- PEFT 0.21.2\n")
    assert report.notes == ("PEFT's template of a card, in which nothing was filled in, was left out",)
    again = vera_tools.push(folder, "ann/x")
    assert (again.committed, again.notes) == (False, ())


def test_one_that_an_earlier_push_sent_is_left_out_too(ann, checkpoint, template):
    sent = template + f"\n{card.BEGIN}\n\nold\n\n{card.END}\n"
    ann.add_repo("ann/x", {"README.md": sent.encode()})
    text = vera_tools.push(checkpoint(KEPT), "ann/x").card
    assert text.count(card.BEGIN) == 1
    assert text.index("# x") < text.index(card.BEGIN) < text.index("### Framework versions")
    assert "[More Information Needed]" not in text
    assert not card.is_empty_template(sent + "My words.\n")


@pytest.mark.parametrize("words", ["- **License:** mit", "My own sentence.", "## A section of mine"])
def test_in_a_template_that_somebody_filled_in_what_matters_comes_first(ann, checkpoint, template, words):
    folder = checkpoint(KEPT)
    filled = template.replace("- **License:** [More Information Needed]", words)
    assert filled != template
    (folder / "README.md").write_text(filled, "utf-8")
    report = vera_tools.push(folder, "ann/x")
    assert report.notes == ()
    text = report.card
    assert text.index("# Model Card for Model ID") < text.index(card.BEGIN) < text.index("## Model Details")
    assert words in text
    assert card.split(filled)[1].partition("## Model Details")[2] in text  # the author's text, byte for byte
    assert not vera_tools.push(folder, "ann/x").committed


def test_a_base_on_the_hub_that_it_is_verified_against_is_named(ann, checkpoint):
    ann.add_repo("ann/llama", {path.name: path for path in base_of(KEPT).iterdir()})
    folder = checkpoint(KEPT)
    assert "base_model: ann/llama\n" in vera_tools.push(folder, "ann/x", base="hf://ann/llama").card
    assert "base_model" not in vera_tools.push(folder, "ann/y", base=base_of(KEPT)).card
