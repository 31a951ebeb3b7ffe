"""One class of models: adapters of PEFT's on it, what vera-tools makes of them, and whether that computes the same.

What is right is what PEFT's live model computes, the one that get_peft_model made and whose vectors were changed. It is
compared in two ways: the outputs of `forward`, where inputs were found, and every parameter after PEFT has merged it,
which reaches parts of the model that these inputs do not.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.architectures import bases, tiny
from tests.architectures.inputs import inputs, outputs
from tests.command import run_cli

RIGHT, REFUSED, WRONG, BADLY, CRASH, PEFT_OFF = "right", "refused", "wrong", "loads badly", "crash", "PEFT is off"

#: Largest difference, relative to the largest number, that the rounding of one merge explains. The adapters change
#: outputs by a hundred times as much.
TOLERANCE = 1e-3
#: The same for a parameter, which is rounded once.
WEIGHT_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Pair:
    """What one command made of one adapter on one base.

    Attributes:
        adapter: ``linear``, all linear layers; ``saved``, embedding and head saved beside them.
        base: A form of the base, as `bases` names them.
        command: ``verify``, ``merge`` or ``lora``.
        outcome: One of the words above.
        reason: Why it is not right, one line.
        exit_code: The command's.
        peft: What PEFT's own loading of the adapter onto this base gives: ``right``, or why not.
        by: What was compared: ``outputs``, ``weights``, or both.
    """

    adapter: str
    base: str
    command: str
    outcome: str
    reason: str
    exit_code: int | None
    peft: str
    by: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Live:
    """PEFT's live model: where its adapter lies, what it computes, and its parameters after merging."""

    folder: Path
    arguments: dict[str, Any] | None
    outputs: list[Any] | None
    weights: dict[str, Any] | None
    merged_outputs: list[Any] | None
    unlike_base: bool
    peft: str = ""

    @property
    def by(self) -> str:
        if self.outputs is None or not self.unlike_base:
            return "weights"
        return "outputs and weights" if self.weights is not None else "outputs"


class NotComparableError(Exception):
    """There is nothing to compare: the class cannot be built tiny, saved, loaded, or adapted; the message says why."""


def pairs(name: str, folder: Path) -> Iterator[Pair]:
    """Every pair of adapter and base of a class, with each command.

    Raises:
        NotComparableError: there is nothing to compare with.
    """
    try:
        _, model = tiny.model(name)
    except ValueError as error:
        raise NotComparableError(f"not built tiny: {_line(error)}") from error
    tiny.disturb(model)
    try:
        forms = list(bases.bases(model, folder / "bases"))
    except Exception as error:
        raise NotComparableError(f"transformers does not save it: {_line(error)}") from error
    model_class = type(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    usable: list[tuple[str, Path]] = []
    loaded = None
    for form, base in forms:
        problem, one = _loaded(model_class, base, state)
        if problem and form == "saved":
            raise NotComparableError(f"transformers does not load what it saves: {problem}")
        if not problem:
            usable.append((form, base))
            loaded = loaded or one
    adapters: list[tuple[str, Live]] = []
    failed = ""
    for adapter in ("linear", "saved"):
        try:
            live = adapted(loaded, folder / adapter, name, saved=adapter == "saved")
        except Exception as error:
            failed = failed or f"{type(error).__name__}: {_line(error)}"
            continue
        if live is not None:
            adapters.append((adapter, live))
    if not adapters:
        raise NotComparableError(f"PEFT does not adapt it: {failed}")
    # What names the base's files have matters to the base alone: the adapter that touches most meets all of them.
    plan = [(adapter, live, *usable[0], (_verify, _merge, _lora)) for adapter, live in adapters]
    plan += [(*adapters[-1], form, base, (_verify, _merge)) for form, base in usable[1:]]
    for adapter, live, form, base, commands in plan:
        for command in commands:
            started = time.perf_counter()
            live.peft = live.peft or _loaded_adapter(loaded, live.folder, live) or RIGHT
            outcome, reason, code = command(loaded, base, live, folder / "out")
            shutil.rmtree(folder / "out", ignore_errors=True)
            seconds = round(time.perf_counter() - started, 2)
            yield Pair(adapter, form, command.__name__[1:], outcome, reason, code, live.peft, live.by, seconds)


def _loaded(model_class: Any, base: Path, state: dict[str, Any]) -> tuple[str, Any]:
    """The model of a folder, and why transformers does not make the right one of it; empty where it does."""
    import torch

    try:
        model, wrong = bases.load(model_class, base)
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}", None
    if wrong:
        return _wrong_keys(wrong), None
    theirs = model.state_dict()
    other = [key for key in state if key not in theirs or not torch.equal(theirs[key], state[key])]
    return (f"other values: {', '.join(other[:3])} ({len(other)})" if other else ""), model


