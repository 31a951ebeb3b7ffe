"""`vera-tools verify` as a whole process, against what `import peft` alone takes; and a registry of 1,000 adapters.

    python benchmarks/verify.py

Makes its own adapters in a temporary folder: one of 25 MB (r 256, 11008 x 11008, 64 layers), and 1,000 seed-only
ones with manifests that share one projection pair (r 64, 1024 x 1024, 48 layers).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from processes import PYTHON, load, paired, run

from vera_tools.checkpoints.config import VeraConfig
from vera_tools.checkpoints.manifest import ProjectionRecord
from vera_tools.checkpoints.writing import write_checkpoint
from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import digests, generate
from vera_tools.projections.recipe import Recipe


def adapter(
    folder: Path, *, r: int, width: int, layers: int, key: int, seed: int, stored: bool, pair: dict[str, str]
) -> None:
    rng = np.random.default_rng(seed)
    shape, recipe = PairShape(r, width, width), Recipe(prng_key=key)
    tensors = {}
    for n in range(layers):
        prefix = f"base_model.model.model.layers.{n}.self_attn.q_proj.vera_lambda_"
        tensors[prefix + "b"] = rng.normal(size=width).astype(np.float32)
        tensors[prefix + "d"] = rng.normal(size=r).astype(np.float32)
    if stored:
        tensors["base_model.vera_A"], tensors["base_model.vera_B"] = generate(recipe, shape)
    config = VeraConfig(r=r, target_modules=["q_proj"], projection_prng_key=key, save_projection=stored)
    folder.mkdir(parents=True)
    write_checkpoint(folder, config, tensors, ProjectionRecord(recipe, "stored", shape, "float32", pair))


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="vera-tools-benchmark-"))
    try:
        print(load())
        one_adapter(folder)
        registry(folder)
    finally:
        shutil.rmtree(folder)


def one_adapter(folder: Path) -> None:
    pair = digests(Recipe(prng_key=7), PairShape(256, 11008, 11008))
    adapter(folder / "large", r=256, width=11008, layers=64, key=7, seed=0, stored=True, pair=pair)
    size = (folder / "large" / "adapter_model.safetensors").stat().st_size / 1e6
    commands = {
        "import peft": [*PYTHON, "-c", "import peft"],
        "verify": [*PYTHON, "-m", "vera_tools", "verify", str(folder / "large")],
    }
    runs = paired(commands)
    for name, result in runs.items():
        print(f"{name:14} {result.seconds:6.2f} s  {result.peak_mb:5.0f} MB peak")
    share = runs["verify"].seconds / runs["import peft"].seconds
    print(f"verify of one adapter of {size:.0f} MB takes {share:.1%} of `import peft`")


def registry(folder: Path) -> None:
    pair = digests(Recipe(prng_key=9), PairShape(64, 1024, 1024))
    for n in range(1000):
        place = folder / ("first" if n < 100 else "rest") / f"adapter-{n}"
        adapter(place, r=64, width=1024, layers=48, key=9, seed=n, stored=False, pair=pair)
    for jobs in (1, 2):
        command = [*PYTHON, "-m", "vera_tools", "verify", "-R", "-q", "--jobs", str(jobs)]
        few = run([*command, str(folder / "first")])
        all_ = run([*command, str(folder / "first"), str(folder / "rest")])
        rate = 1000 / all_.seconds
        print(
            f"1,000 seed-only adapters, --jobs {jobs}: {all_.seconds:5.2f} s, {rate:4.0f} a second, "
            f"{all_.peak_mb:.0f} MB peak (100 adapters: {few.peak_mb:.0f} MB)"
        )


if __name__ == "__main__":
    main()
