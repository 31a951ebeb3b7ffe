"""Sizes, times and peak memory of the conversions, on an adapter as large as a 7B model's.

    python benchmarks/conversion.py --folder /tmp/bench

Makes a checkpoint of random vectors over the projections that PEFT would draw (Llama-2-7B's shapes: 32 layers, hidden
size 4096, intermediate size 11008), strips it, embeds it again, compares the bytes, writes the LoRA, and diffs. Each
command runs in a process of its own; its peak memory is the kernel's figure (VmHWM), and so is that of `--version`, the
interpreter alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vera_tools import __version__
from vera_tools.files.safetensors import save
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import generate
from vera_tools.projections.recipe import Recipe

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32
# Name: in_features, out_features.
MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
TARGETS = {"q,v": ("self_attn.q_proj", "self_attn.v_proj"), "all-linear": tuple(MODULES)}


def make_checkpoint(folder: Path, *, r: int, targets: tuple[str, ...], base: Path) -> None:
    """A checkpoint in PEFT's form, and the header-only outline of its base (a sparse file of zeros)."""
    shape = PairShape(r, max(MODULES[name][0] for name in targets), max(MODULES[name][1] for name in targets))
    vera_A, vera_B = generate(Recipe(prng_key=42), shape)
    rng = np.random.default_rng(0)
    tensors = {"base_model.vera_A": vera_A, "base_model.vera_B": vera_B}
    for layer in range(LAYERS):
        for name in targets:
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.vera_lambda_b"] = rng.normal(0, 1e-2, MODULES[name][1]).astype(np.float32)
            tensors[f"{prefix}.vera_lambda_d"] = rng.normal(0.1, 1e-2, r).astype(np.float32)
    folder.mkdir(parents=True)
    save(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "base_model_name_or_path": "meta-llama/Llama-2-7b-hf",
        "bias": "none",
        "peft_type": "VERA",
        "projection_prng_key": 42,
        "r": r,
        "save_projection": True,
        "target_modules": [name.rpartition(".")[2] for name in targets],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    header, position = {}, 0
    for layer in range(LAYERS):
        for name, (columns, rows) in MODULES.items():
            entry = {
                "dtype": "F16",
                "shape": [rows, columns],
                "data_offsets": [position, position + 2 * rows * columns],
            }
            header[f"model.layers.{layer}.{name}.weight"] = entry
            position = entry["data_offsets"][1]
    text = json.dumps(header).encode()
    base.mkdir()
    with (base / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + position)


# ru_maxrss would not do: it is inherited from the parent, which has held whole adapters.
_PROGRAM = """
import atexit, sys
from vera_tools.cli import main
def report():
    with open("/proc/self/status") as status:
        sys.stderr.write("".join(line for line in status if line.startswith("VmHWM")))
atexit.register(report)
main(sys.argv[1:])
"""


def measure(*arguments: object) -> tuple[float, int, int]:
    """Seconds, peak memory in bytes, and exit code of one command."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    peak = int(result.stderr.splitlines()[-1].split()[1]) * 1024
    return seconds, peak, result.returncode


def size(folder: Path) -> int:
    """Bytes of the weights file."""
    return (folder / "adapter_model.safetensors").stat().st_size


def run(folder: Path, *, r: int, name: str) -> list[str]:
    """One table row for each conversion."""
    source, base = folder / "vera", folder / "base"
    make_checkpoint(source, r=r, targets=TARGETS[name], base=base)
    out = {word: folder / word for word in ("stripped", "embedded", "lora")}
    commands = [
        ("strip-projections", (source, "-o", out["stripped"]), source, out["stripped"]),
        ("embed-projections", (out["stripped"], "-o", out["embedded"]), out["stripped"], out["embedded"]),
        ("convert --to lora", (source, "--to", "lora", "--base", base, "-o", out["lora"]), source, out["lora"]),
        ("diff (with stripped)", (source, out["stripped"]), source, None),
    ]
    alone = measure("--version")[1]
    rows = []
    for title, arguments, before, after in commands:
        seconds, peak, code = measure(title.split()[0], *arguments)
        assert code == (1 if title.startswith("diff") else 0), f"{title} failed with {code}"
        sizes = f"{size(before) / 1e6:.2f} -> {size(after) / 1e6:.2f}" if after else ""
        above = peak - alone
        rows.append(
            f"| {name}, r {r} | {title} | {sizes} | {seconds:.2f} | {peak / 1e6:.0f} | {above / size(source):.2f} |"
        )
    same = (source / "adapter_model.safetensors").read_bytes() == (
        out["embedded"] / "adapter_model.safetensors"
    ).read_bytes()
    assert same, "the original did not come back byte for byte"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to work (1 to 14 GB)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--targets", choices=TARGETS, nargs="+", default=list(TARGETS))
    options = parser.parse_args()
    alone = measure("--version")
    print(
        f"vera-tools {__version__}, Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, "
    )
    print(f"{os.cpu_count()} CPUs; the interpreter alone: {alone[1] / 1e6:.0f} MB, {alone[0]:.2f} s\n")
    print("| adapter | command | weights file, MB | seconds | peak, MB | (peak - interpreter) / adapter |")
    print("|---|---|---|---|---|---|")
    for name in options.targets:
        for r in options.ranks:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                for row in run(Path(folder), r=r, name=name):
                    print(row, flush=True)
                shutil.rmtree(Path(folder) / "lora")


if __name__ == "__main__":
    main()
