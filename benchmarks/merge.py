"""vera-tools merge against PEFT's load + merge_and_unload + save_pretrained and against `cp -r`: time, memory, bits.

Whole processes, paired in one run, on a synthetic Llama-shaped bfloat16 base of 22 layers (2.2 GB, 5 shards), r 256::

    python benchmarks/merge.py [--repeats 3] [--layers 22] [--larger] [--folder DIR]

``--larger`` adds a base of four times as many layers, on which only the memory of vera-tools is looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import ENVIRONMENT, PYTHON, load
from synthetic_base import LINEAR, TARGETS, write_adapter, write_base

from vera_tools.dtypes import np_dtype
from vera_tools.files.safetensors import TensorFile

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
PRODUCTS = f"""
import sys, numpy as np
layers, names = int(sys.argv[1]), sys.argv[2].split(",")
sys.path.insert(0, {str(Path(__file__).parent)!r})
from synthetic_base import LINEAR, RANK
for name in names:
    outs, ins = LINEAR[name]
    a, b, c = np.ones((outs, RANK), np.float32), np.ones((RANK, ins), np.float32), np.empty((outs, ins), np.float32)
    for _ in range(layers):
        np.matmul(a, b, out=c)
"""


# The host of a virtual machine takes back memory that its guest has freed, and to get it again costs more than to copy
# a file into it: `cp -r` of the base took 0.8 s, or 1.7 to 4.5 s. So each program finds memory that was in use a moment
# ago.
TOUCH = """
import mmap, os
free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
mmap.mmap(-1, min(8 << 30, free // 2), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
"""


@dataclass(frozen=True)
class Run:
    """One program: wall time, CPU time (user and system), and its largest anonymous memory, sampled every 5 ms.

    The memory is that of all its processes; what copies of a process share with it counts in each of them.
    """

    seconds: float
    cpu: float
    anonymous_mb: float


def run(command: list[str]) -> Run:
    """Run one process to its end, on a disk with nothing left to write and in memory that is at hand."""
    subprocess.run(["sync"], check=True)
    subprocess.run([sys.executable, "-c", TOUCH], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True)
    peak = [0.0]
    sampler = threading.Thread(target=_sample, args=(process, peak))
    sampler.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    sampler.join()
    if process.returncode:
        sys.exit(f"{command} exited {process.returncode}: {errors}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, peak[0])


def _sample(process: subprocess.Popen[str], peak: list[float]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):  # one that has just ended
            peak[0] = max(peak[0], sum(map(_anonymous_mb, _family(process.pid))))
        time.sleep(0.005)


def _family(pid: int) -> list[int]:
    """A process and those that it has started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in _family(int(child)))]


def _anonymous_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def off_share(base: Path, adapter: Path, merged: Path, targets: list[str], *, layers: tuple[int, ...]) -> float:
    """Share of a sample of weights' elements that are not the correctly rounded float64 result."""
    with TensorFile.open(adapter / "adapter_model.safetensors") as file:
        tensors = {name: file.read(name).astype(np.float64) for name in file.tensors}
    wrong = total = 0
    for layer in layers:
        for name in targets:
            prefix = f"model.layers.{layer}.{name}"
            lambda_b = tensors[f"base_model.model.{prefix}.vera_lambda_b"]
            lambda_d = tensors[f"base_model.model.{prefix}.vera_lambda_d"]
            outs, ins = LINEAR[name]
            exact = _read(base, f"{prefix}.weight").astype(np.float64)
            exact += (lambda_b[:, None] * tensors["base_model.vera_B"][:outs]) @ (
                lambda_d[:, None] * tensors["base_model.vera_A"][:, :ins]
            )
            # To 8 significant bits by integers: another way than that of either program.
            shift = np.frexp(exact)[1] - 8
            right = np.ldexp(np.rint(np.ldexp(exact, -shift)), shift).astype(np_dtype("bfloat16"))
            wrong += int(np.count_nonzero(_read(merged, f"{prefix}.weight") != right))
            total += right.size
    return wrong / total


def _read(folder: Path, tensor: str) -> np.ndarray:
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile.open(path) as file:
            if tensor in file.tensors:
                return file.read(tensor)
    raise KeyError(tensor)


def ours(base: Path, adapter: Path, out: Path) -> list[str]:
    """The command under test."""
    return [*PYTHON, "-m", "vera_tools", "merge", str(adapter), "--base", str(base), "-o", str(out), "-q"]


def compare(folder: Path, title: str, targets: list[str], *, layers: int, repeats: int) -> None:
    base, adapter = folder / "base", folder / title.replace(" ", "-").replace(",", "-")
    write_adapter(adapter, targets, layers=layers)
    outs = {name: folder / f"out-{name}" for name in ("peft", "vera-tools", "cp")}
    commands = {
        "PEFT": ([*PYTHON, "-c", PEFT, str(base), str(adapter), str(outs["peft"])], outs["peft"]),
        "vera-tools merge": (ours(base, adapter, outs["vera-tools"]), outs["vera-tools"]),
        "cp -r": (["cp", "-r", str(base), str(outs["cp"])], outs["cp"]),
        "matrix products alone": ([*PYTHON, "-c", PRODUCTS, str(layers), ",".join(targets)], None),
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, (command, out) in commands.items():
            if out is not None:
                shutil.rmtree(out, ignore_errors=True)
            runs[name].append(run(command))
    shutil.rmtree(outs["cp"])
    peft = statistics.median(r.seconds for r in runs["PEFT"])
    print(f"\n{title} ({load()})")
    print(f"{'':24}{'median s':>10}{'all s':>24}{'CPU s':>8}{'peak anonymous':>16}{'PEFT / this':>13}")
    for name, done in runs.items():
        median = statistics.median(r.seconds for r in done)
        every = " ".join(f"{r.seconds:.2f}" for r in done)
        memory = f"{max(r.anonymous_mb for r in done):.0f} MB"
        cpu = statistics.median(r.cpu for r in done)
        print(f"{name:24}{median:10.2f}{every:>24}{cpu:8.1f}{memory:>16}{peft / median:12.1f}x", flush=True)
    sample = tuple(dict.fromkeys((0, layers // 2, layers - 1)))
    for name, key in (("PEFT", "peft"), ("vera-tools merge", "vera-tools")):
        share = off_share(base, adapter, outs[key], targets, layers=sample)
        print(f"{name}: {share:.1e} of the elements are not the correctly rounded float64 result")
        shutil.rmtree(outs[key])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--larger", action="store_true")
    parser.add_argument("--folder", type=Path, help="a disk with room for three times the base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_base(folder / "base", layers=options.layers)
        for title, targets in TARGETS.items():
            compare(folder, title, targets, layers=options.layers, repeats=options.repeats)
        if options.larger:
            shutil.rmtree(folder / "base")
            layers = 4 * options.layers
            base = write_base(folder / "base", layers=layers)
            size = sum(path.stat().st_size for path in base.iterdir()) / 1e9
            for number, (title, targets) in enumerate(TARGETS.items()):
                adapter = write_adapter(folder / f"larger-{number}", targets, layers=layers)
                done = run(ours(base, adapter, folder / "out"))
                shutil.rmtree(folder / "out")
                print(f"\n{size:.1f} GB, {title}: {done.seconds:.1f} s, peak anonymous {done.anonymous_mb:.0f} MB")


if __name__ == "__main__":
    main()
