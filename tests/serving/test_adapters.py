"""Adapters by name, as LoRA: what is served, what is refused, and when one is converted anew."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.adapters import CHECKPOINTS, KEPT, SEED_ONLY, WEIGHTS, base_of, edit, files_of, flip, tensors_of
from vera_tools import record, to_lora
from vera_tools.errors import CheckFailedError, FormatError, UsageError, VeraToolsError
from vera_tools.serving import adapters as module
from vera_tools.serving.adapters import Adapters
from vera_tools.serving.settings import Settings

BASE = str(base_of(CHECKPOINTS / KEPT))


@pytest.fixture
def settings(tmp_path):
    shutil.copytree(CHECKPOINTS / KEPT, tmp_path / "adapters" / "team" / "mine")
    return Settings(tmp_path / "adapters", tmp_path / "cache")


@pytest.fixture
def mine(settings):
    return settings.adapters / "team" / "mine"


@pytest.fixture
def conversions(monkeypatch):
    """The conversions that are made."""
    made = []
    monkeypatch.setattr(module, "to_lora", lambda *given, **named: made.append(given) or to_lora(*given, **named))
    return made


def test_it_is_what_convert_writes(settings, tmp_path):
    found = Adapters(settings).lora("team/mine", BASE)
    to_lora(CHECKPOINTS / KEPT, tmp_path / "lora", base=BASE)
    written = files_of(tmp_path / "lora")
    del written["expected_logits.json"]  # lies beside the adapter, and is no part of it
    assert files_of(found) == written


def test_what_was_converted_is_kept(settings, conversions):
    one = Adapters(settings).lora("team/mine", BASE)
    assert Adapters(settings).lora("team/mine", BASE) == one
    assert len(conversions) == 1


def test_the_same_adapter_under_another_name_is_not_converted_again(settings, mine, conversions):
    shutil.copytree(mine, settings.adapters / "copy")
    adapters = Adapters(settings)
    assert adapters.lora("copy", BASE) == adapters.lora("team/mine", BASE)
    assert len(conversions) == 1


def test_a_changed_adapter_is_converted_anew(settings, mine):
    adapters = Adapters(settings)
    before = adapters.lora("team/mine", BASE)
    edit(mine, lambda tensors: tensors.update({name: 2 * t for name, t in tensors.items() if "lambda_b" in name}))
    after = adapters.lora("team/mine", BASE)
    assert after != before
    b = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(tensors_of(after)[b], 2 * tensors_of(before)[b])


def test_another_base_is_another_lora(settings, tmp_path):
    """The widths of layers and the class of the model are the base's to say."""
    shutil.copytree(BASE, tmp_path / "base")
    adapters = Adapters(settings)
    assert adapters.lora("team/mine", BASE) == adapters.lora("team/mine", str(tmp_path / "base"))
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OwnForCausalLM"))
    assert adapters.lora("team/mine", BASE) != adapters.lora("team/mine", str(tmp_path / "base"))


@pytest.mark.parametrize("name", [
    "", ".", "..", "../adapters/team/mine", "team/../team/mine", "./team/mine", "team//mine", "team/mine/", "team",
    "/", "C:team", "team\\mine", "team/mine\0", "\ud800", "nothing", "x" * 5000, "team/mine/adapter_config.json",
    "hf://team/mine", "team/mine\n",
])  # fmt: skip
def test_no_name_leads_out(settings, name):
    assert Adapters(settings).lora(name, BASE) is None


def test_an_absolute_name_is_none(settings, mine):
    assert Adapters(settings).lora(str(mine), BASE) is None


def test_no_link_leads_out(settings, mine, tmp_path):
    shutil.move(mine, tmp_path / "outside")
    mine.symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="a link leads out of the folder of adapters"):
        Adapters(settings).lora("team/mine", BASE)
    mine.unlink()
    mine.mkdir()
    for path in (tmp_path / "outside").iterdir():
        (mine / path.name).symlink_to(path)
    with pytest.raises(FormatError, match="this link leads out of the folder"):
        Adapters(settings).lora("team/mine", BASE)


