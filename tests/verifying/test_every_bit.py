"""Every bit of one small checkpoint, flipped: it is found, or the checkpoint still means the same."""

from __future__ import annotations

import pytest
from safetensors import SafetensorError
from safetensors.numpy import load as library_load

from fuzz import oracle, targets
from tests.adapters import CONFIG, MANIFEST, WEIGHTS
from vera_tools.checkpoints import peft_values
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.errors import FormatError
from vera_tools.files import local
from vera_tools.files.local import MemoryFile
from vera_tools.files.safetensors import TensorFile
from vera_tools.verifying.verifier import Verifier

#: Which of the sound checkpoints, and which of their files.
FILES = [
    *((targets.recorded, name) for name in (WEIGHTS, CONFIG, MANIFEST)),
    *((targets.stripped, name) for name in (WEIGHTS, CONFIG, MANIFEST)),
    *((targets.adapter, name) for name in (WEIGHTS, CONFIG)),
]
IDS = [f"{sound.__name__}, {name}" for sound, name in FILES]


def tensors_of(data):
    """What the safetensors library reads; None where it reads nothing."""
    try:
        return {name: (array.dtype, array.shape, array.tobytes()) for name, array in library_load(data).items()}
    except (SafetensorError, KeyError):
        return None


def config_of(data):
    """What PEFT takes a config for; None where it takes it for nothing."""
    try:
        text = data.decode()
        return VeraConfig.from_json(text), peft_values.read(text, where="here").document
    except (FormatError, UnicodeDecodeError):
        return None


def metadata_of(data):
    with TensorFile(MemoryFile("here", data)) as file:
        return file.metadata


def is_the_same(before, after, name):
    """Whether a file that was changed still says the same of the adapter."""
    if name == WEIGHTS:
        return tensors_of(before) == tensors_of(after) and metadata_of(before) == metadata_of(after)
    return config_of(before) == config_of(after)


def flip_every(sound, name, bits, folder):
    """Each change that goes unseen and is not without meaning, and how many were made."""
    files, unseen, count = sound(), [], 0
    oracle.put(folder, files)
    verifier = Verifier()  # it remembers what was found of a pair, by digest
    for place in range(len(files[name])):
        for bit in bits(place):
            changed = bytearray(files[name])
            changed[place] ^= 1 << bit
            (folder / name).write_bytes(changed)
            report = verifier.verify(str(folder))
            count += 1
            if report.verdict != "reproducible" or not report.ok:
                continue
            if name == MANIFEST or is_the_same(files[name], bytes(changed), name):
                continue
            if MANIFEST not in files and "vectors not covered: no manifest" in report.scope:
                pair = ("base_model.vera_A", "base_model.vera_B")
                then, now = tensors_of(files[WEIGHTS]), tensors_of((folder / WEIGHTS).read_bytes())
                key = config_of((folder / CONFIG).read_bytes())[0].projection_prng_key
                if key == 7 and all(then[name] == now[name] for name in pair):
                    continue  # the pair is what its key makes, and no more was promised
            unseen.append((place, bit))
    return unseen, count


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """For a file's times to differ, which is about other processes."""
    monkeypatch.setattr(local, "_TICKS", 0)


@pytest.mark.parametrize(
    "stride",
    [
        pytest.param(4, marks=pytest.mark.long, id="one bit of every fourth byte"),
        pytest.param(1, marks=pytest.mark.slow, id="one bit of every byte"),
    ],
)
@pytest.mark.parametrize(("sound", "name"), FILES, ids=IDS)
def test_one_bit(sound, name, stride, tmp_path):
    unseen, count = flip_every(
        sound, name, lambda place: [place // stride % 8] if place % stride == 0 else [], tmp_path / "a"
    )
    assert not unseen
    assert count == -(-len(sound()[name]) // stride)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("sound", "name"), FILES, ids=IDS)
def test_every_bit(sound, name, tmp_path):
    unseen, count = flip_every(sound, name, lambda _: range(8), tmp_path / "a")
    assert not unseen
    assert count == 8 * len(sound()[name])
