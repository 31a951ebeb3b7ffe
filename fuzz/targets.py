"""What is fuzzed: each target takes bytes, makes an input of them, and raises for what must not happen.

The first byte of a target's input says how: as it stands, or as a change of a sound file. So even a fuzzer that knows
nothing of JSON gets past the parsers.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load as library_load

import vera_tools
from fuzz import mutation, oracle
from fuzz.mutation import Source
from vera_tools.architectures import data as architectures
from vera_tools.checkpoints import peft_values
from vera_tools.checkpoints.base import BaseModel
from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import Manifest, ProjectionRecord
from vera_tools.drifting import comparison
from vera_tools.files import hub_answers, opening, safetensors
from vera_tools.files.hub_reference import Reference
from vera_tools.files.local import MemoryFile
from vera_tools.files.safetensors import TensorFile
from vera_tools.platforms import atlas
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe
from vera_tools.verifying.log import Conditions, Log, Result
from vera_tools.verifying.runs import Run
from vera_tools.verifying.verifier import Verifier

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "vera_manifest.json"
INDEX, PART, MODEL = "model.safetensors.index.json", "model-00001-of-00001.safetensors", "config.json"
_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
_OUT, _IN, _R = 8, 6, 2


@functools.cache
def adapter() -> dict[str, bytes]:
    """The files of a small sound adapter that PEFT would load into the base below."""
    vera_A, vera_B = generate(Recipe(prng_key=7), PairShape(_R, _IN, _OUT))
    tensors = {"base_model.vera_A": vera_A, "base_model.vera_B": vera_B}
    for number, module in enumerate(_MODULES):
        tensors[f"base_model.model.{module}.vera_lambda_b"] = np.arange(1, 1 + _OUT, dtype=np.float32) + number
        tensors[f"base_model.model.{module}.vera_lambda_d"] = np.full(_R, 0.1, np.float32)
    tensors["base_model.model.lm_head.weight"] = np.ones((4, _IN), np.float32)
    config = VeraConfig(
        r=_R, target_modules=["q_proj"], projection_prng_key=7, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    return {CONFIG: config.to_json().encode(), WEIGHTS: file(tensors, {"format": "pt"})}


@functools.cache
def recorded() -> dict[str, bytes]:
    """The same with its manifest."""
    with oracle.folder(adapter()) as path:
        vera_tools.record(path)
        return files_of(path)


@functools.cache
def stripped() -> dict[str, bytes]:
    """The same without its projections."""
    with oracle.folder({}) as path:
        oracle.put(path / "a", adapter())
        vera_tools.strip_projections(path / "a", path / "b")
        return files_of(path / "b")


@functools.cache
def base() -> dict[str, bytes]:
    """A base model of two layers, with an index."""
    rng = np.random.default_rng(0)
    tensors = {f"{module}.weight": rng.standard_normal((_OUT, _IN), np.float32) for module in _MODULES}
    tensors["lm_head.weight"] = rng.standard_normal((4, _IN), np.float32)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict.fromkeys(tensors, PART),
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4, "num_attention_heads": 2,
              "hidden_size": _IN, "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip
    return {
        PART: file(tensors, {"format": "pt"}),
        INDEX: json.dumps(index).encode(),
        MODEL: json.dumps(config).encode(),
    }


@functools.cache
def log_line() -> bytes:
    """A line of a log that is believed."""
    with oracle.folder(recorded()) as path:
        report = Verifier().verify(str(path))
    result = Result("hf://ann/x", "0" * 40, report)
    return json.dumps(result.to_dict()).encode() + b"\n"


@functools.cache
def drift_report() -> dict[str, Any]:
    """A saved report of `drift`: the smallest of the atlas."""
    documents = atlas._documents("fixtures/atlas").values()
    return min(documents, key=lambda document: len(json.dumps(document)))


def file(tensors: dict[str, Any], metadata: dict[str, str]) -> bytes:
    """A safetensors file's bytes."""
    infos = safetensors.layout({name: (array.dtype.name, array.shape) for name, array in tensors.items()})
    header = safetensors.encode_header(infos, metadata)
    return struct.pack("<Q", len(header)) + header + b"".join(tensors[name].tobytes() for name in infos)


