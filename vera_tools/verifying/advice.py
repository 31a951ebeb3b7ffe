"""What a person needs of a report: where it is safe to load, in one plain sentence, and what to do next.

Loaders and platforms have the names that people know. How a machine rounds is in recipes, in the loader table and in
docs/projections.md, and not here.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vera_tools.checkpoints.manifest import MANIFEST_NAME
from vera_tools.files import opening
from vera_tools.platforms import rows
from vera_tools.report import Document
from vera_tools.verifying.findings import MATCH, REQUIRED, Check, Verdict, is_covered
from vera_tools.verifying.loads import BASE_DTYPES, BASE_KINDS, OLD_PEFT, PEFT, VERA_TOOLS, Load

#: Loaders in words.
NAMES = {VERA_TOOLS: "vera-tools", PEFT: "PEFT 0.21 or newer", OLD_PEFT: "PEFT before 0.21"}
_BOTH_PEFTS = "any PEFT"

#: (rounding, dtype of the base) of each place where a loader is exact.
Cells = frozenset[tuple[str, str]]
EVERYWHERE: Cells = frozenset((rounding, dtype) for rounding in rows.ROUNDINGS for dtype in BASE_DTYPES)


@dataclass(frozen=True)
class Step(Document):
    """What to do next.

    Attributes:
        words: What it is good for, one clause.
        command: To be copied into a shell.
    """

    words: str
    command: str


def safety(verdict: Verdict, loads: Sequence[Load], checks: Sequence[Check], *, stored: bool, whole: bool) -> str:
    """Where a checkpoint is safe to load, in one sentence.

    Args:
        verdict: Its verdict.
        loads: Its loader table.
        checks: What was found.
        stored: Whether the projections are in the file.
        whole: Whether nothing of it is damaged or missing.
    """
    failed = [check.id for check in checks if check.status == "fail" and check.id not in (MATCH, REQUIRED)]
    if verdict == "invalid":
        return "Not safe to load with any loader: no whole VeRA adapter could be read."
    if not whole and all(name.startswith("base.") for name in failed):
        return "Not safe to load on this base: it is another one than it was trained on, or the adapter is incomplete."
    if not whole:
        return "Not safe to load with any loader: the adapter is damaged or incomplete."
    where = _where(loads)
    lost = any(check.id == MATCH and check.status == "fail" for check in checks)
    if verdict == "drift" and (lost or (stored and not where)):
        return "Not safe to load with any loader: the trained vera_A and vera_B cannot be made again."
    if failed:
        return f"Not safe to load before {'this is' if len(failed) == 1 else 'these are'} explained: {_list(failed)}."
    if verdict == "unproven":
        return "Not known to be safe with any loader: vera_A and vera_B are not stored, and no recipe is recorded."
    if verdict == "assumed":
        return "Not known to be safe with any loader: which vera_A and vera_B it was trained with is a guess."
    if verdict == "drift" and _few(checks):
        return "Not safe to load with any loader: a few stored elements were changed, which looks like damage."
    if verdict == "drift":
        return (
            "Not safe to ship: its key does not give the stored vera_A and vera_B. "
            f"If they are the trained ones, they load exactly with {where}."
        )
    if not where:
        return "Not safe to load with any loader: none computes with the trained vera_A and vera_B."
    exact = {loader for loader in NAMES if _cells(loads, loader) == EVERYWHERE}
    silent = "" if exact == set(NAMES) else "; elsewhere PEFT silently uses other projections"
    if any(load.exact is None for load in loads):
        silent = "; with PEFT it is not known, as the warning says"
    right = "" if is_covered(checks) else ", if its vectors are right,"  # which nothing tells without a manifest
    return f"Safe to load{right} with {where}{silent}."


def _few(checks: Sequence[Check]) -> bool:
    """Whether the verdict's own words name single places."""
    return any(check.id == MATCH and re.search(r"in \d+ places?: ", check.message) for check in checks)


def _where(loads: Sequence[Load]) -> str:
    """The loaders that are exact, and where each is: "vera-tools everywhere; with PEFT only on Linux ..."."""
    cells = {NAMES[loader]: _cells(loads, loader) for loader in NAMES}
    if cells[NAMES[PEFT]] == cells[NAMES[OLD_PEFT]]:
        cells = {NAMES[VERA_TOOLS]: cells[NAMES[VERA_TOOLS]], _BOTH_PEFTS: cells[NAMES[PEFT]]}
    names = {name: name + _by_default(loads, name) for name in cells}
    whole = [names[name] for name, exact in cells.items() if exact == EVERYWHERE]
    parts = [f"{_list(whole)} everywhere"] if whole else []
    parts += [f"{names[name]} only {_places(exact)}" for name, exact in cells.items() if exact and exact != EVERYWHERE]
    return "; with ".join(parts)


