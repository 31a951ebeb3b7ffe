"""Train, save and load VeRA adapters on an accelerator, beside PEFT, and measure both; JSON and Markdown come out.

    python -m tests.gpu.measure [-o FOLDER] [--device cuda] [--width 4096] [--layers 6] [--rank 256] [--positions 4096]

The two files bear the card's name; by default they go to tests/gpu/results, to be committed. Exit code 1: something is
not as it should be; the tables say what. Needs a CUDA build of torch and the packages of ``.[dev,quantised-tests]``; a
section that lacks one says so, and the others go on. On a machine that has no more than such a torch::

    python3 -m venv --system-site-packages venv
    venv/bin/pip install -e '.[dev,quantised-tests]'
    venv/bin/python -m tests.gpu.measure -o FOLDER

Without constraints.txt, which names torch for the CPU. A few minutes do for all: installing and what torch.compile
compiles take nearly all of them, and everything else is small but for the stack of layers (3 GB on the card).

``--device cpu`` runs the same on the CPU, with small sizes, to try the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from benchmarks.nn_performance import in_turn, kept_bytes, options, stack
from tests import FIXTURES
from tests.nn.models import OPTIONS, llama, logits, peft_model, randomise, some_ids
from tests.nn.quantised import base as quantised_base
from tests.peers import load_peft
from vera_tools import verify
from vera_tools.drifting.environments import ask, this_interpreter
from vera_tools.nn import VeraConfig, VeraModel, save_adapter
from vera_tools.nn.projection import same_bits
from vera_tools.platforms.streams import Draw, identify_stream
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

STEPS = 6
#: How far from PEFT logits and trained vectors may be, where PEFT itself comes out the same twice.
LIMITS = {
    "float32": 1e-5,
    "bfloat16": 2e-2,
    "autocast": 2e-2,
    "bitsandbytes nf4": 1e-5,
    "bitsandbytes 8 bit": 2e-2,
    "torchao int8": 1e-5,
}

Make = Callable[[], nn.Module]
Result = dict[str, Any]


def train(model: nn.Module, device: str, *, autocast: bool = False) -> list[float]:
    """A few steps of plain descent, which makes less of the order of sums than Adam does; the losses."""
    ids = some_ids(4, 12, seed=1).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses = []
    model.train()
    for _ in range(STEPS):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def farthest(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between tensors of the same names."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in mine)


def vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    found = ((name, value) for name, value in model.named_parameters() if "vera_lambda" in name)
    return {name.replace("base_model.model.", "model."): value.detach() for name, value in found}


def beside_peft(kind: str, make: Make, folder: Path, device: str) -> Result:
    """Train both from one checkpoint of PEFT's, save, and load each in the other."""
    autocast, ids = kind == "autocast", some_ids().to(device)

    def out(model: nn.Module) -> torch.Tensor:
        model.train()  # nothing drops out; to evaluate, bitsandbytes computes in bfloat16 on some CPUs
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return logits(model, ids)

    start = folder / kind / "start"
    new = peft_model(make())
    randomise(new)
    new.save_pretrained(start)
    ours = VeraModel.from_pretrained(make(), start, is_trainable=True)
    peers, again = (load_peft(make(), start, is_trainable=True) for _ in range(2))
    losses = {name: train(model, device, autocast=autocast) for name, model in (("ours", ours), ("peft", peers))}
    train(again, device, autocast=autocast)
    noise = max(farthest(vectors(again), vectors(peers)), float((out(again) - out(peers)).abs().max()))
    save_adapter(ours, folder / kind / "ours")
    peers.save_pretrained(folder / kind / "peft")
    in_peft = load_peft(make(), folder / kind / "ours")
    in_ours = VeraModel.from_pretrained(make(), folder / kind / "peft")
    differences = {
        "losses": max(abs(a - b) for a, b in zip(losses["ours"], losses["peft"], strict=True)),
        "vectors": farthest(vectors(ours), vectors(peers)),
        "logits": float((out(ours) - out(peers)).abs().max()),
        "ours loaded in PEFT": float((out(in_peft) - out(ours)).abs().max()),
        "PEFT's loaded in ours": float((out(in_ours) - out(peers)).abs().max()),
    }
    limit = max(LIMITS[kind], 2 * noise)
    learned = losses["ours"][-1] < losses["ours"][0]
    return {
        "differences": differences,
        "noise of PEFT": noise,
        "limit": limit,
        "losses": losses,
        "ok": learned and max(differences.values()) <= limit,
    }


