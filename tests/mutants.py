"""Change the code in one place at a time, and see whether a test fails: the mutation score, of a sample.

    pip install coverage cosmic-ray
    python -m tests.mutants                                  # 60 changes of each subject, drawn with seed 0
    python -m tests.mutants rounding --sample 25 --seed 5

The changes are cosmic-ray's: another operator, comparison, number or truth value, a condition turned round, a loop that
does not run, a decorator left out, an exception that is not caught. First a place is drawn, then one of its changes. It
is made in a copy of the working tree. Of the subject's tests those that ran the changed lines are asked first, then all
others, until one fails. A change that none notices is printed as the line before and after. Some of them change nothing
that can be noticed: those are read, and not counted away. Half an hour or more goes by for each subject; with --quick
it is a third of that, and some of what is printed would be noticed by others.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests import ROOT


class Subject(NamedTuple):
    """Which code is changed, and which tests must notice."""

    code: tuple[str, ...]
    tests: tuple[str, ...]


SUBJECTS = {
    "projections": Subject(("projections/*.py",), ("tests/projections",)),
    "files": Subject(
        ("files/*.py",), ("tests/files", "tests/hub", "tests/converting/test_in_place.py", "tests/test_links.py")
    ),
    "verifying": Subject(("verifying/*.py",), ("tests/verifying", "tests/cli/test_verify.py")),
    "rounding": Subject(
        tuple(f"merging/{name}.py" for name in ("arithmetic", "exact", "rounding", "values", "verification")),
        ("tests/merging",),
    ),
}
#: What the tests need of the working tree beside the code.
COPIED = ("vera_tools", "tests", "fuzz", "schemas", "docs", "examples", "pyproject.toml")
LINKED = ("fixtures", "benchmarks", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "action.yml")


class Change(NamedTuple):
    """One place of one file, and the file's text as it would be.

    Attributes:
        file: By its path in the tree.
        line: Where the place begins.
        lines: Those of the statement that it belongs to, where that runs when a function is called; else none.
        source: The text with the change.
    """

    file: str
    line: int
    lines: range
    source: str

    def __str__(self) -> str:
        before = (ROOT / self.file).read_text("utf-8").splitlines()
        _, _, *shown = difflib.unified_diff(before, self.source.splitlines(), n=0, lineterm="")
        return "\n    ".join([f"{self.file}:{self.line}", *(line for line in shown if line[0] in "-+")])


class _Code:
    """A file, and each of its places with the operators that change it, and which of an operator's places it is."""

    def __init__(self, file: str) -> None:
        from cosmic_ray.ast import ast_nodes, get_ast
        from cosmic_ray.plugins import get_operator, operator_names

        self.file, self.text = file, (ROOT / file).read_text("utf-8")
        self.tree, nodes = ast.parse(self.text), list(ast_nodes(get_ast(self.text)))
        self.places = defaultdict[tuple[int, int], list[tuple[Any, int]]](list)
        for operator in (get_operator(name) for name in operator_names()):
            if not operator.arguments():  # the others want to be told names of variables
                found = ((node, start) for node in nodes for start, _ in operator().mutation_positions(node))
                for number, (node, start) in enumerate(found):
                    if node.parent is None or node.parent.type != "parameters":  # the star alone, taken for a product
                        self.places[start].append((operator(), number))

    def changes(self, place: tuple[int, int], rng: random.Random) -> Iterator[Change]:
        """What can be made of a place, in any order: what Python reads, and not as the same."""
        from cosmic_ray.mutating import mutate_code

        for operator, number in rng.sample(self.places[place], len(self.places[place])):
            source = mutate_code(self.text, operator, number)
            with contextlib.suppress(SyntaxError), warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                if _meaning(ast.parse(source)) != _meaning(ast.parse(self.text)):
                    yield Change(self.file, place[0], lines_run(self.tree, place[0]), source)


