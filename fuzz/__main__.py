"""`python -m fuzz`: run the targets on made inputs, guided by coverage where atheris is installed.

It ends with 1 at the first input that brings up what must not happen, and keeps that input.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import random
import sys
import time
import traceback
from pathlib import Path

FOUND = Path(__file__).parent / "found"


def main() -> int:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000, help="inputs to try")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same inputs again")
    parser.add_argument("--corpus", type=Path, help="a folder in which atheris keeps inputs that reach new code")
    parser.add_argument("--plain", action="store_true", help="do without atheris")
    parser.add_argument("--keep-going", action="store_true", help="without atheris: go on after a finding")
    parser.add_argument("inputs", nargs="*", type=Path, help="run these files alone")
    options = parser.parse_args()
    if not options.plain and not options.inputs:
        try:
            import atheris
        except ImportError:
            print("atheris is not installed: inputs are made at random")
        else:
            return _guided(atheris, options)
    return _plain(options)


def _plain(options: argparse.Namespace) -> int:
    from fuzz import oracle, targets

    oracle.prepare()
    begun, counts, bad = time.monotonic(), collections.Counter[str](), dict[str, int]()
    for data in [path.read_bytes() for path in options.inputs] or _made(options, targets.seeds()):
        try:
            counts[targets.run(data)] += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}"
            if key not in bad:
                print("".join(traceback.format_exception(error)), _kept(data), file=sys.stderr, flush=True)
            bad[key] = bad.get(key, 0) + 1
            if not options.keep_going:
                return 1
    total = sum(counts.values())
    shares = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"{shares}; {total} inputs in {time.monotonic() - begun:.0f} s, {sum(bad.values())} findings {bad or ''}")
    return 1 if bad else 0


def _made(options: argparse.Namespace, seeds: list[bytes]):  # type: ignore[no-untyped-def]
    rng = random.Random(options.seed)
    yield from seeds[: options.runs]
    for _ in range(options.runs - len(seeds)):
        yield bytes([rng.randrange(256)]) + rng.randbytes(rng.choice((4, 12, 24, 48)))


def _guided(atheris, options: argparse.Namespace) -> int:  # type: ignore[no-untyped-def]
    with atheris.instrument_imports(include=["vera_tools"]):
        from fuzz import oracle, targets

    oracle.prepare()
    corpus = options.corpus or FOUND.parent / "corpus"
    corpus.mkdir(exist_ok=True, parents=True)
    for seed in targets.seeds():
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    FOUND.mkdir(exist_ok=True)

    def one(data: bytes) -> None:
        try:
            targets.run(data)
        except Exception:
            print(_kept(data), file=sys.stderr)
            raise

    arguments = [sys.argv[0], f"-runs={options.runs}", f"-seed={options.seed + 1}", "-max_len=96", "-len_control=0"]
    atheris.Setup([*arguments, "-timeout=60", "-rss_limit_mb=3000", "-print_final_stats=1", str(corpus)], one)
    atheris.Fuzz()  # it ends the process itself
    return 0


def _kept(data: bytes) -> str:
    FOUND.mkdir(exist_ok=True)
    path = FOUND / hashlib.sha1(data, usedforsecurity=False).hexdigest()[:16]
    path.write_bytes(data)
    return f"kept as {path}"


if __name__ == "__main__":
    sys.exit(main())