def compiled(device: str) -> Result:
    """torch.compile on both sides of a step, against the model as it is."""
    torch.compiler.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    ids = some_ids(4, 12, seed=1).to(device)
    found = {}
    for name in ("as it is", "compiled"):
        model = VeraModel(llama().to(device), VeraConfig(**OPTIONS))
        randomise(model)
        run = torch.compile(model, backend=backend) if name == "compiled" else model
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        found[name] = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name]["loss"] = loss.detach()
    difference = farthest(found["compiled"], found["as it is"])
    return {"backend": backend, "difference": difference, "limit": 1e-4, "ok": difference <= 1e-4}


def sharded(folder: Path, device: str) -> Result:
    """FSDP2 on one device: the checkpoint must be the one that the same training writes without it."""
    from safetensors.torch import load_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    saved = {}
    with single_process(device):
        for name in ("whole", "sharded"):
            model = VeraModel(llama().to(device), VeraConfig(**OPTIONS))
            randomise(model)
            if name == "sharded":
                mesh = init_device_mesh(device, (1,))
                for module in (*model.model.model.layers, model.model, model):
                    fully_shard(module, mesh=mesh)
            train(model, device)
            model.save_pretrained(folder / "fsdp" / name)
            saved[name] = load_file(folder / "fsdp" / name / "adapter_model.safetensors")
    difference = farthest(saved["sharded"], saved["whole"])
    return {"difference": difference, "limit": 1e-5, "ok": difference <= 1e-5}


@contextlib.contextmanager
def single_process(device: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
        )
        try:
            yield
        finally:
            distributed.destroy_process_group()


def exactness(folder: Path, device: str) -> Result:
    """What is promised to the bit, or follows from the definition, for adapters that live on the device."""
    holds: dict[str, bool] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model, on_cpu = adapted_on(device, dtype), adapted_on("cpu", dtype)
        name = str(dtype).removeprefix("torch.")
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        model.merge_adapter()
        layer = next(iter(model.vera_layers()))
        merged, on_cpus = (each.merge_and_unload().state_dict() for each in (adapted_on(device, dtype), on_cpu))
        model.unmerge_adapter()
        after = model.state_dict()
        holds[f"{name}: unmerging gives back the bits"] = all(same_bits(before[key], after[key]) for key in before)
        holds[f"{name}: merging changes the weights, by what it does on the CPU"] = not same_bits(
            merged[f"{layer}.weight"], before[f"model.{layer}.base_layer.weight"]
        ) and all(
            torch.allclose(merged[key].float().cpu(), on_cpus[key].float(), rtol=2.0**-7, atol=1e-6) for key in on_cpus
        )
    model = adapted_on(device, torch.bfloat16, save_projection=False)
    save_adapter(model, folder / "exact")
    report = verify(folder / "exact")
    holds["what is saved without projections verifies"] = report.exit_code == 0
    again = VeraModel.from_pretrained(llama(torch.bfloat16).to(device), folder / "exact")
    pair = again.vera_A["default"], again.vera_B["default"]
    recipe = Recipe.parse("mt19937-f32-fused", prng_key=OPTIONS["projection_prng_key"])
    drawn = generate(recipe, PairShape(*pair[0].shape, pair[1].shape[0]))
    holds["the pair on the device is the recipe's, bit for bit"] = all(
        held.device.type == device and same_bits(held.cpu(), torch.from_numpy(array))
        for held, array in zip(pair, drawn, strict=True)
    )
    loras = [each.to_lora().state_dict for each in (model, adapted_on("cpu", torch.bfloat16, save_projection=False))]
    holds["its LoRA is the CPU's, bit for bit"] = loras[0].keys() == loras[1].keys() and all(
        same_bits(loras[0][key], loras[1][key]) for key in loras[0]
    )
    holds["rows of a batch with different adapters are as each alone"] = mixed(device) <= 1e-5
    return {"holds": holds, "ok": all(holds.values())}


def adapted_on(device: str, dtype: torch.dtype, **options: Any) -> VeraModel:
    """A Llama on the device with an adapter that does something, the same one everywhere."""
    model = VeraModel(llama(dtype).to(device), VeraConfig(**{**OPTIONS, **options}))
    randomise(model)
    return model


