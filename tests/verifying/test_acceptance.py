"""Configs as editors and programs leave them: what PEFT loads is not invalid, what it does not load is not well.

Every config here is loaded by real PEFT onto the model that the adapter was trained on.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

import vera_tools
from tests.adapters import CONFIG, WEIGHTS
from tests.command import run_json
from tests.peers import QUIET_PEERS
from tests.trained import distance, llama, load, logits, trained
from tests.verifying.reports import failed, message_of, one, statuses

pytestmark = [
    *QUIET_PEERS,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Where a machine draws separately, what is stripped loads exactly in few places, and strip says so.
    pytest.mark.filterwarnings("ignore::vera_tools.errors.LoadingWarning"),
]

VALUES = {
    "null": "null",
    "true": "true",
    "false": "false",
    "0": "0",
    "1": "1",
    "4.0": "4.0",
    "-1": "-1",
    "2**70": str(2**70),
    "1e39": "1e39",
    "NaN": "NaN",
    "1e999": "1e999",
    "text": '"true"',
    "empty text": '""',
    "empty list": "[]",
    "empty object": "{}",
    "list of 1": "[1]",
    "list of text": '["x"]',
    "list of null": "[null]",
    "list of lists": "[[]]",
    "object": '{"x": 1}',
    "half a character": '"\\ud800"',
    "deep": "[" * 200 + "]" * 200,
}
KEYS = (
    *("task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "r"),
    *("target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out"),
    *("bias", "modules_to_save", "init_weights", "layers_to_transform", "layers_pattern", "unknown", "runtime_config"),
)


def changed(**values):
    return lambda config: json.dumps({**config, **values}).encode()


def appended(text):
    return lambda config: (json.dumps(config)[:-1] + f", {text}}}").encode()


SPECIAL = {
    "another case": changed(peft_type="VeRA"),
    "lower case": changed(peft_type="vera"),
    "byte-order mark": lambda config: b"\xef\xbb\xbf" + json.dumps(config).encode(),
    "line ends": lambda config: json.dumps(config, indent=1).replace("\n", "\r\n").encode(),
    "a key twice": appended('"r": 4'),
    "a key twice, the last wrong": appended('"r": 7'),
    "an unknown key twice": appended('"future": {"a": 1, "a": 2}'),
    "NaN inside": appended('"future": [1, {"a": NaN}, -Infinity]'),
    "digits that Python reads": appended('"future": ' + "1" * 4200),
    "digits that Python refuses": appended('"future": ' + "1" * 5000),
    "half a character in a key": appended('"\\ud800": 1'),
    "a key of Python's": changed(self=1),
    "another key of Python's": changed(cls=1),
    "targets in an object": changed(target_modules={"q_proj": 1, "v_proj": 1}),
    "biases of LoRA": changed(bias="lora_only"),
    "layers as floats": changed(layers_to_transform=[0, 1.0]),
    "layers and more": changed(layers_to_transform=[0, 1, "x", None, -3]),
    "layers and what is no float": changed(layers_to_transform=[0, 1, 10**400]),
    "a layer that is no float": changed(layers_to_transform=10**400),
    "one layer": changed(layers_to_transform=1),
    "one layer as true": changed(layers_to_transform=True),
    "patterns in an object": changed(layers_to_transform=[0, 1], layers_pattern={"layers": 1}),
    "patterns of numbers": changed(layers_to_transform=[0, 1], layers_pattern=[5, "layers"]),
    "a pattern of a number": changed(layers_to_transform=[0, 1], layers_pattern=5),
    "a pattern with flags": changed(layers_to_transform=[0, 1], layers_pattern="(?i)layers"),
    "a pattern that is none": changed(layers_to_transform=[0, 1], layers_pattern=["["]),
    "a pattern with a group": changed(layers_to_transform=[0, 1], layers_pattern="(?P<index>layers)"),
    "a saved module with flags": changed(modules_to_save=["(?i)x"]),
    "a saved module of a star": changed(modules_to_save=["*"]),
    "a saved module that is adapted": changed(modules_to_save=["q_proj"]),
    "a saved module that is not there": changed(modules_to_save=["lm_head"]),
    "too many repeats": changed(target_modules="a{" + "9" * 22 + "}"),
    "too many groups": changed(target_modules="(" * 1000 + ")" * 1000),
    "flags": changed(target_modules="(?i).*(Q_proj|v_proj)"),
    "a named group": changed(target_modules=r".*\.(?P<x>q|v)_proj"),
    "d_initial of a float32": changed(d_initial=1e38),
    "no kind": lambda config: json.dumps({k: v for k, v in config.items() if k != "peft_type"}).encode(),
    "space": lambda config: b"\n\n \t" + json.dumps(config).encode() + b"\n ",
    "a comma behind the last": lambda config: json.dumps(config)[:-1].encode() + b", }\n",
    "comments": lambda config: (
        b"// of ours\n" + json.dumps(config, indent=1).replace("{\n", "{ /* r, key */\n").encode()
    ),
    "a tab in a text": lambda config: json.dumps({**config, "future": "x?y, ]// /* z"}).replace("?", "\t").encode(),
    "a comment without an end": lambda config: json.dumps(config).encode() + b"/* ",
    "two commas": lambda config: json.dumps(config)[:-1].encode() + b",,}",
    "a text without an end": lambda config: json.dumps(config).encode()[:-2],
    "rubbish behind": lambda config: json.dumps(config).encode() + b"x",
}
CONFIGS = {
    **{f"{key} {label}": appended(f"{json.dumps(key)}: {text}") for key in KEYS for label, text in VALUES.items()},
    **SPECIAL,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter that PEFT trained and saved, and its logits."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trained(llama(), task_type="CAUSAL_LM")
        model.save_pretrained(folder)
    return folder, logits(model)


@pytest.fixture
def configured(made, tmp_path):
    def write(change) -> Path:
        folder = Path(shutil.copytree(made[0], tmp_path / "configured"))
        (folder / CONFIG).write_bytes(change(json.loads((made[0] / CONFIG).read_text())))
        return folder

    return write


def off(folder, expected) -> float | None:
    """How far PEFT's model is from the trained one; None where PEFT does not load it."""
    try:
        return distance(load(folder), expected)
    except Exception:
        return None


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_loads_is_not_invalid_and_what_it_does_not_load_is_not_well(change, made, configured):
    folder = configured(change)
    distance_of_peft, report = off(folder, made[1]), one(folder)
    rows = {load.exact for load in report.loads if load.loader == "peft>=0.21" and load.base_dtype == "float32"}
    if distance_of_peft is None:
        assert True not in rows
        assert report.exit_code() in (1, 4)
    elif distance_of_peft > 0:
        assert report.verdict != "invalid"
        assert True not in rows
        assert not report.ok
    else:
        assert report.verdict in ("reproducible", "drift")  # the stored pair is drift to another key than its own
        unknown = statuses(report).get("config.target_modules") == "warn"  # PEFT's default fits, which the base tells
        assert True in rows or "tensors.saved" in failed(report) or (unknown and rows == {None})
        assert not failed(report) - {"tensors.saved"}