def _by_default(loads: Sequence[Load], name: str) -> str:
    """A remark where other options than a loader's own make a difference."""
    answers: dict[str, list[bool | None]] = {}
    for load in loads:
        if NAMES[load.loader] == name or (name == _BOTH_PEFTS and load.loader == PEFT):
            answers.setdefault(str(load.options), []).append(load.exact)
    return " (default options)" if len({tuple(row) for row in answers.values()}) > 1 else ""


def _cells(loads: Iterable[Load], loader: str) -> Cells:
    return frozenset(
        (load.rounding, load.base_dtype) for load in loads if load.loader == loader and not load.options and load.exact
    )


def _places(cells: Cells) -> str:
    """Where these cells are, in the names of platforms and dtypes of the base."""
    dtypes = {
        rounding: [dtype for dtype in BASE_DTYPES if (rounding, dtype) in cells]
        for rounding in rows.ROUNDINGS
        if any(where == rounding for where, _ in cells)
    }
    if len(dtypes) == len(rows.ROUNDINGS) and len({tuple(found) for found in dtypes.values()}) == 1:
        return _on_bases(next(iter(dtypes.values()))).strip()
    return " and ".join(
        f"on {_list([_platform(place) for place in rows.places(rounding)])}{_on_bases(found)}"
        for rounding, found in dtypes.items()
    )


def _platform(place: str) -> str:
    # "Linux without AVX2" has a row of its own among those that draw otherwise; alone, "Linux" would promise it too.
    return "Linux (AVX2 or Arm)" if place == "Linux" else place


def _on_bases(dtypes: Sequence[str]) -> str:
    if len(dtypes) == len(BASE_DTYPES):
        return ""
    return f" with a {_list([BASE_KINDS[dtype] for dtype in dtypes], last='or')} base"


def _list(names: Sequence[str], *, last: str = "and") -> str:
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


_OTHER_BASE = "name the base that it was trained on"
#: Nothing that is proven is ever replaced so: these checks fail of a record that was assumed or stated.
_REPLACED = (
    f"only if it was trained on this base, replace its record, which nothing proves; if not, {_OTHER_BASE}",
    "{anew} --base {base}",
)
_OR_DAMAGED = f"{_OTHER_BASE}; if this is it, copy the adapter again"
#: Renewing a manifest vouches for whatever is there, so that nothing but these words ever proposes it for a damage.
_MEANT = "only if you made the change yourself, `record` vouches for it from then on"
#: What to do where a check failed, the first that applies. `_step` says what stands in the places.
REMEDIES: Mapping[str, tuple[str, str]] = {
    "config.kind": ("this is no VeRA adapter: leave it out, or let -R skip it", "vera-tools verify -R {path}"),
    "config.key": ("put the key of the recorded pair back into adapter_config.json", "{again}"),
    "config.peft": ("write a config that PEFT reads", "vera-tools convert {path} --from auto -o OUT"),
    "config.target_modules": ("name the adapted modules in target_modules of adapter_config.json", "{again}"),
    "config.schema": ("correct adapter_config.json, or copy it again from where it was trained", "{again}"),
    "config.save_projection": ("copy it again from where it was trained, with its vera_A and vera_B", "{again}"),
    "tensors.file": ("copy or download the file again; if the original is broken too, save it anew", "{again}"),
    "tensors.official": ("save it again with the safetensors library, which PEFT reads with", "{again}"),
    "tensors.names": ("write the names that PEFT looks for", "vera-tools convert {path} --from auto -o OUT"),
    "tensors.layers": ("save it again from the trained model: vectors are missing", "{again}"),
    "tensors.shapes": ("save it again, alone in its model: PEFT saves one pair for all adapters", "{again}"),
    "tensors.out_max": ("save it again, alone in its model: PEFT saves one pair for all adapters", "{again}"),
    "tensors.dtypes": ("save it again in float32, bfloat16 or float16", "{again}"),
    "tensors.saved": ("save it again from the trained model: a module of modules_to_save is missing", "{again}"),
    "tensors.unexpected": ("see which tensors the config does not explain", "vera-tools inspect -v {path}"),
    "tensors.finite": ("training diverged or the file is damaged: take an earlier checkpoint", "{again}"),
    "metadata.schema": ("copy the file again; its own record is damaged", "{again}"),
    "metadata.projections": ("copy the file again; its vera_A or vera_B changed after it was written", "{again}"),
    "metadata.manifest": (f"copy both files again; {_MEANT}", "{again}"),
    "manifest.stale": ("if it was trained on since, renew its manifest; if not, copy it again", "{record}"),
    "manifest.schema": ("copy the manifest again from where it was written", "{again}"),
    "manifest.digest": ("copy the manifest again from where it was written", "{again}"),
    "manifest.projections": ("copy the file again; its vera_A or vera_B changed after it was recorded", "{again}"),
    "manifest.tensors": (f"copy the file again, which looks damaged; {_MEANT}", "{again}"),
    "manifest.config": (f"copy adapter_config.json again; {_MEANT}", "{again}"),
    "manifest.metadata": (f"copy the file again; {_MEANT}", "{again}"),
    "manifest.recipe": (f"copy the manifest again; {_MEANT}", "{again}"),
    # Not the base that it was checked against: that is the one which does not fit.
    "base.class": (
        "merge it, which goes by what was meant; or save it again",
        "vera-tools merge {path} --base {base} -o OUT",
    ),
    "base.modules": (_OR_DAMAGED, "vera-tools verify {path} --base BASE"),
    "base.pair": (_OTHER_BASE, "vera-tools verify {path} --base BASE"),
    "base.parameters": (
        f"{_OTHER_BASE}; if this is it, copy the adapter again",
        "vera-tools verify {path} --base BASE",
    ),
    "base.digests": (_OTHER_BASE, "vera-tools verify {path} --base BASE"),
    "base.dtype": _REPLACED,
}