def mixed(device: str) -> float:
    """How far the rows of one batch, each with an adapter of its own, are from each adapter alone."""
    model = adapted_on(device, torch.float32)
    model.add_adapter("second", VeraConfig(**OPTIONS))
    model.add_adapter("narrow", VeraConfig(**{**OPTIONS, "r": 8}))
    randomise(model)
    names, ids = ["second", "narrow", "default", "second"], some_ids(4).to(device)
    together = logits(model, ids, adapter_names=names)
    alone = []
    for name, row in zip(names, ids, strict=True):
        model.set_adapter(name)
        alone.append(logits(model, row[None]))
    return float((together - torch.cat(alone)).abs().max())


def generator(device: str) -> Result:
    """What the device's own generator draws for the golden keys, and what makes that."""
    cases = json.loads((FIXTURES / "golden" / "streams.json").read_text("utf-8"))["cases"]
    streams = {}
    for dtype in sorted({case["drawn_dtype"] for case in cases}):
        chosen = [case for case in cases if case["drawn_dtype"] == dtype]
        pairs = [(case["prng_key"], case["r"], case["in_max"], case["out_max"]) for case in chosen]
        answer = ask(this_interpreter(), pairs, dtypes=[dtype], device=device, timeout=600)
        if answer.status != "ok":
            return {"ok": False, "error": answer.error}
        stream = identify_stream(
            dtype,
            answer.streams[dtype],
            [Draw(*pair) for pair in pairs],
            device=None if device == "cpu" else answer.facts["device_name"] or device,
            threads=answer.facts["device_threads"],
        )
        names = ("prng_key", "r", "in_max", "out_max")
        drawn = [
            dict(zip(names, pair, strict=True)) | digests
            for pair, digests in zip(pairs, answer.streams[dtype], strict=True)
        ]
        streams[dtype] = {"made by": stream.label, "drawn": drawn}
    unknown = [name for name, stream in streams.items() if stream["made by"].startswith("own generator")]
    return {"streams": streams, "unknown": unknown, "ok": not unknown}


