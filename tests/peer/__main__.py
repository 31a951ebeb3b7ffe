"""PEFT's own tests about VeRA, on PEFT and on `VeraModel`.

    python -m tests.peer                    # all
    python -m tests.peer --fast             # a selection, in half a minute
    python -m tests.peer --folder FOLDER    # keep what is fetched and made there, and use it again

It exits 1 where a test that PEFT passes does not pass on ours and is not listed in differences.toml, and where one that
is listed does.
"""

from __future__ import annotations

import argparse
import collections
import functools
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.peer import comparison, models, suite


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        tests, hub = suite.fetch(folder), folder / "hub"
        if not arguments.fast:
            models.make(hub)
        with ThreadPoolExecutor() as pool:
            run = functools.partial(suite.run, tests, hub, fast=arguments.fast)
            peft, ours = pool.map(lambda ours: run(ours=ours), (False, True))
        passed = [name for name, outcome in peft.items() if outcome["outcome"] == "passed"]
    differences = comparison.known(Path(__file__).with_name("differences.toml"))
    problems = comparison.compare(peft, ours, differences, whole=not arguments.fast)
    print(*problems, sep="\n", end="\n" if problems else "")
    kinds = collections.Counter(differences[name].kind for name in passed if name in differences)
    print(f"PEFT passes {len(passed)}; ours does something else in {sum(kinds.values())}: {dict(kinds)}")
    equal = sum(ours.get(name, {}).get("outcome") == "passed" for name in passed)
    print(f"{equal} passed, {len(problems)} failed")
    return bool(problems)


if __name__ == "__main__":
    raise SystemExit(main())
