"""`vera-tools verify -R` over registries: adapters a second and peak memory, against reading the same bytes.

    python benchmarks/registry.py [--sizes 100 1000 10000]

Makes its own adapters in a temporary folder: r 64, 1024 x 1024, 48 layers, with manifests, of 10 distinct pairs, a
tenth with the pair stored (which is read and compared bit by bit), one in a hundred cut off.
"""

from __future__ import annotations

import argparse
import shutil
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


def make(folder: Path, size: int) -> None:
    pairs = [digests(Recipe(prng_key=key), PairShape(64, 1024, 1024)) for key in range(10)]
    for n in range(size):
        place = folder / f"{n // 100:03}" / f"{n:05}"
        adapter(place, r=64, width=1024, layers=48, key=n % 10, seed=n, stored=n % 10 == 3, pair=pairs[n % 10])
        if n % 100 == 50:
            weights = place / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1])


def show(name: str, size: int, found: Run) -> None:
    print(
        f"{size:6,} adapters  {name:34} {found.seconds:7.2f} s  {size / found.seconds:6.0f}/s  {found.peak_mb:4.0f} MB"
    )


def halves(folder: Path, size: int) -> None:
    """Two processes of one job each, side by side: as good as two jobs can get."""
    roots = sorted(folder.iterdir())
    command = [*PYTHON, "-m", "vera_tools", "verify", "-R", "-q", "--jobs", "1"]
    whole = (
        "import subprocess, sys\n"
        "half = (len(sys.argv) - 1) // 2\n"
        f"for run in [subprocess.Popen({command!r} + part) for part in (sys.argv[1:1 + half], sys.argv[1 + half:])]:\n"
        "    run.wait()\n"
    )
    show("two of --jobs 1, on halves", size, run([*PYTHON, "-c", whole, *map(str, roots)]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10000])
    for size in parser.parse_args().sizes:
        folder = Path(tempfile.mkdtemp(prefix="vera-tools-benchmark-"))
        try:
            print(load())
            make(folder / "r", size)
            subprocess.run([sys.executable, "-c", READ, folder / "r"], check=True)  # so that all is in memory
            show("sha256 of the bytes alone", size, run([*PYTHON, "-c", READ, str(folder / "r")]))
            verify = [*PYTHON, "-m", "vera_tools", "verify", "-R", "-q", str(folder / "r")]
            expect = 4 if size > 50 else 0
            show("--jobs 1", size, run([*verify, "--jobs", "1"], expect=expect))
            show("--jobs 2", size, run([*verify, "--jobs", "2"], expect=expect))
            if size > 100:
                halves(folder / "r", size)
            log = [*verify, "--jobs", "2", "--log", str(folder / "log")]
            show("--jobs 2 --log", size, run(log, expect=expect))
            show("--jobs 2 --log, taken up again", size, run(log, expect=expect))
            print(f"a line of the log is {(folder / 'log').stat().st_size / size / 1000:.1f} kB")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
