"""`vera-tools verify -R` over registries: adapters a second and peak memory, against reading the same bytes.

    python benchmarks/registry.py [--sizes 100 1000 10000] [--seed-only] [--turns 5]

Makes its own adapters in a temporary folder: r 64, 1024 x 1024, 48 layers, with manifests, of 10 distinct pairs, a
tenth with the pair stored (which is read and compared bit by bit), one in a hundred cut off; or all of them seed-only
and sound. Of several turns the figures are the median times and the largest memory of the process that was called.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import PYTHON, Run, load, run
from verify import adapter

from vera_tools.projections.pair import PairShape
from vera_tools.projections.prng import digests
from vera_tools.projections.recipe import Recipe

READ = """
import hashlib, sys
from pathlib import Path
for path in Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        hashlib.sha256(path.read_bytes()).digest()
"""


def make(folder: Path, size: int, *, seed_only: bool) -> None:
    pairs = [digests(Recipe(prng_key=key), PairShape(64, 1024, 1024)) for key in range(10)]
    for n in range(size):
        place = folder / f"{n // 100:03}" / f"{n:05}"
        stored = n % 10 == 3 and not seed_only
        adapter(place, r=64, width=1024, layers=48, key=n % 10, seed=n, stored=stored, pair=pairs[n % 10])
        if n % 100 == 50 and not seed_only:
            weights = place / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])


def show(name: str, size: int, found: Run) -> None:
    print(
        f"{size:6,} adapters  {name:34} {found.seconds:7.2f} s  {size / found.seconds:6.0f}/s  {found.peak_mb:4.0f} MB"
    )


def halves(folder: Path) -> list[str]:
    """Two processes of one job each, side by side: as good as two jobs can get."""
    roots = sorted(folder.iterdir())
    command = [*PYTHON, "-m", "vera_tools", "verify", "-R", "-q", "--jobs", "1"]
    whole = (
        "import subprocess, sys\n"
        "half = (len(sys.argv) - 1) // 2\n"
        f"for run in [subprocess.Popen({command!r} + part) for part in (sys.argv[1:1 + half], sys.argv[1 + half:])]:\n"
        "    run.wait()\n"
    )
    return [*PYTHON, "-c", whole, *map(str, roots)]


def measure(folder: Path, size: int, *, code: int, turns: int) -> None:
    registry, log = folder / "r", folder / "log"
    verify = [*PYTHON, "-m", "vera_tools", "verify", "-R", "-q", str(registry)]
    logged = [*verify, "--jobs", "2", "--log", str(log)]
    commands = {
        "sha256 of the bytes alone": ([*PYTHON, "-c", READ, str(registry)], 0),
        "--jobs 1": ([*verify, "--jobs", "1"], code),
        "--jobs 2": ([*verify, "--jobs", "2"], code),
        "two of --jobs 1, on halves": (halves(registry), 0),
        "--jobs 2 --log": (logged, code),
        "--jobs 2 --log, taken up again": (logged, code),
    }
    if size <= 100:
        del commands["two of --jobs 1, on halves"]
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(turns):
        log.unlink(missing_ok=True)
        for name, (command, expect) in commands.items():
            found[name].append(run(command, expect=expect))
    for name, runs in found.items():
        show(name, size, Run(statistics.median(one.seconds for one in runs), max(one.peak_mb for one in runs)))
    print(f"a line of the log is {log.stat().st_size / size / 1000:.1f} kB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--seed-only", action="store_true")
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    for size in options.sizes:
        folder = Path(tempfile.mkdtemp(prefix="vera-tools-benchmark-"))
        try:
            make(folder / "r", size, seed_only=options.seed_only)
            subprocess.run([sys.executable, "-c", READ, folder / "r"], check=True)  # so that all is in memory
            print(load())
            broken = size > 50 and not options.seed_only
            measure(folder, size, code=4 if broken else 0, turns=options.turns)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
