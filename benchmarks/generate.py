"""The reference generator against torch's own CPU `uniform_`, one thread each, in turn in one process.

    python benchmarks/generate.py

Prints million elements a second, the median of several rounds, for the sizes of real adapters.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from processes import load

from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import bound, generate
from vera_tools.projections.recipe import Recipe

SHAPES = {
    "1024 x 1024, r 256": (256, 1024, 1024),
    "4096 x 4096, r 256": (256, 4096, 4096),
    "11008, r 256": (256, 11008, 11008),
}


def torch_draw(key: int, shape: PairShape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(key)
    limits = {size: bound(size[1]) for size in (shape.vera_A, shape.vera_B)}
    a, b = (torch.empty(size).uniform_(-limit, limit, generator=generator) for size, limit in limits.items())
    return a, b


def main() -> None:
    torch.set_num_threads(1)
    print(f"float32, one thread; {load()}")
    print(f"{'pair':22} {'torch':>8} {'reference':>10} {'ratio':>6}   million elements a second")
    for label, (r, in_max, out_max) in SHAPES.items():
        shape, recipe = PairShape(r, in_max, out_max), Recipe(prng_key=42)
        times: dict[str, list[float]] = {"torch": [], "reference": []}
        for _ in range(9):
            start = time.perf_counter()
            theirs = torch_draw(42, shape)
            middle = time.perf_counter()
            ours = generate(recipe, shape)
            end = time.perf_counter()
            times["torch"].append(middle - start)
            times["reference"].append(end - middle)
        same = all(np.array_equal(x.numpy(), y) for x, y in zip(theirs, ours, strict=True))
        speed = {name: shape.elements / statistics.median(t) / 1e6 for name, t in times.items()}
        ratio = speed["reference"] / speed["torch"]
        note = "" if same else "   (this torch rounds separately: other bits)"
        print(f"{label:22} {speed['torch']:8.0f} {speed['reference']:10.0f} {ratio:6.2f}{note}")


if __name__ == "__main__":
    main()