def performance(device: str, args: argparse.Namespace) -> Result:
    """Forward, training step and memory of a stack of linear layers: ours, PEFT's, and its matrix products alone."""
    import peft

    results = {}
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):

        def new(kind: Any, config: Any, dtype: torch.dtype = dtype) -> Any:
            base = stack(args.width, args.layers).to(device, dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return kind(base, config(**options(args.rank, args.layers)))

        models = {"vera-tools": new(VeraModel, VeraConfig), "PEFT": new(peft.get_peft_model, peft.VeraConfig)}
        x = torch.randn(args.positions, args.width, device=device, dtype=dtype)
        inputs = x.clone().requires_grad_()  # as in a model whose first adapted layer is not its first
        ours = models["vera-tools"]
        A, B = (held["default"].to(dtype) for held in (ours.vera_A, ours.vera_B))
        layers = list(ours.vera_layers().values())

        def products(x: torch.Tensor = x, layers: Any = layers, A: Any = A, B: Any = B) -> None:
            for layer in layers:
                nn.functional.linear(x, layer.weight, layer.bias)
                nn.functional.linear(nn.functional.linear(x, A), B)

        def computed(model: Any, x: torch.Tensor, autocast: bool = autocast) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                return model(x)  # type: ignore[no-any-return]

        forward: dict[str, Callable[[], object]] = {"products alone": products}
        forward |= {who: partial(computed, model, x) for who, model in models.items()}
        steps = {
            who: lambda model=model, x=inputs: computed(model, x).sum().backward() for who, model in models.items()
        }
        with torch.no_grad():
            forward_ms = milliseconds(forward, device, args.repeats)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            kept = {who: kept_bytes(model, x) / 1e6 for who, model in models.items()}
        results[str(dtype).removeprefix("torch.") + autocast * ", autocast"] = {
            "forward, ms": forward_ms,
            "training step, ms": milliseconds(steps, device, args.repeats),
            "kept for the backward pass, MB": kept,
            "peak of a step, MB": {who: peak(step, device) for who, step in steps.items()},
        }
    return {"sizes": {key: getattr(args, key) for key in ("width", "layers", "rank", "positions")}, "figures": results}


def milliseconds(variants: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """The median of each, the variants taking turns."""

    def finished(run: Callable[[], object]) -> Callable[[], None]:
        def call() -> None:
            run()
            synchronize(device)

        return call

    # A CPU is shared with others, and an accelerator's work is no CPU time.
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = in_turn({name: finished(run) for name, run in variants.items()}, repeats, clock=clock)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def peak(run: Callable[[], object], device: str) -> float | None:
    """Memory that a run takes beyond what is held before it; None on a CPU, which does not count."""
    if device == "cpu":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def measure(device: str, args: argparse.Namespace, folder: Path) -> Result:
    """All of it, by section; one that fails says why, and the others go on."""

    def quantised(kind: str) -> Make:
        return lambda: quantised_base(kind, folder, device=device)

    bases: dict[str, Make] = {
        "float32": lambda: llama().to(device),
        "bfloat16": lambda: llama(torch.bfloat16).to(device),
        "autocast": lambda: llama().to(device),
        "bitsandbytes nf4": quantised("bitsandbytes nf4"),
        "bitsandbytes 8 bit": quantised("bitsandbytes 8 bit"),
        "torchao int8": quantised("torchao int8"),
    }
    sections: dict[str, Callable[[], Result]] = {
        kind: lambda kind=kind, make=make: beside_peft(kind, make, folder, device)  # type: ignore[misc]
        for kind, make in bases.items()
    }
    sections |= {
        "torch.compile": lambda: compiled(device),
        "FSDP2 on one device": lambda: sharded(folder, device),
        "exactness": lambda: exactness(folder, device),
        "generator": lambda: generator(device),
        "performance": lambda: performance(device, args),
    }
    results = {}
    for name, section in sections.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results[name] = section()
            except BaseException as error:  # pytest's skip, where a package is not installed, is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                results[name] = {"ok": False, "error": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        print(f"{name}: {'ok' if results[name].get('ok', True) else 'NOT OK'}", file=sys.stderr, flush=True)
    return results


def facts(device: str) -> Result:
    found: Result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
    }
    for package in ("peft", "transformers", "bitsandbytes", "torchao", "vera-tools"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def markdown(report: Result) -> str:
    """The report as tables."""
    lines = [f"# {report['facts']['device']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in report["facts"].items() if value is not None), ""]
    lines += ["| what | differs from PEFT by at most | PEFT from itself | allowed | |", "|---|---|---|---|---|"]
    for name, section in report["sections"].items():
        verdict = "ok" if section.get("ok") else "**not ok**"
        if "error" in section:
            lines.append(f"| {name} | {section['error']} | | | {verdict} |")
        elif "differences" in section:
            worst = max(section["differences"], key=section["differences"].get)
            figures = f"{section['differences'][worst]:.1e} ({worst}) | {section['noise of PEFT']:.1e}"
            lines.append(f"| {name} | {figures} | {section['limit']:.1e} | {verdict} |")
        elif "difference" in section:
            lines.append(
                f"| {name} | {section['difference']:.1e} (from itself) | | {section['limit']:.1e} | {verdict} |"
            )
    holds = report["sections"]["exactness"].get("holds", {})
    lines += ["", *(f"- {statement}: {'yes' if is_so else '**no**'}" for statement, is_so in holds.items())]
    streams = report["sections"]["generator"].get("streams", {})
    makers = sorted({stream["made by"] for stream in streams.values()})
    lines += ["", f"Drawn on the device for the golden keys: {'; '.join(makers) or 'nothing'}.", ""]
    speed = report["sections"]["performance"]
    if "figures" in speed:
        lines += [", ".join(f"{key} {value}" for key, value in speed["sizes"].items()) + ":", ""]
        lines += ["| dtype | what | products alone | vera-tools | PEFT |", "|---|---|---|---|---|"]
        for dtype, figures in speed["figures"].items():
            for what, values in figures.items():
                cells = (values.get(who) for who in ("products alone", "vera-tools", "PEFT"))
                shown = " | ".join("" if value is None else f"{value:.2f}" for value in cells)
                lines.append(f"| {dtype} | {what} | {shown} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    small = {"width": 64, "layers": 2, "rank": 16, "positions": 32, "repeats": 2}
    large = {"width": 4096, "layers": 6, "rank": 256, "positions": 4096, "repeats": 15}
    for name in large:
        parser.add_argument(f"--{name}", type=int)
    args = parser.parse_args(arguments)
    for name in large:
        if getattr(args, name) is None:
            setattr(args, name, (small if args.device == "cpu" else large)[name])
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu tries the script itself")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as folder:
        report = {"facts": facts(args.device), "sections": measure(args.device, args, Path(folder))}
    args.output.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", report["facts"]["device"]).strip("-").lower()
    (args.output / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    (args.output / f"{name}.md").write_text(markdown(report), "utf-8")
    print(markdown(report))
    return 0 if all(section.get("ok", True) for section in report["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
