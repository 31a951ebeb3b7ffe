"""Change the code in one place at a time, and see whether a test fails: the mutation score, of a sample.

    pip install coverage
    python -m tests.mutants                                  # 60 changes of each subject, drawn with seed 0
    python -m tests.mutants rounding --sample 25 --seed 5

A change turns one operator, constant, condition or statement into another: ``<`` into ``<=``, ``and`` into ``or``,
``n`` into ``n + 1``, a ``raise`` or a call into nothing. It is made in a copy of the working tree. Of the tests that
concern it those that ran the changed lines are asked first, then all that start processes, until one fails. A change
that none notices is printed as the line before and after. Some of them change nothing that can be noticed: those are
read, and not counted away.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
        tuple(f"tests/merging/test_{name}.py" for name in ("rounding", "values", "merge", "interrupted")),
    ),
}
#: What the tests need of the working tree beside the code.
COPIED = ("vera_tools", "tests", "fuzz", "schemas", "docs", "examples", "pyproject.toml")
LINKED = ("fixtures", "benchmarks", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt", "action.yml")

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult, ast.Mod: ast.Add,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip


class Change(NamedTuple):
    """One place of one file, with what stands there and what would."""

    file: Path
    line: int
    last_line: int
    before: str
    after: str
    source: str

    @property
    def lines(self) -> range:
        """Those that what stands there takes."""
        return range(self.line, self.last_line + 1)


class _Changer(ast.NodeTransformer):
    """Visits every place that can be changed in the same order, and changes one of them; with -1 it counts them."""

    def __init__(self, chosen: int) -> None:
        self.chosen, self.count = chosen, 0
        self.found: tuple[int, int, str, str] | None = None

    def _offer(self, node: ast.AST, new: ast.AST) -> ast.AST:
        self.count += 1
        if self.count - 1 != self.chosen:
            return node
        first = getattr(node, "lineno", 0)
        self.found = first, getattr(node, "end_lineno", first), ast.unparse(node), ast.unparse(new)
        return ast.copy_location(new, node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.ops[0]))
        if other is None:
            return node
        return self._offer(node, ast.Compare(node.left, [other(), *node.ops[1:]], node.comparators))

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        other = _OTHER.get(type(node.op))
        return self._offer(node, ast.BinOp(node.left, other(), node.right)) if other else node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, ast.BoolOp(_OTHER[type(node.op)](), node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        return self._offer(node, node.operand) if isinstance(node.op, ast.Not | ast.USub | ast.Invert) else node

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return node
        self.generic_visit(node)
        node.test = self._offer(node.test, ast.UnaryOp(ast.Not(), node.test))
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool):
            return self._offer(node, ast.Constant(not node.value))
        if isinstance(node.value, int | float):
            return self._offer(node, ast.Constant(node.value + 1))
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return self._offer(node, ast.Pass())  # and nothing inside it: it is a message

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if isinstance(node.value, ast.Constant):
            return node  # documentation
        self.generic_visit(node)
        return self._offer(node, ast.Pass()) if isinstance(node.value, ast.Call) else node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        if node.value is None or isinstance(node.value, ast.Constant):
            return node
        return self._offer(node, ast.Return(ast.Constant(None)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return node  # a message, mostly

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return node  # an annotation

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.body = [self.visit(statement) for statement in node.body]
        node.args = self.visit(node.args)
        return node


def drawn(subject: Subject, count: int, rng: random.Random) -> list[Change]:
    """A sample of a subject's changes."""
    code, places = ROOT / "vera_tools", list[tuple[Path, int]]()
    for file in sorted(file for pattern in subject.code for file in code.glob(pattern)):
        counter = _Changer(-1)
        counter.visit(ast.parse(file.read_text("utf-8")))
        places += [(file, number) for number in range(counter.count)]
    return [_change(*place) for place in sorted(rng.sample(places, min(count, len(places))))]


def _change(file: Path, number: int) -> Change:
    changer = _Changer(number)
    tree = ast.fix_missing_locations(changer.visit(ast.parse(file.read_text("utf-8"))))
    assert changer.found is not None
    return Change(file, *changer.found, source=ast.unparse(tree))


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
    text = change.file.read_bytes()
    for cached in (change.file.parent / "__pycache__").glob(f"{change.file.stem}.*"):
        cached.unlink()  # it is told from the file by its size and its time in seconds
    change.file.write_text(change.source, "utf-8")
    try:
        yield
    finally:
        change.file.write_bytes(text)


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
        file = change.file.relative_to(ROOT).as_posix()
        names = known.concerned(file, change.lines, here=quick)
        with made(change):
            if names and not asker.passes(names, within=10 + 10 * usual):
                noticed += 1
                continue
        print(f"{file}:{change.line}: no test fails where\n    {change.before}\nis\n    {change.after}", flush=True)
    took = time.monotonic() - begun
    return f"{name}: {noticed} of {len(changes)} changes are noticed (seed {seed}, {took:.0f} s)"


def main() -> int:
    """Draw, change, test, report."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("subjects", nargs="*", choices=[*SUBJECTS, []], help="what is changed (default: each)")
    parser.add_argument("--sample", type=int, default=60, help="changes of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="do not ask the tests that start processes")
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