#: What a message of the file, its shapes or its base asks for, where it holds such words, instead of the usual remedy.
SAID: Mapping[str, tuple[str, str]] = {
    "the weights file itself holds this record": (
        f"if it was trained on this base, take it again from there and record that; if not, {_OTHER_BASE}",
        "vera-tools verify {path} --base BASE",
    ),
    "of both half dtypes": (_OTHER_BASE, "vera-tools verify {path} --base BASE"),
    "wrongly: if it was trained on this base": _REPLACED,
    "the recorded base gives": (
        "save it again, alone in its model, or take it as LoRA, which needs no pair; if another base was recorded than "
        "it was trained on, record that one",
        "{lora}",
    ),
    "beside a first, wider one": (
        "if this is not the base that it was trained on, name that one; if it is, save the adapter again, alone in its "
        "model, or take it as LoRA, which needs no pair",
        "{lora}",
    ),
    "--allow-pickle": ("read the pickle, if you trust it", "vera-tools verify --allow-pickle {path}"),
    "`vera-tools verify -R` finds": (
        "it holds no adapter itself: search what is below it",
        "vera-tools verify -R {path}",
    ),
    "this looks like a base model": (
        "name the adapter, and this as its base",
        "vera-tools verify ADAPTER --base {path}",
    ),
    "there is no adapter_config.json": ("copy adapter_config.json again from where it was trained", "{again}"),
    "not a file or a folder": ("name the folder of an adapter", "vera-tools verify ADAPTER"),
    "was r edited?": ("set r back in adapter_config.json, or copy it again from where it was trained", "{again}"),
}


_SAYING = ("tensors.file", "tensors.shapes", "base.pair", "base.dtype")
#: What takes the adapter for right, and so is proposed last: nothing is renewed or exported that is damaged.
_TRUSTING = ("{anew}", "{record}", "{lora}")


def next_step(
    path: str, verdict: Verdict, checks: Sequence[Check], *, stored: bool, key: int | None, base: str | None
) -> Step | None:
    """What to do with a checkpoint that is not proven, or of which a check failed; None where all is well.

    Args:
        path: What the user called it.
        verdict: Its verdict.
        checks: What was found.
        stored: Whether the projections are in the file.
        key: The key that exactly makes the stored pair, where it is another one than the config's.
        base: The base that its config names, or that it was checked against.
    """
    failed = [check for check in checks if check.status == "fail" and check.id in REMEDIES]
    remedies = [_remedy(check) for check in failed]
    for words, command in sorted(remedies, key=lambda remedy: any(part in remedy[1] for part in _TRUSTING)):
        return _step(words, command, path, base)
    if verdict == "drift":
        return _after_drift(path, checks, stored=stored, key=key, base=base)
    if verdict == "unproven":
        words = "save it anew from the process that trained it, or record it for its base: it is then `assumed`"
        return _step(words, "{record} --base {base}", path, base)
    if verdict == "assumed":
        words = "check on the machine that trained it that it draws this pair; then pass --require assumed to accept it"
        return _step(words, "vera-tools drift --checkpoint {path}", path, base)
    if any(check.id == REQUIRED and check.status == "fail" for check in checks):
        return _step(
            "where it is known to be right, record it, and keep vera_manifest.json with it", "{record}", path, base
        )
    return None