REFUSED = (
    *("another case", "lower case", "byte-order mark", "digits that Python refuses", "a key of Python's"),
    *("a comma behind the last", "comments", "a tab in a text"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_refuses_is_read_named_and_written_so_that_peft_reads_it(name, made, configured, tmp_path):
    folder = configured(SPECIAL[name])
    assert off(folder, made[1]) is None
    report = one(folder)
    assert (report.verdict, failed(report)) == ("reproducible", {"config.peft"})
    assert "convert --from auto" in message_of(report, "config.peft")
    assert {row.exact for row in report.loads if row.loader != "vera-tools"} == {False}
    assert all("refuses the config" in row.why for row in report.loads if row.loader != "vera-tools")
    assert run_json("convert", folder, "--from", "auto", "-o", tmp_path / "clean")[0] == 0
    vera_tools.strip_projections(folder, tmp_path / "stripped")
    vera_tools.embed_projections(tmp_path / "stripped", tmp_path / "embedded")
    for output in ("clean", "stripped", "embedded"):
        assert off(tmp_path / output, made[1]) == 0
        assert statuses(one(tmp_path / output))["config.peft"] == "pass"
    assert (tmp_path / "embedded" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    vera_tools.from_foreign(folder, in_place=True)
    assert off(folder, made[1]) == 0


FIRST = {"r": 4, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 0}
TOLERATED = {
    "inference_mode null": "inference_mode is null, which PEFT takes for false",
    "save_projection text": 'save_projection is "true", which PEFT takes for true',
    "a key twice": "duplicate key 'r': the last one counts",
    "NaN inside": "NaN is not JSON",
    "half a character in a key": "half a character",
    "biases of LoRA": "'vera_only' to PEFT from 0.21 on and unknown before",
    "modules_to_save empty text": 'modules_to_save is "", which PEFT takes for null',
    "unknown deep": "nested more than 64 deep",
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_peft_reads_all_the_same_is_a_warning(name, configured, tmp_path):
    folder = configured(CONFIGS[name])
    report = one(folder)
    assert (report.verdict, report.exit_code()) == ("reproducible", 0)
    assert statuses(report)["config.peft"] == "warn"
    assert TOLERATED[name] in message_of(report, "config.peft")
    vera_tools.record(folder)
    assert one(folder).ok, "a manifest can hold it"
    vera_tools.from_foreign(folder, tmp_path / "clean")
    assert statuses(one(tmp_path / "clean"))["config.peft"] == "pass"


def test_what_only_the_newest_peft_reads_is_told_apart(configured):
    report = one(configured(SPECIAL["biases of LoRA"]))
    assert {row.exact for row in report.loads if row.loader == "peft>=0.11,<0.21"} == {False}
    assert True in {row.exact for row in report.loads if row.loader == "peft>=0.21"}


def test_keys_that_the_first_peft_refuses_are_named(configured):
    """PEFT before 0.14 raises TypeError for any key that it does not know, peft_version for one."""
    report = one(configured(changed(peft_version="0.21.2")))
    old = [row for row in report.loads if row.loader == "peft>=0.11,<0.21" and row.exact]
    assert old
    assert all("before 0.14 it refuses the config for its key 'peft_version'" in row.why for row in old)


def test_a_config_of_the_first_peft_needs_no_such_word(configured):
    report = one(configured(lambda config: json.dumps({"peft_type": "VERA", **FIRST}).encode()))
    assert report.ok
    assert not any("before 0.14" in row.why for row in report.loads)


def test_every_tensor_stays(made, configured, tmp_path):
    folder = configured(SPECIAL["byte-order mark"])
    vera_tools.from_foreign(folder, tmp_path / "clean")
    ours, theirs = load_file(tmp_path / "clean" / WEIGHTS), load_file(made[0] / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in theirs)