def lines_run(tree: ast.Module, line: int) -> range:
    """The lines of the innermost statement around a line, up to those in it; none where it runs on import."""
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    bodies = (node for node in statements if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    if not any(body.body[0].lineno <= line <= (body.end_lineno or 0) for body in bodies):
        return range(0)
    starts = {min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]) for node in statements}
    next_one = min((start for start in starts if start > line), default=line + 1)
    return range(max(start for start in starts if start <= line), next_one)


def _meaning(tree: ast.Module) -> str:
    """The same for files that differ in annotations alone, which nothing here reads when it runs."""
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                setattr(node, name, ast.Constant(None))
    return ast.dump(tree)


def drawn(subject: Subject, count: int, rng: random.Random) -> list[Change]:
    """A sample of a subject's changes: first places are drawn, then one of the changes that can be made there."""
    files = sorted(file for pattern in subject.code for file in (ROOT / "vera_tools").glob(pattern))
    code = [_Code(file.relative_to(ROOT).as_posix()) for file in files]
    places = [(each, place) for each in code for place in sorted(each.places)]
    found = (next(each.changes(place, rng), None) for each, place in rng.sample(places, len(places)))
    return sorted(itertools.islice(filter(None, found), count), key=lambda change: change[:2])


def files_of_tests(subject: Subject) -> list[str]:
    """The files of a subject's tests, by their paths in the tree."""
    found = [
        path
        for name in subject.tests
        for path in (sorted((ROOT / name).glob("test_*.py")) if (ROOT / name).is_dir() else [ROOT / name])
    ]
    return [path.relative_to(ROOT).as_posix() for path in found]


def copy_tree(folder: Path) -> None:
    """A copy of the working tree in which the code can be changed."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
        else:
            shutil.copy2(source, folder / name)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    compiled = ["-m", "compileall", "-q", str(folder / "vera_tools"), str(folder / "tests")]
    subprocess.run([sys.executable, *compiled], check=True)


@contextlib.contextmanager
def made(change: Change) -> Iterator[None]:
    """Within the block the code is changed."""
    from cosmic_ray.util import restore_contents

    file = ROOT / change.file
    for cached in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        cached.unlink()  # it is told from the file by its size and its time in seconds
    with restore_contents(file):
        file.write_text(change.source, "utf-8")
        yield


def score(name: str, sample: int, seed: int, *, quick: bool) -> str:
    """Change what belongs to a subject, in this tree, and print what no test notices.

    Args:
        name: Of the subject.
        sample: How many changes.
        seed: Of the sample.
        quick: Ask only the tests that ran the lines themselves.

    Returns:
        A line with the score.
    """
    from tests.mutants_asked import Asker  # which needs what only Unix has

    subject, begun = SUBJECTS[name], time.monotonic()
    tests, asker = files_of_tests(subject), Asker()
    known = asker.learn(tests)
    usual, noticed = time.monotonic() - begun, 0
    print(f"{name}: {len(known.seconds)} tests, {usual:.0f} s", flush=True)
    changes = drawn(subject, sample, random.Random(f"{name} {seed}"))
    for change in changes:
        names = known.concerned(change.file, change.lines, here=quick)
        with made(change):
            if names and not asker.passes(names, known):
                noticed += 1
                continue
        print(f"{change}\n", flush=True)
    took = time.monotonic() - begun
    return f"{name}: {noticed} of {len(changes)} changes are noticed (seed {seed}, {took:.0f} s)"


def main() -> int:
    """Draw, change, test, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="what is changed (default: each)")
    parser.add_argument("--sample", type=int, default=60, help="changes of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="ask only the tests that ran the changed lines")
    parser.add_argument("--here", action="store_true", help="change the working tree itself, not a copy of it")
    options = parser.parse_args()
    if options.here:
        for name in options.subjects or SUBJECTS:
            print(score(name, options.sample, options.seed, quick=options.quick), flush=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="vera-tools-mutants-") as folder:
        copy_tree(Path(folder))
        environment = {**os.environ, "PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "tests.mutants", "--here", *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