def test_another_kind_is_not_ours(settings, mine):
    shutil.rmtree(mine)
    to_lora(CHECKPOINTS / KEPT, mine, base=BASE)
    assert Adapters(settings).lora("team/mine", BASE) is None


def test_what_is_not_what_its_key_gives_is_refused(settings, mine):
    edit(mine, lambda tensors: tensors["base_model.vera_A"].__setitem__((0, 0), 1.0))
    with pytest.raises(CheckFailedError, match="drift, so it is not served") as caught:
        Adapters(settings).lora("team/mine", BASE)
    assert caught.value.where == str(mine)


def test_a_damaged_file_is_refused(settings, mine):
    (mine / WEIGHTS).write_bytes((mine / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(CheckFailedError, match="invalid, so it is not served") as caught:
        Adapters(settings).lora("team/mine", BASE)
    assert str(settings.cache) not in str(caught.value)


def test_an_adapter_of_another_base_is_refused(settings, tmp_path):
    other = str(base_of(CHECKPOINTS / "peft-0.21.2-gpt2-conv1d-kept"))
    with pytest.raises(CheckFailedError, match=r"so it is not served: base\.modules: .*this is another base"):
        Adapters(settings).lora("team/mine", other)


def test_what_nobody_proved_is_refused_unless_it_was_stated_and_that_is_asked_for(settings):
    seeds = settings.adapters / "seeds"
    shutil.copytree(CHECKPOINTS / SEED_ONLY, seeds)
    base = str(base_of(CHECKPOINTS / SEED_ONLY))
    asking = Settings(settings.adapters, settings.cache, require="assumed")
    for each in (settings, asking):
        with pytest.raises(CheckFailedError, match="unproven, so it is not served"):
            Adapters(each).lora("seeds", base)
    record(seeds, base=base, recipe="mt19937-f32-fused")
    with pytest.raises(CheckFailedError, match="assumed, so it is not served"):
        Adapters(settings).lora("seeds", base)
    found = Adapters(asking).lora("seeds", base)
    to_lora(seeds, settings.cache.parent / "lora", base=base)
    assert tensors_of(found).keys() == tensors_of(settings.cache.parent / "lora").keys()
    with pytest.raises(CheckFailedError, match="assumed, so it is not served"):
        Adapters(settings).lora("seeds", base)  # though it lies in the cache


def test_what_vllm_would_leave_out_is_refused(settings):
    """Trained biases: vLLM takes no such LoRA."""
    shutil.copytree(CHECKPOINTS / "peft-0.21.2-gpt2-conv1d-kept", settings.adapters / "gpt2")
    base = str(base_of(CHECKPOINTS / "peft-0.21.2-gpt2-conv1d-kept"))
    with pytest.raises(CheckFailedError, match="vLLM would not compute as it was trained"):
        Adapters(settings).lora("gpt2", base)
    assert [path.name for path in settings.cache.iterdir()] == ["lock"]


def test_what_was_damaged_in_the_cache_is_converted_anew(settings, conversions):
    found = Adapters(settings).lora("team/mine", BASE)
    whole = files_of(found)
    flip(found / WEIGHTS, -1)
    assert Adapters(settings).lora("team/mine", BASE) == found
    assert files_of(found) == whole
    assert len(conversions) == 2


def test_a_pickle_is_not_read(settings, mine):
    (mine / WEIGHTS).rename(mine / "adapter_model.bin")
    with pytest.raises(CheckFailedError, match="invalid, so it is not served"):
        Adapters(settings).lora("team/mine", BASE)


def test_what_it_takes_is_known_before(settings, mine):
    """So that nothing is removed for what does not fit, and the disk is never fuller than was said."""
    size = sum(map(len, files_of(Adapters(settings).lora("team/mine", BASE)).values()))
    for most, fits in ((size - 1, False), (size + 5 * 4096 + 1, True)):
        small = Settings(settings.adapters, settings.cache.with_name(f"cache-{most}"), most)
        if fits:
            assert Adapters(small).lora("team/mine", BASE)
        else:
            with pytest.raises(VeraToolsError, match="the cache has no room for it"):
                Adapters(small).lora("team/mine", BASE)