def _remedy(check: Check) -> tuple[str, str]:
    said = [step for part, step in SAID.items() if check.id in _SAYING and part in check.message]
    return (said or [REMEDIES[check.id]])[0]


def lora_command(path: str, base: str | None, output: str) -> str:
    """The command that makes a LoRA which loads: without a base, PEFT refuses layers of another width than vera_A.

    Args:
        path: The adapter.
        base: Its base: a BASE argument, or the name that its config has; None leaves a BASE to fill in.
        output: The folder to write.
    """
    return (
        f"vera-tools convert {shlex.quote(path)} --to lora --base {shlex.quote(_base(base))} -o {shlex.quote(output)}"
    )


def gate_step(path: str, loads: Sequence[Load], *, stored: bool, base: str | None) -> Step:
    """What to do with a checkpoint that a gate on loaders does not let pass.

    Args:
        path: What the user called it.
        loads: Its loader table.
        stored: Whether the projections are in the file.
        base: The base that its config names, or that it was checked against.
    """
    if all(load.exact is None for load in loads):
        # Embedding or exporting a guess would make it exact for the loader, and no less a guess.
        words = "nothing proves which projections it was trained with: save it anew from the process that trained it"
        return _step(words, "{again}", path, None)
    refuses = [load for load in loads if load.loader == PEFT and not load.options and load.exact is not True]
    if stored or not refuses:
        return _step("as LoRA every loader is exact", "{lora}", path, base)
    words = (
        "with vera_A and vera_B in it, PEFT 0.21 or newer is exact; for older PEFT use `convert --to lora --base BASE`"
    )
    return _step(words, f"vera-tools embed-projections {{path}} -o {shlex.quote(_target(path))}-embedded", path, None)


def _after_drift(path: str, checks: Sequence[Check], *, stored: bool, key: int | None, base: str | None) -> Step:
    if key is not None:
        words = f"if it was trained with key {key}, set projection_prng_key to {key} in adapter_config.json"
        return _step(words, "{again}", path, base)
    if not stored:
        words = "take a copy that has the recorded pair, or the one that was recorded"
        return _step(words, "{again}", path, base)
    if _few(checks):
        return _step("a few elements were changed: copy it again from where it was trained", "{again}", path, base)
    words = "run it on the machine that trained it: it says whether that machine draws this pair"
    return _step(words, "vera-tools drift --checkpoint {path}", path, base)


def _step(words: str, command: str, path: str, base: str | None) -> Step:
    quoted = shlex.quote(path)
    pull, forget, record = "", f"rm {shlex.quote(_manifest_beside(path))}", f"vera-tools record {quoted}"
    if opening.is_on_hub(path):
        pull = f"vera-tools pull {quoted} -o pulled && "
        forget, record = f"rm pulled/{MANIFEST_NAME}", "vera-tools record pulled"
    elif opening.is_remote(path):  # a copy that was made by the store's own means
        forget, record = f"rm COPY/{MANIFEST_NAME}", "vera-tools record COPY"
    text = command.format(
        again=f"vera-tools verify {quoted}",
        record=f"{pull}{record}",
        anew=f"{pull}{forget} && {record}",
        lora=lora_command(path, base, f"{_target(path)}-lora"),
        path=quoted,
        base=shlex.quote(_base(base)),
    )
    return Step(words, text)


def _target(path: str) -> str:
    """A name for what is made of a checkpoint."""
    return re.sub(r"[^\w.-]+", "-", path.rstrip("/").rsplit("/", 1)[-1])


def _manifest_beside(path: str) -> str:
    """The manifest of a local checkpoint, which may have been named by a file of it."""
    folder = os.path.dirname(path) if os.path.isfile(path) else path
    return os.path.join(folder, MANIFEST_NAME)


def _base(name: str | None) -> str:
    """A BASE argument for the name that a config has."""
    if not name:
        return "BASE"
    is_repository = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.exists(name)
    return f"hf://{name}" if is_repository else name
