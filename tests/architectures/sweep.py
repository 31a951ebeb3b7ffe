"""Every class of transformers that can be built tiny, each with adapters of PEFT's, through verify, merge and convert.

    python -m tests.architectures.sweep --out sweep.jsonl             # all, an hour on one core; goes on where it was
    python -m tests.architectures.sweep --out s.jsonl --only '^Bert'  # some
    python -m tests.architectures.sweep --out sweep.jsonl --table     # and write what docs/architectures.md shows

A line of JSON for each class goes into the file as it is done. Each class has a process of its own, forked from one
that has imported torch and transformers, with a limit of time and memory.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import multiprocessing
import re
import resource
import sys
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.architectures import judging
from vera_tools.architectures import data

SECONDS = 600
#: What a class is called that has most: it comes before the others of its model type.
HEADS = ("ConditionalGeneration", "LMHeadModel", "MaskedLM", "CausalLM", "PreTraining", "Classification")
#: Bytes of address space that a process may take beyond what torch and transformers have.
MEMORY = 6 * 2**30


def main(arguments: list[str]) -> int:
    """Run what is not in the file yet, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="classes whose names match")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="JSON lines; what it holds is not run again"
    )
    parser.add_argument("--again", default="", metavar="REGEX", help="run classes again that have such an outcome")
    parser.add_argument("--table", action="store_true", help="write the table that docs/architectures.md shows, too")
    options = parser.parse_args(arguments)
    judging.quiet()
    done = read(options.out)
    if options.again:
        done = {name: one for name, one in done.items() if not _matches(one, options.again, options.only)}
    names = [name for name in ordered() if re.search(options.only, name) and name not in done]
    if options.again and options.out.exists():
        options.out.write_text("".join(json.dumps(one) + "\n" for one in done.values()), "utf-8")
    with options.out.open("a", encoding="utf-8") as file:
        for number, document in enumerate(run(names, options.jobs), 1):
            file.write(json.dumps(document) + "\n")
            file.flush()
            print(f"{number}/{len(names)} {_summary(document)}", flush=True)
    documents = [one for name, one in read(options.out).items() if re.search(options.only, name)]
    print(counts(documents))
    if options.table:
        from tests.architectures import table

        table.write(documents)
    return 0


def ordered() -> list[str]:
    """All classes, one of each model type first, so that a run that is cut short has seen all families."""
    places: dict[str, list[str]] = collections.defaultdict(list)
    for name, known in sorted(data.tables()["classes"].items(), key=lambda item: (_last(item[0]), item[0])):
        places[known["model_type"]].append(name)
    ranked = sorted((number, name) for names in places.values() for number, name in enumerate(names))
    return [name for _, name in ranked]


def _last(name: str) -> int:
    return next((number for number, head in enumerate(HEADS) if name.endswith(head)), len(HEADS))


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What a file of JSON lines holds, by class."""
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").splitlines()
    return {document["class"]: document for document in map(json.loads, filter(None, lines))}


def run(names: list[str], jobs: int) -> Any:
    """Judge classes in processes of their own; a document for each, in the order in which they are done."""
    if names:
        judging.judged("BertForMaskedLM", lambda pair: None)  # what is imported on first use is then there for all
        gc.freeze()
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(names))
    running: dict[Connection, tuple[str, BaseProcess, float, dict[str, Any]]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, sender), daemon=True)
            process.start()
            sender.close()
            document = {"class": name, "pairs": [], "why": "the process ended"}
            running[receiver] = (name, process, time.monotonic(), document)
        ready = wait(list(running), timeout=1.0)
        for receiver, (_, process, started, document) in list(running.items()):
            over = time.monotonic() - started > SECONDS
            if receiver in ready:
                try:
                    kind, value = receiver.recv()
                except EOFError:
                    kind, value = "end", document["why"]
                if kind == "pair":
                    document["pairs"].append(value)
                    continue
                document["why"] = value
            elif not over:
                continue
            else:
                document["why"] = f"not done after {SECONDS} s"
                process.kill()
            process.join()
            document["seconds"] = round(time.monotonic() - started, 1)
            receiver.close()
            del running[receiver]
            yield document


def _work(name: str, sender: Connection) -> None:
    with open("/proc/self/statm", encoding="ascii") as statm:
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    try:
        why = judging.judged(name, lambda pair: sender.send(("pair", pair.to_dict())))
    except MemoryError:
        why = "out of memory"
    except Exception as error:
        why = f"the sweep itself fails: {type(error).__name__}: {error}"
    sender.send(("end", why))


def _matches(document: dict[str, Any], outcomes: str, only: str) -> bool:
    found = [pair["outcome"] for pair in document["pairs"]] or ["none"]
    return bool(re.search(only, document["class"])) and any(re.search(outcomes, outcome) for outcome in found)


def _summary(document: dict[str, Any]) -> str:
    found = collections.Counter(pair["outcome"] for pair in document["pairs"])
    text = ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
    bad = [pair for pair in document["pairs"] if pair["outcome"] not in (judging.RIGHT, judging.PEFT_OFF)][:1]
    why = "".join(f" | {p['adapter']}/{p['base']}/{p['command']} {p['outcome']}: {p['reason'][:160]}" for p in bad)
    return f"{document['class']} {document['seconds']} s: {text or document['why'][:160]}{why}"


def counts(documents: list[dict[str, Any]]) -> str:
    """A table of outcomes: adapter, form of the base and command; and how many classes have nothing to compare."""
    tally: dict[tuple[str, str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    untested: collections.Counter[str] = collections.Counter()
    for document in documents:
        for pair in document["pairs"]:
            good = pair["peft"] == judging.RIGHT or pair["outcome"] in (judging.WRONG, judging.BADLY, judging.CRASH)
            outcome = pair["outcome"] if good else judging.PEFT_OFF
            tally[pair["adapter"], pair["base"], pair["command"]][outcome] += 1
        if not document["pairs"]:
            untested[document["why"].partition(":")[0]] += 1
    lines = [f"{len(documents)} classes, of which without a pair: {sum(untested.values())} {dict(untested)}"]
    for key, found in sorted(tally.items()):
        lines.append(
            f"  {'/'.join(key):24} " + ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