def task_type(name: str) -> str | None:
    """The task that a user of PEFT would name for a class; none where PEFT has no model of its own for it."""
    tasks = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM"}
    return next((task for end, task in tasks.items() if name.endswith(end)), None)


def saved_modules(model: Any) -> list[str]:
    """Input embedding and head, by the last part of their names, as a user would write them."""
    names = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError, AttributeError):
            wanted = getattr(model, getter)()
            names += [
                name.rpartition(".")[2]
                for name, module in model.named_modules()
                if module is wanted and name and any(True for _ in module.parameters(recurse=False))
            ]
    return list(dict.fromkeys(name for name in names if not name.isdigit()))


def adapted(base: Any, folder: Path, name: str, *, saved: bool) -> Live | None:
    """Adapt the base, change every vector and saved module, save; None where there is nothing that could be saved."""
    import torch
    from peft import VeraConfig, get_peft_model

    model = copy.deepcopy(base)
    options: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "projection_prng_key": 7}
    if saved:
        options.update(modules_to_save=saved_modules(model) or None, task_type=task_type(name))
        if options["modules_to_save"] is None and options["task_type"] is None:
            return None
    found = inputs(model)
    live = get_peft_model(model, VeraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in live.named_parameters():
            if "vera_lambda" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
            elif parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    live.save_pretrained(folder)
    arguments, before = found if found is not None else (None, None)
    computed = None
    if arguments is not None:
        with contextlib.suppress(Exception):
            computed = outputs(live, arguments)
    unlike = computed is not None and before is not None and bool(_off(before, computed, 10 * TOLERANCE))
    weights = merged_outputs = None
    with contextlib.suppress(Exception):
        merged = _merged(live)
        weights = {key: value.detach().clone() for key, value in merged.state_dict().items()}
        if computed is not None:
            merged_outputs = outputs(merged, arguments)
    if weights is None and not unlike:
        raise ValueError("neither outputs nor merged weights to compare with")
    return Live(folder, arguments, computed, weights, merged_outputs, unlike)


def _untied(adapted: Any) -> Any:
    """Give every adapted layer a weight of its own: where it is tied, merging would change others too."""
    import torch

    for module in adapted.modules():
        layer = getattr(module, "base_layer", None)
        if layer is not None and getattr(layer, "weight", None) is not None:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return adapted


def _merged(adapted: Any) -> Any:
    """PEFT's merged model, with the weights that its live model computes with.

    torch's MultiheadAttention takes the weight of its out_proj and does not call the layer: live, an adapter of it has
    no effect, and PEFT's merging gives it one.
    """
    import torch

    past = [
        (name, module.out_proj.base_layer.weight.detach().clone())
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, torch.nn.MultiheadAttention) and hasattr(module.out_proj, "base_layer")
    ]
    merged = _untied(adapted).merge_and_unload()
    with torch.no_grad():
        for name, weight in past:
            merged.get_submodule(name).out_proj.weight.copy_(weight)
    return merged


def _loaded_adapter(base: Any, adapter: Path, live: Live) -> str:
    """In what a base with an adapter that PEFT loads is not the live model; empty where it is the same."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            adapted = PeftModel.from_pretrained(copy.deepcopy(base), adapter).eval()
        except Exception as error:
            return f"does not load: {type(error).__name__}: {_line(error)}"
    missed = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    if missed:
        return f"misses keys: {_line(missed[0])}"
    return difference(adapted, live, merge=True)


def difference(model: Any, live: Live, *, merge: bool = False) -> str:
    """In what a model is not PEFT's live one: outputs, or parameters once merged; empty where it is the same."""
    other = ""
    if live.outputs is not None:
        try:
            mine = outputs(model, live.arguments)
        except Exception as error:
            return f"forward fails: {type(error).__name__}: {_line(error)}"
        other = _off(mine, live.outputs, TOLERANCE)
        if other and not merge and live.merged_outputs is not None and not _off(mine, live.merged_outputs, TOLERANCE):
            other = ""  # rounding the merged weights alone does that, in PEFT too: something is chosen by a comparison
    if live.weights is not None and not other:
        if merge:
            try:
                model = _merged(model)
            except Exception as error:
                return f"does not merge: {type(error).__name__}: {_line(error)}"
        state = model.state_dict()
        names = [
            key for key in live.weights if key not in state or _off([state[key]], [live.weights[key]], WEIGHT_TOLERANCE)
        ]
        if names:
            other = f"other weights: {', '.join(names[:3])} ({len(names)} of {len(live.weights)})"
    return other


