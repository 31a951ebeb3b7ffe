"""adapter_config.json as it is found in the wild, against PEFT's own reading of it."""

from __future__ import annotations

import json
import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import FIXTURES
from tests.adapters import CHECKPOINTS, NAMES
from vera_tools.checkpoints.config import CONFIG_NAME, VeraConfig
from vera_tools.errors import FormatError, NotVeraError, UsageError
from vera_tools.files.strict_json import parse_json

WILD = sorted((FIXTURES / "configs").glob("*.json"))
OURS = [path for path in WILD if "pvera" not in path.name]
OTHERS = [path for path in WILD if "pvera" in path.name]
SETS = ("target_modules", "modules_to_save")


@pytest.fixture
def save(tmp_path):
    """Write an adapter_config.json, as text or bytes, and name its folder."""

    def write(content: str | bytes | dict):
        data = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / CONFIG_NAME).write_bytes(data.encode() if isinstance(data, str) else data)
        return tmp_path

    return write


def unordered(config: dict) -> dict:
    return {key: sorted(value) if key in SETS and isinstance(value, list) else value for key, value in config.items()}


def peft_config(folder):
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown keys, and about save_projection=False
        return peft.VeraConfig.from_pretrained(str(folder))


def peft_dict(config) -> dict:
    """What PEFT would write, its sets as lists."""
    document = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    document.pop("peft_version", None)
    return {key: getattr(value, "value", value) for key, value in document.items()}


def test_the_wild_is_wild():
    texts = {path.name: path.read_bytes() for path in WILD}
    assert sum(b"\r\n" in text for text in texts.values()) == 2
    assert sum(len(json.loads(text)) == 5 for text in texts.values()) == 5
    assert sum(b"init_vera_weights" in text for text in texts.values()) == 2
    assert (len(OURS), len(OTHERS)) == (13, 10)


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_every_config_in_the_wild_means_what_peft_takes_it_for(path, save):
    text = path.read_bytes()
    folder = save(text)
    config = VeraConfig.from_pretrained(folder)
    found = {key: value for key, value in config.to_dict().items() if key not in config.extra}
    found.pop("peft_version", None)
    assert unordered(found) == unordered(peft_dict(peft_config(folder)))


@pytest.mark.parametrize("path", [*OURS, *(CHECKPOINTS / name / CONFIG_NAME for name in NAMES)], ids=lambda p: p.stem)
def test_rewriting_keeps_every_key_and_value(path):
    before = json.loads(path.read_text())
    config = VeraConfig.from_json(path.read_text())
    after = json.loads(config.to_json())
    assert before.items() <= after.items()
    assert VeraConfig.from_json(config.to_json()) == config
    assert set(config.extra) == set(before) & {"init_vera_weights", "alpha_pattern", "rank_pattern"}


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_pvera_is_refused_by_name(path):
    with pytest.raises(NotVeraError, match=f"{path.name}: this is an adapter of kind PVERA, not VeRA") as caught:
        VeraConfig.from_json(path.read_text(), where=path.name)
    assert caught.value.kind == "PVERA"
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("kind", ["LORA", "LoRA", "RANDLORA", "VBLORA", "IA3", ""])
def test_other_kinds_are_refused_by_name_whatever_else_they_hold(kind):
    with pytest.raises(NotVeraError, match=f"this is an adapter of kind {kind}, not VeRA"):
        VeraConfig.from_dict({"peft_type": kind, "r": "sixteen", "target_modules": 7})


@pytest.mark.parametrize("kind", ["VERA", "VeRA", "vera", "Vera"])
def test_vera_is_vera_however_it_is_written(kind):
    config = VeraConfig.from_dict({"peft_type": kind})
    assert config == VeraConfig()
    assert json.loads(config.to_json())["peft_type"] == "VERA"


@pytest.mark.parametrize("text", ["{}", '{"r": 8}', '{"peft_type": null}'])
def test_without_a_type_it_is_no_vera_config(text):
    with pytest.raises(FormatError, match="the key 'peft_type' is missing"):
        VeraConfig.from_json(text)


def test_a_look_alike_without_a_type_is_named():
    with pytest.raises(FormatError, match="lora_alpha suggests LoRA"):
        VeraConfig.from_dict({"r": 8, "lora_alpha": 16})


