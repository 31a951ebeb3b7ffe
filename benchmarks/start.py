"""What completion costs before it says anything, beside `import click`: processor time of whole processes, in ms.

    python benchmarks/start.py [--repeats 15]

A completion should start within 60 ms of `python -c "import click"`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

WORDS = (
    "vera-tools ver",
    "vera-tools verify my-ad",
    "vera-tools merge --base my-ad",
    "vera-tools drift --checkpoint my",
)


def milliseconds(command: list[str], **variables: str) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env={**os.environ, **variables}, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    rows: dict[str, list[float]] = {"import click": [], **{words: [] for words in WORDS}}
    for _ in range(repeats):  # in turn, so that what disturbs the machine disturbs all
        rows["import click"].append(milliseconds([sys.executable, "-c", "import click"]))
        for words in WORDS:
            count = str(len(words.split()) - 1)
            variables = {"_VERA_TOOLS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
            rows[words].append(milliseconds([sys.executable, "-m", "vera_tools"], **variables))
    least = statistics.median(rows["import click"])
    for name, values in rows.items():
        middle = statistics.median(values)
        print(f"{name:34} {min(values):6.0f} {middle:6.0f} {max(values):6.0f}   {middle - least:+.0f}")


if __name__ == "__main__":
    main()