def _off(mine: list[Any], theirs: list[Any], tolerance: float) -> str:
    """How far apart two lists of tensors are, where that is more than rounding explains."""
    if [value.shape for value in mine] != [value.shape for value in theirs]:
        return "other shapes"
    for a, b in zip(mine, theirs, strict=True):
        a, b = a.double(), b.double()
        scale = float(b.abs().max()) if b.numel() else 0.0
        apart = float((a - b).abs().max()) if b.numel() else 0.0
        if not apart <= tolerance * max(scale, 1e-6):
            return f"other outputs, off by {apart:.2g} of {scale:.2g}"
    return ""


def _called(*arguments: object) -> tuple[int, str, str]:
    """Run a command: its exit code, what it printed, and the first line of its error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = run_cli(*arguments)
    except BaseException as error:  # nothing may come out of the command line, not even the end of the process
        return 70, "", f"internal error: {type(error).__name__}: {_line(error)} {_place(error)}"
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    return result.returncode, result.stdout, (lines or result.stderr.splitlines() or [""])[-1].removeprefix("error: ")


def refusal(code: int, reason: str) -> tuple[str, str, int]:
    crashed = "internal error" in reason or "Traceback" in reason
    return (CRASH if crashed else REFUSED), reason, code


Judged = tuple[str, str, int | None]


def _verify(loaded: Any, base: Path, live: Live, out: Path) -> Judged:
    peft = live.peft
    code, printed, reason = _called("verify", live.folder, "--base", base)
    failed = [" ".join(line.split()) for line in printed.splitlines() if line.strip().startswith("fail ")]
    if code == 0:
        return (RIGHT, "", 0) if peft == RIGHT else (PEFT_OFF, f"verify passes; PEFT: {peft}", 0)
    outcome, reason, code = refusal(code, "; ".join(failed) or reason)
    return (
        (PEFT_OFF, f"verify says so: {reason}", code)
        if peft != RIGHT and outcome == REFUSED
        else (outcome, reason, code)
    )


def _merge(loaded: Any, base: Path, live: Live, out: Path) -> Judged:
    code, _, reason = _called("merge", live.folder, "--base", base, "-o", out, "--verify", "--jobs", "1")
    if code:
        return refusal(code, reason)
    try:
        model, wrong = bases.load(type(loaded), out)
    except Exception as error:
        return BADLY, f"{type(error).__name__}: {_line(error)}", 0
    if wrong:
        return BADLY, _wrong_keys(wrong), 0
    other = difference(model, live)
    return (WRONG, other, 0) if other else (RIGHT, "", 0)


def _lora(loaded: Any, base: Path, live: Live, out: Path) -> Judged:
    code, _, reason = _called("convert", live.folder, "--to", "lora", "-o", out, "--base", base)
    if code:
        return refusal(code, reason)
    other = _loaded_adapter(loaded, out, live)
    if other.startswith(("does not load", "misses keys")):
        return (BADLY, other, 0) if live.peft == RIGHT else (PEFT_OFF, other, 0)
    return (WRONG, other, 0) if other else (RIGHT, "", 0)


def _wrong_keys(wrong: dict[str, list[str]]) -> str:
    return "; ".join(f"{kind.replace('_', ' ')}: {', '.join(keys[:3])} ({len(keys)})" for kind, keys in wrong.items())


def _line(error: object) -> str:
    return " ".join(str(error).split())[:300]


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"({Path(frame.filename).name}:{frame.lineno})"


def quiet() -> None:
    """Keep transformers off the network, its loggers silent, and torch on one thread."""
    import logging
    import os

    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical", HF_HUB_DISABLE_PROGRESS_BARS="1")
    import torch
    import transformers

    import vera_tools.cli.convert
    import vera_tools.cli.merge
    import vera_tools.cli.verify
    import vera_tools.merging.loading

    # transformers loads what was merged right afterwards, which says more than asking it, and takes seconds less.
    vera_tools.merging.loading.ask = lambda plan, proven: proven
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")


def judged(name: str, told: Callable[[Pair], None]) -> str:
    """Judge a class in a folder of its own; the reason where there is nothing to compare."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for pair in pairs(name, Path(folder)):
                told(copy.copy(pair))
        except NotComparableError as error:
            return str(error)
    return ""
