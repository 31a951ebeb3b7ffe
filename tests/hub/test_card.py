"""The model card: metadata that the Hub and PEFT expect, one section of ours, and everything else as it was."""

from __future__ import annotations

import warnings

import pytest
from huggingface_hub import ModelCard

import vera_tools
from tests.adapters import CHECKPOINTS, KEPT, NAMES
from vera_tools.checkpoints.card import PIPELINES
from vera_tools.checkpoints.checkpoint import Checkpoint
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.resolution import resolve
from vera_tools.errors import FormatError
from vera_tools.hub import card

pytestmark = pytest.mark.capability


def rendered(existing=None, *, name=KEPT, reference="hf://ann/x", base_model="meta/llama", **config):
    with Checkpoint.open(CHECKPOINTS / name) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = resolve(checkpoint).record if checkpoint.projections else None
        settings = VeraConfig.from_dict({**checkpoint.raw_config, **config})
    return card.render(
        existing,
        reference=reference,
        config=settings,
        base_model=base_model,
        record=record,
        verification=vera_tools.verify(CHECKPOINTS / name).checkpoints[0],
    )


def test_the_metadata_that_the_hub_and_peft_expect():
    data = ModelCard(rendered()).data  # the client's own reader
    assert data.library_name == "peft"
    assert data.base_model == "meta/llama"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["base_model:adapter:meta/llama", "vera", "vera-tools"]
    assert "base_model" not in card.split(rendered(base_model=None))[0]


@pytest.mark.parametrize(("task", "expected"), [*PIPELINES.items(), (None, None)])
def test_the_pipeline_tag_comes_from_the_task_type(task, expected):
    text = rendered(task_type=task)
    assert card.split(text)[0].get("pipeline_tag") == expected
    assert f"from transformers import {card.MODEL_CLASSES[task] if task else 'AutoModel'}\n" in text


def test_what_the_section_tells():
    text = rendered()
    with Checkpoint.open(CHECKPOINTS / KEPT) as checkpoint:
        for tensor in ("vera_A", "vera_B"):
            assert checkpoint.weights.sha256(f"base_model.{tensor}") in text
    for expected in (
        "`mt19937-f32-fused`",
        "`101` (`projection_prng_key`)",
        "[16, 64], float32",
        "vera-tools verify hf://ann/x",
        "vera-tools convert hf://ann/x --to lora --base hf://meta/llama -o lora",
        'PeftModel.from_pretrained(base, "ann/x")',
        'VeraModel.from_pretrained(base, "hf://ann/x")',
        "load_adapter` refuses VeRA",
        "| peft>=0.21 | exact | exact | exact | exact |",
        "| peft>=0.11,<0.21, on Linux, Apple silicon (torch >=2.2) | exact | **not exact** | **not exact** | exact |",
        "| peft>=0.11,<0.21, on Windows, Apple silicon (torch <2.2), Intel Mac, Linux without AVX2 "
        "| **not exact** | **not exact** | **not exact** | **not exact** |",
        "Apple silicon and Intel Mac: read from the builds' machine code, not run.",
    ):
        assert expected in text
    assert 'subfolder="en"' in rendered(reference="hf://ann/x/en")
    assert 'revision="v1"' in rendered(revision="v1")
    assert "--to lora --base BASE -o lora" in rendered(base_model=None)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_checkpoint_has_a_card_that_settles(name):
    text = rendered(name=name)
    assert rendered(text, name=name) == text
    card.check(text)


EXISTING = [
    "",
    "# Only text\n",
    "---\nlicense: mit\n---\n",
    "---\n---\n# Empty metadata\n",
    "---\nlibrary_name: peft\nlicense: mit\ntags: [a, vera]\n---\n\nText --- with dashes\n---\nand more.\n",
    "---\r\nlicense: mit\r\n---\r\n\r\n# Windows\r\n\r\nText.\r\n",
    "\ufeff---\nlicense: mit\n---\n# A mark before\n",
    "---\nlicense: mit\nlanguage: ['no', en]\nmodel-index:\n- name: x\n  results: []\n---\nText",
]


@pytest.mark.parametrize("existing", EXISTING, ids=range(len(EXISTING)))
def test_an_existing_card_is_kept(existing):
    text = rendered(existing)
    before, body = card.split(existing.removeprefix("\ufeff"))
    after, new_body = card.split(text)
    assert {key: after[key] for key in before if key != "tags"} == {k: v for k, v in before.items() if k != "tags"}
    assert set(before.get("tags", [])) <= set(after["tags"])
    assert body.rstrip() in new_body
    assert rendered(text) == text
    assert ("\r\n" in text) == ("\r\n" in existing)
    assert not ("\r\n" in text and "\n" in text.replace("\r\n", ""))


def test_the_section_is_replaced_where_it_stands():
    text = rendered("# Mine\n\nBefore.\n") + "\nAfter.\n"
    again = rendered(text, reference="hf://ann/y")
    assert again == text.replace("ann/x", "ann/y")


def test_what_the_author_set_stands_and_metadata_that_is_complete_is_not_rewritten():
    existing = rendered("---\nlibrary_name: transformers # really\nbase_model: [a/b, c/d]\npipeline_tag: other\n---\n")
    assert card.split(existing)[0]["base_model"] == ["a/b", "c/d"]
    assert card.split(existing)[0]["library_name"] == "transformers"
    commented = existing.replace("tags:", "# a comment\ntags:", 1)
    assert "# a comment" in rendered(commented)


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ("tags: vera", "tags"),
        ("tags: [1]", "tags"),
        ("base_model: /local/path", "base_model"),
        ("base_model: [ok/ok, a b]", "base_model"),
        ("pipeline_tag: Text Generation", "pipeline_tag"),
        ("library_name: 3", "library_name"),
        ("license: {}", "license"),
        ("language: no", "language"),
        ("model-index: nothing", "model-index"),
        ("[1", "line 2"),
        ("a:\n\tb: 1", "line 3"),
        ("text", "metadata"),
    ],
)
def test_wrong_metadata_is_named(metadata, where):
    with pytest.raises(FormatError, match=r"README\.md") as caught:
        rendered(f"---\n{metadata}\n---\n# Title\n")
    assert where in str(caught.value)