def test_the_defaults_are_pefts():
    import peft

    ours = VeraConfig().to_dict()
    assert ours == {**peft_dict(peft.VeraConfig()), "peft_type": "VERA"}


def test_the_text_is_pefts_own(tmp_path):
    import peft

    fields = {
        "r": 12,
        "target_modules": ["q_proj"],
        "projection_prng_key": 2**40,
        "vera_dropout": 0.25,
        "task_type": "CAUSAL_LM",
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "base_model_name_or_path": "org/naïve",
    }
    peft.VeraConfig(**fields).save_pretrained(str(tmp_path / "peft"))
    VeraConfig(**fields, inference_mode=False, peft_version=peft.__version__).save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / CONFIG_NAME).read_bytes() == (tmp_path / "peft" / CONFIG_NAME).read_bytes()


@pytest.mark.parametrize(
    ("encode", "what"),
    [
        (lambda text: text.replace("\n", "\r\n").encode(), "CRLF"),
        (lambda text: text.replace("\n", "\r").encode(), "CR"),
        (lambda text: b"\xef\xbb\xbf" + text.encode(), "byte-order mark"),
        (lambda text: json.dumps(json.loads(text)).encode(), "one line"),
        (lambda text: text.encode() + b"\n\n  ", "trailing space"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_however_the_text_is_laid_out_it_means_the_same(save, encode, what):
    text = (CHECKPOINTS / NAMES[0] / CONFIG_NAME).read_text()
    assert VeraConfig.from_pretrained(save(encode(text))) == VeraConfig.from_json(text)


def test_unknown_keys_are_kept_but_change_nothing(save, tmp_path):
    config = VeraConfig.from_pretrained(save({"peft_type": "VeRA", "future": {"a": [1, None]}, "extra": 3}))
    assert config.extra == {"future": {"a": [1, None]}, "extra": 3}
    config.save_pretrained(tmp_path)
    again = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (again["future"], again["extra"], again["r"]) == ({"a": [1, None]}, 3, 256)


BAD_VALUES = {
    "r zero": ({"r": 0}, "r", "an integer of 1 or more", "0"),
    "r negative": ({"r": -8}, "r", "an integer of 1 or more", "-8"),
    "r text": ({"r": "16"}, "r", "an integer of 1 or more", '"16"'),
    "r float": ({"r": 16.0}, "r", "an integer of 1 or more", "16.0"),
    "r true": ({"r": True}, "r", "an integer of 1 or more", "true"),
    "r null": ({"r": None}, "r", "an integer of 1 or more", "null"),
    "key true": ({"projection_prng_key": True}, "projection_prng_key", "an integer in [-2**63, 2**64)", "true"),
    "key too large": ({"projection_prng_key": 2**64}, "projection_prng_key", "an integer in [-2**63", str(2**64)),
    "key 2**70": ({"projection_prng_key": 2**70}, "projection_prng_key", "an integer in [-2**63", str(2**70)),
    "key too small": ({"projection_prng_key": -(2**63) - 1}, "projection_prng_key", "an integer in", "-92"),
    "key float": ({"projection_prng_key": 1e3}, "projection_prng_key", "an integer in", "1000.0"),
    "key text": ({"projection_prng_key": "0"}, "projection_prng_key", "an integer in", '"0"'),
    "key null": ({"projection_prng_key": None}, "projection_prng_key", "an integer in", "null"),
    "targets number": ({"target_modules": 5}, "target_modules", "a list of strings, a string or null", "5"),
    "targets of numbers": ({"target_modules": ["q", 5]}, "target_modules.1", "a string", "5"),
    "targets no expression": ({"target_modules": "("}, "target_modules", "one (missing )", "'('"),
    "saved modules no expression": ({"modules_to_save": ["a", "["]}, "modules_to_save", "one (unterminated", "'['"),
    "saved modules with flags": ({"modules_to_save": ["(?i)x"]}, "modules_to_save", "one (", "'(?i)x'"),
    "pattern with flags": ({"layers_pattern": "(?i)x", "layers_to_transform": 0}, "layers_pattern", "one (", "'(?i)"),
    "pattern with its group": (
        {"layers_pattern": "(?P<idx>x)", "layers_to_transform": 0},
        "layers_pattern",
        "one (redefinition",
        "'(?P<idx>",
    ),
    "targets of many repeats": (
        {"target_modules": "a{" + "9" * 22 + "}"},
        "target_modules",
        "one (the repetition",
        "'a{9",
    ),
    "targets of many groups": ({"target_modules": "(" * 2000 + ")" * 2000}, "target_modules", "one (", "'(((("),
    "dropout above one": ({"vera_dropout": 1.5}, "vera_dropout", "a number in [0, 1]", "1.5"),
    "dropout text": ({"vera_dropout": "0.1"}, "vera_dropout", "a number in [0, 1]", '"0.1"'),
    "d_initial null": ({"d_initial": None}, "d_initial", "a number", "null"),
    "layers negative": ({"layers_to_transform": [-1]}, "layers_to_transform.0", "an integer of 0 or more", "-1"),
    "layers text": ({"layers_to_transform": "0"}, "layers_to_transform", "a list of integers", '"0"'),
    "pattern number": ({"layers_pattern": 1, "layers_to_transform": 0}, "layers_pattern", "a list of strings", "1"),
    "pattern no expression": ({"layers_pattern": "[", "layers_to_transform": 0}, "layers_pattern", "one (", "'['"),
    "task number": ({"task_type": 3}, "task_type", "a task that PEFT knows", "3"),
}


#: What PEFT reads in a file, as something else; in code it is a mistake.
BAD_IN_CODE = {
    "save_projection text": ({"save_projection": "true"}, "save_projection", "true or false", '"true"'),
    "save_projection number": ({"save_projection": 1}, "save_projection", "true or false", "1"),
    "targets object": ({"target_modules": {"q": 1}}, "target_modules", "a list of strings, a string or null", '{"q"'),
    "saved modules text": ({"modules_to_save": "classifier"}, "modules_to_save", "a list of strings or null", '"class'),
    "dropout negative": ({"vera_dropout": -0.1}, "vera_dropout", "a number in [0, 1]", "-0.1"),
    "bias unknown": ({"bias": "lora_only"}, "bias", '"none", "all" or "vera_only"', '"lora_only"'),
    "fan_in_fan_out text": ({"fan_in_fan_out": "yes"}, "fan_in_fan_out", "true or false", '"yes"'),
    "init_weights null": ({"init_weights": None}, "init_weights", "true or false", "null"),
    "base list": ({"base_model_name_or_path": []}, "base_model_name_or_path", "a string or null", "[]"),
    "revision number": ({"revision": 1}, "revision", "a string or null", "1"),
    "mapping list": ({"auto_mapping": []}, "auto_mapping", "an object or null", "[]"),
}


@pytest.mark.parametrize(("change", "key", "expected", "found"), BAD_IN_CODE.values(), ids=BAD_IN_CODE)
def test_a_value_that_peft_takes_for_another_is_refused_in_code_alone(change, key, expected, found, save):
    VeraConfig.from_pretrained(save({"peft_type": "VERA", **change}))
    with pytest.raises(UsageError) as direct:
        VeraConfig(**change)
    assert direct.value.where == key
    assert direct.value.expected.startswith(expected)
    assert direct.value.found.startswith(found)


@pytest.mark.parametrize(("change", "key", "expected", "found"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_wrong_value_is_named_with_what_was_expected_and_found(change, key, expected, found, save):
    with pytest.raises(FormatError) as caught:
        VeraConfig.from_pretrained(save({"peft_type": "VERA", **change}))
    error = caught.value
    assert error.where.endswith(f"{CONFIG_NAME}: {key}")
    assert error.expected.startswith(expected)
    assert error.found.startswith(found)
    assert "\n" not in str(error)
    with pytest.raises(UsageError) as direct:  # the same in code, and a ValueError there, as PEFT's are
        VeraConfig(**change)
    assert isinstance(direct.value, ValueError)
    assert direct.value.where == key


def test_a_pattern_without_layers_is_refused_in_pefts_words(save):
    import peft

    with pytest.raises(ValueError, match="layers_pattern") as theirs:
        peft.VeraConfig(layers_pattern="layers")
    with pytest.raises(UsageError) as ours:
        VeraConfig(layers_pattern="layers")
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(FormatError, match="layers_to_transform"):
        VeraConfig.from_pretrained(save({"peft_type": "VERA", "layers_pattern": "layers"}))


BAD_TEXTS = {
    "empty": (b"", "not JSON: Expecting value"),
    "half": (b'{"peft_type": "VERA"', "line 1, column"),
    "a comment that does not end": (b'{"r": 8} /* rank', "not JSON: Extra data"),
    "two documents": (b'{"peft_type": "VERA"}{}', "not JSON: Extra data"),
    "a list": (b"[]", "not an adapter config (expected a JSON object, found [])"),
    "null": (b"null", "found null"),
    "a number": (b"5", "not an adapter config"),
    "deep nesting": (b'{"peft_type": "VERA", "a": ' + b"[" * 100_000, "nested too deeply"),
    "not UTF-8": (b'{"peft_type": "VERA", "a": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"peft_type": "VERA"}'.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize(("data", "words"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_what_is_no_config_ends_in_one_clear_error(save, data, words):
    with pytest.raises(FormatError) as caught:
        VeraConfig.from_pretrained(save(data))
    assert words in str(caught.value)
    assert CONFIG_NAME in caught.value.where
    assert len(str(caught.value)) < 500


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match=r"adapter_config\.json: cannot be read"):
        VeraConfig.from_pretrained(tmp_path)


def test_a_whole_character_may_be_escaped():
    assert parse_json('"\\ud83d\\ude00 \\u00e9"', where="text") == "😀 é"


def test_sets_become_sorted_lists():
    config = VeraConfig(target_modules={"v_proj", "q_proj"}, modules_to_save=frozenset({"score"}))
    assert (config.target_modules, config.modules_to_save) == (["q_proj", "v_proj"], ["score"])
    assert VeraConfig(target_modules=("b", "a")).target_modules == ["b", "a"]


SEGMENTS = st.sampled_from(
    ["model", "layers", "h", "experts", "0", "1", "2", "01", "12", "self_attn", "q_proj", "v_proj", "proj", "score"]
)
MODULES = st.lists(SEGMENTS, min_size=1, max_size=7).map(".".join)
TARGETS = st.one_of(
    st.lists(st.one_of(MODULES, SEGMENTS), max_size=4),
    st.sampled_from([r".*\.q_proj", r"model\.layers\.[01]\..*proj", "q_proj", ".*", r".*(q|v)_proj$", "score|h"]),
)
LAYERS = st.one_of(st.none(), st.integers(0, 12), st.lists(st.integers(0, 12), max_size=3))
PATTERNS = st.one_of(
    st.none(),
    st.sampled_from(["", "layers", "h", "(layers|h)", "lay.*"]),
    st.lists(st.sampled_from(["", "layers", "h", "experts", "model"]), max_size=2),
)
SAVED = st.one_of(st.none(), st.lists(st.sampled_from(["score", "proj", "q_proj", "h", "s.*"]), max_size=2))


@settings(max_examples=600, deadline=None)
@given(module=MODULES, targets=TARGETS, layers=LAYERS, pattern=PATTERNS, saved=SAVED)
@example(module="model.layers.0.attn.q_proj", targets=["q_proj"], layers=[0], pattern="", saved=None)
@example(module="model.layers.0.attn.q_proj", targets=["q_proj"], layers=[0], pattern=[""], saved=None)
def test_targets_what_peft_targets(module, targets, layers, pattern, saved):
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    fields = {
        "target_modules": targets,
        "layers_to_transform": layers,
        "layers_pattern": pattern if layers is not None else None,
        "modules_to_save": saved,
    }
    theirs = check_target_module_exists(peft.VeraConfig(**fields), module)
    assert VeraConfig(**fields).targets(module) == bool(theirs), fields


def test_a_name_with_more_digits_than_an_int_takes_is_only_a_name():
    config = VeraConfig(target_modules=["q_proj"], layers_to_transform=[0])
    assert not config.targets("model.layers." + "9" * 5000 + ".q_proj")
    assert config.targets("model.layers.0.q_proj")


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_where_only_the_model_can_say_more_anything_may_be_adapted(targets):
    config = VeraConfig(target_modules=targets, modules_to_save=["score"], layers_to_transform=[1])
    assert config.targets("model.layers.1.q_proj")
    assert not config.targets("model.layers.0.q_proj")
    assert not config.targets("score")


def test_the_schema_knows_every_field():
    from dataclasses import fields

    from vera_tools import schema

    properties = schema.load("adapter_config.v1")["properties"]
    assert set(properties) == {field.name for field in fields(VeraConfig)} - {"extra"} | {"peft_type"}
    assert all(re.search(r"\w", value["description"]) for value in properties.values())