def files_of(path: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {entry.name: entry.read_bytes() for entry in sorted(path.iterdir()) if entry.is_file()}


def _document(sound: bytes, source: Source) -> bytes:
    """An input for a reader of JSON: raw, damaged, or changed as a document."""
    how = source.below(8)
    if how == 0:
        return source.rest()
    if how == 1:
        return mutation.damaged(sound, source)
    document = mutation.changed(json.loads(sound), source)
    if how < 6 and isinstance(document, dict):
        document.pop("digest", None)  # a manifest's, behind which nothing else would be looked at
    return mutation.text_of(document, source)


def _weights(sound: bytes, source: Source) -> bytes:
    how = source.below(8)
    if how == 0:
        return source.rest()
    return mutation.damaged(sound, source) if how < 4 else mutation.with_header(sound, source)


def header(source: Source) -> None:
    """The reader of safetensors: what it takes, the library reads the same."""
    with TensorFile(MemoryFile("memory", _weights(adapter()[WEIGHTS], source))) as opened:
        for _, pieces in opened.runs():
            for _ in pieces:
                pass
        opened.objection()
        opened.file_sha256()


def adapter_config(source: Source) -> None:
    """adapter_config.json: what is taken is written so that it is taken again, and says the same."""
    text = _document(adapter()[CONFIG], source).decode("utf-8", "replace")
    reading = peft_values.read(text, where="memory")
    config = VeraConfig.from_dict(reading.document)
    targeting = config.targeting()
    targeting.prepare(_MODULES)
    for module in _MODULES:
        adapts, kept = targeting.adapts(module), targeting.keeps_from_adapting(module)
        if adapts and kept:
            raise oracle.DefectError(f"{module} is adapted, and kept from being so")
        targeting.saves(f"{module}.weight")
    with oracle.sound("what was written is refused"):
        again = VeraConfig.from_json(config.to_json())
    if again != config:
        raise oracle.DefectError("what was written is read otherwise")


def model_config(source: Source) -> None:
    """config.json and the index of a base, and what is made of them for an adapter."""
    files = dict(base())
    name = (MODEL, INDEX)[source.below(2)]
    files[name] = _document(files[name], source)
    with oracle.folder({}) as path:
        oracle.put(path / "base", files)
        oracle.put(path / "adapter", adapter())
        with BaseModel.open(path / "base") as model:
            architectures.architecture(model.config)
            Verifier(base=model).verify(str(path / "adapter"))


def manifest(source: Source) -> None:
    """vera_manifest.json: what is taken is written and taken again."""
    sound = (recorded if source.below(2) else stripped)()[MANIFEST]
    text = _document(sound, source).decode("utf-8", "replace")
    found = Manifest.from_json(text)
    with oracle.sound("what was written is refused"):
        again = Manifest.from_json(found.to_json())
    if again.to_dict() != found.to_dict():
        raise oracle.DefectError("what was written is read otherwise")


def metadata(source: Source) -> None:
    """The record in a file's own metadata."""
    sound = json.loads(recorded()[MANIFEST])
    record = {key: sound[key] for key in ("recipe", "assumed", "origin", "r", "in_max", "out_max", "projections")}
    text = _document(json.dumps(record).encode(), source).decode("utf-8", "replace")
    ProjectionRecord.from_metadata({"vera_tools": text}, where="memory")


def log(source: Source) -> None:
    """A log of `verify` that is taken up again."""
    lines = [
        _document(log_line(), source).replace(b"\n", b" ") + b"\n" * source.below(2) for _ in range(1 + source.below(3))
    ]
    with oracle.folder({"log": b"".join(lines)}) as path:
        log = Log(path / "log", Run("0" * 64))
        log.begin(Conditions(), total=1, whole="0" * 64)
        log.get("hf://ann/x", "0" * 40, skip_others=False)


def drift(source: Source) -> None:
    """A saved report of `drift` beside a sound one."""
    sound = atlas.Entry.from_document(drift_report(), name="sound")
    with oracle.folder({"report": _document(json.dumps(drift_report()).encode(), source)}) as path:
        saved = comparison.load(path / "report")
    comparison.compare_reports(sound.draws, sound.environments, [("saved", saved)]).to_dict()


def reference(source: Source) -> None:
    """``hf://...``: what is taken prints to what means the same."""
    pieces = (
        "hf://",
        "a",
        "b",
        "/",
        "@",
        "models",
        "refs/pr/1",
        "refs/convert/x",
        "%2F",
        "%2f",
        "..",
        ".",
        "*",
        "\n",
        "é",
        "1",
    )
    how = source.below(3)
    text = (
        source.rest().decode("utf-8", "replace")
        if how == 0
        else ("hf://a/b" if how == 1 else "")
        + "".join(pieces[source.below(len(pieces))] for _ in range(source.below(16)))
    )
    found = Reference.parse(text)
    with oracle.sound(f"{text!r} is {found}, which is refused"):
        again = Reference.parse(str(found))
    if again != found:
        raise oracle.DefectError(f"{text!r} is {found}, which prints to another")
    opening.require(str(found))


def listing(source: Source) -> None:
    """What the Hub answers: nothing but names of files and digests comes out of it."""
    row = {
        "type": "file",
        "path": "x/adapter_config.json",
        "size": 3,
        "oid": "0" * 40,
        "lfs": {"oid": "0" * 64, "size": 3},
    }
    path = ("/api/models/a/b/tree/main", "/api/models/a/b", "/a/b/resolve/main/x")[source.below(3)]
    sound = [row, {"type": "directory", "path": "x"}] if "tree" in path else {"sha": "0" * 40, "siblings": [row]}
    body = _document(json.dumps(sound).encode(), source)
    tag = source.rest()[:200].decode("latin-1")
    answer = SimpleNamespace(
        status_code=(200, 429)[source.below(2)],
        headers={"ETag": tag, "X-Repo-Commit": tag, "etag": tag, "retry-after": tag, "ratelimit": tag},
        request=SimpleNamespace(
            method="HEAD" if "resolve" in path else "GET", url=SimpleNamespace(host="hub", path=path)
        ),
        read=lambda: body,
        json=lambda: json.loads(body),
    )
    hub_answers.check_answer(answer)
    if "tree" in path and answer.status_code < 400:
        try:
            rows = json.loads(body)
        except (ValueError, RecursionError):
            return  # the client says so
        for found in rows:
            if found.get("type") != "directory" and (".." in found["path"].split("/") or found["path"].startswith("/")):
                raise oracle.DefectError(f"a path that leads out: {found['path']!r}")


def _files(source: Source, sound: dict[str, bytes]) -> dict[str, bytes]:
    """A checkpoint's files with one or two of them changed."""
    files = dict(sound)
    for _ in range(1 + source.below(2)):
        name = sorted(sound)[source.below(len(sound))]
        files[name] = _weights(sound[name], source) if name.endswith(".safetensors") else _document(sound[name], source)
    return files


def verify(source: Source) -> None:
    """A changed checkpoint with a manifest: what is called sound is what it was."""
    kind = source.below(3)
    sound = (recorded, stripped, adapter)[kind]()
    files = _files(source, sound)
    with oracle.folder(files) as path:
        report = Verifier().verify(str(path))
        report.to_dict()
        if not getattr(report, "ok", False) or report.verdict != "reproducible":
            return
        if kind < 2:
            _same(files, sound)
        else:
            pair = ("base_model.vera_A", "base_model.vera_B")
            theirs, ours = (library_load(f[WEIGHTS]) for f in (files, sound))
            if VeraConfig.from_json(files[CONFIG].decode()).projection_prng_key % 2**32 == 7 and any(
                name in theirs
                and (theirs[name].shape == ours[name].shape and theirs[name].tobytes() != ours[name].tobytes())
                for name in pair
            ):
                raise oracle.DefectError("another pair is called reproducible")


def _same(files: dict[str, bytes], sound: dict[str, bytes]) -> None:
    """What passes with its manifest untouched has the tensors and the config that the manifest is of."""
    theirs, ours = (library_load(f[WEIGHTS]) for f in (files, sound))
    if files.get(MANIFEST) == sound[MANIFEST]:
        same = theirs.keys() == ours.keys() and all(
            theirs[name].dtype == ours[name].dtype and theirs[name].shape == ours[name].shape
            and theirs[name].tobytes() == ours[name].tobytes()
            for name in ours
        )  # fmt: skip
        if not same:
            raise oracle.DefectError("other tensors than the manifest's are called reproducible")
        now, then = (
            VeraConfig.from_json(f[CONFIG].decode("utf-8", "replace").removeprefix("\ufeff")) for f in (files, sound)
        )
        for key in ("r", "projection_prng_key", "target_modules", "modules_to_save", "save_projection", "bias"):
            if getattr(now, key) != getattr(then, key):
                raise oracle.DefectError(f"another {key} than the manifest's is called reproducible")


def _convert(
    source: Source,
    run: Callable[[Path, Path, Path], object],
    sound: dict[str, bytes],
    back: Callable[[Path, Path], object] | None = None,
) -> None:
    """Run a conversion, and where it ends well look at what it wrote: `back` makes the input's tensors of it again."""
    files, other = _files(source, sound), dict(base())
    if source.below(4) == 0:
        files, other = dict(sound), _files(source, base())
    with oracle.folder({}) as path:
        oracle.put(path / "in", files)
        oracle.put(path / "base", other)
        try:
            run(path / "in", path / "out", path / "base")
        except vera_tools.errors.VeraToolsError:
            if (path / "out").exists():
                raise oracle.DefectError("an output was left behind by a command that failed") from None
            raise
        finally:
            left = {entry.name for entry in path.iterdir()} - {"in", "out", "base"}
            if left:
                raise oracle.DefectError(f"left behind: {left}")
            if files_of(path / "in") != files or files_of(path / "base") != other:
                raise oracle.DefectError("an input was changed")
        written = {file: library_load(file.read_bytes()) for file in (path / "out").glob("*.safetensors")}
        if back is None:
            return
        before, after = (Verifier().verify(str(path / name)) for name in ("in", "out"))
        put_right = {"config.peft", "tensors.names"}
        lost = {check.id for check in before.checks if check.status == "fail"} - put_right
        if (before.verdict == "reproducible") != (after.verdict == "reproducible") or (after.ok and lost):
            raise oracle.DefectError(f"{before.verdict} became {after.verdict}, and what failed passes: {lost}")
        with oracle.sound("what was written cannot be taken back"):
            back(path / "out", path / "again")
        (theirs,), ours = written.values(), library_load(files[WEIGHTS])
        again = library_load((path / "again" / WEIGHTS).read_bytes())
        if sorted(t.tobytes() for t in again.values()) != sorted(
            t.tobytes() for t in ours.values()
        ):  # names are put right
            raise oracle.DefectError("other tensors come back than went in")
        if theirs.keys() == ours.keys():
            raise oracle.DefectError("nothing was converted")


def strip(source: Source) -> None:
    """strip-projections."""
    _convert(source, lambda i, o, b: vera_tools.strip_projections(i, o), recorded(), vera_tools.embed_projections)


def embed(source: Source) -> None:
    """embed-projections."""
    _convert(
        source,
        lambda i, o, b: vera_tools.embed_projections(i, o, base=b),
        stripped(),
        vera_tools.strip_projections,
    )


def convert(source: Source) -> None:
    """convert, in both directions."""
    if source.below(2):
        _convert(source, lambda i, o, b: vera_tools.to_lora(i, o, base=b), recorded())
    else:
        _convert(source, lambda i, o, b: vera_tools.from_foreign(i, o, base=b), recorded())


def merge(source: Source) -> None:
    """Merge."""
    _convert(source, lambda i, o, b: vera_tools.merge(i, base=b, output=o), recorded())


def diff(source: Source) -> None:
    """Diff and inspect of a changed checkpoint and the sound one."""
    with oracle.folder({}) as path:
        oracle.put(path / "a", _files(source, recorded()))
        oracle.put(path / "b", recorded())
        try:
            vera_tools.inspect(path / "a").to_dict()
        finally:
            vera_tools.diff(path / "a", path / "b").to_dict()


_WRITING = ("strip-projections", "embed-projections", "convert", "merge")
_COMMANDS = ("verify", "inspect", "record", "regenerate", "diff", *_WRITING)


def commands(source: Source) -> None:
    """The command line: documented exit codes, one document by its schema, no internal error."""
    name, sound = _COMMANDS[source.below(len(_COMMANDS))], (recorded, stripped)[source.below(2)]()
    changed = source.below(4)  # the base, nothing, or the adapter
    with oracle.folder({}) as path:
        oracle.put(path / "base", _files(source, base()) if changed == 0 else base())
        oracle.put(path / "in", _files(source, sound) if changed > 1 else sound)
        arguments: list[object] = [name, path / "in"]
        if name == "regenerate":
            arguments = [name, "--checkpoint", path / "in"]
        elif name == "diff":
            arguments.append(path / "in")
        elif name == "merge" or (name != "strip-projections" and source.below(2)):
            arguments += ["--base", path / "base"]
        if name in _WRITING:
            arguments += ["-o", path / "out"]
        if name == "convert":
            arguments += ["--to", "lora"]
        code, _ = oracle.command(*arguments)
        if code and (path / "out").exists():
            raise oracle.DefectError(f"{name} ended with {code}, and left an output behind")


#: Each target, and how many of a hundred inputs it gets: those that need a folder take a hundred times as long.
TARGETS: dict[Callable[[Source], None], int] = {
    header: 14, adapter_config: 14, manifest: 12, metadata: 8, reference: 10, listing: 10, log: 7, drift: 5,
    model_config: 3, verify: 7, diff: 2, strip: 2, embed: 2, convert: 2, merge: 1, commands: 1,
}  # fmt: skip
_CHOICE = [target for target, share in TARGETS.items() for _ in range(share)]


def run(data: bytes) -> str:
    """One input: its first byte says which target. The name of the target.

    Raises:
        Exception: what must not come out of it.
    """
    source = Source(data)
    target = _CHOICE[source.byte() * len(_CHOICE) // 256]
    with oracle.bounded(target.__name__):
        target(source)
    return target.__name__


def seeds() -> list[bytes]:
    """Inputs to begin with: of each target one for each way of making an input, and what was found to reach more."""
    first: dict[str, int] = {}
    for byte in range(256):
        first.setdefault(_CHOICE[byte * len(_CHOICE) // 256].__name__, byte)
    tails = [
        bytes([how, *rest]) for how in range(8) for rest in ((), (1, 2, 3, 4), (0, 7, 5, 33, 9, 4, 1), (3, 255, 128))
    ]
    learnt = (Path(__file__).parent / "seeds.txt").read_text("ascii").split()
    return [bytes([byte]) + tail for byte in first.values() for tail in tails] + [
        bytes.fromhex(line) for line in learnt
    ]
